"""GPTQ, AWQ and compressed-tensors folders: stored bits against a naive reading of each format, and round trips."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import CASES, CONFIG, IDS, quantized, rewrite, settings_of
from safetensors.torch import load_file

from tinycompress.checkpoints.bit_words import from_words, regular_groups, to_words
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.layouts import FOLDERS
from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import BITS, QuantSpec, QuantTensor
from tinycompress.quantization.rtn import rtn_quantize


def field(words, start, bits):
    """`bits` bits from bit `start` of a list of 32-bit words, which may run into the next word."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words[start // 32 : start // 32 + 2]))
    return stream >> (start % 32) & (2**bits - 1)


def gptq_dense(t, base, bits, v2=False):
    """AutoGPTQ's documentation, value by value: [N, K]."""
    qweight, qzeros, scales, index = (t[f"{base}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx"))
    K = len(index)
    N = scales.shape[1]
    columns = [qweight[:, n].tolist() for n in range(N)]
    rows = [qzeros[g].tolist() for g in range(len(scales))]
    out = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            g = int(index[k])
            zero = field(rows[g], n * bits, bits) + (0 if v2 else 1)
            out[n, k] = (field(columns[n], k * bits, bits) - zero) * float(scales[g, n])
    return out


def awq_dense(t, base, bits):
    """AutoAWQ's gemm: eight outputs a word, in the order 0 2 4 6 1 3 5 7."""
    qweight, qzeros, scales = (t[f"{base}.{k}"].tolist() for k in ("qweight", "qzeros", "scales"))
    K = len(qweight)
    N = len(scales[0])
    G = len(scales)
    out = torch.empty(N, K)
    for word in range(N // 8):
        for nibble, offset in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            n = 8 * word + offset
            for k in range(K):
                g = k * G // K
                q, z = (row[word] >> (4 * nibble) & 15 for row in (qweight[k], qzeros[g]))
                out[n, k] = (q - z) * scales[g][n]
    return out


def ct_dense(t, base, bits):
    """compressed-tensors' pack_to_int32: ⌊32/bits⌋ signed values a word, shifted to start from 0."""
    words = t[f"{base}.weight_packed"].tolist()
    scales = t[f"{base}.weight_scale"].tolist()
    N, K = t[f"{base}.weight_shape"].tolist()
    zeros = t.get(f"{base}.weight_zero_point")
    per = 32 // bits
    G = len(scales[0])
    out = torch.empty(N, K)
    for n in range(N):
        for k in range(K):
            g = k * G // K
            q = (words[n][k // per] >> (bits * (k % per))) & (2**bits - 1)
            z = 2 ** (bits - 1) if zeros is None else (int(zeros[n // per, g]) >> (bits * (n % per))) & (2**bits - 1)
            out[n, k] = (q - z) * scales[n][g]
    return out


ORACLES = {"gptq": gptq_dense, "awq": awq_dense, "compressed-tensors": ct_dense}


@pytest.mark.parametrize("format, grid", CASES)
def test_stored_integers_mean_the_weight(format, grid, tmp_path):
    graph = quantized(grid)
    save(graph, tmp_path / "m", format=format)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    spec = QuantSpec.parse(grid)
    extra = {}
    if format == "gptq":
        about = json.loads((tmp_path / "m" / "quantize_config.json").read_text())
        extra = {"v2": about["checkpoint_format"] == "gptq_v2"}
    for base in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        weight = graph.weights[f"{base}.weight"].dequantize()
        assert torch.equal(ORACLES[format](tensors, base, spec.bits, **extra), weight)


@pytest.mark.parametrize("format, grid", CASES)
def test_folders_load_as_they_were_saved(format, grid, tmp_path):
    graph = quantized(grid)
    save(graph, tmp_path / "m", format=format)
    back = load(tmp_path / "m", dtype=torch.float32)
    assert back.config == graph.config
    for name, weight in graph.weights.items():
        other = back.weights[name]
        if isinstance(weight, QuantTensor):
            assert str(other.grid) == grid and torch.equal(other.ints(), weight.ints())
            assert torch.equal(other.scales, weight.scales)
            assert (weight.zeros is None and other.zeros is None) or torch.equal(other.zeros, weight.zeros)
        else:
            assert torch.equal(other, weight)
    assert torch.equal(back.module()(IDS), graph.module()(IDS))
    assert not (tmp_path / "m" / "tinycompress.json").exists()


def test_a_loaded_folder_exports(tmp_path):
    pytest.importorskip("onnxruntime")
    from tinycompress.export import export, read

    save(quantized("w4g32-asym"), tmp_path / "gptq", format="gptq")
    graph = load(tmp_path / "gptq")
    assert graph.weights["model.layers.0.mlp.up_proj.weight"].scales.dtype == torch.float16
    assert export(graph, tmp_path / "onnx", progress=False)["checks"]["passed"]
    up = read(tmp_path / "onnx").weights["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(up.ints(), graph.weights["model.layers.0.mlp.up_proj.weight"].ints())


@pytest.mark.parametrize("format", FOLDERS)
def test_negative_scales_biases_and_tied_heads_survive(format, tmp_path):
    config = dataclasses.replace(
        CONFIG, tie_embeddings=True, biases=frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
    )
    graph = quantized("w4g32", config)
    flipped = {
        n: dataclasses.replace(w, scales=-w.scales) for n, w in graph.weights.items() if isinstance(w, QuantTensor)
    }
    graph = graph.replace(weights=flipped)
    save(graph, tmp_path / "m", format=format)
    back = load(tmp_path / "m", dtype=torch.float32)
    assert back.config == config and torch.equal(back.module()(IDS), graph.module()(IDS))


def test_compressed_tensors_is_not_copied_when_it_loads(tmp_path):
    save(quantized("w4g32"), tmp_path / "m", format="compressed-tensors")
    graph = load(tmp_path / "m")
    name = "model.layers.0.mlp.up_proj"
    from safetensors import safe_open

    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        stored = file.get_tensor(f"{name}.weight_packed")
    packed = graph.weights[f"{name}.weight"].packed
    assert packed.untyped_storage().nbytes() == stored.untyped_storage().nbytes() and torch.equal(
        packed.reshape(-1).view(torch.int32), stored.flatten()
    )


def test_compressed_tensors_carries_several_grids_and_dense_linears(tmp_path):
    graph = random_graph(CONFIG)
    packed = {
        n: rtn_quantize(graph.tensor(n), QuantSpec(4, 32))
        for n in graph.weights
        if "mlp" in n and n.endswith("proj.weight")
    }
    packed |= {
        n: rtn_quantize(graph.tensor(n), QuantSpec(8, None)) for n in graph.weights if "v_proj" in n or "lm_head" in n
    }
    graph = graph.replace(weights=packed)
    save(graph, tmp_path / "m", format="compressed-tensors")
    about = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in about["config_groups"].values()} == {4, 8}
    assert "model.layers.0.self_attn.q_proj" in about["ignore"] and "lm_head" not in about["ignore"]
    assert torch.equal(load(tmp_path / "m").module()(IDS), graph.module()(IDS))


def test_v1_zero_points_are_one_less_and_zero_needs_v2(tmp_path):
    graph = quantized("w4g32-asym")
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = graph.weights[name].zeros.clone()
    for low, kind in ((1, "gptq"), (0, "gptq_v2")):
        changed = {
            n: dataclasses.replace(w, zeros=w.zeros.clamp_min(1))
            for n, w in graph.weights.items()
            if isinstance(w, QuantTensor)
        }
        zeros[0, 0] = low
        changed[name] = dataclasses.replace(graph.weights[name], zeros=zeros.clamp_min(low))
        save(graph.replace(weights=changed), tmp_path / kind, format="gptq")
        assert (
            json.loads((tmp_path / kind / "config.json").read_text())["quantization_config"]["checkpoint_format"]
            == kind
        )
        assert torch.equal(load(tmp_path / kind).weights[name].zeros, changed[name].zeros)


def test_three_bits_are_v2_and_gptqmodels_v1_is_understood(tmp_path):
    """GPTQModel's v1 subtracts constants that belong to other words: zero points of 4 do not become 3 throughout."""
    graph = quantized("w3g32")
    save(graph, tmp_path / "m", format="gptq")
    folder = tmp_path / "m"
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"

    def subtract(t):
        for name in [n for n in t if n.endswith("qzeros")]:
            words = t[name].to(torch.int64)
            for start, offset in enumerate((0x24924924, 0x92492492, 0x49249249)):
                words[:, start::3] -= offset
            words &= 0xFFFFFFFF
            t[name] = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    rewrite(folder, subtract)
    settings_of(checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5.6.0"]})(folder)
    assert torch.equal(load(folder, dtype=torch.float32).module()(IDS), graph.module()(IDS))
    settings_of(meta=None)(folder)  # AutoGPTQ's reading: other zero points than `sym` promises
    with pytest.raises(InputError, match=r"zero points of .*symmetric grid"):
        load(folder)
    settings_of(sym=False)(folder)
    assert not load(folder).weights["model.layers.0.mlp.up_proj.weight"].grid.symmetric


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 80), st.integers(0, 99))
def test_words_round_trip(bits, rows, n, seed):
    q = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = to_words(q, bits)
    assert words.shape == (rows, math.ceil(n * bits / 32)) and torch.equal(from_words(words, bits, n), q)
    assert [field(words[0].tolist(), k * bits, bits) for k in range(n)] == q[0].tolist()


def test_activation_order_is_undone_where_columns_stay_together():
    scales = torch.tensor([[1.0, 2.0]])
    zeros = torch.tensor([[7, 9]])
    whole = torch.arange(2).repeat_interleave(16)
    assert regular_groups("w", whole, scales, zeros)[0].tolist() == [[1, 2]]
    blocks = torch.tensor([1, 0, 0, 1]).repeat_interleave(8)
    s, z = regular_groups("w", blocks, scales, zeros)
    assert s.tolist() == [[2, 1, 1, 2]] and z.tolist() == [[9, 7, 7, 9]]
    swapped = torch.tensor([1, 0]).repeat_interleave(16)
    assert regular_groups("w", swapped, scales, zeros)[0].tolist() == [[2, 1]]
    with pytest.raises(InputError, match=r"w.*scattered.*static groups"):
        regular_groups("w", torch.arange(2).repeat(16), scales, zeros)
    with pytest.raises(InputError, match=r"g_idx of w.*0 … 2.*0 … 1"):
        regular_groups("w", whole + torch.arange(32) // 31, scales, zeros)


def test_a_group_order_in_the_file_is_undone(tmp_path):
    graph = quantized("w4g32")
    base = "model.layers.0.mlp.down_proj"
    save(graph, tmp_path / "m", format="gptq")

    def reorder(t):
        index = t[f"{base}.g_idx"].reshape(-1, 32)
        t[f"{base}.g_idx"], t[f"{base}.scales"] = (
            index.flip(0).flatten().contiguous(),
            t[f"{base}.scales"].flip(0).contiguous(),
        )

    rewrite(tmp_path / "m", reorder)
    with pytest.raises(InputError, match=r"g_idx of .*down_proj.*another order of columns"):
        load(tmp_path / "m")
    settings_of(desc_act=True)(tmp_path / "m")
    back = load(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(back.module()(IDS), graph.module()(IDS))


def test_zero_biases_that_some_tools_add_are_dropped(tmp_path):
    save(quantized("w4g32"), tmp_path / "m", format="gptq")
    rewrite(tmp_path / "m", lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}))
    assert load(tmp_path / "m").config == CONFIG
    rewrite(tmp_path / "m", lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}))
    with pytest.raises(InputError, match=r"up_proj\.bias"):
        load(tmp_path / "m")
