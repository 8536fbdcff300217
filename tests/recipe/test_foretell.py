"""What is foretold of a recipe is what comes out, and what is estimated moves the right way."""

from __future__ import annotations

import pytest
import torch

from tinycompress import pipeline
from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph
from tinycompress.recipe import Recipe
from tinycompress.recipe.estimate import costs
from tinycompress.recipe.foretell import behind

TOKENS = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))
PASSES = [
    {"name": "PruneFFN", "keep": 0.5, "multiple_of": 16},
    {"name": "Slice", "hidden": 48},
    {"name": "Drop", "count": 1},
    {"name": "ScaleRope", "context": 128},
    {"name": "ChooseRope", "tokens": {"samples": 1, "seq_len": 128}},
    {"name": "Rotate"},
    {"name": "SmoothQuant"},
    {"name": "RTN", "spec": "w3g16"},
    {"name": "HQQ", "spec": "w4g16-asym"},
    {"name": "AWQ", "spec": "w4g16", "quantize": False},
    {"name": "AWQ", "spec": "w4g16"},
    {"name": "GPTQ", "spec": "w2g16-floatzero", "head": True},
    {"name": "GPTQ", "spec": {"model.layers.0.self_attn.q_proj": "w8g16"}},
    {"name": "QuantizeEmbedding", "spec": "w8g16", "head_spec": "w4g16"},
    {"name": "Distill", "training": {"steps": 1, "batch": 2}, "losses": "ce", "fake_quant": "w4g16"},
]


def recipe(*steps: dict[str, object]) -> Recipe:
    return Recipe.of({"data": {"samples": 8, "seq_len": 32}, "pass": list(steps)})


@pytest.mark.parametrize("step", PASSES, ids=lambda step: f"{step['name']} {list(step.values())[1:]}"[:40])
def test_shapes_and_bytes_are_those_that_come_out(tiny: Graph, step: dict[str, object]) -> None:
    (foretold,) = recipe(step).foretell(tiny)
    long = torch.cat([TOKENS[:1]] * 4, 1)
    tokens = long if step["name"] == "ChooseRope" else TOKENS
    out = pipeline.run(tiny, recipe(step).passes(tiny, tokens=tokens), progress=False)
    assert foretold.graph.nbytes == out.nbytes
    assert foretold.graph.config.layers == out.config.layers
    assert foretold.graph.config.hidden_size == out.config.hidden_size
    assert foretold.graph.config.max_position == out.config.max_position


def test_mixed_bits_are_foretold_within_the_budget(tiny: Graph) -> None:
    step = {"name": "MixedBits", "bits": 7, "choices": ["w2g16", "w4g16"], "quantizer": "RTN"}
    (foretold,) = recipe(step).foretell(tiny)
    out = pipeline.run(tiny, recipe(step).passes(tiny, tokens=TOKENS), progress=False)
    assert 0.7 * out.nbytes <= foretold.graph.nbytes <= out.nbytes
    assert "RTN(" in out.history[0] and "MixedBits(" in out.history[1]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"name": "RTN", "spec": "w4g48"}], "48"),
        ([{"name": "RTN", "spec": "w4g16"}, {"name": "GPTQ", "spec": "w4g16"}], "already w4g16"),
        ([{"name": "RTN", "spec": "w4g16"}, {"name": "Prune", "target": "params=0.8"}], "quantized to w4g16"),
        ([{"name": "AutoRound", "reference": "model"}], "without packed weights"),
        ([{"name": "Slice", "hidden": 65}], "at most the model's 64"),
        ([{"name": "MixedBits", "bits": 1, "quantizer": "RTN", "choices": ["w2g16"]}], "or more"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(tiny: Graph, steps: list[dict[str, object]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        recipe(*steps).foretell(tiny)


def test_more_text_costs_more(tiny: Graph) -> None:
    few, many = (
        Recipe.of({"data": {"samples": samples, "seq_len": 32}, "pass": [{"name": "GPTQ", "spec": "w4g16"}]})
        for samples in (8, 64)
    )
    (one,) = costs(tiny, few.stand_ins(tiny), few.foretell(tiny))
    (other,) = costs(tiny, many.stand_ins(tiny), many.foretell(tiny))
    assert 0 < one.seconds < other.seconds and one.memory < other.memory and one.disk == other.disk


def test_a_pass_of_your_own_is_taken_to_leave_shapes_alone(tiny: Graph) -> None:
    assert behind(lambda graph: graph, tiny).graph.config == tiny.config
