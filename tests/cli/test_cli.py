"""The command line on small random models with a real tokenizer: every command, its JSON, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.cli.main import app
from tinycompress.evaluation.report import folder_bytes
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor

UNIFORM = Config(
    vocab_size=300, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 128),) * 2, max_position=64, eos_token_id=0
)
MIXED = Config(
    vocab_size=300,
    hidden_size=64,
    head_dim=16,
    layers=(Layer(4, 2, 128), Layer(4, 2, 128), Layer(2, 1, 64)),
    max_position=64,
)
CALIBRATE = ("--samples", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens, trained on the text that the tests evaluate."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([data.text("pydoc")[:20000]], trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with the models `uniform` and `mixed`, and `onnx`, the first one quantized and exported."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"uniform": UNIFORM, "mixed": MIXED}.items():
        checkpoint.save(Graph(config, Graph.random(config, seed=1, std=0.1).weights, (), tokenizer), folder / name)
    run("compress", folder / "uniform", "--quantize", "w4g32", "--quantize-method", "rtn", "-o", folder / "small")
    run("export", folder / "small", "--profile", "ort", "-o", folder / "onnx")
    return folder


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run(*args: object) -> str:
    code, out, err = invoke(*args)
    assert code == 0, err
    return out


def refused(*args: object, output: Path | None = None, code: int = 2) -> str:
    """The one error line (progress bars may stand before it); nothing of the output folder may be there."""
    before = sorted(output.parent.iterdir()) if output else []
    got, out, err = invoke(*args, *(("-o", output) if output else ()))
    assert got == code, (out, err)
    assert err.count("error: ") == 1 and err.splitlines()[-1].startswith("error: ")
    if output:
        assert sorted(output.parent.iterdir()) == before
    return err


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
    (step,) = (tmp_path / "work").iterdir()
    before = step.stat()
    run(*args, "-o", tmp_path / "two")
    assert [*(tmp_path / "work").iterdir()] == [step] and step.stat() == before
    assert checkpoint.load(tmp_path / "one").fingerprint() == checkpoint.load(tmp_path / "two").fingerprint()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prune", "depth=0.5"], ["--prune", "depth=0.5", "params=SHARE"]),
        (["--prune", "ffn=1.5"], ["--prune", "at most 1"]),
        (["--prune", "ffn"], ["--prune", "ffn=", "params=0.8"]),
        (["--prune", "params=0.1"], ["params=0.1", "or more", "--prune params=0.1,ffn,heads"]),
        (["--prune", "params=0.5,ffn,depth"], ["['depth']", "ffn | heads"]),
        (["--prune", "ffn=0.001"], ["keep", "0.001"]),
        (["--quantize", "int4"], ["'int4'", "w4g64"]),
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
    run("compress", made / "uniform", "--overwrite", "-o", tmp_path)
    assert not (tmp_path / "notes.txt").exists() and (tmp_path / "config.json").exists()


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


def test_generate_stops_at_the_context(made: Path) -> None:
    _, _, err = invoke("generate", made / "mixed", "abc", "--max-new-tokens", "1000")
    assert int(err.split()[0]) < 64
    assert "context" in refused("generate", made / "mixed", "a b c d e f g h " * 20)
    assert "token ids" in refused("generate", made / "mixed", "")


# export, verify


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
    import tinycompress.export.write as write
    from tinycompress.export import ORT

    gate = write.gate
    monkeypatch.setattr(
        write, "gate", lambda folder, **options: gate(folder, **options | {"limits": dict.fromkeys(ORT.limits, -1.0)})
    )
    error = refused("export", made / "mixed", output=tmp_path / "out", code=1)
    assert "failed" in error and "prefill" in error and "limit" in error


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
