"""Structured pruning: closed forms against naive ones, criteria against their formulas, budgets against brute force, whole graphs."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.calibration.gram import cross_gram, stream_gram
from tinycompress.calibration.walk import walk
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.topology import axes
from tinycompress.pruning.allocation import Item, Target, apply, by_threshold, fixed_price, items, optimal, uniform
from tinycompress.pruning.importance import CRITERIA, block_influence, collect, hidden_importance, root, sensitivities
from tinycompress.pruning.prune import Prune, with_biases
from tinycompress.pruning.refit import (
    bias_for,
    keep_best,
    obs_losses,
    plain_curve,
    refit_columns,
    refit_curve,
    wanted_output,
)
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.rtn import RTN
from tinycompress.recipe import prune_pass

BOTH = ("ffn", "heads")
MIXED = (Layer(4, 2, 96), Layer(6, 2, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


def small(layers=MIXED, **changes) -> Graph:
    return random_graph(
        Config(**(dict(vocab_size=128, hidden_size=64, head_dim=16, layers=layers, max_position=64) | changes))
    )


def ids(n: int = 6, length: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(128, (n, length), generator=torch.Generator().manual_seed(seed))


def problem(outputs=6, inputs=24, n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x


def squared_loss(W, x, kept):
    """What a least-squares fit on the kept inputs leaves of W x."""
    y = x @ W.T
    if not len(kept):
        return y.square().sum()
    return (y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution).square().sum()


# compensation


@pytest.mark.parametrize("width", [1, 4])
def test_obs_is_the_greedy_search_with_a_refit_at_every_step(width):
    """The oracle tries every unit that is left, refits, and removes the cheapest."""
    W, x = problem()
    units = torch.arange(24).view(-1, width)
    losses = obs_losses(W, x.T @ x, width, damping=1e-14, steps=24)
    left = list(range(len(units)))
    for expected in losses.argsort().tolist():
        trials = {
            u: squared_loss(W, x, torch.cat([units[v] for v in left if v != u]) if len(left) > 1 else []) for u in left
        }
        best = min(trials, key=trials.get)
        assert best == expected
        assert torch.allclose(losses[best], trials[best], rtol=1e-6)
        left.remove(best)


def test_obs_in_steps_loses_little_more_than_one_by_one():
    W, x = problem(inputs=64, n=1000)
    H = x.T @ x
    exact, blocked = (obs_losses(W, H, steps=steps).argsort()[:32] for steps in (64, 8))
    kept = lambda gone: torch.tensor([j for j in range(64) if j not in gone.tolist()])  # noqa: E731
    assert squared_loss(W, x, kept(blocked)) < 1.3 * squared_loss(W, x, kept(exact))


def test_obs_takes_heads_from_every_group_in_turn():
    W, x = problem(inputs=24)
    order = obs_losses(W, x.T @ x, width=2, groups=3).argsort().view(4, 3)  # 12 heads in 3 groups of 4
    assert all(sorted((heads // 4).tolist()) == [0, 1, 2] for heads in order)


@pytest.mark.parametrize("width", [1, 3])
def test_curves_hold_every_loss_of_an_order(width):
    W, x = problem()
    n, H = 24 // width, x.T @ x
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    units = torch.arange(24).view(n, width)
    with_refit, without = refit_curve(W, H, order, width, damping=1e-14), plain_curve(W, H, order, width)
    for k in range(n + 1):
        gone, kept = (units[part].flatten() for part in (order[:k], order[k:]))
        assert torch.allclose(
            with_refit[k], squared_loss(W, x, kept) if k else torch.tensor(0.0).double(), rtol=1e-6, atol=1e-6
        )
        assert torch.allclose(without[k], (x[:, gone] @ W[:, gone].T).square().sum())


def test_the_obs_update_is_the_refit():
    """Removal step by step loses what one least-squares fit at the end loses."""
    W, x = problem()
    H = x.T @ x
    losses = obs_losses(W, H, damping=1e-14, steps=24)
    order = losses.argsort()
    assert torch.allclose(losses[order], refit_curve(W, H, order, damping=1e-14)[1:], rtol=1e-8)


def test_refit_reaches_for_the_float_models_stream():
    W, x = problem()
    g = torch.Generator().manual_seed(2)
    seen = x + 0.3 * torch.randn(x.shape, generator=g, dtype=torch.float64)
    gap = torch.randn(len(x), 6, generator=g, dtype=torch.float64)  # h - ĥ
    H, keep = seen.T @ seen, torch.arange(0, 24, 2)
    for share in (0.0, 0.5, 1.0):
        target = (1 - share) * seen @ W.T + share * (x @ W.T + gap)
        ours = refit_columns(W, H, keep, 1e-14, wanted_output(W, H, (x @ W.T + gap).T @ seen, share))
        assert torch.allclose(ours, torch.linalg.lstsq(seen[:, keep], target).solution.T, atol=1e-8)
    same = wanted_output(W, x.T @ x, W @ x.T @ x, 1.0)
    assert torch.allclose(
        refit_columns(W, x.T @ x, torch.arange(24), wanted=same), W, atol=1e-12
    )  # nothing removed, nothing changed


def test_the_walk_shows_how_the_streams_differ():
    graph, tokens = small(), ids(3)
    halved = {n: w / 2 for n, w in graph.weights.items() if n.endswith("v_proj.weight")}
    module, other = graph.module(), graph.replace(weights=halved).module()
    streams = []
    for m in (module, other):
        m.get_submodule("model.layers.1.post_attention_layernorm").register_forward_pre_hook(
            lambda m, args: streams.append(args[0].clone())
        )
        m(tokens)
    half = len(streams) // 2
    gap = torch.cat([(a - b).flatten(0, -2) for a, b in zip(streams[:half], streams[half:])])

    def visit(feed, inputs):
        if feed.layer == 1 and feed.readers[0].endswith("down_proj"):
            x = torch.cat([b.flatten(0, 1) for b in inputs])
            W = torch.zeros(64, x.shape[1])
            assert (
                torch.allclose(stream_gram(inputs, W), (gap.T @ x).double(), rtol=1e-3, atol=1e-2)
                and gap.abs().max() > 0.01
            )
            W = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
            difference = stream_gram(inputs, W) - stream_gram(inputs, torch.zeros_like(W))
            assert torch.allclose(difference, W.double() @ cross_gram(inputs), rtol=1e-3, atol=1e-2)
        return {f"{n}.weight": halved[f"{n}.weight"] for n in feed.readers if f"{n}.weight" in halved}

    walk(graph, tokens, visit, reference=True)


# statistics and criteria


@pytest.fixture(scope="module")
def measured():
    graph, tokens = small(), ids()
    sensitivity = sensitivities(graph, tokens, gradients=True)
    names = [a for a in axes(graph.config) if a.endswith((".ffn", "heads"))]
    return graph, tokens, sensitivity, collect(graph, tokens, names, sensitivity)


def seen_by(graph, tokens, name):
    seen = []
    module = graph.module()
    module.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    for window in tokens:  # the forward takes an FFN some rows at a time: one window, one entry
        module(window[None])
    return torch.stack(seen).double()  # (N, T, K)


@pytest.mark.parametrize("name", ["layers.0.ffn", "layers.1.heads", "layers.1.kv_heads"])
def test_criteria_are_their_formulas(measured, name):
    graph, tokens, _, stats = measured
    s, axis = stats[name], axes(graph.config)[name]
    i = name.split(".")[1]
    reader = f"model.layers.{i}.mlp.down_proj" if name.endswith("ffn") else f"model.layers.{i}.self_attn.o_proj"
    x, W = seen_by(graph, tokens, reader), graph.weights[f"{reader}.weight"].double()
    u = W.shape[1] // axis.size
    by_unit = lambda v: v.view(axis.size, u).sum(1)  # noqa: E731
    expected = {
        "wanda_sp": by_unit(W.abs().mean(0) * x.square().sum((0, 1)).sqrt()),
        "minitron": by_unit(x.abs().mean(1).square().sum(0)).sqrt(),
        "flap": by_unit(x.flatten(0, 1).var(0, correction=0) * W.square().sum(0)),
    }
    for criterion, scores in expected.items():
        assert torch.allclose(CRITERIA[criterion](s), scores, rtol=1e-4), criterion
    for j in range(axis.size):  # what is cut together: everything that changes shape
        kept = cut(
            graph,
            axis,
            [k for k in range(axis.size) if k % (axis.size // axis.groups) != j % (axis.size // axis.groups)],
        )
        parts = [n for n in graph.weights if n in kept.weights and kept.weights[n].shape != graph.weights[n].shape]
        assert set(parts) == set(axis.cuts)
        part = [
            graph.weights[n].double().movedim(d, 0).reshape(axis.size, -1)[j].square().sum()
            for n, (d, _) in axis.cuts.items()
        ]
        assert torch.allclose(CRITERIA["magnitude"](s)[j], sum(part).sqrt())


def test_taylor_sums_weight_times_gradient(measured):
    graph, tokens, _, stats = measured
    module = graph.module()
    names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    weights = [module.get_parameter(n).requires_grad_() for n in names]
    with torch.enable_grad():
        logits = module(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        gate, up, down = ((w * g).abs().double() for w, g in zip(weights, torch.autograd.grad(loss, weights)))
    assert torch.allclose(CRITERIA["taylor"](stats["layers.0.ffn"]), gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-3)


def test_the_fisher_matrix_predicts_the_divergence(measured):
    """½ tr(G E) for a small random change of one linear's output, against the KL that it causes."""
    graph, tokens, *_ = measured
    tokens = ids(24, 48, seed=3)
    sensitivity = sensitivities(graph, tokens)
    name = "model.layers.1.mlp.down_proj"
    W = graph.weights[f"{name}.weight"]
    change = 0.02 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(5))
    x = seen_by(graph, tokens, name).flatten(0, 1)
    moved = graph.replace(weights={f"{name}.weight": W + change})
    p, q = (g.module()(tokens).double().log_softmax(-1) for g in (graph, moved))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    E = change.double() @ (x.T @ x / len(x)) @ change.double().T
    assert 0.6 < 0.5 * (sensitivity.fisher[name] * E).sum() / kl < 1.6


