"""The closed forms of refitting against naive ones: greedy searches, least squares, and the streams of two models."""

import pytest
import torch
from pruning_cases import ids, problem, small

from tinycompress.calibration.gram import cross_gram, stream_gram
from tinycompress.calibration.walk import walk
from tinycompress.pruning.refit import (
    obs_losses,
    plain_curve,
    refit_columns,
    refit_curve,
    wanted_output,
)


def squared_loss(W, x, kept):
    """What a least-squares fit on the kept inputs leaves of W x."""
    y = x @ W.T
    if not len(kept):
        return y.square().sum()
    return (y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution).square().sum()


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
    n = 24 // width
    H = x.T @ x
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    units = torch.arange(24).view(n, width)
    with_refit = refit_curve(W, H, order, width, damping=1e-14)
    without = plain_curve(W, H, order, width)
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
    H = seen.T @ seen
    keep = torch.arange(0, 24, 2)
    for share in (0.0, 0.5, 1.0):
        target = (1 - share) * seen @ W.T + share * (x @ W.T + gap)
        ours = refit_columns(W, H, keep, 1e-14, wanted_output(W, H, (x @ W.T + gap).T @ seen, share))
        assert torch.allclose(ours, torch.linalg.lstsq(seen[:, keep], target).solution.T, atol=1e-8)
    same = wanted_output(W, x.T @ x, W @ x.T @ x, 1.0)
    assert torch.allclose(
        refit_columns(W, x.T @ x, torch.arange(24), wanted=same), W, atol=1e-12
    )  # nothing removed, nothing changed


def test_the_walk_shows_how_the_streams_differ():
    graph = small()
    tokens = ids(3)
    halved = {n: w / 2 for n, w in graph.weights.items() if n.endswith("v_proj.weight")}
    module = graph.module()
    other = graph.replace(weights=halved).module()
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


def test_a_refit_that_removes_nothing_changes_nothing():
    W, x = problem()
    assert torch.equal(refit_columns(W, x.T @ x, torch.arange(24)), W)
