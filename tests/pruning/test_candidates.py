"""The search heals before it chooses."""

import pytest
import torch
from conftest import random_graph

from tinycompress.distillation.distill import Distill
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.evaluation.divergence import divergence
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.pruning.candidates import search
from tinycompress.pruning.prune import Prune

GRAPH = random_graph(
    Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
)
IDS = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))


def narrow(graph):
    return cut(graph, "layers.0.ffn", range(8))


def shallow(graph):
    return cut(graph, "layers", [0])


def test_the_best_after_healing_comes_first():
    flat = {
        "lm_head.weight": torch.zeros_like(GRAPH.weights["lm_head.weight"])
    }  # uniform: far better than random weights

    def heals_what_is_narrow(graph):
        return graph.replace(weights=flat) if graph.config.n_layers == 2 else graph

    seen = []
    trials = search(GRAPH, [shallow, narrow], heals_what_is_narrow, IDS, seen.append)
    assert len(seen) == 2 and trials[0].pruned.config.layers[0].ffn_dim == 8
    assert trials[0].after == pytest.approx(128) and trials[0].after < trials[1].after
    assert trials[0].before == perplexity(narrow(GRAPH).module(), IDS).value
    with pytest.raises(InputError, match="at least one pass"):
        search(GRAPH, [], lambda g: g, IDS)


def test_candidates_of_one_budget_heal_by_distillation():
    """Minitron's practice as it is meant: width against depth at a like size, each healed by the whole model."""
    width = Prune(IDS, "params=0.7", criterion="magnitude", allocation="uniform", refit=False, multiple_of=16)
    candidates = [width, Prune(IDS, keep={"layers": 1})]
    heal = Distill(IDS, GRAPH, Training(steps=12, lr=3e-3, batch=2))
    trials = search(GRAPH, candidates, heal, IDS)
    assert [trial.after for trial in trials] == sorted(trial.after for trial in trials)
    assert all(
        trial.healed.history[-1].startswith("Distill") and trial.healed.config == trial.pruned.config
        for trial in trials
    )
    module = GRAPH.module()
    nearer = [
        divergence(module, t.healed.module(), IDS).mean_kl < divergence(module, t.pruned.module(), IDS).mean_kl
        for t in trials
    ]
    assert all(nearer)
