"""Folds and rotations change nothing in float: float64 logits within 1e-8, on non-uniform graphs too."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.graph.config import LINEARS, Config, Layer, shapes
from tinycompress.graph.edit import fold, untie
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.topology import feeds, stream_norms
from tinycompress.quantization.awq import AWQ, CLIPS, awq_scale, clip_grid, mean_magnitude
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.hqq import HQQ, hqq_quantize
from tinycompress.quantization.rotate import Rotate, hadamard, orthogonal
from tinycompress.quantization.rtn import RTN, rtn_quantize

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])


def double(graph: Graph) -> Graph:
    return graph.replace(weights={n: w.double() for n, w in graph.weights.items()})


def biased(tied: bool) -> Graph:
    layers = (Layer(4, 2, 96, window=5), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0, rope=False), Layer(6, 2, 48))
    config = Config(
        *(64, 48, 8, layers), max_position=64, tie_embeddings=tied, biases=frozenset(LINEARS), qk_norm_eps=1e-6
    )
    g = torch.Generator().manual_seed(0)
    norms = {n: (torch.rand(s, generator=g) + 0.5).double() for n, s in shapes(config).items() if "norm" in n}
    return Graph.random(config, std=0.2, dtype=torch.float64).replace(weights=norms)


@pytest.fixture
def tokens():
    return torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_every_fold_is_exact(seed):
    graph = biased(tied=False)
    reference = graph.module()(IDS)
    g = torch.Generator().manual_seed(seed)
    for feed in feeds(graph.config):
        K = graph.linear(feed.readers[0]).shape[1]
        d = graph.config.head_dim
        heads = (
            torch.rand(
                K // (feed.repeat * d) if feed.repeat > 1 else K, d if feed.repeat > 1 else 1, generator=g
            ).double()
            * 4
            + 0.1
        )
        scale = heads[:, None].expand(-1, feed.repeat, -1).reshape(-1) if feed.repeat > 1 else heads[:, 0]
        graph = graph.replace(weights=fold(graph, feed, scale))
    assert torch.allclose(graph.module()(IDS), reference, atol=1e-8)


def test_a_fold_that_query_heads_disagree_on_is_refused():
    graph = biased(tied=False)
    feed = next(f for f in feeds(graph.config) if f.repeat > 1)
    with pytest.raises(InputError, match="KV head"):
        fold(graph, feed, torch.rand(graph.linear(feed.readers[0]).shape[1]) + 0.5)


def test_a_fold_into_packed_rows_is_exact():
    graph = biased(tied=False)
    feed = next(f for f in feeds(graph.config) if f.source.endswith("up_proj"))
    name = f"{feed.source}.weight"
    packed = graph.replace(weights={name: rtn_quantize(graph.weights[name], QuantSpec(4, 16))})
    packed = packed.replace(weights={name: packed.weights[name].to(dtype=torch.float64)})
    changed = packed.replace(weights=fold(packed, feed, torch.rand(graph.linear(feed.readers[0]).shape[1]) + 0.5))
    assert isinstance(changed.weights[name], QuantTensor)
    assert torch.allclose(changed.module()(IDS), packed.module()(IDS), atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, True)])
def test_rotations_are_exact(tied, kind, parts):
    graph = biased(tied)
    out = Rotate(kind, *parts)(graph)
    assert torch.allclose(out.module()(IDS), graph.module()(IDS), atol=1e-8)
    residual, _ = parts
    assert all(
        torch.equal(w, torch.ones_like(w) if residual and n in stream_norms(graph.config) else graph.weights[n])
        for n, w in out.weights.items()
        if "norm" in n
    )
    assert out.config.tie_embeddings == (tied and not residual)
    v = "model.layers.0.self_attn.v_proj.weight"
    assert not torch.allclose(out.weights[v], graph.weights[v])


def test_rotation_survives_dead_norm_channels():
    graph = biased(tied=False)
    name = "model.layers.0.input_layernorm.weight"
    weight = graph.weights[name].clone()
    weight[::3] = 0
    graph = graph.replace(weights={name: weight})
    assert torch.allclose(Rotate()(graph).module()(IDS), graph.module()(IDS), atol=1e-8)


def test_rotation_spreads_outliers(tiny):
    name = "model.layers.1.mlp.gate_proj.weight"
    w = tiny.weights[name].clone()
    w[:, 7] *= 50
    kurtosis = lambda t: (t.double() ** 4).mean() / (t.double() ** 2).mean() ** 2  # noqa: E731
    graph = tiny.replace(weights={name: w})
    assert kurtosis(Rotate()(graph).weights[name]) < 0.5 * kurtosis(w)


@pytest.mark.parametrize("n", [1, 2, 4, 12, 16, 20, 28, 36, 44, 64, 128, 576, 1536, 2048, 5632])
def test_hadamard_matrices(n):
    H = hadamard(n)
    assert H is not None and set(H.unique().tolist()) <= {-1.0, 1.0}
    rows = torch.randperm(n)[:64]  # all of the small ones, a sample of the large
    assert torch.equal(H[rows] @ H.T, n * torch.eye(n, dtype=torch.float64)[rows])


@pytest.mark.parametrize("n", [3, 7, 48, 50])
def test_orthogonal_matrices_of_any_order(n):
    for kind in ("hadamard", "random"):
        Q = orthogonal(n, kind, seed=1)
        assert torch.allclose(Q @ Q.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
        assert (
            torch.equal(Q, orthogonal(n, kind, seed=1)) and not torch.equal(Q, orthogonal(n, kind, seed=2))
        ) or n == 1


def test_untying_keeps_the_function():
    graph = biased(tied=True)
    assert torch.equal(untie(graph).module()(IDS), graph.module()(IDS))


def test_awq_without_rounding_changes_nothing(tokens):
    graph = biased(tied=True)
    out = AWQ(tokens, QuantSpec(3, 8), quantize=False)(graph)
    assert torch.allclose(out.module()(IDS), graph.module()(IDS), atol=1e-8)
    assert not torch.equal(
        out.weights["model.layers.0.self_attn.o_proj.weight"], graph.weights["model.layers.0.self_attn.o_proj.weight"]
    )
    assert GPTQ(tokens, QuantSpec(3, 8))(out).history[0].startswith("AWQ")


def test_the_awq_scale_is_the_best_of_the_grid_it_searches():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g) * torch.logspace(-1, 1, 64)
    W = torch.randn(32, 64, generator=g)
    spec = QuantSpec(3, 32)

    def error(s):
        from tinycompress.quantization.grid_search import find_grid, round_to_grid

        scales, zeros = find_grid("w", W * s, spec, x.square().mean(0) / s.square())
        q = QuantTensor.from_ints(round_to_grid(W * s, scales, zeros, spec), scales, zeros, spec).dequantize()
        return ((q / s - W) @ x.T).square().sum().item()

    scale = awq_scale([W], x.T @ x, x.abs().mean(0), spec)
    assert error(scale) < error(torch.ones(64))
    for r in (0.2, 0.5, 0.9):
        s = x.abs().mean(0).pow(r)
        assert error(scale) <= error(s / (s.max() * s.min()).sqrt()) * 1.001


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_clip_is_the_best_of_those_tried_by_the_output_of_its_group(symmetric):
    """As AWQ writes it: group by group, the outputs of all positions with clamped and rounded weights."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=g) @ torch.randn(32, 32, generator=g)  # correlated channels
    W = torch.randn(6, 32, generator=g) ** 3
    spec = QuantSpec(3, 16, symmetric)
    scales, _ = clip_grid("w", W, x.double().T @ x.double(), spec)
    chosen = set()
    for row in range(6):
        for group in range(2):
            at = slice(16 * group, 16 * group + 16)
            w, xs, top = W[row, at], x[:, at], 7
            tried = []
            for clip in CLIPS:
                edge = clip * w.abs().max()
                low, high = w.clamp(-edge, edge).min().clamp_max(0), w.clamp(-edge, edge).max().clamp_min(0)
                if symmetric:
                    s, q = edge.item() / 3, (w / (edge / 3)).round().clamp(-4, 3)
                else:
                    s = ((high - low) / top).item()
                    z = (-low / s).round().clamp(0, top)
                    q = ((w / s).round() + z).clamp(0, top) - z
                tried.append((((q * s - w) @ xs.T).square().sum().item(), s))
            best = min(tried)
            chosen.add(tried.index(best))
            assert abs(scales[row, group].item() - best[1]) < 1e-5 * best[1], (row, group, tried, scales[row, group])
    assert len(chosen) > 2  # neither the whole range for all, nor the smallest


