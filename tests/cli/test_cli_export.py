"""The commands export, verify, eval and generate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cli_cases import invoke, made, refused, run, tokenizer

from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer

__all__ = ["made", "tokenizer"]  # fixtures, for this file too


@pytest.mark.parametrize("model", ["mixed", "small", "onnx"])
def test_eval_json_is_all_there_is(made: Path, model: str) -> None:
    out = json.loads(run("eval", made / model, "--windows", "3", "--seq-len", "32", "--json"))
    assert set(out) == {"model", "data", "perplexity", "tokens", "protocol"}
    assert out["tokens"] == 3 * 31 and out["data"] == "pydoc" and "3 non-overlapping windows of 32" in out["protocol"]
    assert 1 < out["perplexity"] < 10000


def test_eval_of_an_export_agrees_with_its_graph(made: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(data.text("pydoc", "test")[:3000])
    args = ("--data", tmp_path / "text.txt", "--windows", "4", "--json")
    torch_side, ort_side = (json.loads(run("eval", made / model, *args)) for model in ("small", "onnx"))
    assert ort_side["perplexity"] == pytest.approx(torch_side["perplexity"], rel=0.01)
    assert torch_side["tokens"] == 4 * 63  # the context, where that is shorter than 2048


def test_eval_refuses_more_than_there_is(made: Path) -> None:
    assert "--seq-len" in refused("eval", made / "mixed", "--seq-len", "65")
    assert "pydoc" in refused("eval", made / "mixed", "--windows", "100000")


@pytest.mark.parametrize("model", ["mixed", "small", "onnx"])
def test_generate_streams_what_the_library_generates(made: Path, model: str, tokenizer: Tokenizer) -> None:
    code, out, err = invoke("generate", made / model, "The module", "--max-new-tokens", "12")
    assert code == 0 and "tokens" in err
    ids = torch.tensor(tokenizer.encode("The module"))
    if model != "onnx":
        new = checkpoint.load(made / model).module().generate(ids, 12).tolist()
        step = tokenizer.decode_stream()
        assert out == "".join(map(step, new)) + "\n"
    options = ("--max-new-tokens", "8", "--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", "3")
    assert run("generate", made / model, "The module", *options) == run(
        "generate", made / model, "The module", *options
    )


def test_generate_draws_as_generation_config_says(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "small", tmp_path / "model")
    contents = {"eos_token_id": 0, "do_sample": True, "temperature": 1.5, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(contents))
    ids = torch.tensor(checkpoint.load(folder).tokenizer.encode("The module"))
    with pytest.warns(UserWarning, match="num_beams"):
        new = checkpoint.load(folder).module().generate(ids, 8, seed=3).tolist()
        code, out, err = invoke("generate", folder, "The module", "--max-new-tokens", "8", "--seed", "3")
    step = checkpoint.load(folder).tokenizer.decode_stream()
    assert code == 0 and out == "".join(map(step, new)) + "\n"
    assert "as generation_config.json says: temperature 1.5, top k 50 (--temperature 0 is greedy)" in err
    (folder / "generation_config.json").write_text(json.dumps(contents | {"num_beams": 1}))
    greedy = run("generate", folder, "The module", "--max-new-tokens", "8", "--temperature", "0")
    assert greedy == run("generate", made / "small", "The module", "--max-new-tokens", "8")


def test_generate_stops_at_the_context(made: Path) -> None:
    _, _, err = invoke("generate", made / "mixed", "abc", "--max-new-tokens", "1000")
    assert int(err.split()[0]) < 64
    assert "context" in refused("generate", made / "mixed", "a b c d e f g h " * 20)
    assert "token ids" in refused("generate", made / "mixed", "")


def test_export_reports_its_checks(made: Path, tmp_path: Path) -> None:
    out = run("export", made / "mixed", "--dtype", "float32", "-o", tmp_path / "onnx")
    assert "prefill" in out and "decode" in out and "passed" in out and "onnxruntime >=" in out
    assert "prefill" not in run("export", tmp_path / "onnx", "--no-verify", "-o", tmp_path / "again")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--profile", "toaster"], "profile"),
        (["--dtype", "float8"], "dtype"),
        (["--accuracy-level", "9"], "accuracy_level"),
    ],
)
def test_export_refuses(made: Path, tmp_path: Path, flags: Sequence[str], word: str) -> None:
    assert word in refused("export", made / "mixed", *flags, output=tmp_path / "out")


def test_verify(made: Path) -> None:
    report = json.loads(run("verify", made / "onnx", "--json"))
    assert report["passed"] and {check["check"] for check in report["checks"]} >= {"files", "prefill", "decode", "kl"}
    assert "manifest.json" in refused("verify", made / "small")


def test_verify_finds_changed_weights(made: Path, tmp_path: Path) -> None:
    for path in (made / "onnx").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "model.onnx.data").read_bytes())
    raw[len(raw) // 2] ^= 255
    (tmp_path / "model.onnx.data").write_bytes(raw)
    code, out, err = invoke("verify", tmp_path, "--json")
    assert code == 1 and not json.loads(out)["passed"]
    assert err.startswith("error: ") and "files" in err


def test_an_export_that_fails_its_gate_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = import_module("tinycompress.export.gate.verify")
    from tinycompress.export import ORT

    check = verify.verify
    strict = {"limits": dict.fromkeys(ORT.limits, -1.0)}
    monkeypatch.setattr(verify, "verify", lambda folder, **options: check(folder, **options | strict))
    error = refused("export", made / "mixed", output=tmp_path / "out", code=1)
    assert "failed" in error and "prefill" in error and "limit" in error
