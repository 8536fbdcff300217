"""The gate passes what is right, and fails each kind of wrong by the check that is there for it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from exported import ids_of, proto, quantized, small
from gate_results import checks, failed

from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.export import GateError, OrtModel, export, read, summary, verify
from tinycompress.export.read import load_proto
from tinycompress.graph.rope import Rope

YARN = Rope(type="yarn", factor=4.0, original_max_position=32)
EXACT = ["prefill", "decode", "turns", "padding", "left_padding"]
SHIPPED = ["kl", "flips", "perplexity"]
ALL = ["files", "fingerprint", "tables", *EXACT, "end_of_context", *SHIPPED]


def overwrite(folder, name: str, change) -> None:
    """Changes an initializer in place, behind the manifest's back."""
    tensor = next(t for t in load_proto(folder).graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = np.uint8 if name.endswith("packed") else np.float32
    stored = np.memmap(folder / "model.onnx.data", dtype, "r+", int(where["offset"]), tuple(tensor.dims))
    change(stored)
    stored.flush()


@pytest.mark.parametrize("graph", [small(), quantized(small(), "w4g32")], ids=["dense", "w4g32"])
def test_report(graph, tmp_path):
    manifest = export(graph, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report["passed"] and list(checks(report)) == ALL
    assert (
        manifest["checks"]["checks"] == report["checks"][1:]
    )  # the same figures, and export need not hash what it wrote
    assert report["text"] == "8 × 64 tokens, random ids: no tokenizer"
    assert report["perplexity"]["torch"] > 1 and "onnxruntime" in report["versions"]
    lines = summary(report)
    assert len(lines) == len(ALL) + 2 and lines[-1] == "passed" and "prefill" in lines[4]
    json.dumps(report)


def test_only_checks_that_ran_are_reported(tmp_path):
    from tinycompress.graph.config import Layer

    export(small(layers=(Layer(0, 0, 32),)), tmp_path / "out")
    assert list(checks(verify(tmp_path / "out"))) == ["files", "fingerprint", *EXACT, *SHIPPED]
    export(small(rope=YARN, max_position=128), tmp_path / "yarn")
    assert "beyond_context" in checks(verify(tmp_path / "yarn"))


def test_changed_bytes(tmp_path):
    export(quantized(small(), "w4g32"), tmp_path / "out", check=False)

    def flip(packed) -> None:
        packed[0, 0, 0] ^= 1

    overwrite(tmp_path / "out", "model.layers.0.mlp.gate_up_proj.weight.packed", flip)
    report = verify(tmp_path / "out")
    assert (
        list(checks(report)) == ["files"] and not report["passed"] and "model.onnx.data" in report["checks"][0]["about"]
    )
    assert summary(report)[-1] == "failed"
    assert failed(verify(tmp_path / "out", hashes=False)) == {
        "fingerprint"
    }  # one bit: logits still agree with the changed graph
    (tmp_path / "out" / "genai_config.json").unlink()
    assert "genai_config.json" in verify(tmp_path / "out")["checks"][0]["about"]


def test_scaling_that_was_lost_beyond_the_original_context(tmp_path):
    """Tables right up to the original context and wrong behind it: nothing but the far checks can see it in logits."""
    graph = small(rope=YARN, max_position=128)
    export(graph, tmp_path / "out", check=False)
    for name, table in zip(("rope.cos", "rope.sin"), Rope().tables(16, 128)):

        def spoil(stored, table=table) -> None:
            stored[32:] = table[32:].numpy()

        overwrite(tmp_path / "out", name, spoil)
    report = verify(tmp_path / "out", hashes=False, tokens=ids_of(graph, 32))
    assert failed(report) == {"tables", "beyond_context", "end_of_context"}


def test_another_graph(tmp_path):
    graph = small()
    export(graph, tmp_path / "out", check=False)
    assert verify(tmp_path / "out", graph)["passed"]
    other = graph.replace(weights={"model.norm.weight": graph.weights["model.norm.weight"] * 1.01})
    assert {"prefill", "decode"} <= failed(verify(tmp_path / "out", other))
    flat = graph.replace(config=dataclasses.replace(graph.config, rope=Rope(theta=20000.0)))
    assert {"prefill", "decode"} <= failed(verify(tmp_path / "out", flat))


def test_nan_fails(tmp_path):
    graph = small()
    weight = graph.weights["lm_head.weight"].clone()
    weight[5], weight[6] = 3e38, -3e38  # finite, and the logits are not
    with pytest.raises(GateError, match="prefill nan"):
        export(graph.replace(weights={"lm_head.weight": weight}), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_limits(tmp_path):
    graph = quantized(small(), "w4g32")
    export(graph, tmp_path / "out", check=False)
    report = verify(tmp_path / "out", limits={"kl": 1e-12, "perplexity": 0.0})
    assert failed(report) == {"kl", "perplexity"}  # int8 activations cost something
    error = GateError(report)
    assert "kl" in str(error) and "limit 1e-12" in str(error) and error.report is report
    assert "accuracy level 0" in str(error)
    assert "accuracy level 0" not in str(
        GateError(verify(tmp_path / "out", limits={"kl": 1e-12, "prefill": 0.0}))
    )  # float fails, too
    with pytest.raises(InputError, match=r"limits.*speed"):
        verify(tmp_path / "out", limits={"speed": 1.0})


def test_text(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    graph = small(vocab_size=256).replace(tokenizer=Tokenizer(backend))
    manifest = export(graph, tmp_path / "out")
    assert manifest["checks"]["text"] == "8 × 64 tokens, pydoc (test)" and "tokenizer.json" in manifest["files"]
    tokenizer = OrtModel(tmp_path / "out").tokenizer
    assert (
        tokenizer is not None and tokenizer.decode(tokenizer.encode("So long, and thanks.")) == "So long, and thanks."
    )
    report = verify(tmp_path / "out", tokens=ids_of(graph, 20, B=2))
    assert report["passed"] and report["text"] == "2 × 20 tokens, the given tokens"
    assert verify(tmp_path / "out", tokens=ids_of(graph, 2))["passed"]  # the shortest text there is
    with pytest.raises(InputError, match="verification tokens"):
        verify(tmp_path / "out", tokens=torch.zeros(4, dtype=torch.long))
    with pytest.raises(InputError, match="token ids"):
        verify(tmp_path / "out", tokens=torch.full((1, 4), 256))


def corrupt(folder, change) -> None:
    model = proto(folder)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_files_that_were_changed(tmp_path):
    export(quantized(small(), "w4g32"), tmp_path / "good", check=False)

    def copy(name):
        return shutil.copytree(tmp_path / "good", tmp_path / name)

    def largest(model):
        return max(model.graph.initializer, key=lambda t: len(t.external_data))

    folder = copy("truncated")
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="truncated"):
        read(folder)
    with pytest.raises(InputError, match=r"model.onnx.data: found 1000 bytes"):
        OrtModel(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"model.onnx.data: found no such file"):
        OrtModel(folder)
    with pytest.raises(InputError, match="a file inside"):
        read(folder)

    folder = copy("renamed")
    corrupt(
        folder,
        lambda m: setattr(next(t for t in m.graph.initializer if t.name == "model.norm.weight"), "name", "other"),
    )
    with pytest.raises(InputError, match="no initializer"):
        read(folder)

    for name, key, value, match in (
        ("escaping", 0, "../good/model.onnx.data", "inside the folder"),
        ("offset", 1, "-4", "bytes -4"),
        ("word", 1, "x", "integer offset"),
    ):
        folder = copy(name)
        corrupt(folder, lambda m, key=key, value=value: setattr(largest(m).external_data[key], "value", value))
        with pytest.raises(InputError, match=match):
            read(folder)

    folder = copy("garbage")
    (folder / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match="not an ONNX model"):
        read(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="format in"):
        read(folder)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "nowhere")


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """A real model: 4 bits a weight, its own context stretched by YaRN."""
    rope = dataclasses.replace(smollm2.config.rope, type="yarn", factor=2.0, original_max_position=2048)
    config = dataclasses.replace(smollm2.config, rope=rope, max_position=4096)
    graph = quantized(smollm2.replace(config=config), "w4g64", scale="minmax")
    report = export(graph, tmp_path / "out")["checks"]
    assert {"prefill", "decode", "beyond_context", "kl"} <= set(checks(report))
