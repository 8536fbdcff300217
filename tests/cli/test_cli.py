"""The command line on small random models with a real tokenizer: every command, its JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch
from cli_cases import CALIBRATE, MIXED, UNIFORM, made, refused, run, tokenizer

from tinycompress.checkpoints import checkpoint
from tinycompress.evaluation.report import folder_bytes
from tinycompress.graph.config import Config
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

__all__ = ["made", "tokenizer"]  # fixtures, for this file too


# inspect


def test_inspect_folds_equal_layers(made: Path) -> None:
    lines = run("inspect", made / "mixed").splitlines()
    text = "\n".join(lines)
    assert (
        "3 layers" in text
        and f"parameters {MIXED.n_params:,}" in text
        and f"non-embedding {MIXED.n_body_params:,}" in text
    )
    rows = [line.split() for line in lines]
    assert ["0–1", "4", "2", "128"] in rows and ["2", "2", "1", "64"] in rows
    assert ["0–1", "mlp.up_proj", "128", "down_proj"] in rows
    assert ["0–1", "self_attn.v_proj", "64", "(2", "×", "32)", "o_proj"] in rows
    assert "feeds: 13" in text
    assert run("inspect", made / "mixed", "--feeds").count("down_proj") > text.count("down_proj")


def test_inspect_json(made: Path) -> None:
    out = json.loads(run("inspect", made / "small", "--json"))
    assert Config.from_dict(out["config"]) == UNIFORM
    assert out["parameters"] == UNIFORM.n_params and out["non_embedding_parameters"] == UNIFORM.n_body_params
    assert sum(weight["bytes"] for weight in out["weights"]) == out["bytes"]
    assert {weight["stored"] for weight in out["weights"]} == {"float32", "w4g32"}
    assert sum(len(feed["readers"]) for feed in out["feeds"]) == 7 * 2 + 1
    assert len(out["history"]) == 1 and out["history"][0].startswith("RTN(")


# compress


def test_no_flag_is_a_copy(made: Path, tmp_path: Path) -> None:
    run("compress", made / "mixed", "-o", tmp_path / "copy")
    assert checkpoint.load(tmp_path / "copy").fingerprint() == checkpoint.load(made / "mixed").fingerprint()


def test_prune_stretch_quantize_in_this_order(made: Path, tmp_path: Path) -> None:
    flags = ("--prune", "ffn=0.75", "--context", "128", "--quantize", "w4g32", *CALIBRATE)
    out = run("compress", made / "uniform", *flags, "-o", tmp_path / "out")
    graph = checkpoint.load(tmp_path / "out")
    assert [step.split("(")[0] for step in graph.history] == ["Prune", "ScaleRope", "Rotate", "GPTQ"]
    assert sum(layer.ffn_dim for layer in graph.config.layers) == 2 * 96 and all(
        layer.ffn_dim % 32 == 0 for layer in graph.config.layers
    )
    assert graph.config.max_position == 128 and ("ScaleRope(context=128" in graph.history[1])
    assert isinstance(graph.weights["model.layers.0.mlp.down_proj.weight"], QuantTensor)
    assert graph.tokenizer is not None
    for word in (f"{UNIFORM.n_params:,}", f"{graph.config.n_params:,}", "Prune(", "'ffn': 0.75", "GPTQ("):
        assert word in out


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_params_counts_non_embedding_parameters(made: Path, tmp_path: Path, share: float) -> None:
    run("compress", made / "mixed", "--prune", f"params={share}", *CALIBRATE, "-o", tmp_path / "out")
    config = checkpoint.load(tmp_path / "out").config
    assert share - 0.15 < config.n_body_params / MIXED.n_body_params <= share  # steps of 64 channels are coarse here
    assert {layer.ffn_dim for layer in config.layers} <= {64, 128}


def test_dense_is_what_transformers_opens(made: Path, tmp_path: Path) -> None:
    run("compress", made / "small", "--format", "dense", "-o", tmp_path / "dense")
    name = "model.layers.0.mlp.down_proj.weight"
    quantized, dense = checkpoint.load(made / "small").weights[name], checkpoint.load(tmp_path / "dense").weights[name]
    assert torch.equal(quantized.dequantize(), dense)  # type: ignore[union-attr]
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"] == "llama"


def test_straight_to_an_exported_model(made: Path, tmp_path: Path) -> None:
    run("compress", made / "mixed", "--quantize", "w4g32", *CALIBRATE, "--export", "ort", "-o", tmp_path / "onnx")
    manifest = json.loads((tmp_path / "onnx" / "manifest.json").read_text())
    assert manifest["checks"]["passed"] and [step.split("(")[0] for step in manifest["history"]] == ["Rotate", "GPTQ"]
    run("compress", tmp_path / "onnx", "-o", tmp_path / "back")
    assert checkpoint.load(tmp_path / "back").fingerprint() == manifest["fingerprint"]


def test_a_work_folder_is_taken_up(made: Path, tmp_path: Path) -> None:
    args = ("compress", made / "uniform", "--prune", "ffn=0.5", *CALIBRATE, "--work", tmp_path / "work")
    run(*args, "-o", tmp_path / "one")
    (step,) = (tmp_path / "work").glob("01-*")
    before = step.stat()
    run(*args, "-o", tmp_path / "two")
    assert [*(tmp_path / "work").glob("0*")] == [step] and step.stat() == before
    assert checkpoint.load(tmp_path / "one").fingerprint() == checkpoint.load(tmp_path / "two").fingerprint()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prune", "depth=0.5"], ["--prune", "depth=0.5", "params=SHARE"]),
        (["--prune", "ffn=1.5"], ["--prune", "at most 1"]),
        (["--prune", "ffn"], ["--prune", "ffn=", "params=0.8"]),
        (["--prune", "params=0.1"], ["params=0.1", "or more", "--prune params=0.1,ffn,heads"]),
        (["--prune", "params=0.5,ffn,depth"], ["['depth']", "ffn | heads"]),
        (["--prune", "ffn=0.001"], ["--prune", "0.001"]),
        (["--quantize", "nf4"], ["'nf4'", "w4g64"]),
        (["--quantize", "w4g48"], ["group_size", "48", "64 inputs"]),
        (["--quantize", "w5g32"], ["bits", "5"]),
        (["--quantize", "w4g32", "--quantize-method", "magic"], ["--quantize-method", "'magic'", "gptq | rtn"]),
        (["--quantize", "w4g8", "--export", "ort"], ["group_size", "8", "multiple of 16"]),
        (["--context", "32"], ["context", "32", "64"]),
        (
            ["--context", "128", "--rope-method", "magic"],
            ["'magic'", "auto | linear | ntk | ntk-by-parts | dynamic | yarn | llama3"],
        ),
        (["--context", "100000000"], ["pydoc", "or name a --rope-method, which needs no text"]),
        (["--export", "toaster"], ["'toaster'", "ort"]),
        (["--export", "ort", "--format", "dense"], ["--format"]),
        (["--prune", "ffn=0.5", "--seq-len", "65"], ["--seq-len", "65", "64"]),
        (["--prune", "ffn=0.5", "--calibration", "missing.txt"], ["missing.txt", "pydoc"]),
        (["--prune", "ffn=0.5", "--samples", "100000"], ["pydoc", "at most"]),
    ],
)
def test_bad_options_are_one_line(made: Path, tmp_path: Path, flags: Sequence[str], words: Sequence[str]) -> None:
    error = refused("compress", made / "uniform", *flags, output=tmp_path / "out")
    assert all(word in error for word in words), error


def test_an_output_that_is_not_empty(made: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("compress", "export"):
        assert "--overwrite" in refused(command, made / "uniform", "-o", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    error = refused("compress", made / "uniform", "--overwrite", "-o", tmp_path)
    assert "not written by tinycompress" in error and (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("command", ["inspect", "compress", "eval", "generate", "export"])
def test_models_that_are_none(command: str, tmp_path: Path) -> None:
    rest = {"compress": ("-o", tmp_path / "out"), "export": ("-o", tmp_path / "out"), "generate": ("hello",)}.get(
        command, ()
    )
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "config.json").write_text("{}")
    (garbage / "model.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "half.gguf").write_bytes(b"GGUF\x03")
    for model in ("nowhere", tmp_path / "nowhere", garbage, tmp_path / "half.gguf"):
        assert Path(str(model)).name in refused(command, model, *rest)
    assert not (tmp_path / "out").exists()


def test_quantizing_twice_is_refused(made: Path, tmp_path: Path) -> None:
    assert "already w4g32" in refused("compress", made / "small", "--quantize", "w4g32", output=tmp_path / "out")


def test_a_model_without_a_tokenizer(made: Path, tmp_path: Path) -> None:
    checkpoint.save(Graph.random(UNIFORM), tmp_path / "mute")
    for args in (("eval",), ("generate", "hello"), ("compress", "--prune", "ffn=0.5", "-o", tmp_path / "out")):
        assert "tokenizer" in refused(args[0], tmp_path / "mute", *args[1:])
    run("compress", tmp_path / "mute", "--quantize", "w4g32", "--quantize-method", "rtn", "-o", tmp_path / "out")


# eval, generate


# export, verify


# the command itself


@pytest.mark.parametrize("command", ["inspect", "compress", "eval", "generate", "export", "verify"])
def test_help_has_examples(command: str) -> None:
    text = run(command, "--help")
    assert "Examples:" in text and f"\n    tinycompress {command} " in text


def test_version() -> None:
    assert run("--version") == f"tinycompress {metadata.version('tinycompress')}\n"


def test_interrupted(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> Graph:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load", interrupted)
    assert "interrupted" in refused("inspect", made / "mixed", code=130)


def test_as_a_program(tmp_path: Path) -> None:
    """The installed entry point: exit code and one line, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "tinycompress.cli", "inspect", str(tmp_path / "none")], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: model: found")


def test_a_folders_bytes_are_those_of_everything_in_it(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "a").write_bytes(b"12")
    (tmp_path / "onnx" / "b").write_bytes(b"345")
    assert folder_bytes(tmp_path) == 5 and folder_bytes(tmp_path / "a") == 2