def test_the_root_of_a_matrix():
    _, x = problem()
    assert torch.allclose(root(x.T @ x) @ root(x.T @ x), x.T @ x)


def test_block_influence_is_one_minus_the_cosine():
    graph, tokens = small(), ids()
    module = graph.module()
    states = []
    for layer in module.model.layers:
        layer.register_forward_hook(lambda m, args, out: states.append((args[0].clone(), out.clone())))
        layer.register_forward_pre_hook(lambda m, args: (args[0].clone(), *args[1:]))
    expected = torch.zeros(graph.config.n_layers, dtype=torch.float64)
    x = module.model.embed_tokens(tokens)
    for i, layer in enumerate(module.model.layers):
        before = x.clone()
        x = layer(x.clone(), module.tables(0, tokens.shape[1]))
        expected[i] = 1 - torch.nn.functional.cosine_similarity(before.double(), x.double(), dim=-1).mean()
    assert torch.allclose(block_influence(graph, tokens), expected, atol=1e-5)


def test_hidden_importance_sums_over_norms():
    graph, tokens = small(layers=(Layer(4, 2, 96),)), ids()
    names = {"model.layers.0.self_attn.q_proj": 0, "model.layers.0.mlp.up_proj": 0, "lm_head": 0}
    expected = sum(seen_by(graph, tokens, n).abs().mean(1).square().sum(0).sqrt() for n in names)
    assert torch.allclose(hidden_importance(graph, tokens), expected, rtol=1e-4)


