"""Distillation: it heals, what learns is what was asked, and the result is what training saw."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from tinycompress import PruneFFN
from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.lora import LoRA, merge
from tinycompress.distillation.schedule import Ramp
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import agreement, perplexity
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.fake_quant import PackedLinear, fake_quantize
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.rtn import RTN

FAST = Training(steps=3, lr=1e-2, batch=4)


def windows(graph, n=12, length=16, seed=0):
    return torch.randint(graph.config.vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def perturbed(graph, scale=0.3):
    """A student that is clearly not its teacher."""
    generator = torch.Generator().manual_seed(9)
    return graph.replace(
        weights={
            n: w * (1 + scale * torch.randn(w.shape, generator=generator))
            for n, w in graph.weights.items()
            if n.endswith("proj.weight")
        }
    )


def same(a, b):
    return all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def kl(teacher, student, tokens):
    return agreement(teacher.module(), student.dense().module(), tokens).kl


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


def test_lora_merges_exactly_and_freezes_the_rest(nonuniform):
    graph = Graph(nonuniform.config, {n: w.double() for n, w in nonuniform.weights.items()})
    student, tokens, lora = perturbed(graph), windows(graph), LoRA(4, 8.0, ("q_proj", "up_proj"))
    pass_, modules = Distill(tokens, graph, FAST, lora=lora), []
    import tinycompress.distillation.distill as where

    plain = where.train
    try:
        where.train = lambda network, *args, **kwargs: (plain(network, *args, **kwargs), modules.append(network))
        out = pass_(student)
    finally:
        where.train = plain
    changed = {n for n in out.weights if not torch.equal(out.weights[n], student.weights[n])}
    assert changed == {n for n in out.weights if n.endswith(("q_proj.weight", "up_proj.weight"))}
    assert all(out.weights[n] is student.weights[n] for n in set(out.weights) - changed)
    ids = windows(graph, 2, seed=3)
    assert (
        (modules[0].transformer(ids) - out.module()(ids)).abs().max()
        < 1e-8
        < (out.module()(ids) - student.module()(ids)).abs().max()
    )


def test_lora_is_the_low_rank_sum():
    w, a, b = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    torch.testing.assert_close(merge(w, a, b, 0.5), w + 0.5 * b @ a)


# quantization-aware


@pytest.mark.parametrize("grid", ["refind", "learn"])
@pytest.mark.parametrize("text", ["w3g16", "w4", "w2g16-asym"])
def test_the_packed_result_is_what_training_saw(nonuniform, monkeypatch, text, grid):
    import tinycompress.distillation.distill as where

    seen, plain = [], where.train
    monkeypatch.setattr(
        where, "train", lambda network, *args, **kwargs: (plain(network, *args, **kwargs), seen.append(network))
    )
    spec = QuantSpec.parse(text)
    out = Distill(windows(nonuniform), nonuniform, FAST, fake_quant=spec, grid=grid)(nonuniform)
    packed = {n: w for n, w in out.weights.items() if isinstance(w, QuantTensor)}
    assert len(packed) == sum(n.endswith("proj.weight") for n in shapes(nonuniform.config)) and {
        w.grid for w in packed.values()
    } == {spec.grid}
    for name, weight in packed.items():
        module = seen[0].transformer.get_submodule(name.removesuffix(".weight"))
        scales, zeros = module.grid(module.weight)
        assert torch.equal(fake_quantize(module.weight, scales, zeros, spec), weight.dequantize())
    ids = windows(nonuniform, 2, seed=4)
    with torch.no_grad():
        assert torch.equal(seen[0].transformer(ids), out.dense().module()(ids))
    if grid == "refind":  # what RTN makes of the trained float weights
        trained = Graph(
            nonuniform.config, {n: seen[0].get_parameter(f"transformer.{n}").detach() for n in nonuniform.weights}
        )
        rounded = RTN(spec)(trained)
        assert all(
            torch.equal(rounded.weights[n].packed, w.packed) and torch.equal(rounded.weights[n].scales, w.scales)
            for n, w in packed.items()
        )


def test_linears_have_grids_of_their_own(nonuniform):
    name = "model.layers.0.mlp.up_proj"
    specs = {name: QuantSpec(3, 16), "model.layers.3.self_attn.q_proj": QuantSpec(8, None)}
    out = Distill(windows(nonuniform), nonuniform, FAST, fake_quant=specs)(nonuniform)
    assert {n: w.grid for n, w in out.weights.items() if isinstance(w, QuantTensor)} == {
        f"{n}.weight": spec.grid for n, spec in specs.items()
    }
    with pytest.raises(InputError, match="a grid for lm_head"):
        Distill(windows(nonuniform), nonuniform, FAST, fake_quant={"lm_head": QuantSpec(4, 16)})(nonuniform)
    with pytest.raises(InputError, match="'learn' with lpbq"):
        Distill(windows(nonuniform), nonuniform, FAST, fake_quant=QuantSpec(4, 16, search="lpbq"), grid="learn")(
            nonuniform
        )


def test_quantization_aware_training_beats_rounding(nonuniform):
    tokens, spec = windows(nonuniform, 24), QuantSpec.parse("w2g16")
    rounded = RTN(spec)(nonuniform)
    for grid in ("refind", "learn"):
        out = Distill(tokens, nonuniform, Training(steps=25, lr=3e-3, batch=8), fake_quant=spec, grid=grid)(nonuniform)
        assert kl(nonuniform, out, tokens) < 0.8 * kl(nonuniform, rounded, tokens)


def test_gradients_of_fake_quantization():
    """Straight through inside the range, none outside; the scale's by the naive formula."""
    spec, w = QuantSpec(3, 8), torch.randn(4, 16)
    scales, _ = find_grid("w", w, spec)
    scales = (scales * 0.6).requires_grad_()  # so that some are clamped
    weight, upstream = w.clone().requires_grad_(), torch.randn(4, 16)
    fake_quantize(weight, scales, None, spec).backward(upstream)
    q = round_to_grid(w, scales.detach(), None, spec).float() - 4
    u = w / scales.detach().repeat_interleave(8, 1)
    inside = (u.round() >= -4) & (u.round() <= 3)
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(weight.grad, upstream * inside)
    torch.testing.assert_close(scales.grad, (upstream * (q - u * inside)).reshape(4, 2, 8).sum(-1))


