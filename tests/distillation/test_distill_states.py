"""Losses of states inside the model, towards teachers of other widths and depths."""

from __future__ import annotations

import json

import pytest
import torch
from distill_cases import kl, perturbed, same, windows

from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.schedule import Ramp
from tinycompress.distillation.training import Training
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph


def test_a_wider_and_deeper_teacher_with_hidden_losses(nonuniform):
    teacher = Graph.random(
        Config(vocab_size=128, hidden_size=48, head_dim=16, layers=(Layer(3, 1, 64),) * 7, max_position=64), 3, std=0.1
    )
    tokens = windows(teacher)
    for kind in ("cosine", "mse"):
        out = Distill(tokens, teacher, Training(steps=12, lr=5e-3, batch=6), hidden=(HiddenLoss(kind),))(nonuniform)
        assert kl(teacher, out, tokens) < 0.8 * kl(teacher, nonuniform, tokens)


def test_the_hidden_loss_alone_pulls_the_states_together(tiny):
    student, tokens = perturbed(tiny), windows(tiny)
    pass_ = Distill(
        tokens,
        tiny,
        Training(steps=15, lr=3e-3, batch=6),
        losses=(Loss("kl", 0.0),),
        hidden=(HiddenLoss("mse", 1.0, ((0, 0),)),),
    )
    out = pass_(student)

    def state(graph):
        from tinycompress.distillation.student import Network

        with torch.no_grad():
            return Network(graph)(tokens, lambda hidden, head, states: states[0], [0])

    assert (state(out) - state(tiny)).square().mean() < 0.6 * (state(student) - state(tiny)).square().mean()
    assert torch.equal(
        out.weights["model.layers.1.mlp.up_proj.weight"], student.weights["model.layers.1.mlp.up_proj.weight"]
    )


@pytest.mark.parametrize("heads", [None, 4])
def test_the_attention_loss_is_that_of_the_models_attention(tiny, tmp_path, heads):
    """Its value against transformers' own attention matrices (where relation heads are the model's heads) and
    values."""
    student, tokens = perturbed(tiny), windows(tiny, 4)
    loss = HiddenLoss("attention", 0.7, ((0, 1),), heads=heads)
    Distill(tokens, tiny, Training(steps=1, batch=4), losses=(Loss("kl", 0.0),), hidden=(loss,), log=tmp_path)(student)
    found = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])["loss"]

    def seen(graph, layer):
        hf, values = graph.to_hf(), []
        hf.set_attn_implementation("eager")
        hf.model.layers[layer].self_attn.v_proj.register_forward_hook(
            lambda module, inputs, output: values.append(output)
        )
        with torch.no_grad():
            attention = hf(tokens, output_attentions=True).attentions[layer]  # [B, H, T, T]
        return attention, values[0]

    (q, v_s), (p, v_t) = seen(student, 0), seen(tiny, 1)

    def kl(p, q):
        return torch.xlogy(p, p / q.clamp_min(1e-30)).sum(-1).mean()

    def relation(v):
        v = v.unflatten(-1, (4, -1)).transpose(1, 2)
        later = torch.ones(16, 16, dtype=torch.bool).triu(1)
        return (v @ v.transpose(2, 3) / v.shape[-1] ** 0.5).masked_fill(later, -1e9).softmax(-1)

    if heads == 4:
        assert found == pytest.approx(0.7 * (kl(p, q) + kl(relation(v_t), relation(v_s))).item(), rel=1e-4)
    else:
        assert found > 0


@pytest.mark.parametrize("kind", ["relation", "attention"])
def test_relations_come_nearer_whatever_the_heads(nonuniform, kind, tmp_path):
    """A teacher of other widths and heads; the loss falls, and only what lies before the tapped layer's scores
    learns."""
    teacher = Graph.random(
        Config(vocab_size=128, hidden_size=48, head_dim=16, layers=(Layer(6, 2, 64),) * 6, max_position=64), 3, std=0.1
    )
    loss = HiddenLoss(kind, layers=((1, 4),))
    training = Training(steps=25, lr=3e-3, batch=6)
    out = Distill(windows(teacher), teacher, training, losses=(Loss("kl", 0.0),), hidden=(loss,), log=tmp_path)(
        nonuniform
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    changed = {
        n.removeprefix("model.layers.") for n in out.weights if not torch.equal(out.weights[n], nonuniform.weights[n])
    }
    assert {f"1.self_attn.{x}_proj.weight" for x in "qkv"} <= changed
    assert "1.self_attn.o_proj.weight" not in changed and not any(
        n.startswith(("1.mlp", "2.", "3.", "4.")) for n in changed
    )


def test_taps_do_not_depend_on_micro_batches_or_checkpointing(nonuniform):
    graph = Graph(nonuniform.config, {n: w.double() for n, w in nonuniform.weights.items()})
    student, tokens, hidden = (
        perturbed(graph),
        windows(graph),
        (HiddenLoss("relation", 2.0, last=2), HiddenLoss("cosine"), HiddenLoss("attention")),
    )
    trainings = [
        Training(steps=3, lr=1e-2, batch=4, micro_batch=m, checkpointing=c)
        for m, c in ((None, False), (3, False), (None, True))
    ]
    results = [Distill(tokens, graph, training, hidden=hidden)(student) for training in trainings]
    assert same(results[0], results[2])
    for name, weight in results[0].weights.items():
        torch.testing.assert_close(results[1].weights[name], weight, rtol=1e-6, atol=1e-8)


def test_a_ramp_is_the_step_by_step_sum(tiny, tmp_path):
    """A step's logged loss is the losses' own, each at its weight of that step."""
    student, tokens, steps = perturbed(tiny), windows(tiny), 5

    def logged(name, *losses, hidden=()):
        training = Training(steps=steps, lr=1e-12, batch=4)  # nothing moves: every step's losses can be told apart
        Distill(tokens, tiny, training, losses=losses, hidden=hidden, log=tmp_path / name)(student)
        return [json.loads(line)["loss"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]

    kl, ce = logged("kl", Loss("kl")), logged("ce", Loss("ce"))
    cosine = [a - b for a, b in zip(logged("cosine", Loss("kl"), hidden=(HiddenLoss("cosine"),)), kl)]
    ramps = Loss("kl", Ramp(0, 1)), Loss("ce", Ramp(0.5, 0.1, "cosine"))
    for i, found in enumerate(logged("both", *ramps, hidden=(HiddenLoss("cosine", Ramp(2, 0)),))):
        t = i / (steps - 1)
        assert found == pytest.approx(
            t * kl[i] + Ramp(0.5, 0.1, "cosine").at(t) * ce[i] + 2 * (1 - t) * cosine[i], rel=1e-4
        )
