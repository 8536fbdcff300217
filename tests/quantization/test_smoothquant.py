"""SmoothQuant's fold is exact and makes channels alike; int8 activations are rounded where linears read, and nowhere
else."""

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.calibration.walk import walk
from tinycompress.errors import InputError
from tinycompress.graph.config import LINEARS, Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.topology import feeds
from tinycompress.quantization.activation_rounding import round_activations, simulate, static_ranges
from tinycompress.quantization.rtn import RTN
from tinycompress.quantization.smoothquant import SmoothQuant, peaks, smooth_scale


def double(tied=False):
    """Biases, grouped queries, layers without a sublayer; float64."""
    layers = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(6, 2, 48))
    config = Config(
        vocab_size=64,
        hidden_size=48,
        head_dim=8,
        layers=layers,
        max_position=64,
        tie_embeddings=tied,
        biases=frozenset(LINEARS),
    )
    graph = random_graph(config)
    return graph.replace(weights={n: w.double() for n, w in graph.weights.items()})


@pytest.fixture
def tokens():
    return torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))


def outliers(graph):
    """One channel in eight of every layer norm is 30 times as large."""
    changed = {}
    for n, w in graph.weights.items():
        if "layernorm" in n:
            changed[n] = w.clone()
            changed[n][::8] *= 30
    return graph.replace(weights=changed)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("writers", [True, False])
def test_smoothing_is_exact(tokens, alpha, writers):
    graph = outliers(double(tied=writers))
    out = SmoothQuant(tokens, alpha, writers)(graph)
    reference = graph.module()(tokens)
    assert torch.allclose(out.module()(tokens), reference, atol=1e-8 * reference.abs().max().item())
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(out.weights[name], graph.weights[name]) != writers
    assert out.history == (f"SmoothQuant(alpha={alpha}, writers={writers})",)


def test_alpha_one_makes_the_channels_of_every_activation_alike(tokens):
    out = SmoothQuant(tokens, alpha=1.0)(outliers(double()))

    def visit(feed, inputs):
        if feed.layer is not None:
            heads = peaks(inputs).reshape(-1, feed.repeat, 8) if feed.repeat > 1 else peaks(inputs)[:, None, None]
            assert torch.allclose(
                heads.amax(1), torch.ones(()), atol=1e-4
            )  # the largest of the query heads of a KV channel

    walk(out, tokens, visit)


def test_the_scale_is_the_formula_and_shared_by_the_heads_of_a_kv_channel():
    g = torch.Generator().manual_seed(0)
    x, weights = torch.rand(12, generator=g) + 0.1, [torch.randn(5, 12, generator=g), torch.randn(3, 12, generator=g)]
    naive = [x[j].item() ** 0.7 / max(w[:, j].abs().max().item() for w in weights) ** 0.3 for j in range(12)]
    assert torch.allclose(smooth_scale(x, weights, 0.7), torch.tensor(naive).double(), rtol=1e-5)
    s = smooth_scale(x, weights[:1], 0.7, repeat=3, head_dim=2)  # two KV heads, three query heads each, head_dim 2
    for kv in range(2):
        for d in range(2):
            at = [kv * 6 + h * 2 + d for h in range(3)]
            assert torch.allclose(
                s[at],
                torch.tensor(x[at].max().item() ** 0.7 / weights[0][:, at].abs().max().item() ** 0.3).double(),
                rtol=1e-5,
            )


def test_dead_channels_keep_their_scale():
    x, w = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([[1.0, 0.0, 4.0]])
    assert smooth_scale(x, [w], 0.5).tolist() == [1.0, 1.0, (3 / 4) ** 0.5]


def error(graph, module, ids):
    return (module(ids) - graph.module()(ids)).square().mean().item()


def test_smoothing_helps_eight_bit_activations(tokens):
    graph = outliers(double())
    smooth = SmoothQuant(tokens, 0.5)(graph)
    for plain, smoothed in (
        (simulate(graph), simulate(smooth)),
        (simulate(graph, ranges=static_ranges(graph, tokens)), simulate(smooth, ranges=static_ranges(smooth, tokens))),
    ):
        assert error(graph, smoothed, tokens) < 0.5 * error(graph, plain, tokens)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 16), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
def test_each_position_is_rounded_to_its_own_grid(bits, rows, width, seed):
    x = (
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * torch.arange(rows)[:, None]
    )
    top = 2 ** (bits - 1) - 1
    for row, back in zip(x, round_activations(x, top)):
        step = row.abs().max() / top
        assert ((row - back).abs() <= step / 2 * (1 + 1e-9)).all()
        assert step == 0 or torch.allclose((back / step).round(), back / step, atol=1e-6)
    clipped = round_activations(x, top, fixed=0.5)
    assert clipped.abs().max() <= 0.5 + 1e-12


def test_every_linear_of_the_layers_reads_rounded_inputs_and_the_head_does_not(nonuniform):
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1))
    module, seen = simulate(nonuniform, bits=4), {}
    for feed in feeds(nonuniform.config):
        for name in feed.readers:
            module.get_submodule(name).register_forward_pre_hook(
                lambda m, args, name=name: seen.__setitem__(name, args[0])
            )
    with torch.no_grad():
        module(ids)
    for name, x in seen.items():
        steps = (x / (x.abs().amax(-1, keepdim=True) / 7)).flatten()
        assert torch.allclose(steps, steps.round(), atol=1e-3) == (name != "lm_head")
    assert len(seen) == sum(len(feed.readers) for feed in feeds(nonuniform.config))


def test_more_bits_lose_less_and_packed_weights_work_too(nonuniform):
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(1))
    packed = RTN(QuantSpec(4, 16))(nonuniform)
    losses = [error(packed, simulate(packed, bits), ids) for bits in (4, 8, 16)]
    assert losses[0] > 30 * losses[1] > 30 * losses[2] > 0
    ranges = static_ranges(nonuniform, ids)
    assert error(nonuniform, simulate(nonuniform, ranges=ranges), ids) > 0


def test_bad_input_is_named(nonuniform, tokens):
    for bad in (-0.1, 1.5):
        with pytest.raises(InputError, match="alpha"):
            SmoothQuant(tokens, bad)
    name = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj.*NaN or infinite"):
        SmoothQuant(tokens)(nonuniform.replace(weights={name: nonuniform.weights[name] * float("inf")}))
    with pytest.raises(InputError, match="quantize last"):
        SmoothQuant(tokens)(RTN(QuantSpec(4, 16))(nonuniform))
    with pytest.raises(InputError, match="2 … 16"):
        simulate(nonuniform, bits=1)
    with pytest.raises(InputError, match=r"no range for .*q_proj"):
        simulate(nonuniform, ranges={})
