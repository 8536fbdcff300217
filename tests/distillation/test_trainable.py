"""Modules that are asked for by name learn; all others stay bit for bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distill_cases import FAST, perturbed, same, windows

from tinycompress.distillation.distill import Distill
from tinycompress.distillation.hidden_losses import HiddenLoss
from tinycompress.distillation.lora import LoRA
from tinycompress.distillation.stopping import Stopped
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("model.norm",), lambda name: name == "model.norm.weight"),
        (("*norm*",), lambda name: "norm" in name),
        (("lm_head.weight",), lambda name: name == "lm_head.weight"),
        (("model.layers.1", "*.mlp"), lambda name: name.startswith("model.layers.1.") or ".mlp." in name),
        (("*.self_attn.[qk]_proj",), lambda name: name.endswith(("q_proj.weight", "k_proj.weight"))),
        (("model.embed_tokens",), lambda name: name == "model.embed_tokens.weight"),
    ],
)
def test_what_is_named_learns_and_the_rest_stays(nonuniform, patterns, expected):
    student = perturbed(nonuniform)
    out = Distill(windows(nonuniform), nonuniform, FAST, trainable=patterns)(student)
    changed = {name for name in out.weights if not torch.equal(out.weights[name], student.weights[name])}
    assert changed == {name for name in out.weights if expected(name)}
    assert all(out.weights[name] is student.weights[name] for name in set(out.weights) - changed)
    assert "trainable=(" in out.history[-1]


def test_all_named_is_all(nonuniform):
    tokens = windows(nonuniform)
    student = perturbed(nonuniform)
    assert same(*(Distill(tokens, nonuniform, FAST, trainable=names)(student) for names in ((), ("*",))))


def test_checkpointing_and_hidden_losses_of_a_frozen_part(nonuniform):
    """The states of layer 0 do not depend on what learns, and have no gradient."""
    tokens = windows(nonuniform)
    student = perturbed(nonuniform)
    hidden = (HiddenLoss("cosine", layers=((0, 0), (4, 4))),)
    results = [
        Distill(tokens, nonuniform, dataclasses.replace(FAST, checkpointing=on), hidden=hidden, trainable=("*.4",))
        for on in (False, True)
    ]
    plain, kept = (distill(student) for distill in results)
    assert same(plain, kept) and not same(plain, student)


def test_a_tied_head_learns_with_the_embedding(tiny):
    config = dataclasses.replace(tiny.config, tie_embeddings=True)
    weights = {name: weight for name, weight in tiny.weights.items() if name != "lm_head.weight"}
    graph = type(tiny)(config, weights)
    student = perturbed(graph)
    out = Distill(windows(graph), graph, FAST, trainable=("model.embed_tokens",))(student)
    changed = {name for name in out.weights if not torch.equal(out.weights[name], student.weights[name])}
    assert changed == {"model.embed_tokens.weight"}


def test_a_run_that_was_stopped_goes_on(nonuniform, tmp_path):
    tokens = windows(nonuniform)
    student = perturbed(nonuniform)
    training = Training(steps=4, lr=1e-2, batch=4, save_every=1)
    names = ("*.mlp",)
    asked = iter([False, True])
    stopped = Distill(
        tokens, nonuniform, training, trainable=names, work=tmp_path, stop=lambda: next(asked, False), progress=False
    )
    with pytest.raises(Stopped):
        stopped(student)
    resumed = Distill(tokens, nonuniform, training, trainable=names, work=tmp_path)(student)
    assert same(resumed, Distill(tokens, nonuniform, training, trainable=names)(student))
    with pytest.raises(InputError, match="another model, data or settings"):
        Distill(tokens, nonuniform, training, work=tmp_path)(student)


def test_bad_names_are_refused(tiny):
    tokens = windows(tiny)
    with pytest.raises(InputError, match=r"'\*\.moe'.*names such as model"):
        Distill(tokens, tiny, FAST, trainable=("*.mlp", "*.moe"))(tiny)
    with pytest.raises(InputError, match="a tuple of patterns"):
        Distill(tokens, tiny, FAST, trainable="*.mlp")
    with pytest.raises(InputError, match="together with lora"):
        Distill(tokens, tiny, FAST, trainable=("*.mlp",), lora=LoRA())
    with pytest.raises(InputError, match="together with lora"):
        Distill(tokens, tiny, FAST, trainable=("*.mlp",), scales=True)
