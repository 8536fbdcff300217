"""torchao as an oracle of the grid arithmetic, and packed weights as its tensors, both ways."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import BITS, QuantSpec, QuantTensor
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.rtn import RTN, rtn_quantize
from tinycompress.quantization.torchao import fake_quant_module, from_torchao, packed_graph, to_torchao, torchao_module

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torchao's own, at import
primitives = pytest.importorskip("torchao.quantization.quant_primitives")
IDS = torch.arange(24)[None]
specs = st.builds(
    QuantSpec,
    st.sampled_from(BITS),
    st.sampled_from([None, 8, 16, 32]),
    st.booleans(),
    st.sampled_from(["minmax", "mse"]),
)


@settings(max_examples=40, deadline=None)
@given(specs, st.integers(1, 6), st.integers(0, 99))
def test_rounding_and_dequantization_are_torchaos(spec, rows, seed):
    w = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    scales, zeros = find_grid("w", w, spec)
    q = round_to_grid(w, scales, zeros, spec)
    block = (1, spec.group("w", 64))
    zero = torch.full_like(scales, spec.zero).int() if zeros is None else zeros.int()
    theirs = primitives.quantize_affine(w, block, scales, zero, torch.uint8, 0, 2**spec.bits - 1)
    assert (
        (q.int() - theirs.int()).abs() > 0
    ).float().mean() <= 0.02  # it multiplies by 1 / s: ties may fall otherwise
    ours = QuantTensor.from_ints(q, scales, zeros, spec).dequantize()
    back = primitives.dequantize_affine(q, block, scales, zero, torch.uint8, 0, 2**spec.bits - 1)
    assert torch.equal(ours, back)


@pytest.mark.parametrize("bits", BITS)
def test_the_asymmetric_minmax_grid_is_torchaos(bits):
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(bits))
    scales, zeros = find_grid("w", w, QuantSpec(bits, 16, False, search="minmax"))
    s, z = primitives.choose_qparams_affine(
        w,
        primitives.MappingType.ASYMMETRIC,
        (1, 16),
        torch.uint8,
        0,
        2**bits - 1,
        eps=1e-10,
        zero_point_dtype=torch.int32,
    )
    assert torch.allclose(scales, s.reshape(16, 4), rtol=1e-6) and torch.equal(zeros.int(), z.reshape(16, 4))


@settings(max_examples=30, deadline=None)
@given(specs, st.integers(1, 6), st.integers(0, 99))
def test_packed_weights_are_the_same_tensor_both_ways(spec, rows, seed):
    weight = rtn_quantize(torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)), spec)
    tensor = to_torchao(weight)
    assert torch.equal(tensor.dequantize(), weight.dequantize())
    back = from_torchao(tensor)
    assert torch.equal(back.ints(), weight.ints()) and torch.equal(back.scales, weight.scales)
    assert torch.equal(back.dequantize(), weight.dequantize())


def test_what_torchao_quantized_is_taken_over():
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    linear = torch.nn.Linear(64, 48, bias=False)
    quantize_(linear, IntxWeightOnlyConfig(torch.int4, PerGroup(32)))
    x = torch.randn(3, 64)
    weight = from_torchao(linear.weight)
    assert str(weight.grid) == "w4g32"
    assert torch.allclose(torch.nn.functional.linear(x, weight.dequantize()), linear(x), atol=1e-5)
    with pytest.raises(InputError, match=r"a Parameter.*Intx"):
        from_torchao(torch.nn.Linear(8, 8).weight)


@pytest.mark.parametrize("text", ["w4g16", "w3g16", "w8g16", "w2g16-asym", "w4"])
@pytest.mark.parametrize("which", ["tiny", "nonuniform"])
def test_the_module_computes_our_logits(which, text, request):
    from torchao.quantization import IntxUnpackedToInt8Tensor

    graph = RTN(QuantSpec.parse(text), head=True)(request.getfixturevalue(which))
    module = torchao_module(graph)
    kinds = {type(m.weight) for m in module.modules() if isinstance(m, torch.nn.Linear)}
    assert all(issubclass(kind, IntxUnpackedToInt8Tensor) for kind in kinds) and kinds
    assert torch.allclose(module(IDS), graph.module()(IDS), atol=1e-4)


def test_tied_tables_and_biases_stay(tiny):
    config = dataclasses.replace(tiny.config, tie_embeddings=True, biases=frozenset({"q_proj", "o_proj"}))
    graph = QuantizeEmbedding(QuantSpec(8, 32))(RTN(QuantSpec(4, 16))(random_graph(config)))
    assert torch.allclose(torchao_module(graph)(IDS), graph.module()(IDS), atol=1e-4)
    half = torchao_module(graph, dtype=torch.bfloat16)(IDS)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), graph.module()(IDS), atol=0.3)
    with pytest.raises(InputError, match=r"float64.*float32"):
        to_torchao(graph.weights["model.layers.0.mlp.up_proj.weight"], torch.float64)


def test_training_through_fake_quantizers_lowers_the_loss_and_packs_what_was_seen(nonuniform):
    spec = QuantSpec(4, 16)
    module = fake_quant_module(nonuniform, spec)
    before = {name: weight.clone() for name, weight in nonuniform.weights.items()}
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        logits = module(IDS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in nonuniform.weights.items())
    trained = packed_graph(nonuniform, module, spec)
    with torch.no_grad():
        seen = module.eval()(IDS)
    assert torch.allclose(trained.module()(IDS), seen, atol=1e-4)
    assert {w.grid.bits for w in trained.weights.values() if isinstance(w, QuantTensor)} == {4}


def test_asymmetric_training_and_packed_graphs_are_refused(tiny):
    with pytest.raises(InputError, match=r"w4g16-asym.*symmetric"):
        fake_quant_module(tiny, QuantSpec(4, 16, False))
    with pytest.raises(InputError, match="already w4g16"):
        fake_quant_module(RTN(QuantSpec(4, 16))(tiny), QuantSpec(4, 16))
