"""The first passes: algebra, naive oracles, non-uniform graphs, bad calibration."""

import pytest
import torch

from tinycompress.calibration.gram import gram
from tinycompress.calibration.walk import walk
from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.topology import feeds
from tinycompress.pruning.prune_ffn import PruneFFN, channel_scores, refit_columns
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.rtn import RTN

SPEC = QuantSpec(4, 16)


@pytest.fixture
def tokens(nonuniform):
    return torch.randint(nonuniform.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))


def correlated(n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) @ torch.randn(k, k, generator=g) * torch.rand(k, generator=g)


# calibrate


def test_the_walk_shows_what_the_forward_computes(nonuniform, tokens):
    """Hooks on the real forward see the same inputs, feed by feed."""
    module = nonuniform.module()
    seen = {}
    for feed in feeds(nonuniform.config):
        owner = module.get_submodule(feed.readers[0])
        owner.register_forward_pre_hook(lambda m, args, key=feed.readers[0]: seen.__setitem__(key, args[0]))
    with torch.no_grad():
        module(tokens)
    order = []

    def visit(feed, inputs):
        order.append(feed)
        assert torch.allclose(torch.cat(list(inputs)).flatten(0, 1), seen[feed.readers[0]].flatten(0, -2), atol=1e-5)

    walk(nonuniform, tokens, visit)
    assert tuple(order) == feeds(nonuniform.config)


def test_the_walk_shows_the_replaced_prefix_and_the_reference(nonuniform, tokens):
    names = [n for n in nonuniform.weights if n.endswith("proj.weight")]
    changed = nonuniform.replace(weights={n: nonuniform.weights[n] * 0.9 for n in names})
    expected, original = {}, {}

    def record(into):
        return lambda feed, inputs: into.__setitem__(feed, torch.cat(list(inputs)))

    walk(changed, tokens, record(expected))
    walk(nonuniform, tokens, record(original))

    def visit(feed, inputs):
        assert torch.allclose(torch.cat(list(inputs)), expected[feed], atol=1e-5)
        assert torch.allclose(torch.cat(list(inputs.reference)), original[feed], atol=1e-5)
        return {n: changed.weights[n] for n in (f"{r}.weight" for r in feed.readers) if n in names}

    out = walk(nonuniform, tokens, visit, reference=True)
    assert all(out.weights[n] is changed.weights[n] for n in names)


def test_gram_is_the_sum_of_outer_products(nonuniform, tokens):
    def visit(feed, inputs):
        x = torch.cat(list(inputs)).flatten(0, 1).double()
        assert torch.allclose(gram(feed, inputs), x.T @ x, rtol=1e-4, atol=1e-3)

    walk(nonuniform, tokens, visit)


def test_bad_calibration_is_named(nonuniform):
    for bad, names in (
        (torch.zeros(2, 8), "integer ids"),
        (torch.zeros(2, 1, dtype=torch.long), "at least 2"),
        (torch.full((2, 8), 10**6), "vocabulary"),
        (torch.zeros(1, nonuniform.config.max_position + 1, dtype=torch.long), "context"),
    ):
        with pytest.raises(InputError, match=names):
            GPTQ(bad, SPEC)(nonuniform)


def test_non_finite_activations_name_the_linears(nonuniform, tokens):
    name = "model.layers.0.self_attn.v_proj.weight"
    broken = nonuniform.replace(weights={name: torch.full_like(nonuniform.weights[name], 1e38)})
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.o_proj.*NaN or infinite"):
        GPTQ(tokens, SPEC)(broken)


# PruneFFN


def test_refit_with_nothing_removed_changes_nothing():
    x, W = correlated(200, 24).double(), torch.randn(8, 24, dtype=torch.float64)
    assert torch.allclose(refit_columns(W, x.T @ x, torch.arange(24)), W, atol=1e-12)


def test_refit_is_least_squares():
    x, W = correlated(500, 24).double(), torch.randn(8, 24, dtype=torch.float64)
    keep = torch.arange(0, 24, 2)
    ours = refit_columns(W, x.T @ x, keep, damping=1e-12)
    oracle = torch.linalg.lstsq(x[:, keep], x @ W.T).solution.T
    assert torch.allclose(ours, oracle, atol=1e-5)


def test_scores_are_each_channels_output_energy():
    x, W = correlated(50, 6).double(), torch.randn(4, 6, dtype=torch.float64)
    energy = torch.stack([(x[:, j, None] * W[:, j]).square().sum() for j in range(6)])
    assert torch.allclose(channel_scores(W, x.T @ x), energy)


def test_prune_ffn_on_a_nonuniform_graph(nonuniform, tokens):
    out = PruneFFN(tokens, keep=0.5, multiple_of=16)(nonuniform)
    assert [layer.ffn_dim for layer in out.config.layers] == [
        round(la.ffn_dim / 2 / 16) * 16 for la in nonuniform.config.layers
    ]
    reference = nonuniform.module()(tokens)
    error = lambda g: (g.module()(tokens) - reference).square().mean().item()  # noqa: E731
    assert error(out) < 0.9 * error(PruneFFN(tokens, keep=0.5, multiple_of=16, refit=False)(nonuniform))


def test_keeping_everything_changes_nothing(nonuniform, tokens):
    out = PruneFFN(tokens, keep=1.0)(nonuniform)
    assert out.config == nonuniform.config
    assert all(torch.equal(out.weights[n], w) for n, w in nonuniform.weights.items())


def test_shares_a_layer(tiny):
    tokens = torch.randint(tiny.config.vocab_size, (4, 16))
    out = PruneFFN(tokens, keep=(0.5, 1.0))(tiny)
    full = tiny.config.layers[0].ffn_dim
    assert [layer.ffn_dim for layer in out.config.layers] == [full // 2, full]


def test_bad_shares_are_refused(tiny):
    tokens = torch.zeros(2, 8, dtype=torch.long)
    for bad in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(InputError, match="keep"):
            PruneFFN(tokens, keep=bad)
    with pytest.raises(InputError, match="3 shares"):
        PruneFFN(tokens, keep=(0.5,) * 3)(tiny)
    with pytest.raises(InputError, match="rounded to 0"):
        PruneFFN(tokens, keep=0.01, multiple_of=64)(tiny)
    with pytest.raises(InputError, match="quantize last"):
        PruneFFN(tokens, keep=0.5)(RTN(SPEC)(tiny))


def test_passes_keep_calibration_out_of_their_repr(tiny):
    tokens = torch.zeros(2, 8, dtype=torch.long)
    for p in (GPTQ(tokens), PruneFFN(tokens)):
        assert "tensor" not in repr(p) and p == type(p)(tokens + 1)


def test_prune_then_quantize(nonuniform, tokens):
    graph = GPTQ(tokens, SPEC)(PruneFFN(tokens, keep=0.5, multiple_of=16)(nonuniform))
    assert len(graph.history) == 2 and isinstance(graph, Graph)
    assert torch.isfinite(graph.module()(tokens)).all()
