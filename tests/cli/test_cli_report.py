"""`report` on small models: from figures measured now, and from results measured before."""

from __future__ import annotations

import json
from pathlib import Path

from cli_cases import made, refused, run, tokenizer

__all__ = ["made", "tokenizer"]  # fixtures, for this file too
TEXT = ("--windows", "4", "--seq-len", "32")


def test_a_report_of_a_checkpoint_and_its_export(made: Path, tmp_path: Path) -> None:
    args = (made / "small", made / "onnx", "--reference", made / "uniform", *TEXT)
    assert run("report", *args, "-o", tmp_path / "report.html") == f"written: {tmp_path / 'report.html'}\n"
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((made / "onnx" / "manifest.json").read_text())
    for piece in (
        "4 non-overlapping windows of 32 tokens, 95% bootstrap over windows, of pydoc",
        "Bits of a weight by layer: small",
        "The gate of onnx: passed",
        "RTN(",
        "--quantize-method rtn",
        *(check["check"] for check in manifest["checks"]["checks"]),
    ):
        assert piece in text
    assert "overwrite" in refused("report", *args, "-o", tmp_path / "report.html")


def test_results_are_shown_and_not_measured_again(made: Path, tmp_path: Path) -> None:
    measured = run("eval", made / "small", "--reference", made / "uniform", *TEXT, "--json")
    (tmp_path / "divergence.json").write_text(measured)
    tasks = {"model": str(made / "small"), "metrics": {"piqa acc": {"value": 0.625, "low": 0.5, "high": 0.75}}}
    tasks["reference"] = {"model": str(made / "uniform"), "metrics": {"piqa acc": {"value": 0.6875}}}
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    results = ("--results", tmp_path / "divergence.json", "--results", tmp_path / "tasks.json")
    args = ("report", made / "small", "--reference", made / "uniform", *results)
    run(*args, "--data", "nothing/there", "-o", tmp_path / "report.html")  # the text is not opened
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    ratio = json.loads(measured)["reference"]["figures"]["perplexity_ratio"]["value"]
    assert f"{ratio:.4g}<small>" in text and "0.6875" in text and "0.625<small>[0.5, 0.75]" in text
    elsewhere = refused("report", made / "onnx", "--reference", made / "uniform", *results, output=tmp_path / "two")
    assert "model in" in elsewhere and "divergence.json" in elsewhere
