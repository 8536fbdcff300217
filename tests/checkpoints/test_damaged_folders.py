"""Folders that are damaged, incomplete or hostile: one clear error that names the file."""

import dataclasses
import json

import pytest
import torch
from checkpoint_cases import IDS, as_hf, broken, edit
from conftest import random_graph

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.config import shapes


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


DAMAGE = {
    "truncated": (truncate, "model.safetensors"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64), "model.safetensors"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "missing tensors": (
        broken(lambda t: [t.pop(n) for n in list(t) if "mlp" in n]),
        "mlp.gate_proj.weight.* and 3 more",
    ),
    "missing head": (broken(lambda t: t.pop("lm_head.weight")), "lm_head.weight"),
    "unexpected": (broken(lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})), "q_norm"),
    "integers": (broken(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})), "I32.*F32"),
    "bytes": (broken(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.uint8)})), "uint8"),
    "shape": (broken(lambda t: t.update({"model.norm.weight": torch.ones(63)})), "model.norm.weight.*63.*64"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "pickle only": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle.*safetensors"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_one_clear_error(name, tiny, tmp_path):
    damage, message = DAMAGE[name]
    folder = as_hf(tiny, tmp_path / "out")
    load(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"model.norm.weight": "../secret.safetensors"}, "inside"),
        ({"model.norm.weight": "/etc/passwd"}, "inside"),
        ({"model.norm.weight": 3}, "inside"),
        ({"model.norm.weight": "model-2.safetensors"}, "model-2.safetensors"),
        ({"no.such": "model-1.safetensors"}, "no.such"),
        ({}, "weight_map"),
        (["x"], "weight_map"),
    ],
)
def test_a_bad_index_is_one_clear_error(weight_map, message, tiny, tmp_path):
    folder = as_hf(tiny, tmp_path / "out")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_what_says_nothing_is_ignored_and_mixed_floats_meet(tiny, tmp_path):
    tied = random_graph(dataclasses.replace(tiny.config, tie_embeddings=True))
    folder = as_hf(tied, tmp_path / "out")

    def extra(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float()

    broken(extra)(folder)
    back = load(folder)
    assert set(back.weights) == set(shapes(tied.config))
    assert {w.dtype for w in back.weights.values()} == {torch.float32}
    back.module()(IDS)


ABOUT = [
    ({"format": 2}, "format"),
    ({"format": ...}, "format"),
    ({"history": [1]}, "history"),
    ({"history": "x"}, "history"),
    ({"config": ...}, "config"),
    ({"config": 3}, "tinycompress.json"),
    ({"config": {}}, "tinycompress.json"),
    ({"quantized": {"model.norm.weight": {"bits": 4}}}, "model.norm.weight"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"bits": 5}}}, "bits"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"width": 5}}}, "width"),
    ({"quantized": {"model.layers.0.mlp.up_proj.weight": {"bits": 4}}}, "up_proj.weight.packed"),
    ({"quantized": 5}, "tinycompress.json"),
]


@pytest.mark.parametrize("fields, message", ABOUT, ids=[str(f)[:60] for f, _ in ABOUT])
def test_a_bad_tinycompress_json_is_one_clear_error(fields, message, tiny, tmp_path):
    folder = save(tiny, tmp_path / "out")
    edit(folder, "tinycompress.json", **fields)
    with pytest.raises(InputError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "field, value",
    [("rope", 3), ("rope", {"theta": "x"}), ("layers", [["a", 1, 2]]), ("layers", 3), ("vocab_size", "x")],
)
@pytest.mark.parametrize("more", [{}, {"bos_token_id": 1.5}, {"tie_embeddings": "no"}])
def test_a_bad_config_in_tinycompress_json(field, value, more, tiny, tmp_path):
    folder = save(tiny, tmp_path / "out")
    edit(folder, "tinycompress.json", config=tiny.config.to_dict() | (more or {field: value}))
    with pytest.raises(InputError, match=r"tinycompress\.json"):
        load(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(shared, tmp_path):
    graph = load(shared / "models/stories260K")
    folder = as_hf(graph, tmp_path / "out")
    edit(folder, vocab_size=256)
    broken(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:256].clone()}))(folder)
    with pytest.raises(InputError, match=r"tokenizer in .*512.*256"):
        load(folder)
