"""Distillation: it heals, what learns is what was asked, and the result is what training saw."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from distill_cases import FAST, distance, kl, perturbed, same, windows

from tinycompress import PruneFFN
from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.lora import LoRA
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.rtn import RTN


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "jsd", "skew_kl"])
def test_the_student_comes_nearer_whatever_the_divergence(nonuniform, kind):
    tokens, student = windows(nonuniform), perturbed(nonuniform)
    out = Distill(tokens, nonuniform, Training(steps=15, lr=3e-3, batch=6), losses=(Loss(kind),))(student)
    assert kl(nonuniform, out, tokens) < 0.7 * kl(nonuniform, student, tokens)
    assert not same(out, student) and out.history[-1].startswith("Distill(training=Training(steps=15")


def test_the_input_is_untouched_and_the_result_saves(nonuniform, tmp_path):
    before = {n: w.clone() for n, w in nonuniform.weights.items()}
    student = perturbed(nonuniform)
    kept = {n: w.clone() for n, w in student.weights.items()}
    out = Distill(windows(nonuniform), nonuniform, FAST)(student)
    assert all(
        torch.equal(before[n], nonuniform.weights[n]) and torch.equal(kept[n], student.weights[n]) for n in before
    )
    assert all(out.weights[n].dtype == student.weights[n].dtype and not out.weights[n].requires_grad for n in kept)
    checkpoint.save(out, tmp_path / "out")
    loaded, ids = checkpoint.load(tmp_path / "out"), windows(nonuniform, 1)
    assert torch.equal(loaded.module()(ids), out.module()(ids)) and loaded.history == out.history


def test_one_step_is_the_gradient_of_the_dense_loss(tiny):
    """Plain autograd on whole logits and torch's own AdamW end at the same weights."""
    graph = Graph(tiny.config, {n: w.double() for n, w in tiny.weights.items()})
    student, tokens = perturbed(graph, 0.1), windows(graph, 2)
    training = Training(steps=1, lr=1e-3, warmup=0, batch=2, clip=0.5, weight_decay=0.1)
    out = Distill(tokens, graph, training, losses=(Loss("kl", 0.7), Loss("ce", 0.3)))(student)
    module = Graph(student.config, {n: w.clone() for n, w in student.weights.items()}).module().requires_grad_(True)
    q, p = module(tokens)[:, :-1].log_softmax(-1), graph.module()(tokens)[:, :-1].log_softmax(-1)
    ce = torch.nn.functional.cross_entropy(module(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    (0.7 * (p.exp() * (p - q)).sum(-1).mean() + 0.3 * ce).backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
    named = dict(module.named_parameters())
    groups = [
        {"params": [w for w in named.values() if w.dim() > 1]},
        {"params": [w for w in named.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1).step()
    for name, weight in out.weights.items():
        torch.testing.assert_close(weight, named[name].detach(), rtol=1e-7, atol=1e-9)


def test_micro_batches_are_one_batch(nonuniform):
    graph = Graph(nonuniform.config, {n: w.double() for n, w in nonuniform.weights.items()})
    student, tokens = perturbed(graph), windows(graph)
    hidden = (HiddenLoss("cosine", 0.5, last=1),)
    results = [
        Distill(tokens, graph, Training(steps=3, lr=1e-2, batch=4, micro_batch=m), hidden=hidden)(student)
        for m in (None, 3, 1)
    ]
    for other in results[1:]:
        for name, weight in results[0].weights.items():
            torch.testing.assert_close(other.weights[name], weight, rtol=1e-6, atol=1e-8)


def test_checkpointing_changes_nothing(nonuniform):
    student, tokens = perturbed(nonuniform), windows(nonuniform)
    plain, kept = (
        Distill(tokens, nonuniform, Training(steps=2, lr=1e-2, batch=4, checkpointing=c))(student)
        for c in (False, True)
    )
    assert same(plain, kept)


def test_tied_weights_stay_tied_and_bfloat16_stays_bfloat16():
    config = Config(
        vocab_size=64,
        hidden_size=32,
        head_dim=16,
        layers=(Layer(2, 1, 48), Layer(0, 0, 16)),
        max_position=32,
        tie_embeddings=True,
    )
    teacher = Graph.random(config, std=0.1, dtype=torch.bfloat16)
    student = perturbed(teacher)
    student = Graph(config, {n: w.bfloat16() for n, w in student.weights.items()})
    out = Distill(windows(teacher), teacher, Training(steps=2, lr=1e-2, batch=4, precision="bfloat16"))(student)
    assert set(out.weights) == set(shapes(config)) and {w.dtype for w in out.weights.values()} == {torch.bfloat16}
    assert not torch.equal(out.weights["model.embed_tokens.weight"], student.weights["model.embed_tokens.weight"])


def test_biases_learn():
    layers = (Layer(2, 1, 48),) * 2
    config = Config(
        vocab_size=64,
        hidden_size=32,
        head_dim=16,
        layers=layers,
        max_position=32,
        biases=frozenset({"q_proj", "down_proj"}),
    )
    teacher = Graph.random(config, std=0.1)
    out = Distill(windows(teacher), teacher, FAST)(perturbed(teacher))
    assert not torch.equal(
        out.weights["model.layers.0.mlp.down_proj.bias"], teacher.weights["model.layers.0.mlp.down_proj.bias"]
    )


# LoRA


# quantization-aware


# of a quantized graph, the scales


# the stable embedding


# hidden states, teachers of other shapes


# attention relations


# weights that change


# cached teachers


@pytest.mark.parametrize("kind", ["sample", "topk"])
def test_a_cached_teacher_teaches(nonuniform, tmp_path, kind):
    tokens, student = windows(nonuniform), perturbed(nonuniform)
    write_cache(nonuniform, tokens, tmp_path / "cache", kind)
    cache = open_cache(tmp_path / "cache", tokens)
    pass_ = Distill(tokens, cache, Training(steps=15, lr=3e-3, batch=6))
    assert kl(nonuniform, pass_(student), tokens) < 0.8 * kl(nonuniform, student, tokens)
    with pytest.raises(InputError, match="a cache of other tokens"):
        Distill(tokens[1:], cache, FAST)(student)
    with pytest.raises(InputError, match="a Graph, for losses of hidden states"):
        Distill(tokens, cache, FAST, on_policy=0.5)


# on-policy


def test_on_policy_text_is_the_students_and_repeatable(nonuniform, monkeypatch):
    import tinycompress.distillation.objective as where

    tokens, student, seen, plain = windows(nonuniform), perturbed(nonuniform), [], where.fused_loss
    monkeypatch.setattr(
        where, "fused_loss", lambda *args, **kwargs: (seen.append(kwargs["labels"]), plain(*args, **kwargs))[1]
    )
    pass_ = Distill(
        tokens, nonuniform, Training(steps=12, lr=3e-3, batch=6), losses=(Loss("reverse_kl"),), on_policy=0.6
    )
    first, again = pass_(student), pass_(student)
    assert same(first, again) and kl(nonuniform, first, tokens) < kl(nonuniform, student, tokens)
    ours = [
        labels for labels in seen[:12] if (labels.view(-1, 16)[:, :7] == -100).all()
    ]  # nothing of the prompt counts
    assert 3 <= len(ours) <= 10
    for labels in ours:
        assert (labels.view(-1, 16)[:, 7:15] != -100).all()


def test_on_policy_loss_is_a_mean_over_what_counts(tiny, tmp_path):
    """A student whose distribution is uniform has the same CE everywhere, so steps on its own text (half as many tokens
    count) log the same loss as the others."""
    uniform = tiny.replace(weights={"lm_head.weight": torch.zeros_like(tiny.weights["lm_head.weight"])})
    training = Training(steps=8, lr=1e-12, batch=4, micro_batch=3)
    Distill(windows(tiny), tiny, training, losses=(Loss("ce"),), on_policy=0.5, log=tmp_path)(uniform)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([math.log(128)] * 8, rel=1e-5)


# tokens that count more than others


def test_tokens_count_as_much_as_their_weights(tiny, tmp_path):
    """The logged loss is the weighted mean over the step, whatever the micro-batches; weights of 0 and 1 are a mask."""
    tokens, student = windows(tiny, 4), perturbed(tiny)
    weights = 3 * torch.rand(4, 16, generator=torch.Generator().manual_seed(1)) * (tokens % 3 > 0)
    with torch.no_grad():
        theirs, ours = (g.module()(tokens)[:, :-1].log_softmax(-1) for g in (tiny, student))
    kl_ = (theirs.exp() * (theirs - ours)).sum(-1)
    ce = -ours.gather(-1, tokens[:, 1:, None])[..., 0]
    expected = ((kl_ + 0.5 * ce) * weights[:, 1:]).sum() / weights[:, 1:].sum()
    outs = []
    for micro in (4, 3, 1):
        training, log = Training(steps=2, lr=1e-3, batch=4, micro_batch=micro), tmp_path / str(micro)
        pass_ = Distill(tokens, tiny, training, losses=(Loss("kl"), Loss("ce", 0.5)), token_weights=weights, log=log)
        outs.append(pass_(student))
        assert json.loads((log / "train.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(
            expected.item(), rel=1e-4
        )
    for other in outs[1:]:
        assert distance(other, outs[0]) < 1e-3 * distance(outs[0], student)
    ones, none = (Distill(tokens, tiny, FAST, token_weights=w)(student) for w in (torch.ones(4, 16), None))
    assert distance(ones, none) < 1e-3 * distance(none, student)
    by_kind = {"kl": weights, "ce": torch.ones(4, 16)}
    Distill(
        tokens,
        tiny,
        Training(steps=1, batch=4),
        losses=(Loss("kl"), Loss("ce", 0.5)),
        token_weights=by_kind,
        log=tmp_path / "k",
    )(student)
    expected = (kl_ * weights[:, 1:]).sum() / weights[:, 1:].sum() + 0.5 * ce.mean()
    assert json.loads((tmp_path / "k/train.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(
        expected.item(), rel=1e-4
    )
    pass_ = Distill(tokens, tiny, FAST, token_weights=weights)
    assert pass_.key(student) != dataclasses.replace(pass_, token_weights=None).key(student)


# a teacher of a shorter context


def test_the_teacher_reads_long_windows_in_pieces(tiny, tmp_path):
    """The KL of the first step is that of the pieces, put together; a student that is its teacher has none at T =
    piece."""
    tokens, student = windows(tiny, 4, 32), perturbed(tiny)

    def first_loss(**how):
        training = Training(steps=1, lr=1e-9, batch=4, micro_batch=3)
        log = tmp_path / str(how)
        Distill(tokens, tiny, training, log=log, **how)(student)
        return json.loads((log / "train.jsonl").read_text().splitlines()[0])["loss"]

    with torch.no_grad():
        theirs = tiny.module()(tokens.reshape(8, 16)).reshape(4, 32, -1)[:, :-1].log_softmax(-1)
        whole = tiny.module()(tokens)[:, :-1].log_softmax(-1)
        ours = student.module()(tokens)[:, :-1].log_softmax(-1)
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert first_loss(teacher_context=16) == pytest.approx(expected, rel=1e-4)
    plain = (whole.exp() * (whole - ours)).sum(-1).mean().item()
    assert abs(plain - expected) > 1e-2 * expected  # the test can tell
    assert (
        first_loss() == first_loss(teacher_context=64) == pytest.approx(plain, rel=1e-4)
    )  # windows that fit are read whole
    short = tiny.replace(config=dataclasses.replace(tiny.config, max_position=16))
    assert same(*(Distill(tokens, teacher, FAST, teacher_context=16)(student) for teacher in (short, tiny)))


# a real model


def test_a_pruned_model_heals(shared, tmp_path):
    teacher = checkpoint.load(shared / "models/stories260K")
    (tmp_path / "some.txt").write_text((shared / "data/wiki_passages.txt").read_text()[:60000])
    text = data.tokens(tmp_path / "some.txt", teacher.tokenizer, 110, 96)
    tokens, held_out = text[:98], text[98:]
    pruned = PruneFFN(tokens[:16], keep=0.7)(teacher)
    pass_ = Distill(
        tokens, teacher, Training(steps=24, lr=1e-3, batch=6, eval_every=24), held_out={"wiki": held_out}, log=tmp_path
    )
    healed = pass_(pruned)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert kl(teacher, healed, held_out) < 0.8 * kl(teacher, pruned, held_out)
    assert lines[0]["perplexity"]["wiki"] == pytest.approx(perplexity(pruned.module(), held_out).value, rel=1e-4)
    assert lines[-1]["perplexity"]["wiki"] == pytest.approx(perplexity(healed.module(), held_out).value, rel=1e-4)
    assert lines[-1]["perplexity"]["wiki"] < lines[0]["perplexity"]["wiki"]


# what is refused


def test_bad_input_is_named_before_any_work(tiny, nonuniform):
    tokens = windows(tiny)
    other = Graph.random(
        Config(vocab_size=100, hidden_size=32, head_dim=16, layers=(Layer(2, 1, 32),), max_position=64)
    )
    for make, words in (
        (lambda: Distill(tokens % 100, other, FAST)(tiny), "a vocabulary of 100 tokens"),
        (lambda: Distill(tokens, None, FAST), "or the loss ce alone"),
        (lambda: Distill(tokens, None, FAST, losses=(Loss("ce"),), hidden=(HiddenLoss(),)), "losses of hidden states"),
        (lambda: Distill(tokens, tiny, FAST, lora=LoRA(), fake_quant=QuantSpec()), "one of the two"),
        (lambda: Distill(tokens, tiny, FAST)(RTN(QuantSpec(4, 16))(tiny)), "already w4g16"),
        (lambda: Distill(tokens, tiny, FAST, fake_quant=QuantSpec(4, 40))(tiny), "does not divide"),
        (lambda: Distill(tokens, tiny, FAST, scales=True)(tiny), "without a packed linear"),
        (lambda: Distill(tokens, tiny, FAST, scales=True, lora=LoRA()), "Distill.scales"),
        (lambda: Distill(tokens.repeat(1, 8), tiny, FAST)(tiny), "at most the context, 64"),
        (
            lambda: Distill(tokens, tiny, FAST, held_out=torch.zeros(1, 99, dtype=torch.long))(tiny),
            "held-out set held_out",
        ),
        (lambda: Distill(tokens, tiny, FAST, hidden=(HiddenLoss(layers=((5, 0),)),))(tiny), "HiddenLoss.layers"),
        (lambda: LoRA(targets=("lm_head",)), "LoRA.targets"),
        (lambda: LoRA(rank=0), "LoRA.rank"),
        (lambda: HiddenLoss("dot"), "cosine | mse | relation | attention"),
        (lambda: Distill(tokens, tiny, FAST, grid="fixed"), "refind | learn"),
        (lambda: Distill(tokens, tiny, FAST, token_weights=torch.ones(12, 15)), r"12, 15\)?.*at least 0"),
        (lambda: Distill(tokens, tiny, FAST, token_weights=torch.full((12, 16), math.nan)), "finite numbers"),
        (
            lambda: Distill(tokens, tiny, FAST, token_weights={"ce": torch.ones(12, 16)}),
            r"for each of the losses: \['kl'\]",
        ),
        (lambda: Distill(tokens, tiny, FAST, token_weights=torch.ones(12, 16), on_policy=0.5), "with on_policy"),
        (lambda: Distill(tokens, tiny, FAST, teacher_context=5), "a divisor of the windows' 16 tokens"),
        (lambda: Distill(tokens, None, FAST, losses=(Loss("ce"),), teacher_context=8), "a Graph as the teacher"),
        (lambda: Distill(tokens, tiny, FAST, hidden=(HiddenLoss("relation"),), teacher_context=8), "no relations"),
        (
            lambda: Distill(tokens, tiny.replace(config=dataclasses.replace(tiny.config, max_position=8)), FAST)(tiny),
            "or a teacher_context",
        ),
    ):
        with pytest.raises(InputError, match=words.replace("|", r"\|")):
            make()


def test_another_tokenizer_is_refused(tiny):
    tokenizers = pytest.importorskip("tokenizers")
    from tinycompress.checkpoints.tokenizer import Tokenizer

    def with_words(*words):
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])
        )
        return Graph(tiny.config, tiny.weights, (), Tokenizer(backend))

    with pytest.raises(InputError, match="another tokenizer"):
        Distill(windows(tiny), with_words("a", "b"), FAST)(with_words("b", "a"))
