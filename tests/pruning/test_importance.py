"""Statistics, sensitivities and criteria against their formulas, on whole small models."""

import pytest
import torch
from pruning_cases import ids, problem, seen_by, small

from tinycompress.graph.config import Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.topology import axes
from tinycompress.pruning.axis_statistics import collect, root
from tinycompress.pruning.importance import CRITERIA, block_influence, hidden_importance
from tinycompress.pruning.sensitivity import sensitivities


@pytest.fixture(scope="module")
def measured():
    graph = small()
    tokens = ids()
    sensitivity = sensitivities(graph, tokens, gradients=True)
    names = [a for a in axes(graph.config) if a.endswith((".ffn", "heads"))]
    return graph, tokens, sensitivity, collect(graph, tokens, names, sensitivity)


@pytest.mark.parametrize("name", ["layers.0.ffn", "layers.1.heads", "layers.1.kv_heads"])
def test_criteria_are_their_formulas(measured, name):
    graph, tokens, _, stats = measured
    s = stats[name]
    axis = axes(graph.config)[name]
    i = name.split(".")[1]
    reader = f"model.layers.{i}.mlp.down_proj" if name.endswith("ffn") else f"model.layers.{i}.self_attn.o_proj"
    x = seen_by(graph, tokens, reader)
    W = graph.weights[f"{reader}.weight"].double()
    u = W.shape[1] // axis.size
    by_unit = lambda v: v.view(axis.size, u).sum(1)  # noqa: E731
    expected = {
        "wanda_sp": by_unit(W.abs().mean(0) * x.square().sum((0, 1)).sqrt()),
        "minitron": by_unit(x.abs().mean(1).square().sum(0)).sqrt(),
        "flap": by_unit(x.flatten(0, 1).var(0, correction=0) * W.square().sum(0)),
    }
    for criterion, scores in expected.items():
        assert torch.allclose(CRITERIA[criterion](s), scores, rtol=1e-4), criterion
    for j in range(axis.size):  # what is cut together: everything that changes shape
        kept = cut(
            graph,
            axis,
            [k for k in range(axis.size) if k % (axis.size // axis.groups) != j % (axis.size // axis.groups)],
        )
        parts = [n for n in graph.weights if n in kept.weights and kept.weights[n].shape != graph.weights[n].shape]
        assert set(parts) == set(axis.cuts)
        part = [
            graph.weights[n].double().movedim(d, 0).reshape(axis.size, -1)[j].square().sum()
            for n, (d, _) in axis.cuts.items()
        ]
        assert torch.allclose(CRITERIA["magnitude"](s)[j], sum(part).sqrt())


def test_taylor_sums_weight_times_gradient(measured):
    graph, tokens, _, stats = measured
    module = graph.module()
    names = [f"model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    weights = [module.get_parameter(n).requires_grad_() for n in names]
    with torch.enable_grad():
        logits = module(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        gate, up, down = ((w * g).abs().double() for w, g in zip(weights, torch.autograd.grad(loss, weights)))
    assert torch.allclose(CRITERIA["taylor"](stats["layers.0.ffn"]), gate.sum(1) + up.sum(1) + down.sum(0), rtol=1e-3)


def test_the_fisher_matrix_predicts_the_divergence(measured):
    """½ tr(G E) for a small random change of one linear's output, against the KL that it causes."""
    graph, tokens, *_ = measured
    tokens = ids(24, 48, seed=3)
    sensitivity = sensitivities(graph, tokens)
    name = "model.layers.1.mlp.down_proj"
    W = graph.weights[f"{name}.weight"]
    change = 0.02 * W.std() * torch.randn(W.shape, generator=torch.Generator().manual_seed(5))
    x = seen_by(graph, tokens, name).flatten(0, 1)
    moved = graph.replace(weights={f"{name}.weight": W + change})
    p, q = (g.module()(tokens).double().log_softmax(-1) for g in (graph, moved))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    E = change.double() @ (x.T @ x / len(x)) @ change.double().T
    assert 0.6 < 0.5 * (sensitivity.fisher[name] * E).sum() / kl < 1.6


def test_the_root_of_a_matrix():
    _, x = problem()
    assert torch.allclose(root(x.T @ x) @ root(x.T @ x), x.T @ x)


def test_block_influence_is_one_minus_the_cosine():
    graph = small()
    tokens = ids()
    module = graph.module()
    states = []
    for layer in module.model.layers:
        layer.register_forward_hook(lambda m, args, out: states.append((args[0].clone(), out.clone())))
        layer.register_forward_pre_hook(lambda m, args: (args[0].clone(), *args[1:]))
    expected = torch.zeros(graph.config.n_layers, dtype=torch.float64)
    x = module.model.embed_tokens(tokens)
    for i, layer in enumerate(module.model.layers):
        before = x.clone()
        x = layer(x.clone(), module.tables(0, tokens.shape[1]))
        expected[i] = 1 - torch.nn.functional.cosine_similarity(before.double(), x.double(), dim=-1).mean()
    assert torch.allclose(block_influence(graph, tokens), expected, atol=1e-5)


def test_hidden_importance_sums_over_norms():
    graph = small(layers=(Layer(4, 2, 96),))
    tokens = ids()
    names = {"model.layers.0.self_attn.q_proj": 0, "model.layers.0.mlp.up_proj": 0, "lm_head": 0}
    expected = sum(seen_by(graph, tokens, n).abs().mean(1).square().sum(0).sqrt() for n in names)
    assert torch.allclose(hidden_importance(graph, tokens), expected, rtol=1e-4)


def test_gradients_come_without_fisher_matrices(measured):
    graph, tokens, both, _ = measured
    alone = sensitivities(graph, tokens, gradients=True, fisher=False)
    assert not alone.fisher and both.fisher
    assert all(torch.equal(g, both.gradients[n]) for n, g in alone.gradients.items())
