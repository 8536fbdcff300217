"""Input that ended in a traceback or in the wrong place: odd numbers, bytes that are no text, odd names of folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_cases import invoke, made, refused, run, tokenizer

__all__ = ["made", "tokenizer"]  # fixtures, for this file too

ROWS = 3000  # before the one that is no text: the types of a table's columns are guessed from its first rows


def test_a_late_row_that_is_no_text_is_named(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b c d e f g h"}\n' * ROWS + '{"text": 7}\n')
    said = refused("eval", made / "mixed", "--data", path, "--windows", "1", "--seq-len", "32")
    assert f"text in line {ROWS + 1} of {path}" in said


@pytest.mark.parametrize("flags", [("--top-p", "0"), ("--top-p", "1e-9")])
def test_the_smallest_share_leaves_the_first_token(made: Path, flags: Sequence[str]) -> None:
    greedy = run("generate", made / "mixed", "The", "--max-new-tokens", "4")
    assert run("generate", made / "mixed", "The", "--temperature", "1", *flags, "--max-new-tokens", "4") == greedy


def test_a_temperature_near_zero_is_greedy(made: Path) -> None:
    greedy = run("generate", made / "mixed", "The", "--max-new-tokens", "4")
    assert run("generate", made / "mixed", "The", "--temperature", "1e-40", "--max-new-tokens", "4") == greedy


def test_numbers_and_bytes_that_are_refused(made: Path, tmp_path: Path) -> None:
    seed = "99999999999999999999"
    assert f"seed: found {seed}" in refused("generate", made / "mixed", "hi", "--temperature", "1", "--seed", seed)
    assert "PROMPT: found '\\udcff'" in refused("generate", made / "mixed", "\udcff")
    folder = shutil.copytree(made / "mixed", tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja: found not UTF-8" in refused("inspect", folder)


def test_an_export_opens_from_a_folder_of_any_name(made: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "mödel 模型 'x'"
    run("export", made / "small", "-o", out, "--mobile", "--no-verify")
    assert invoke("verify", out)[0] == 0
    for name in (json.loads((out / "manifest.json").read_text())["model"], "model.ort"):
        assert onnxruntime.InferenceSession(out / name, providers=["CPUExecutionProvider"]).get_inputs()


@pytest.mark.parametrize("place", ["same", "inside", "around"])
def test_an_export_never_takes_the_place_of_its_model(made: Path, tmp_path: Path, place: str) -> None:
    model = shutil.copytree(made / "small", tmp_path / "outer" / "model")
    before = sorted(path.name for path in model.iterdir())
    out = {"same": model, "inside": model / "onnx", "around": tmp_path / "outer"}[place]
    code, _, error = invoke("export", model, "-o", out, "--overwrite", "--no-verify")
    assert code == 2 and "a place apart from MODEL" in error
    assert sorted(path.name for path in model.iterdir()) == before
