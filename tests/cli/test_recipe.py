"""What `compress --quantize` does unless told otherwise, and what it says before any work."""

import dataclasses

import pytest
import torch
from conftest import random_graph

from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.recipe import Recipe

SPEC = QuantSpec(4, 16)


def steps(recipe, graph):
    return [type(step).__name__ for step in recipe.passes(graph)]


@pytest.fixture
def tied(tiny):
    return random_graph(dataclasses.replace(tiny.config, tie_embeddings=True))


def test_rotation_is_the_default_where_it_costs_nothing(tiny, tied):
    assert steps(Recipe(quantize=SPEC), tiny) == ["Rotate", "GPTQ"] and steps(Recipe(quantize=SPEC), tied) == ["GPTQ"]
    assert steps(Recipe(quantize=SPEC, rotate=False), tiny) == ["GPTQ"] and steps(
        Recipe(quantize=SPEC, rotate=True), tied
    ) == ["Rotate", "GPTQ"]
    assert steps(Recipe(quantize=SPEC, quantize_method="rtn"), tiny) == ["RTN"]
    found = [Recipe(quantize=QuantSpec(bits, 16), quantize_method="rtn").passes(tiny)[0].spec.search for bits in (3, 8)]
    assert found == ["mse", "auto"]
    assert steps(Recipe(), tiny) == steps(Recipe(), tied) == []
    with pytest.raises(InputError, match=r"Recipe\.rotate"):
        Recipe(rotate=True)


@pytest.mark.parametrize("rotate", [None, True, False])
def test_the_config_foretold_is_the_one_arrived_at(tied, nonuniform, rotate):
    for graph in (tied, nonuniform):
        recipe = Recipe(prune="ffn=0.5", quantize=SPEC, quantize_embedding=QuantSpec(8, 16), rotate=rotate)
        tokens = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))
        out = graph
        for step in recipe.passes(graph, tokens):
            out = step(out)
        expected = recipe.check(graph)
        assert out.config.tie_embeddings == expected.tie_embeddings and out.config.hidden_size == expected.hidden_size
        heads = [n for n in out.weights if n in ("model.embed_tokens.weight", "lm_head.weight")]
        assert (
            all(isinstance(out.weights.entries[n], QuantTensor) for n in heads)
            and len(heads) == 2 - expected.tie_embeddings
        )


def test_a_rotated_model_is_closer_to_the_float_one_where_channels_are_outliers(tiny):
    outliers = torch.ones(64)
    outliers[::16] = 30.0
    wild = {n: w * outliers if n.endswith(("q_proj.weight", "up_proj.weight")) else w for n, w in tiny.weights.items()}
    graph, tokens = tiny.replace(weights=wild), torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(0))
    reference = graph.module()(tokens)

    def error(rotate):
        out = graph
        for step in Recipe(quantize=QuantSpec(3, 16), rotate=rotate).passes(graph, tokens):
            out = step(out)
        return (out.module()(tokens) - reference).square().mean().item()

    assert error(None) == error(True) < error(False)


def test_scales_of_htp_come_out_in_its_form(nonuniform):
    """What `compress --quantize w4g16-lpbq` makes, all of it: propagated, refined, the tables packed too."""
    tokens, spec = (
        torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0)),
        QuantSpec.parse("w4g16-lpbq"),
    )
    out = nonuniform
    for step in Recipe(quantize=spec, quantize_embedding=spec).passes(nonuniform, tokens):
        out = step(out)
    packed = [w for w in out.weights.entries.values() if isinstance(w, QuantTensor)]
    assert len(packed) > 20 and all(is_lpbq(w) for w in packed)
    with pytest.raises(InputError, match=r"w4g16-lpbq.*RTN or GPTQ"):
        HQQ(spec)


def test_tuned_scales_come_nearer_to_the_model_that_was_given(nonuniform):
    """With pruning too: the float model before it is what the scales learn from."""
    tokens = torch.randint(128, (16, 32), generator=torch.Generator().manual_seed(0))
    reference = nonuniform.module()(tokens).log_softmax(-1)

    def kl(tune):
        out = nonuniform
        for step in Recipe(
            prune="ffn=0.75", quantize=QuantSpec(3, 16), quantize_embedding=QuantSpec(8, 16), tune=tune
        ).passes(nonuniform, tokens):
            out = step(out)
        assert out.history[-1].startswith("Distill") == tune
        return (reference.exp() * (reference - out.dense().module()(tokens).log_softmax(-1))).sum(-1).mean().item()

    assert kl(True) < 0.97 * kl(False)
    assert (
        Recipe(quantize=SPEC, quantize_method="rtn", tune=True).calibrates
        and not Recipe(quantize=SPEC, quantize_method="rtn").calibrates
    )
    with pytest.raises(InputError, match=r"Recipe\.tune"):
        Recipe(tune=True)


def test_a_budget_can_name_its_axes(nonuniform):
    (step,) = Recipe(prune="params=0.7,ffn,heads").passes(nonuniform)
    assert (step.target, step.axes) == ("params=0.7", ("ffn", "heads"))
    assert Recipe(prune="params=0.7").passes(nonuniform)[0].axes == ("ffn",)