# budgets


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_knapsack_finds_the_best_combination(data):
    n = data.draw(st.integers(1, 4))
    choices, losses = [], []
    for i in range(n):
        k = data.draw(st.integers(1, 4))
        prices = sorted(data.draw(st.lists(st.integers(0, 30), min_size=k, max_size=k, unique=True)))
        choices.append(Item(f"layers.{i}.ffn", tuple(range(k)), tuple(prices), k - 1))
        losses.append(data.draw(st.lists(st.floats(0, 10), min_size=k, max_size=k)))
    least, most = (sum(item.prices[j] for item in choices) for j in (0, -1))
    limit = data.draw(st.integers(least, most + 5))
    sizes = optimal(choices, losses, limit)
    price = lambda combination: sum(item.prices[s] for item, s in zip(choices, combination))  # noqa: E731
    value = lambda combination: sum(loss[s] for loss, s in zip(losses, combination))  # noqa: E731
    best = min(value(c) for c in itertools.product(*(item.sizes for item in choices)) if price(c) <= limit)
    assert price(sizes) <= limit and value(sizes) == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.3, 1.0), st.sampled_from(["params", "bytes", "flops"]), st.sampled_from([1, 8, 16]))
def test_prices_are_those_of_the_config_they_lead_to(share, kind, multiple):
    config = small().config
    target = Target(kind, share)
    choices = items(config, ("ffn", "heads"), target, multiple, remove=True)
    fixed = fixed_price(config, choices, target)
    limit = target.limit(config) - fixed
    if limit < sum(item.prices[0] for item in choices):
        return
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(item.now, generator=generator) for item in choices]
    for sizes in (uniform(choices, limit), by_threshold(choices, scores, limit)):
        after = apply(config, {item.axis: size for item, size in zip(choices, sizes)})
        assert all(layer.n_kv_heads in (0, old.n_kv_heads) for layer, old in zip(after.layers, config.layers))
        measured = {"params": after.n_body_params / config.n_body_params, "bytes": after.n_params / config.n_params}
        assert target.price(after) == fixed + sum(item.prices[item.sizes.index(s)] for item, s in zip(choices, sizes))
        assert measured.get(kind, 0) <= share + 1e-9


