"""The pruning table: rows that share one collection of statistics are the rows that the passes would give."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import random_graph

from tinycompress.graph.config import Config, Layer
from tinycompress.pruning.prune import Prune
from tinycompress.pruning.slice import Slice

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import prune

SHARE, TARGET = 0.8, "params=0.8"


@pytest.fixture(scope="module")
def collected():
    graph = random_graph(
        Config(vocab_size=128, hidden_size=128, head_dim=32, layers=(Layer(4, 2, 256),) * 3, max_position=64)
    )
    tokens = torch.randint(128, (4, 48), generator=torch.Generator().manual_seed(0))
    return graph, tokens, {name: t for gather in prune.COLLECT.values() for name, t in gather(graph, tokens).items()}


@pytest.mark.parametrize(
    "name, make",
    [
        ("layers", lambda t: Prune(t, keep={"layers": 2})),
        ("hidden", lambda t: Prune(t, keep={"hidden": 96}, multiple_of=32)),
        ("slice", lambda t: Slice(t, 96)),
        (
            "flap",
            lambda t: Prune(
                t,
                TARGET,
                axes=("ffn", "heads"),
                criterion="flap",
                allocation="global",
                refit="bias",
                probe=4,
                one_shot=True,
            ),
        ),
        (
            "taylor + refit",
            lambda t: Prune(
                t,
                TARGET,
                axes=("ffn", "heads"),
                criterion="taylor",
                allocation="uniform",
                refit=True,
                probe=4,
                one_shot=True,
            ),
        ),
        (
            "wanda_sp",
            lambda t: Prune(
                t,
                TARGET,
                axes=("ffn", "heads"),
                criterion="wanda_sp",
                allocation="uniform",
                refit=False,
                probe=4,
                one_shot=True,
            ),
        ),
    ],
)
def test_a_row_from_shared_statistics_is_what_the_pass_gives(collected, name, make):
    graph, tokens, found = collected
    recipe = prune.RECIPES[name]
    out, expected = recipe.cut(graph, SHARE, tokens, found), make(tokens)(graph)
    assert out.config == expected.config != graph.config
    assert all(torch.equal(w, expected.weights[n]) for n, w in out.weights.items())


def test_every_row_knows_what_it_reads(collected):
    graph, tokens, found = collected
    for name, recipe in prune.RECIPES.items():
        if recipe.reads:
            own = (
                {n: t for kind in recipe.reads for n, t in prune.COLLECT[kind](graph, tokens).items()}
                if "taylor" not in name
                else found
            )
            assert recipe.cut(graph, SHARE, tokens, own).config.n_body_params < graph.config.n_body_params