def test_awq_rounds_on_grids_weighted_by_the_folded_inputs(nonuniform):
    from tinycompress.calibration.gram import gram
    from tinycompress.calibration.walk import walk
    from tinycompress.quantization.grid_search import find_grid

    tokens, spec, seen = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0)), QuantSpec(3, 16), {}
    norms = {n: w * torch.logspace(-1, 1, 64) for n, w in nonuniform.weights.items() if "layernorm" in n}
    graph = nonuniform.replace(weights=norms)
    walk(
        graph,
        tokens,
        lambda feed, inputs: seen.setdefault(feed.source, (gram(feed, inputs), mean_magnitude(inputs))) and None,
    )
    H, magnitude = seen["model.layers.0.input_layernorm"]
    names = [f"model.layers.0.self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj")]
    s = awq_scale([graph.tensor(n) for n in names], H, magnitude, spec)
    assert s.max() / s.min() > 2
    scales, _ = find_grid("q", graph.tensor(names[0]) * s, spec, (H.diagonal() / s.double().square()).float())
    assert torch.allclose(AWQ(tokens, spec)(graph).linear(names[0].removesuffix(".weight")).scales, scales, rtol=1e-5)


def test_awq_clips_all_but_queries_and_keys(tokens):
    graph = biased(tied=False)
    covering = AWQ(tokens, QuantSpec(3, 16, search="minmax"), gqa=False)(graph)
    clipped = AWQ(tokens, QuantSpec(3, 16), gqa=False, clip=True)(graph)
    at = "model.layers.0"  # further on, the inputs differ already
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        assert torch.equal(clipped.linear(f"{at}.{name}").scales, covering.linear(f"{at}.{name}").scales)
    narrower = clipped.linear(f"{at}.self_attn.v_proj").scales / covering.linear(f"{at}.self_attn.v_proj").scales
    assert narrower.max() <= 1 + 1e-6 and narrower.min() < 0.9
    with pytest.raises(InputError, match="clip"):
        AWQ(tokens, QuantSpec.parse("w4g16-lpbq"), clip=True)


