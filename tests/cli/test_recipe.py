"""What `compress --quantize` does unless told otherwise, and what it says before any work."""

import dataclasses

import pytest
import torch
from conftest import random_graph

from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.recipe import Options

SPEC = "w4g16"


def steps(options, graph):
    return [step["name"] for step in options.steps(graph.config)]


def passes(options, graph, tokens=None):
    return options.recipe(graph.config).passes(graph, tokens=tokens)


@pytest.fixture
def tied(tiny):
    return random_graph(dataclasses.replace(tiny.config, tie_embeddings=True))


def test_rotation_is_the_default_where_it_costs_nothing(tiny, tied):
    assert steps(Options(quantize=SPEC), tiny) == ["Rotate", "GPTQ"] and steps(Options(quantize=SPEC), tied) == ["GPTQ"]
    assert steps(Options(quantize=SPEC, rotate=False), tiny) == ["GPTQ"] and steps(
        Options(quantize=SPEC, rotate=True), tied
    ) == ["Rotate", "GPTQ"]
    assert steps(Options(quantize=SPEC, quantize_method="rtn"), tiny) == ["RTN"]
    found = [passes(Options(None, None, None, f"w{bits}g16", "rtn"), tiny)[0].spec.search for bits in (3, 8)]
    assert found == ["mse", "auto"]
    assert steps(Options(), tiny) == steps(Options(), tied) == []
    with pytest.raises(InputError, match=r"Options\.rotate"):
        Options(rotate=True)


@pytest.mark.parametrize("rotate", [None, True, False])
def test_the_config_foretold_is_the_one_arrived_at(tied, nonuniform, rotate):
    for graph in (tied, nonuniform):
        options = Options(prune="ffn=0.5", quantize=SPEC, quantize_embedding="w8g16", rotate=rotate)
        tokens = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0))
        out = graph
        for step in passes(options, graph, tokens):
            out = step(out)
        foretold = options.recipe(graph.config).foretell(graph)[-1].graph
        expected = foretold.config
        assert foretold.nbytes == out.nbytes or options.prune
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
        for step in passes(Options(quantize="w3g16", rotate=rotate), graph, tokens):
            out = step(out)
        return (out.module()(tokens) - reference).square().mean().item()

    assert error(None) == error(True) < error(False)


def test_scales_of_htp_come_out_in_its_form(nonuniform):
    """What `compress --quantize w4g16-lpbq` makes, all of it: propagated, refined, the tables packed too."""
    tokens, spec = torch.randint(128, (8, 32), generator=torch.Generator().manual_seed(0)), "w4g16-lpbq"
    out = nonuniform
    for step in passes(Options(quantize=spec, quantize_embedding=spec), nonuniform, tokens):
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
        options = Options(prune="ffn=0.75", quantize="w3g16", quantize_embedding="w8g16", tune=tune)
        for step in passes(options, nonuniform, tokens):
            out = step(out)
        assert out.history[-1].startswith("Distill") == tune
        return (reference.exp() * (reference - out.dense().module()(tokens).log_softmax(-1))).sum(-1).mean().item()

    assert kl(True) < 0.97 * kl(False)
    with pytest.raises(InputError, match=r"Options\.tune"):
        Options(tune=True)


def test_a_budget_can_name_its_axes(nonuniform):
    tokens = torch.zeros(1, 8, dtype=torch.long)
    (step,) = passes(Options(prune="params=0.95,ffn,heads"), nonuniform, tokens)
    assert (step.target, step.axes) == ("params=0.95", ("ffn", "heads"))
    assert passes(Options(prune="params=0.95"), nonuniform, tokens)[0].axes == ("ffn",)