def test_uniform_spends_what_rounding_leaves():
    config = Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 160),) * 8, max_position=64)
    target = Target("params", 0.8)
    choices = items(config, ("ffn",), target, 32)
    limit = target.limit(config) - fixed_price(config, choices, target)
    sizes = uniform(choices, limit)
    assert set(sizes) == {96, 128}  # not 96 everywhere
    assert limit - sum(i.prices[i.sizes.index(s)] for i, s in zip(choices, sizes)) < choices[0].prices[1]


# the pass


@pytest.mark.parametrize("allocation", ["optimal", "global", "uniform"])
@pytest.mark.parametrize("criterion", ["obs", "wanda_sp", "taylor"])
def test_targets_are_met_on_a_nonuniform_graph(allocation, criterion):
    graph = small()
    out = Prune(ids(), "params=0.7", criterion=criterion, allocation=allocation, multiple_of=16)(graph)
    assert 0.6 < out.config.n_body_params / graph.config.n_body_params <= 0.7
    for old, new in zip(graph.config.layers, out.config.layers):
        assert new.n_kv_heads == old.n_kv_heads and new.ffn_dim % 16 == 0
    assert torch.isfinite(out.module()(ids())).all()
    assert len(out.history) == 1 and out.history[0].startswith("Prune(target='params=0.7'")


def output_error(graph, out, tokens):
    return (out.module()(tokens) - graph.module()(tokens)).square().mean().item()


def test_compensation_and_the_reference_come_closer():
    graph, tokens = small(), ids(12)
    error = {
        r: output_error(
            graph, Prune(tokens, "params=0.7", refit=r, multiple_of=16, allocation="uniform")(graph), tokens
        )
        for r in (False, True, "reference")
    }
    assert error["reference"] < error[True] < 0.9 * error[False]


@pytest.mark.parametrize("refit", [False, True, "reference"])
def test_a_pruned_graph_is_a_masked_graph(refit):
    """float64: the model with the same weights at full width, zero where the cut was, computes the same logits."""
    graph, tokens = small(), ids()
    graph = graph.dense(torch.float64)
    step = Prune(tokens, "params=0.6", multiple_of=16, sublayers=True, refit=refit)
    plan = step.plan(graph)
    out = step.apply(graph, plan)
    assert out.config.layers == plan.pruned.layers != graph.config.layers
    rebuilt = dict(graph.weights)
    for name, weight in out.weights.items():
        if weight.shape == graph.weights[name].shape:
            rebuilt[name] = weight
    for i, (old, new) in enumerate(zip(graph.config.layers, out.config.layers)):
        for kind, changed in (("ffn", new.ffn_dim != old.ffn_dim), ("heads", new.n_heads != old.n_heads)):
            if not changed:
                continue
            axis = axes(graph.config)[f"layers.{i}.{kind}"]
            reader = next(n for n, (d, _) in axis.cuts.items() if d == 1)
            if reader not in out.weights:  # the sublayer went
                rebuilt[reader] = torch.zeros_like(graph.weights[reader])
                continue
            rows = next(n for n, (d, _) in axis.cuts.items() if d == 0)  # rows that stayed are found by their values
            kept = (graph.weights[rows][:, None, :] == out.weights[rows][None]).all(-1).any(1)
            assert kept.sum() == out.weights[rows].shape[0]
            rebuilt[reader] = torch.zeros_like(graph.weights[reader])
            rebuilt[reader][:, kept] = out.weights[reader]
    whole = Graph(graph.config, rebuilt)
    assert (whole.module()(tokens) - out.module()(tokens)).abs().max() < 1e-8


