"""Layouts that a cut stays within."""

import itertools

import pytest
from pruning_cases import BOTH, ids, small

from tinycompress.checkpoints.gguf_families import architecture_of
from tinycompress.errors import InputError
from tinycompress.graph.config import Layer
from tinycompress.pruning.allocation import Choice
from tinycompress.pruning.layout import LAYOUTS, alike
from tinycompress.pruning.prune import Prune

ALIKE = (Layer(4, 2, 96),) * 4


def pruned(layout, layers=ALIKE, target="params=0.6", **how):
    return Prune(ids(), target, layout=layout, multiple_of=16, progress=False, **how)(small(layers)).config


@pytest.mark.parametrize("axes", [("ffn",), BOTH])
@pytest.mark.parametrize("allocation", ["optimal", "global", "uniform"])
def test_uniform_keeps_layers_alike_within_the_budget(axes, allocation):
    before = small(ALIKE).config
    after = pruned("uniform", axes=axes, allocation=allocation)
    assert after.uniform and after.layers != before.layers
    assert 0.5 * before.n_body_params < after.n_body_params <= 0.6 * before.n_body_params


def test_uniform_keeps_what_it_is_told_to_keep():
    after = Prune(ids(), keep={"ffn": 0.7, "heads": 0.5}, layout="uniform", multiple_of=16, progress=False)(
        small(ALIKE)
    )
    assert {layer.widths for layer in after.config.layers} == {(2, 2, 64)}


def test_shares_are_the_largest_that_fit():
    """Against every pair of sizes: no other pair within the limit is as large in both."""
    ffn = [Choice(f"layers.{i}.ffn", "ffn", (16, 32, 48), (10, 20, 30), 48) for i in range(3)]
    heads = [Choice(f"layers.{i}.heads", "heads", (1, 2, 4), (5, 9, 17), 4) for i in range(3)]
    for limit in range(45, 150, 7):
        chosen = alike([*ffn, *heads], limit)
        price = sum(choice.prices[0] for choice in chosen)
        sizes = {choice.kind: choice.sizes for choice in chosen}
        assert price <= limit and all(len(choice.sizes) == 1 for choice in chosen)
        for a, b in itertools.product(range(3), range(3)):
            larger = (ffn[0].sizes[a], heads[0].sizes[b])
            more = larger != (sizes["ffn"][0], sizes["heads"][0])
            if more and larger[0] >= sizes["ffn"][0] and larger[1] >= sizes["heads"][0]:
                assert 3 * (ffn[0].prices[a] + heads[0].prices[b]) > limit


def test_deci_is_what_llama_cpp_reads():
    """No FFN may go, nor the first attention; what is left llama.cpp runs."""
    step = Prune(ids(), "params=0.4", axes=BOTH, sublayers=True, layout="deci", multiple_of=16, progress=False)
    may_go = {choice.axis for choice in step._choices(small(ALIKE)) if 0 in choice.sizes}
    assert may_go == {"layers.1.heads", "layers.2.heads", "layers.3.heads"}
    uneven = Prune(ids(), "params=0.6", layout="deci", multiple_of=16, progress=False)(small(ALIKE)).config
    assert not uneven.uniform and architecture_of(uneven).name == "deci"


def test_nemotron_nas_keeps_query_heads():
    after = pruned("nemotron-nas", target="params=0.5", sublayers=True)
    assert {layer.n_heads for layer in after.layers} == {4} and after.layers[0].n_kv_heads == 2
    with pytest.raises(InputError, match="heads with layout='nemotron-nas'"):
        pruned("nemotron-nas", axes=BOTH)


@pytest.mark.parametrize(
    "layout, layers, message",
    [
        ("uniform", (Layer(4, 2, 96), Layer(4, 2, 64)), "layers of different widths"),
        ("deci", (Layer(4, 2, 96), Layer(4, 2, 0)), r"layers \[1\] without an FFN"),
        ("deci", (Layer(0, 0, 96), Layer(4, 2, 96)), "first layer without attention"),
        ("nemotron-nas", (Layer(4, 2, 96), Layer(2, 2, 96)), "different query heads.*deci"),
    ],
)
def test_models_outside_of_a_layout_are_refused(layout, layers, message):
    with pytest.raises(InputError, match=message):
        pruned(layout, layers)


def test_a_layout_has_a_name():
    with pytest.raises(InputError, match=" . ".join(LAYOUTS)):
        pruned("square")
