"""Budgets: allocations against brute force, prices against configs, and every error before any work."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import BOTH, ids, small

from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.pruning.allocation import Choice, by_threshold, choices_of, fixed_price, optimal, resize, uniform
from tinycompress.pruning.prune import Prune
from tinycompress.pruning.target import BudgetTarget
from tinycompress.recipe.options import prune_step


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_knapsack_finds_the_best_combination(data):
    n = data.draw(st.integers(1, 4))
    choices = []
    losses = []
    for i in range(n):
        k = data.draw(st.integers(1, 4))
        prices = sorted(data.draw(st.lists(st.integers(0, 30), min_size=k, max_size=k, unique=True)))
        choices.append(Choice(f"layers.{i}.ffn", "ffn", tuple(range(k)), tuple(prices), k - 1))
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
    target = BudgetTarget(kind, share)
    choices = choices_of(config, ("ffn", "heads"), target, multiple, remove=True)
    fixed = fixed_price(config, choices, target)
    limit = target.limit(config) - fixed
    if limit < sum(item.prices[0] for item in choices):
        return
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(item.now, generator=generator) for item in choices]
    for sizes in (uniform(choices, limit), by_threshold(choices, scores, limit)):
        after = resize(config, {item.axis: size for item, size in zip(choices, sizes)})
        assert all(layer.n_kv_heads in (0, old.n_kv_heads) for layer, old in zip(after.layers, config.layers))
        measured = {"params": after.n_body_params / config.n_body_params, "bytes": after.n_params / config.n_params}
        assert target.price(after) == fixed + sum(item.prices[item.sizes.index(s)] for item, s in zip(choices, sizes))
        assert measured.get(kind, 0) <= share + 1e-9


def test_uniform_spends_what_rounding_leaves():
    config = Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 160),) * 8, max_position=64)
    target = BudgetTarget("params", 0.8)
    choices = choices_of(config, ("ffn",), target, 32)
    limit = target.limit(config) - fixed_price(config, choices, target)
    sizes = uniform(choices, limit)
    assert set(sizes) == {96, 128}  # not 96 everywhere
    assert limit - sum(i.prices[i.sizes.index(s)] for i, s in zip(choices, sizes)) < choices[0].prices[1]


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


def test_a_hidden_width_no_runtime_takes_is_refused():
    with pytest.raises(InputError, match="a multiple of 16"):
        Prune(torch.zeros(0, 0, dtype=torch.long), keep={"hidden": 50}, multiple_of=16)(
            small(layers=(Layer(4, 2, 96),) * 2)
        )


def test_the_forms_of_the_command_line():
    assert (
        prune_step("bytes=300MB", 64)["target"] == "bytes=300MB" and prune_step("params=0.8", 32)["multiple_of"] == 32
    )
    step = {"name": "Prune", "target": "params=0.8", "axes": ["ffn"], "multiple_of": 64, "layout": "deci"}
    assert prune_step("params=0.8,ffn,layout=deci", 64) == step
    assert prune_step("ffn=0.75", 64)["keep"] == {"ffn": 0.75} and prune_step("layers=20", 64)["keep"] == {"layers": 20}
    assert prune_step("slice=48", 64) == {"name": "Slice", "hidden": 48}
    assert prune_step("drop=2", 64) == {"name": "Drop", "count": 2}
    for bad in ("ffn=1.5", "ffn", "depth=0.5", "params=much", "layers=0", "slice=0.5", "drop=0"):
        with pytest.raises(InputError, match=r"Options\.prune.*params"):
            prune_step(bad, 64)
