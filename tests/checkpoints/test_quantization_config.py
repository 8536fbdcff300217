"""Quantization configs: under their old names, contradictory, and with fields that nothing here knows."""

import dataclasses
import json

import pytest
import torch
from layout_cases import IDS, quantized, rewrite, settings_of
from safetensors.torch import load_file

from tinycompress.checkpoints.bit_words import to_words
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import InputError

UP = "model.layers.0.mlp.up_proj"


def saved(format, folder, grid="w4g32"):
    graph = quantized(grid)
    save(graph, folder, format=format)
    return graph


def logits(source):
    return load(source, dtype=torch.float32).module()(IDS)


def config_json(folder, change):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def change_tensors(**changes):
    """Changes tensors of one linear by suffix; None removes one."""

    def change(tensors):
        for suffix, value in changes.items():
            name = f"{UP}.{suffix}"
            old = tensors.pop(name, None)
            if value is not None:
                tensors[name] = value(old).contiguous()

    return lambda folder: rewrite(folder, change)


# ---- where it lies


def test_quantize_config_json_alone_is_read(tmp_path):
    graph = saved("gptq", tmp_path / "m")
    config_json(tmp_path / "m", lambda data: data.pop("quantization_config"))
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    old |= {"model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-32g"}
    (tmp_path / "m" / "quantize_config.json").write_text(json.dumps(old))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "gptq_model-4bit-32g.safetensors")
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


def test_quant_config_json_alone_is_read(tmp_path):
    graph = saved("awq", tmp_path / "m")
    config_json(tmp_path / "m", lambda data: data.pop("quantization_config"))
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "m" / "quant_config.json").write_text(json.dumps(old))
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


def test_compression_config_is_read(tmp_path):
    graph = saved("compressed-tensors", tmp_path / "m")

    def rename(data):
        old = data.pop("quantization_config")
        del old["quant_method"]
        data["compression_config"] = old | {"sparsity_config": {"format": "dense", "global_sparsity": 0.1}}

    config_json(tmp_path / "m", rename)
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


@pytest.mark.parametrize("format, fields", [("gptq", {"bits": 4.0, "group_size": 32.0}), ("awq", {"bits": 4.0})])
def test_integers_written_as_floats_are_read(format, fields, tmp_path):
    graph = saved(format, tmp_path / "m")
    settings_of(**fields)(tmp_path / "m")
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 8}, r"bits in .*quantize_config\.json: found 8; accepted: 4, as quantization_config"),
        ({"sym": False}, r"sym in .*quantize_config\.json"),
        ({"checkpoint_format": "gptq_v2"}, r"checkpoint_format in .*quantize_config\.json"),
        ({"w_bit": 3}, r"bits in .*quantize_config\.json: found 4 and 3, as w_bit"),
    ],
)
def test_two_descriptions_have_to_agree(fields, message, tmp_path):
    saved("gptq", tmp_path / "m")
    path = tmp_path / "m" / "quantize_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m")


def test_a_config_without_packed_weights_names_the_file(tiny, tmp_path):
    save(tiny, tmp_path / "m")
    (tmp_path / "m" / "tinycompress.json").unlink()
    (tmp_path / "m" / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(InputError, match=r"no tensor \*\.qweight.*quantize_config\.json speaks \(gptq\)"):
        load(tmp_path / "m")


# ---- contradictions


def words_of(value):
    """Zero points that are all `value`, stored as the words of 4 bits."""
    return lambda words: to_words(torch.full((len(words), words.shape[1] * 8), value), 4)


@pytest.mark.parametrize("stored", [8, 6])  # version 1 holds z - 1: 8 is what version 2 holds
def test_zero_points_beside_sym_are_refused(stored, tmp_path):
    """vLLM's kernels ignore them, GPTQModel's use them."""
    saved("gptq", tmp_path / "m")
    change_tensors(qzeros=words_of(stored))(tmp_path / "m")
    with pytest.raises(InputError, match=rf"zero points of {UP}.*symmetric grid"):
        load(tmp_path / "m")
    settings_of(sym=False)(tmp_path / "m")
    assert (load(tmp_path / "m").weights[f"{UP}.weight"].zeros == stored + 1).all()


def test_zero_points_of_nothing_borrow_as_gptqmodel_writes_them(tmp_path):
    """GPTQModel subtracts whole words: the neighbour of z = 0 loses 1 more, and gets it back."""
    graph = quantized("w4g32-asym")
    name = f"{UP}.weight"
    zeros = graph.weights[name].zeros.clone()
    zeros[::3] = 0
    graph = graph.replace(weights={name: dataclasses.replace(graph.weights[name], zeros=zeros)})
    save(graph, tmp_path / "m", format="gptq")

    def subtract(tensors):
        for key in [key for key in tensors if key.endswith("qzeros")]:
            words = (tensors[key].to(torch.int64) - 0x11111111) & 0xFFFFFFFF
            tensors[key] = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    rewrite(tmp_path / "m", subtract)
    settings_of(checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5.6.0"]})(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m").weights[name].zeros, zeros)
    settings_of(meta=...)(tmp_path / "m")
    with pytest.raises(InputError, match=r"qzeros.*a stored zero point of 15.*gptq_v2"):
        load(tmp_path / "m")