def test_asking_for_everything_changes_nothing():
    graph = small()
    for step in (
        Prune(ids(), "params=1.0", multiple_of=16),
        Prune(ids(), keep={"ffn": 1.0, "heads": 1.0, "layers": 5}, multiple_of=16),
    ):
        out = step(graph)
        assert out.config == graph.config and all(torch.equal(out.weights[n], w) for n, w in graph.weights.items())


def test_counts_shares_layers_and_hidden_width():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    out = Prune(ids(), keep={"ffn": 64, "heads": 2, "layers": 3, "hidden": 48}, multiple_of=16)(graph)
    assert out.config.layers == (Layer(2, 2, 64),) * 3 and out.config.hidden_size == 48
    out = Prune(ids(), keep={"ffn": 0.5}, multiple_of=16)(graph)
    assert sum(layer.ffn_dim for layer in out.config.layers) == 2 * 96
    assert Prune(ids(), keep={"kv_heads": 1}, multiple_of=16)(graph).config.layers == (Layer(2, 1, 96),) * 4


def test_widths_suit_the_quantizer():
    """172 channels are no multiple of 32: the width comes down to one, heads to even numbers of 16 wide ones."""
    graph = small(layers=(Layer(6, 2, 172),) * 2)
    out = Prune(ids(), "params=0.9", multiple_of=32)(graph)
    assert all(layer.ffn_dim % 32 == 0 and layer.n_heads * 16 % 32 == 0 for layer in out.config.layers)
    assert Prune(ids(), "params=0.9", multiple_of=32).expected(graph).n_body_params <= 0.9 * graph.config.n_body_params
    GPTQ(ids(), QuantSpec(4, 32))(out)


def test_floors_hold():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    out = Prune(ids(), "params=0.6", axes=BOTH, multiple_of=16, floors={"ffn": 0.5, "heads": 2}, sublayers=True)(graph)
    assert all(layer.ffn_dim >= 48 and layer.n_heads >= 2 for layer in out.config.layers)


def test_sublayers_go_where_they_are_worth_least():
    graph = small(layers=(Layer(4, 2, 96),) * 4)
    useless = {
        n: graph.weights[n] * 1e-4
        for n in graph.weights
        if n in ("model.layers.2.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight")
    }
    out = Prune(ids(), "params=0.8", axes=BOTH, multiple_of=96, sublayers=True)(graph.replace(weights=useless))
    assert out.config.layers[2].n_heads == 0 and out.config.layers[1].ffn_dim == 0


def test_anybodys_criterion():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    first = lambda s: torch.arange(s.axis.size, 0, -1).double()  # noqa: E731
    out = Prune(ids(), keep={"ffn": 32}, criterion=first, refit=False, multiple_of=16)(graph)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(out.weights[name], graph.weights[name][:32])
    with pytest.raises(InputError, match="96 finite ones"):
        Prune(ids(), keep={"ffn": 32}, criterion=lambda s: torch.zeros(3), multiple_of=16)(graph)


def test_the_bias_keeps_the_mean_output():
    graph, tokens = small(layers=(Layer(4, 2, 96),)), ids()
    out = Prune(tokens, keep={"ffn": 48}, criterion="flap", refit="bias", multiple_of=16)(graph)
    outputs = [g.module().model.layers[0].mlp for g in (graph, out)]
    x = torch.cat(list(seen_by(graph, tokens, "model.layers.0.mlp.up_proj"))).float()
    a, b = (mlp(x).mean(0) for mlp in outputs)
    assert torch.allclose(a, b, atol=1e-4) and out.config.biases == {"o_proj", "down_proj"}
    W, x = problem()
    assert torch.allclose(bias_for(W, x.mean(0), torch.tensor([1, 3])), (x[:, [1, 3]] @ W[:, [1, 3]].T).mean(0))
    plain = small()
    assert torch.equal(with_biases(plain).module()(tokens), plain.module()(tokens))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.floats(0.4, 0.9), st.booleans())