def test_the_magnitude_of_a_kv_channel_is_averaged_over_its_query_heads():
    from tinycompress.calibration.walk import Inputs

    x = torch.rand(2, 3, 2 * 3 * 4)  # two KV heads, three query heads each, head_dim 4
    m = mean_magnitude(Inputs(lambda: iter([x])), repeat=3, head_dim=4).reshape(2, 3, 4)
    assert torch.allclose(m[:, 0], m[:, 2]) and torch.allclose(m[:, 0], x.mean((0, 1)).reshape(2, 3, 4).mean(1))


def test_awq_is_no_worse_than_its_own_grid_without_scales(nonuniform):
    tokens = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))
    channels = torch.logspace(-1.5, 1.5, 64)  # inputs whose channels differ widely: what AWQ is for
    norms = {n: w * channels for n, w in nonuniform.weights.items() if "layernorm" in n}
    graph = nonuniform.replace(weights=norms)
    reference = graph.module()(tokens)
    out = AWQ(tokens, QuantSpec(3, 16))(graph)
    assert all(isinstance(w, QuantTensor) for n, w in out.weights.items() if n.endswith("proj.weight"))
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    assert error(out) < error(RTN(QuantSpec(3, 16))(graph))


@pytest.mark.parametrize("symmetric", [True, False])
def test_hqq_fits_the_p_norm_better_than_rounding(symmetric):
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) ** 3  # heavy tails, where it matters
    spec = QuantSpec(3, 64, symmetric)
    loss = lambda q: (q.dequantize() - w).abs().pow(0.7).sum().item()  # noqa: E731
    assert loss(hqq_quantize(w, spec)) < loss(rtn_quantize(w, spec))


def test_hqq_on_a_nonuniform_graph(nonuniform):
    out = HQQ(QuantSpec(4, 16, False))(nonuniform)
    assert out.history[-1].startswith("HQQ") and torch.isfinite(out.module()(IDS)).all()


def test_rotation_wants_a_dense_graph(tiny):
    with pytest.raises(InputError, match="quantize last"):
        Rotate()(RTN(QuantSpec(4, 16))(tiny))
    with pytest.raises(InputError, match="kind"):
        Rotate("spiral")
    assert dataclasses.replace(Rotate(), seed=3) != Rotate()
