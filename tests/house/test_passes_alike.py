"""One contract for every exported pass: the same thing has the same name, and a device is where the work is done."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_graph
from every_pass import CONFIG, PASSES

import tinycompress as tc
from tinycompress.distillation.training import Training

CLASSES: dict[str, type] = {name: getattr(tc, name) for name in PASSES}
QUICK = {"ScaleRope"}  # reads no tensor, so there is no bar to show
RETURNING = ("ChooseRope", "Distill", "HQQ", "LongRope", "QuantizeEmbedding", "RTN", "Rotate", "ScaleRope")
PLANS = {"ChooseRope", "Drop", "LongRope", "Prune", "PruneFFN", "Rotate", "ScaleRope", "Slice"}  # change the config


def fields(name: str) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(CLASSES[name])}


@pytest.mark.parametrize("name", CLASSES)
class TestEveryPass:
    def test_it_is_a_frozen_dataclass(self, name: str) -> None:
        assert CLASSES[name].__dataclass_params__.frozen  # type: ignore[attr-defined]

    def test_it_has_a_device_that_the_history_does_not_name(self, name: str) -> None:
        device = fields(name)["device"]
        assert device.default is None and not device.repr
        assert device.type == "str | None"

    def test_it_shows_its_progress(self, name: str) -> None:
        if name in QUICK:
            assert "progress" not in fields(name)
            return
        progress = fields(name)["progress"]
        assert progress.default is True and not progress.repr and not progress.compare

    def test_its_tokens_come_first(self, name: str) -> None:
        named = list(fields(name))
        if "tokens" in named:
            assert named[0] == "tokens" and not fields(name)["tokens"].repr

    def test_it_has_a_seed_if_something_is_drawn(self, name: str) -> None:
        source = Path(inspect.getfile(CLASSES[name])).read_text(encoding="utf-8")
        if any(generator in source for generator in ("torch.Generator(", "random.Random(")):
            assert fields(name)["seed"].default == 0

    def test_its_plan_is_the_shapes_that_come(self, name: str) -> None:
        assert hasattr(CLASSES[name], "plan") == (name in PLANS)
        if name in PLANS:
            step = PASSES[name]()
            planned = step.plan(CONFIG)
            config = step(random_graph(CONFIG)).config
            assert tc.shapes(planned) == tc.shapes(config)
            assert planned.max_position == config.max_position


def test_distillation_draws_by_the_seed_of_its_training() -> None:
    assert {field.name: field.default for field in dataclasses.fields(Training)}["seed"] == 0


def with_device(name: str, device: str) -> Any:
    """The pass of `every_pass` with its device set, where it is an instance of the class itself."""
    step = PASSES[name]()
    if not dataclasses.is_dataclass(step):
        pytest.skip("a function around the pass")
    return dataclasses.replace(step, device=device)  # type: ignore[type-var]


@pytest.mark.parametrize("name", CLASSES)
def test_a_device_that_is_named_changes_nothing_but_the_place(name: str) -> None:
    graph = random_graph(CONFIG)
    step = PASSES[name]()
    named = with_device(name, "cpu")
    assert repr(named) == repr(step)
    expected = step(graph)
    result = named(graph)
    assert result.config == expected.config and result.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"AutoRound", "ScaleRope"}))
def test_the_work_is_done_on_the_device(name: str) -> None:
    """No machine has a device of that name: whoever puts a tensor there is told."""
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        with_device(name, "xpu")(random_graph(CONFIG))


@pytest.mark.parametrize("name", RETURNING)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_result_is_where_the_weights_were(name: str) -> None:
    result = with_device(name, "cuda")(random_graph(CONFIG))
    assert [key for key, weight in result.weights.items() if weight.device.type != "cpu"] == []