def test_heads_stay_equal_in_every_group(kv, group, share, biased):
    biases = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}) if biased else frozenset()
    graph = small(layers=(Layer(kv * group, kv, 32), Layer(kv, kv, 48)), biases=biases)
    out = Prune(ids(2, 16), f"params={share:.2f}", axes=BOTH, multiple_of=8, sublayers=True)(graph)
    for old, new in zip(graph.config.layers, out.config.layers):
        assert new.n_kv_heads in (0, old.n_kv_heads)
    assert torch.isfinite(out.module()(ids(2, 16))).all()


def test_uneven_kv_heads_are_warned_of():
    graph = small(layers=(Layer(4, 4, 96), Layer(4, 2, 32)))
    step = Prune(ids(), "params=0.6", axes=("ffn", "kv_heads"), uneven_kv=True, multiple_of=16)
    with pytest.warns(UserWarning, match="ort profile loses Optimum"):
        out = step(graph)
    assert torch.isfinite(out.module()(ids())).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prune(ids(), keep={"kv_heads": 1}, multiple_of=16)(small(layers=(Layer(4, 2, 32),) * 2))


def test_prune_scale_quantize_save_load(tmp_path):
    graph, tokens = small(), ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(ScaleRope(128)(Prune(tokens, "params=0.75", multiple_of=16)(graph)))
    save(out, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config.layers == out.config.layers and len(again.history) == 3
    assert torch.equal(again.module()(tokens), out.module()(tokens))


def test_prune_quantize_export_verify(tmp_path):
    from tinycompress.export import export, verify

    graph, tokens = small(bos_token_id=1, eos_token_id=2), ids()
    out = GPTQ(tokens, QuantSpec(4, 16))(Prune(tokens, "params=0.75", multiple_of=16, sublayers=True)(graph))
    assert not out.config.uniform
    export(out, tmp_path / "onnx", tokens=tokens[:2], limits={"kl": 1.0, "flips": 1.0, "perplexity": 1.0})
    assert verify(tmp_path / "onnx", tokens=tokens[:2], limits={"kl": 1.0, "flips": 1.0, "perplexity": 1.0})["passed"]


def test_the_picture(tmp_path):
    graph = small()
    Prune(ids(), "params=0.8", multiple_of=16).plan(graph).draw(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    Prune(ids(), "params=0.8", multiple_of=16, allocation="uniform").plan(graph).draw(tmp_path / "plan.png")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


# bad input: every error before any work


@pytest.mark.parametrize(
    "change, names",
    [
        (dict(target=None), "one of the two"),
        (dict(keep={"ffn": 0.5}), "one of the two"),
        (dict(target="size=0.5"), "params=SHARE"),
        (dict(target="params=-1"), "params=SHARE"),
        (dict(target=None, keep={"depth": 0.5}), "layers"),
        (dict(target=None, keep={"ffn": 1.5}), "a share"),
        (dict(target=None, keep={"ffn": float("nan")}), "a share"),
        (dict(axes=("width",)), "kv_heads"),
        (dict(axes=("heads", "kv_heads"), uneven_kv=True), "one of them a pass"),
        (dict(axes=("kv_heads",)), "uneven_kv"),
        (dict(criterion="best"), "wanda_sp"),
        (dict(allocation="fair"), "optimal"),
        (dict(refit="always"), "reference"),
        (dict(multiple_of=0), "positive"),
        (dict(damping=2.0), "between 0 and 1"),
        (dict(propagate=1.5), "float model's stream"),
        (dict(floors={"hidden": 0.5}), "kv_heads"),
    ],
)
def test_bad_settings_are_refused(change, names):
    with pytest.raises(InputError, match=names):
        Prune(ids(), **(dict(target="params=0.8") | change))


@pytest.mark.parametrize(
    "settings_, names",
    [
        (dict(target="params=0.1"), r"params=0\.\d+ or more"),
        (dict(target="bytes=1kb"), r"bytes=\d+ or more"),
        (dict(target="params=0.5", floors={"ffn": 0.9, "heads": 1.0}), "or more"),
        (dict(keep={"ffn": 40}), r"layers\.0\.ffn one of \[16, 32, 48"),
        (dict(keep={"kv_heads": 0}), "or sublayers=True"),
        (dict(keep={"heads": 3}), "one of"),
        (dict(keep={"layers": 9}), "1 … 2"),
        (dict(keep={"hidden": 0}), "1 … 64"),
        (dict(keep={"ffn": 0.0}), "or more"),
    ],
)
def test_what_cannot_be_met_is_known_before_any_work(settings_, names):
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    nothing = torch.zeros(0, 0, dtype=torch.long)  # no tokens: no work is possible
    with pytest.raises(InputError, match=names):
        Prune(nothing, multiple_of=16, **settings_)(graph)


def test_an_impossible_budget_names_the_nearest_that_works():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    with pytest.raises(InputError) as error:
        Prune(ids(), "params=0.1", axes=BOTH, multiple_of=16)(graph)
    out = Prune(ids(), error.value.accepted.split()[0], axes=BOTH, multiple_of=16)(graph)
    assert out.config.layers == (Layer(2, 2, 16),) * 2


def test_other_graphs_and_packed_ones_are_refused():
    graph, step = small(), Prune(ids(), "params=0.8", multiple_of=16)
    other = small(layers=MIXED[:2])
    with pytest.raises(InputError, match="another graph"):
        step.apply(other, step.plan(graph))
    with pytest.raises(InputError, match="quantize last"):
        step(RTN(QuantSpec(4, 16))(graph))
    with pytest.raises(InputError, match="gradients"):
        CRITERIA["taylor"](collect(graph, ids(), ["layers.0.ffn"])["layers.0.ffn"])
    with pytest.raises(InputError, match="sublayers that are there"):
        collect(graph, ids(), ["layers.3.ffn"])
    with pytest.raises(InputError, match="multiple of 2"):
        keep_best(torch.zeros(4), 3, groups=2)


def test_the_forms_of_the_command_line():
    assert (
        prune_pass(ids(), "bytes=300MB", 64).target == "bytes=300MB"
        and prune_pass(ids(), "params=0.8", 32).multiple_of == 32
    )
    assert prune_pass(ids(), "ffn=0.75", 64).keep == {"ffn": 0.75} and prune_pass(ids(), "layers=20", 64).keep == {
        "layers": 20
    }
    for bad in ("ffn=1.5", "ffn", "depth=0.5", "params=much", "layers=0"):
        with pytest.raises(InputError, match=r"--prune.*params"):
            prune_pass(ids(), bad, 64)


def test_the_repr_names_the_settings_not_the_tokens():
    step = Prune(ids(), "params=0.8")
    assert "tensor" not in repr(step) and step == dataclasses.replace(step, tokens=ids() + 1)


# one shot: scores and refits from the whole graph's statistics


def test_one_shot_scores_and_refits_on_what_the_whole_graph_gives():
    graph, tokens = small(layers=(Layer(4, 2, 96),) * 2), ids()
    out = Prune(tokens, keep={"ffn": 48}, criterion="wanda_sp", refit=True, one_shot=True, multiple_of=16)(graph)
    for i in range(2):
        name = f"model.layers.{i}.mlp.down_proj"
        x, W = seen_by(graph, tokens, name).flatten(0, 1), graph.weights[f"{name}.weight"]
        kept = (W.double().abs().mean(0) * x.square().sum(0).sqrt()).topk(48).indices.sort().values
        assert torch.equal(
            out.weights[f"model.layers.{i}.mlp.up_proj.weight"],
            graph.weights[f"model.layers.{i}.mlp.up_proj.weight"][kept],
        )
        assert torch.allclose(out.weights[f"{name}.weight"], refit_columns(W, x.T @ x, kept).float(), atol=1e-4)
    walked = Prune(tokens, keep={"ffn": 48}, criterion="wanda_sp", refit=True, multiple_of=16)(graph)
    assert not torch.allclose(
        walked.weights[f"{name}.weight"], out.weights[f"{name}.weight"], atol=1e-4
    )  # saw a pruned layer 0
    assert "one_shot=True" in out.history[-1]


@pytest.mark.parametrize(
    "how",
    [
        dict(criterion="flap", allocation="global", refit="bias"),
        dict(criterion="taylor", allocation="uniform", refit=True),
        dict(criterion="obs", allocation="optimal", refit=True, sublayers=True),
    ],
)
def test_one_collection_serves_every_budget(how):
    graph, tokens = small(), ids()
    step = Prune(tokens, "params=0.8", axes=BOTH, multiple_of=16, one_shot=True, probe=6, **how)
    measured = step.collect(graph)
    for target in ("params=0.8", "params=0.6"):
        again = dataclasses.replace(step, target=target)
        ours, theirs = again.from_statistics(graph, measured), again(graph)
        assert ours.config == theirs.config and ours.history == theirs.history
        assert all(torch.equal(w, theirs.weights[n]) for n, w in ours.weights.items())
        assert ours.config.n_body_params <= float(target[7:]) * graph.config.n_body_params


def test_statistics_of_another_graph_are_refused():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    step = Prune(
        ids(), "params=0.8", multiple_of=16, criterion="wanda_sp", allocation="uniform", refit=True, one_shot=True
    )
    measured = step.collect(graph)
    for other in (small(layers=(Layer(4, 2, 64),) * 2), random_graph(graph.config, seed=1)):
        with pytest.raises(InputError, match=r"layers\.0\.ffn of another graph"):
            step.from_statistics(other, measured)
    for change, names in (
        (dict(one_shot=False), "True where the statistics"),
        (dict(axes=("ffn", "kv_heads"), uneven_kv=True), r"none of layers\.0\.kv_heads"),
        (dict(allocation="optimal"), "no Fisher matrix"),
        (dict(criterion="taylor"), "no gradients"),
        (dict(target=None, keep={"ffn": 48, "layers": 1}), "layers and hidden width"),
    ):
        with pytest.raises(InputError, match=names):
            dataclasses.replace(step, **change).from_statistics(graph, measured)
    with pytest.raises(InputError, match="with one_shot"):
        dataclasses.replace(step, refit="reference")


def test_gradients_come_without_fisher_matrices(measured):
    graph, tokens, both, _ = measured
    alone = sensitivities(graph, tokens, gradients=True, fisher=False)
    assert not alone.fisher and both.fisher
    assert all(torch.equal(g, both.gradients[n]) for n, g in alone.gradients.items())


# all axes together, and what comes after


def test_a_refit_that_removes_nothing_changes_nothing():
    W, x = problem()
    assert torch.equal(refit_columns(W, x.T @ x, torch.arange(24)), W)


def cut_on_every_axis(graph, tokens):
    """Several passes: KV groups, then FFN channels, a layer and hidden channels, then under one budget with sublayers."""
    first = Prune(tokens, keep={"kv_heads": 1}, multiple_of=16)
    second = Prune(tokens, keep={"ffn": 64, "layers": 3, "hidden": 48}, multiple_of=16)
    third = Prune(tokens, "params=0.8", multiple_of=16, sublayers=True)
    return third(second(first(graph)))


def test_a_graph_cut_on_every_axis_is_a_graph_like_any_other(tmp_path):
    from tinycompress.export import export, verify

    tokens = ids()
    graph = cut_on_every_axis(small(layers=(Layer(4, 2, 96),) * 4, bos_token_id=1, eos_token_id=2), tokens)
    assert graph.config.hidden_size == 48 and graph.config.n_layers == 3 and not graph.config.uniform
    out = GPTQ(tokens, QuantSpec(4, 16))(ScaleRope(128)(graph))
    save(out, tmp_path / "m")
    again = load(tmp_path / "m")
    assert again.config == out.config and len(again.history) == 5
    assert torch.equal(again.module()(tokens), out.module()(tokens))
    limits = {"kl": 1.0, "flips": 1.0, "perplexity": 1.0}
    export(again, tmp_path / "onnx", tokens=tokens[:2], limits=limits)
    assert verify(tmp_path / "onnx", tokens=tokens[:2], limits=limits)["passed"]


def test_a_hidden_width_no_runtime_takes_is_refused():
    with pytest.raises(InputError, match="a multiple of 16"):
        Prune(torch.zeros(0, 0, dtype=torch.long), keep={"hidden": 50}, multiple_of=16)(
            small(layers=(Layer(4, 2, 96),) * 2)
        )
