"""Folders of other tools that are damaged, and graphs that their formats cannot carry: errors that name the field."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from layout_cases import CONFIG, quantized, rewrite, settings_of

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.rtn import RTN, rtn_quantize

BASE = "model.layers.0.mlp.up_proj"


def tensor(suffix, value):
    return lambda folder: rewrite(
        folder, lambda t: t.pop(BASE + suffix) if value is None else t.update({BASE + suffix: value(t[BASE + suffix])})
    )


def reordered(value):
    """Another g_idx, of which the config speaks."""

    def change(folder):
        settings_of(desc_act=True)(folder)
        tensor(".g_idx", value)(folder)

    return change


DAMAGE = [
    ("gptq", settings_of(quant_method="aqlm"), r"quant_method.*'aqlm'.*gptq \| awq \| compressed-tensors"),
    ("gptq", settings_of(quant_method=["gptq"]), r"quant_method.*gptq \| awq \| compressed-tensors"),
    ("gptq", settings_of(checkpoint_format="marlin"), r"checkpoint_format.*'marlin'.*gptq_v2"),
    ("gptq", tensor(".scales", None), r"no tensor .*up_proj\.scales"),
    ("gptq", tensor(".qweight", lambda t: t[:-1].contiguous()), r"up_proj\.qweight.*7 words for 64 inputs"),
    ("gptq", tensor(".qweight", lambda t: t.float()), r"up_proj\.qweight.*float32.*int32"),
    ("gptq", tensor(".qzeros", lambda t: t[:, :-1].contiguous()), r"up_proj\.qzeros.*\(2, 11\).*\(2, 12\)"),
    (
        "gptq",
        reordered(lambda t: t.flip(0)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]),
        "activation order",
    ),
    ("gptq", reordered(lambda t: t + 1), r"g_idx of .*1 … 2.*0 … 1"),
    ("awq", settings_of(version="gemv"), r"version.*'gemv'.*gemm"),
    ("awq", settings_of(bits=8), r"bits.*8.*4"),
    ("awq", tensor(".scales", lambda t: t[:, :-8].contiguous()), r"scales.*\(2, 88\).*\(2, 96\)"),
    ("compressed-tensors", settings_of(format="nvfp4-pack-quantized"), r"format.*nvfp4.*pack-quantized"),
    ("compressed-tensors", settings_of(config_groups=[]), "config_groups"),
    ("compressed-tensors", tensor(".weight_shape", lambda t: t + 1), r"weight_shape.*\[97, 65\].*\[96, 64\]"),
    ("compressed-tensors", tensor(".weight_scale", lambda t: t[:, :0].contiguous()), r"weight_scale.*0 groups"),
    (
        "compressed-tensors",
        tensor(".weight_packed", lambda t: t[:, :-1].contiguous()),
        r"weight_packed.*num_bits = \['4'\]",
    ),
]


@pytest.mark.parametrize("format, damage, message", DAMAGE)
def test_damaged_folders_are_refused_by_name(format, damage, message, tmp_path):
    save(quantized("w4g32"), tmp_path / "m", format=format)
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m")


def packed_embedding(graph):
    return graph.replace(
        weights={"model.embed_tokens.weight": rtn_quantize(graph.tensor("model.embed_tokens.weight"), QuantSpec(8, 32))}
    )


def mixed(graph):
    name = "model.layers.0.mlp.up_proj.weight"
    return graph.replace(weights={name: rtn_quantize(random_graph(CONFIG).tensor(name), QuantSpec(8, 32))})


def half_dense(graph):
    return graph.replace(weights={"model.layers.0.mlp.up_proj.weight": torch.zeros(96, 64)})


def huge(graph):
    name = "model.layers.0.mlp.up_proj.weight"
    return graph.replace(
        weights={name: dataclasses.replace(graph.weights[name], scales=graph.weights[name].scales * 1e9)}
    )


@pytest.mark.parametrize(
    "format, change, message",
    [
        ("gptq", packed_embedding, "quantized embedding"),
        ("gptq", mixed, r"several grids: w4g32, w8g32.*compressed-tensors"),
        ("gptq", half_dense, r"dense model\.layers\.0\.mlp\.up_proj"),
        ("gptq", huge, r"scales of .*up_proj.*beyond float16"),
        ("awq", mixed, "several grids"),
        ("awq", lambda graph: RTN(QuantSpec(8, 32))(graph.dense()), "4 bits"),
        ("compressed-tensors", lambda graph: graph.dense(), "without quantized weights"),
        ("onnx", lambda graph: graph, r"format.*'onnx'.*native \| gptq \| awq \| compressed-tensors \| gguf"),
    ],
)
def test_what_a_format_cannot_carry_is_refused_and_nothing_written(format, change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save(change(quantized("w4g32")), tmp_path / "m", format=format)
    assert not list(tmp_path.iterdir())


def test_nonuniform_layers_stay_native(nonuniform, tmp_path):
    with pytest.raises(InputError, match=r"different widths.*native"):
        save(RTN(QuantSpec(4, 16))(nonuniform), tmp_path / "m", format="gptq")
    with pytest.raises(InputError, match="dense"):
        save(nonuniform, tmp_path / "m", format="gptq", dense=True)