# of a quantized graph, the scales


@pytest.mark.parametrize("text", ["w3g16", "w4g16-asym", "w4", "w2g16-floatzero", "w4g16-lpbq"])
def test_scales_learn_and_integers_stay(nonuniform, monkeypatch, tmp_path, text):
    import tinycompress.distillation.distill as where

    seen, plain = [], where.train
    monkeypatch.setattr(
        where, "train", lambda network, *args, **kwargs: (plain(network, *args, **kwargs), seen.append(network))
    )
    spec, tokens = QuantSpec.parse(text), windows(nonuniform, 24)
    rounded = RTN(spec)(nonuniform)
    out = Distill(tokens, nonuniform, Training(steps=15, lr=5e-3, batch=8), scales=True)(rounded)
    assert kl(nonuniform, out, tokens) < 0.9 * kl(nonuniform, rounded, tokens)
    for name, before in rounded.weights.items():
        after = out.weights[name]
        if isinstance(before, QuantTensor):
            assert (
                torch.equal(after.packed, before.packed)
                and after.grid == spec.grid
                and not torch.equal(after.scales, before.scales)
            )
            assert (after.zeros is None) == (before.zeros is None) and (
                before.zeros is None or torch.equal(after.zeros, before.zeros)
            )
            assert text != "w4g16-lpbq" or is_lpbq(after)
        else:
            assert torch.equal(before, after) == (before.dim() > 1)
    ids = windows(nonuniform, 2, seed=4)
    with torch.no_grad():
        assert torch.equal(seen[0].transformer(ids), out.dense().module()(ids))
    checkpoint.save(out, tmp_path / "out")
    assert torch.equal(checkpoint.load(tmp_path / "out").dense().module()(ids), out.dense().module()(ids))


def test_a_packed_table_stays_while_scales_learn(tiny):
    rounded = QuantizeEmbedding(QuantSpec(8, 16))(RTN(QuantSpec(3, 16))(tiny))
    out = Distill(windows(tiny), tiny, FAST, scales=True)(rounded)
    assert out.weights["model.embed_tokens.weight"] is rounded.weights["model.embed_tokens.weight"]


@pytest.mark.parametrize("text", ["w3g8", "w3g8-asym", "w2g8-floatzero"])
def test_gradients_of_the_scales_of_packed_weights(text):
    spec, w, x = QuantSpec.parse(text), torch.randn(4, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    scales, zeros = find_grid("w", w, spec)
    weight = QuantTensor.from_ints(round_to_grid(w, scales, zeros, spec), scales, zeros, spec)
    linear = PackedLinear(weight, None, torch.float64)
    linear.scales_delta.data.uniform_(-0.1, 0.1)
    assert torch.autograd.gradcheck(
        lambda delta: torch.func.functional_call(linear, {"scales_delta": delta}, x), linear.scales_delta
    )


# the stable embedding


@pytest.mark.parametrize("tied", [False, True])
def test_the_stable_embedding_folds_away_exactly(nonuniform, monkeypatch, tied):
    import tinycompress.distillation.distill as where

    config = dataclasses.replace(nonuniform.config, tie_embeddings=tied)
    graph = Graph(config, {n: nonuniform.weights[n].double() for n in shapes(config)})
    seen, plain, ids = [], where.train, windows(nonuniform, 2, seed=5)

    def watch(network, *args, **kwargs):
        with torch.no_grad():
            assert (network.transformer(ids) - student.module()(ids)).abs().max() < 1e-8  # starts where the graph is
        plain(network, *args, **kwargs)
        seen.append(network)

    student = perturbed(graph)
    monkeypatch.setattr(where, "train", watch)
    out = Distill(windows(graph), graph, FAST, stable_embedding=True)(student)
    with torch.no_grad():
        assert (seen[0].transformer(ids) - out.module()(ids)).abs().max() < 1e-8
    name = "model.embed_tokens.weight"
    assert set(out.weights) == set(shapes(config)) and (out.weights[name] - student.weights[name]).abs().max() > 1e-4


# hidden states, teachers of other shapes


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


# attention relations


@pytest.mark.parametrize("heads", [None, 4])
def test_the_attention_loss_is_that_of_the_models_attention(tiny, tmp_path, heads):
    """Its value against transformers' own attention matrices (where relation heads are the model's heads) and values."""
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
    """A teacher of other widths and heads; the loss falls, and only what lies before the tapped layer's scores learns."""
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


# weights that change


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


def distance(a: Graph, b: Graph) -> float:
    """Of all weights: AdamW moves a weight whose gradient is all rounding as far as any other, so single ones may differ."""
    return sum((w - b.weights[name]).double().square().sum().item() for name, w in a.weights.items()) ** 0.5


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
    """The KL of the first step is that of the pieces, put together; a student that is its teacher has none at T = piece."""
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