CONTRADICTIONS = [
    ("gptq", settings_of(bits=8), r"4 bits in 2 groups of 64 inputs.*8 bits in groups of 32"),
    ("gptq", settings_of(group_size=16), r"4 bits in 2 groups of 64 inputs.*4 bits in groups of 16"),
    ("gptq", settings_of(group_size=-1), r"2 groups.*one group per row"),
    ("gptq", settings_of(group_size=0), r"group_size.*0.*-1 or a positive"),
    ("gptq", settings_of(bits=None), r"bits in .*None"),
    ("gptq", settings_of(bits="4"), r"bits in .*'4'"),
    ("gptq", settings_of(bits=True), r"bits in .*True"),
    ("gptq", settings_of(sym="yes"), r"sym in .*'yes'.*true or false"),
    ("gptq", settings_of(format="gptq_v2"), r"format in .*gptq_v2 and gptq \(checkpoint_format\)"),
    ("gptq", settings_of(lm_head=True), r"lm_head in .*True, and a head that is not packed"),
    ("gptq", settings_of(pack_dtype="int16"), r"pack_dtype.*int16.*int32"),
    ("gptq", settings_of(is_marlin_format=True), r"is_marlin_format.*True.*false"),
    ("gptq", settings_of(act_bits=8), r"act_bits.*8.*16 \| 32"),
    ("gptq", settings_of(dynamic=[1]), r"dynamic.*an object of objects"),
    ("gptq", settings_of(dynamic={"x": {"bits": 5.5}}), r"bits in .*5\.5"),
    ("gptq", settings_of(rotation="hadamard"), r"rotation in .*'hadamard'.*without it"),
    ("gptq", settings_of(adapter={"path": "x"}), r"adapter in .*without it"),
    ("gptq", settings_of(smoothing=0.5), r"smoothing in .*0\.5.*without it"),
    ("awq", settings_of(zero_point=False), r"zero_point.*False.*true"),
    ("awq", settings_of(group_size=16), r"4 bits in 2 groups of 64 inputs.*groups of 16"),
    ("awq", settings_of(group_size=...), r"group_size in .*None"),
    ("awq", settings_of(version="marlin"), r"version.*'marlin'.*gemm"),
    ("awq", settings_of(backend="llm-awq"), r"backend.*'llm-awq'.*autoawq"),
    ("awq", settings_of(modules_to_not_convert=["mlp"]), r"modules_to_not_convert.*'mlp', and a packed .*mlp"),
    ("awq", settings_of(modules_to_not_convert="mlp"), r"modules_to_not_convert.*a list of names"),
    ("awq", settings_of(clip=0.9), r"clip in .*0\.9.*without it"),
    ("compressed-tensors", settings_of(ignore=[UP]), rf"ignore in .*{UP}, which is packed"),
    ("compressed-tensors", settings_of(ignore="lm_head"), r"ignore in .*a list of names"),
    ("compressed-tensors", settings_of(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme.*KV cache"),
    ("compressed-tensors", settings_of(transform_config={"config_groups": {"u": {}}}), r"transform_config in"),
    ("compressed-tensors", settings_of(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config.*sparse-24"),
    ("compressed-tensors", settings_of(quantization_status="calibration"), r"quantization_status.*compressed"),
]


@pytest.mark.parametrize("format, damage, message", CONTRADICTIONS)
def test_contradictions_and_unknown_fields_are_refused(format, damage, message, tmp_path):
    saved(format, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_what_is_empty_or_of_the_tool_alone_is_harmless(format, tmp_path):
    graph = saved(format, tmp_path / "m")
    settings_of(rotation=None, adapter={}, transform_config={}, smoothing=False)(tmp_path / "m")
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


def test_no_g_idx_where_columns_have_an_order_is_refused(tmp_path):
    saved("gptq", tmp_path / "m")
    change_tensors(g_idx=None)(tmp_path / "m")
    load(tmp_path / "m")
    settings_of(desc_act=True)(tmp_path / "m")
    with pytest.raises(InputError, match=r"no tensor .*up_proj\.g_idx.*desc_act"):
        load(tmp_path / "m")


def test_dynamic_says_other_bits_of_some_linears(tmp_path):
    """GPTQModel's rules by expressions of names: the shapes say which linears are meant."""
    graph, other = quantized("w4g32"), quantized("w8g16")
    save(graph, tmp_path / "m", format="gptq")
    save(other, tmp_path / "other", format="gptq")

    def mix(tensors):
        theirs = load_file(tmp_path / "other" / "model.safetensors")
        tensors |= {name: tensor for name, tensor in theirs.items() if name.startswith(UP)}

    rewrite(tmp_path / "m", mix)
    with pytest.raises(InputError, match=r"8 bits in 4 groups"):
        load(tmp_path / "m")
    settings_of(dynamic={r"+:.*\.up_proj": {"bits": 8, "group_size": 16}, "-:.*lm_head": {}})(tmp_path / "m")
    mixed = graph.replace(weights={f"{UP}.weight": other.weights[f"{UP}.weight"]})
    assert torch.equal(logits(tmp_path / "m"), mixed.module()(IDS))


# ---- groups of compressed-tensors


def group(**fields):
    """Changes fields of the weights of the only group; ... removes one."""

    def change(data):
        weights = data["quantization_config"]["config_groups"]["group_0"]["weights"]
        for key, value in fields.items():
            weights.pop(key, None)
            if value is not ...:
                weights[key] = value

    return lambda folder: config_json(folder, change)


@pytest.mark.parametrize(
    "grid, damage, message",
    [
        ("w4g32", group(num_bits=8), r"weight_packed.*num_bits = \['8'\]"),
        ("w4g32", group(group_size=16), r"4 bits in 2 groups.*groups of 16"),
        ("w4g32", group(strategy="channel", group_size=None), r"2 groups.*one group per row"),
        ("w4g32", group(strategy="tensor"), r"strategy.*'tensor'.*group \| channel"),
        ("w4g32", group(strategy="group", group_size=None), r"group_size.*None"),
        ("w4g32", group(strategy="channel"), r"group_size.*32"),
        ("w4g32", group(type="float"), r"type.*'float'.*int"),
        ("w4g32", group(dynamic=True), r"dynamic.*True.*false"),
        ("w4g32", group(block_structure=[2, 4]), r"block_structure.*without it"),
        ("w4g32", group(actorder="group"), r"no tensor .*weight_g_idx.*actorder"),
        ("w4g32", group(symmetric=False), r"no tensor .*weight_zero_point.*asymmetric"),
        ("w4g32-asym", group(symmetric=True), r"zero points of .*symmetric grid"),
        (
            "w4g32",
            change_tensors(weight_g_idx=lambda _: torch.arange(64, dtype=torch.int32).flip(0) // 32),
            r"g_idx of .*up_proj.*another order",
        ),
        (
            "w4g32-asym",
            change_tensors(weight_zero_point=lambda _: torch.full((96, 2), 9, dtype=torch.int8)),
            r"weight_zero_point.*9 … 9.*signed integers of 4 bits",
        ),
    ],
)
def test_groups_of_compressed_tensors_and_what_is_stored(grid, damage, message, tmp_path):
    saved("compressed-tensors", tmp_path / "m", grid)
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m")


def test_spellings_of_groups_that_mean_the_same(tmp_path):
    graph = saved("compressed-tensors", tmp_path / "m")
    harmless = {"observer": "minmax", "observer_kwargs": {"x": 1}, "zp_dtype": None, "scale_dtype": None}
    group(strategy=..., actorder="weight", block_structure=None, num_bits=4.0, **harmless)(tmp_path / "m")
    settings_of(version="0.14.0.1", global_compression_ratio=1.3, ignore=["lm_head", "re:.*gate"])(tmp_path / "m")
    change_tensors(weight_g_idx=lambda _: torch.full((64,), -1, dtype=torch.int32))(tmp_path / "m")
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


def test_an_order_of_columns_that_the_group_speaks_of(tmp_path):
    graph = saved("compressed-tensors", tmp_path / "m")
    group(actorder="group")(tmp_path / "m")

    def index(tensors):
        for base in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
            K = int(tensors[f"{base}.weight_shape"][1])
            groups = K // 32
            tensors[f"{base}.weight_g_idx"] = (groups - 1 - torch.arange(K) // 32).to(torch.int32)
            tensors[f"{base}.weight_scale"] = tensors[f"{base}.weight_scale"].flip(1).contiguous()

    rewrite(tmp_path / "m", index)
    assert torch.equal(logits(tmp_path / "m"), graph.module()(IDS))


def test_a_leftover_of_packing_is_refused(tmp_path):
    saved("gptq", tmp_path / "m")
    rewrite(tmp_path / "m", lambda t: t.update({"model.layers.0.mlp.extra.qweight": torch.ones(1, dtype=torch.int32)}))
    with pytest.raises(InputError, match=r"mlp\.extra\.qweight"):
        load(tmp_path / "m")
