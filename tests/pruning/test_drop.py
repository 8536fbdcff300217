"""Depth: greedy removal against brute force."""

import pytest
import torch
from pruning_cases import ids, small

from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Layer
from tinycompress.pruning.drop import Drop, remove, units_of


@pytest.mark.parametrize("parts", ["layers", "attention", "ffn", "sublayers"])
def test_each_step_removes_the_unit_that_is_missed_least(parts):
    """The oracle cuts the graph and measures its perplexity, candidate by candidate."""
    graph = small()
    tokens = ids(3)
    out = Drop(tokens, 2, parts)(graph)
    gone = []
    for _ in range(2):
        left = [unit for unit in units_of(graph.config, parts) if unit not in gone]
        values = [perplexity(remove(graph, [*gone, unit]).module(), tokens).value for unit in left]
        gone.append(left[values.index(min(values))])
    assert out.config == remove(graph, gone).config
    assert torch.equal(out.module()(tokens), remove(graph, gone).module()(tokens))


def test_removed_sublayers_add_nothing():
    graph = small(biases=frozenset({"o_proj", "down_proj"}))
    tokens = ids(2)
    silent = {
        n: torch.zeros_like(w)
        for n, w in graph.weights.items()
        if n.startswith(("model.layers.1.self_attn.o_", "model.layers.0.mlp.down_"))
    }
    assert len(silent) == 4
    out = remove(graph, [(1, "attention"), (0, "ffn")])
    assert torch.allclose(out.module()(tokens), graph.replace(weights=silent).module()(tokens), atol=1e-5)


def test_impossible_drops_are_refused():
    nothing = torch.zeros(0, 0, dtype=torch.long)
    for bad, names in (
        (dict(count=5), "fewer than the model's 5 layers"),
        (dict(count=-1), "a number"),
        (dict(count=1, parts="heads"), "sublayers"),
    ):
        with pytest.raises(InputError, match=names):
            Drop(nothing, **bad)(small())


def test_plans_of_equal_layers_are_what_the_pass_leaves():
    graph = small(layers=(Layer(4, 2, 96),) * 3)
    step = Drop(ids(2), 1)
    assert step.plan(graph.config) == step(graph).config
    unequal = small()
    planned = Drop(ids(2), 3, "sublayers").plan(unequal.config)
    assert planned == remove(unequal, [(4, "attention"), (4, "ffn"), (3, "attention")]).config


def test_tokens_may_come_in_batches():
    graph = small(layers=(Layer(4, 2, 96),) * 3)
    batches = ids(4).split(2)
    assert Drop(batches, 1, progress=False)(graph).fingerprint() == Drop(ids(4), 1)(graph).fingerprint()
