"""Pruning in one shot: scores and refits from one collection of the whole graph's statistics."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from pruning_cases import BOTH, ids, seen_by, small

from tinycompress.errors import InputError
from tinycompress.graph.config import Layer
from tinycompress.pruning.prune import Prune
from tinycompress.pruning.refit import refit_columns


def test_one_shot_scores_and_refits_on_what_the_whole_graph_gives():
    graph = small(layers=(Layer(4, 2, 96),) * 2)
    tokens = ids()
    out = Prune(tokens, keep={"ffn": 48}, criterion="wanda_sp", refit=True, one_shot=True, multiple_of=16)(graph)
    for i in range(2):
        name = f"model.layers.{i}.mlp.down_proj"
        x = seen_by(graph, tokens, name).flatten(0, 1)
        W = graph.weights[f"{name}.weight"]
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
    graph = small()
    tokens = ids()
    step = Prune(tokens, "params=0.8", axes=BOTH, multiple_of=16, one_shot=True, probe=6, **how)
    measured = step.collect(graph)
    for target in ("params=0.8", "params=0.6"):
        again = dataclasses.replace(step, target=target)
        shared = again.from_statistics(graph, measured)
        whole = again(graph)
        assert shared.config == whole.config and shared.history == whole.history
        assert all(torch.equal(w, whole.weights[n]) for n, w in shared.weights.items())
        assert shared.config.n_body_params <= float(target[7:]) * graph.config.n_body_params


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
