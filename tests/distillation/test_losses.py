"""The fused losses against a dense float64 oracle that autograd differentiates."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    DIVERGENCES,
    assert_equal,
    cached,
    cached_draws,
    error,
    grad_hidden_of,
    oracle,
    ours,
    problem,
    rng,
)

from tinycompress.distillation import fused_loss as losses
from tinycompress.distillation.divergences import Loss
from tinycompress.distillation.fused_loss import HiddenTarget, SampledTarget, TopKTarget, fused_loss
from tinycompress.errors import InputError
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.grid_search import find_grid, round_to_grid

COMBINATIONS = [(kind, target) for kind in DIVERGENCES for target in ("hidden", "topk")] + [
    ("kl", "sampled"),
    ("ce", "hidden"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("kind", "target"), COMBINATIONS)
def test_values_and_gradients_are_the_dense_ones(kind, target, dtype, tolerance):
    hidden, head, labels, teacher = problem(n=50, V=200, D=16, dtype=dtype)
    hidden, teacher = (
        hidden / 2,
        HiddenTarget(teacher.hidden / 2, teacher.head),
    )  # logits of about 2, as of a language model
    teacher = teacher if target == "hidden" else cached(teacher, target)
    arguments = {"labels": labels, "teacher": teacher}
    assert_equal(
        ours(hidden, head, [Loss(kind)], chunk=16, **arguments),
        oracle(hidden, head, [Loss(kind)], **arguments),
        tolerance,
    )


LOSSES = st.builds(
    Loss,
    kind=st.sampled_from(DIVERGENCES),
    weight=st.sampled_from([0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    beta=st.sampled_from([0.1, 0.5, 0.8]),
    alpha=st.sampled_from([0.1, 0.6]),
)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    V=st.integers(2, 40),
    D=st.integers(1, 6),
    chunk=st.integers(1, 12),
    losses=st.lists(LOSSES, min_size=1, max_size=3),
    ce=st.booleans(),
    counted=st.sampled_from(["all", "some", "weighted", "by kind"]),
    denominator=st.sampled_from([7.0, None]),
    seed=st.integers(0, 99),
)
def test_any_mixture_in_any_chunks(n, V, D, chunk, losses, ce, counted, denominator, seed):
    hidden, head, labels, teacher = problem(n, V, D, D + 1, seed)
    losses = [*losses, Loss("ce", 0.5)] if ce else losses
    drawn = torch.rand(n, generator=rng(seed), dtype=torch.float64)
    weights = {
        "all": None,
        "some": drawn < 0.7,
        "weighted": 3 * drawn * (drawn < 0.7),
        "by kind": {"kl": drawn, "ce": 1.0 * (drawn > 0.5)},
    }[counted]
    arguments = {
        "labels": labels if ce else None,
        "teacher": teacher,
        "token_weights": weights,
        "denominator": denominator,
    }
    assert_equal(ours(hidden, head, losses, chunk=chunk, **arguments), oracle(hidden, head, losses, **arguments), 1e-9)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(1, 6),
    V=st.integers(2, 30),
    k=st.integers(1, 8),
    chunk=st.integers(1, 7),
    kind=st.sampled_from(["topk", "sampled"]),
    seed=st.integers(0, 99),
)
def test_any_cached_target(n, V, k, chunk, kind, seed):
    hidden, head, labels, teacher = problem(n, V, seed=seed)
    target = cached(teacher, kind, seed, k=min(k, V - 1), draws=k + 1)
    for loss in [Loss("kl")] if kind == "sampled" else [Loss(kind) for kind in DIVERGENCES]:
        mixture = [loss, Loss("ce", 0.5)]
        found = ours(hidden, head, mixture, labels=labels, teacher=target, chunk=chunk)
        assert_equal(found, oracle(hidden, head, mixture, labels=labels, teacher=target), 1e-8)


def test_the_whole_vocabulary_as_top_k_is_the_full_divergence():
    hidden, head, _, teacher = problem()
    for kind in DIVERGENCES:
        every = cached(teacher, "topk", k=37)
        assert_equal(
            ours(hidden, head, [Loss(kind)], teacher=every), ours(hidden, head, [Loss(kind)], teacher=teacher), 1e-8
        )


def test_micro_batches_add_up_to_one_batch():
    """Divided by the count of the whole step, not by their own: the parts hold different numbers of valid tokens."""
    hidden, head, labels, teacher = problem(n=12)
    losses = [Loss("kl", 0.5), Loss("ce", 0.5)]
    whole = ours(hidden, head, losses, labels=labels, teacher=teacher)
    count = (labels != -100).sum()
    h, W = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    total = 0.0
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        loss = fused_loss(h[part], W, losses, labels=labels[part], teacher=teacher.rows(part), denominator=count)
        loss.backward()
        total += loss.detach()
    assert_equal((total, h.grad, W.grad), whole, 1e-12)


def test_an_ignored_token_can_hold_anything():
    hidden, head, labels, teacher = problem()
    labels[3] = -100
    hidden[3], teacher.hidden[3] = math.nan, math.inf
    value, grad_hidden, grad_head = ours(hidden, head, [Loss("kl"), Loss("ce")], labels=labels, teacher=teacher)
    assert torch.isfinite(value) and torch.isfinite(grad_head).all() and not grad_hidden[3].any()


def test_no_valid_token_is_a_loss_of_zero():
    hidden, head, _, teacher = problem()
    for value in ours(hidden, head, [Loss()], teacher=teacher, token_weights=torch.zeros(11, dtype=torch.bool)):
        assert not value.any()


def test_a_loss_of_weight_zero_does_not_look_at_the_teacher(monkeypatch):
    hidden, head, labels, teacher = problem()
    plain = ours(hidden, head, [Loss("ce")], labels=labels)
    real, made = losses.head_logits, []
    monkeypatch.setattr(losses, "head_logits", lambda h, head, out: (made.append(head), real(h, head, out))[1])
    assert_equal(ours(hidden, head, [Loss("ce"), Loss("kl", 0.0)], labels=labels, teacher=teacher), plain, 1e-15)
    assert not any(x.any() for x in ours(hidden, head, [Loss("kl", 0.0)], teacher=teacher))
    assert not any(w is teacher.head for w in made) and made


def test_a_student_equal_to_its_teacher_has_no_loss():
    hidden, head, _, _ = problem()
    for kind in DIVERGENCES:
        value, grad_hidden, grad_head = ours(hidden, head, [Loss(kind)], teacher=HiddenTarget(hidden, head))
        assert abs(value) < 1e-12 and grad_hidden.abs().max() < 1e-12 and grad_head.abs().max() < 1e-12


def test_the_limits_of_the_skewed_and_mixed_losses():
    """skew_kl → kl for α → 0, and jsd / β → kl for β → 0."""
    hidden, head, _, teacher = problem()
    hidden *= 0.1  # no p / q is so large as to make up for a small α
    teacher.hidden.mul_(0.1)
    kl = ours(hidden, head, [Loss("kl")], teacher=teacher)
    assert_equal(ours(hidden, head, [Loss("skew_kl", alpha=1e-9)], teacher=teacher), kl, 1e-6)
    assert_equal(ours(hidden, head, [Loss("jsd", 1e7, beta=1e-7)], teacher=teacher), kl, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_widened_inside(dtype):
    """Only the inputs and the gradients handed back are rounded."""
    hidden, head, labels, teacher = problem(n=40, V=300, D=16)
    hidden, head, teacher = (
        hidden.to(dtype),
        head.to(dtype),
        HiddenTarget(teacher.hidden.to(dtype), teacher.head.to(dtype)),
    )
    found = ours(hidden, head, [Loss("kl"), Loss("ce")], labels=labels, teacher=teacher, chunk=16)
    expected = oracle(hidden, head, [Loss("kl"), Loss("ce")], labels=labels, teacher=teacher)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    assert error(found[0], expected[0]) < 1e-5
    assert_equal(found[1:], expected[1:], 4 * torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype):
        assert_equal(
            ours(hidden, head, [Loss("kl"), Loss("ce")], labels=labels, teacher=teacher, chunk=16), found, 1e-6
        )


def test_a_packed_teacher_head_is_its_dequantized_one():
    hidden, head, _, teacher = problem(D_t=16)
    spec = QuantSpec(4, 16)
    scales, zeros = find_grid("head", teacher.head, spec)
    packed = QuantTensor.from_ints(round_to_grid(teacher.head, scales, zeros, spec), scales, zeros, spec)
    found = ours(hidden, head, [Loss()], teacher=HiddenTarget(teacher.hidden, packed))
    assert_equal(found, oracle(hidden, head, [Loss()], teacher=HiddenTarget(teacher.hidden, packed.dequantize())), 1e-9)


def test_a_head_that_is_a_result_passes_its_gradient_on():
    """As of a fake-quantized head, or one shared with the embedding; frozen parts get none."""
    hidden, head, labels, _ = problem()
    latent = head.clone().requires_grad_()
    h = hidden.clone().requires_grad_()
    (3 * fused_loss(h, latent * 2, [Loss("ce")], labels=labels)).backward()
    _, grad_hidden, grad_head = oracle(hidden, head * 2, [Loss("ce")], labels=labels)
    assert_equal((h.grad, latent.grad), (3 * grad_hidden, 6 * grad_head), 1e-12)
    h.grad = None
    fused_loss(h, head, [Loss("ce")], labels=labels).backward()
    assert_equal((h.grad,), (grad_hidden_of(hidden, head, labels),), 1e-12)
    with torch.no_grad():
        assert not fused_loss(h, head, [Loss("ce")], labels=labels).requires_grad


def test_backward_twice_says_so():
    hidden, head, labels, _ = problem()
    loss = fused_loss(hidden.requires_grad_(), head, [Loss("ce")], labels=labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_random_samples_point_where_the_full_teacher_does_and_top_k_does_not():
    """arXiv:2503.16870, on a teacher with a heavy tail: the angle to the full gradient, over tokens, with an average of
    many draws near zero (the estimate is unbiased), and larger for the k most probable ids, with a tail bucket or
    without."""
    g = rng(1)
    n, V, D = 1500, 300, 12
    hidden, head = (
        torch.randn(n, D, generator=g, dtype=torch.float64),
        torch.randn(V, D, generator=g, dtype=torch.float64) * 0.2,
    )
    teacher = HiddenTarget(
        torch.randn(n, D, generator=g, dtype=torch.float64), torch.randn(V, D, generator=g, dtype=torch.float64) * 0.3
    )
    _, _, whole = ours(hidden, head, [Loss()], teacher=teacher)
    _, _, sampled = ours(hidden, head, [Loss()], teacher=cached_draws(teacher, 50))
    top = cached(teacher, "topk", k=12)
    _, _, naive = ours(
        hidden, head, [Loss()], teacher=SampledTarget(top.ids, top.probs / top.probs.sum(-1, keepdim=True))
    )
    _, _, bucket = ours(hidden, head, [Loss()], teacher=top)

    def cosine(a):
        return F.cosine_similarity(a.flatten(), whole.flatten(), 0)

    assert cosine(sampled) > 0.94
    assert cosine(naive) < 0.91 and cosine(bucket) < 0.91
    many = torch.stack(
        [ours(hidden, head, [Loss()], teacher=cached_draws(teacher, 50, seed))[2] for seed in range(10)]
    ).mean(0)
    assert cosine(many) > 0.99 and cosine(many) > cosine(sampled)


def test_bad_arguments_are_named():
    hidden, head, labels, teacher = problem()
    sample = cached(teacher, "sampled")
    for arguments, message in [
        ({"labels": labels, "losses": []}, "losses: found none"),
        ({"losses": [Loss("ce")]}, "labels: found none"),
        ({"losses": [Loss("kl")]}, "teacher: found none"),
        ({"losses": [Loss("ce")], "labels": labels[:3]}, r"labels: found \(3,\)"),
        ({"losses": [Loss("ce")], "labels": labels.clamp_min(0) + 37}, "labels: found .*0 … 36"),
        (
            {"teacher": HiddenTarget(teacher.hidden, teacher.head[:30])},
            "a vocabulary of 30; accepted: the student's, 37",
        ),
        ({"teacher": teacher.rows(slice(3))}, "teacher.hidden"),
        ({"teacher": TopKTarget(torch.full((11, 2), 37), torch.full((11, 2), 0.1))}, "teacher.ids: found 37 … 37"),
        ({"teacher": sample, "losses": [Loss("reverse_kl")]}, "reverse_kl with a sampled teacher"),
        ({"teacher": sample, "losses": [Loss("kl", temperature=2.0)]}, "2.0 with a cached teacher"),
        ({"teacher": teacher, "token_weights": torch.ones(10)}, r"token_weights: found torch.float32 \(10,\)"),
        ({"teacher": teacher, "token_weights": torch.full((11,), -1.0)}, "at least 0"),
        ({"teacher": teacher, "token_weights": torch.full((11,), math.nan)}, "finite"),
        ({"teacher": teacher, "chunk": 0}, "chunk: found 0"),
    ]:
        losses = arguments.pop("losses", [Loss()])
        with pytest.raises(InputError, match=message):
            fused_loss(hidden, head, losses, **arguments)
    with pytest.raises(InputError, match="hidden and head"):
        fused_loss(hidden, head[:, :3], [Loss()])
    for fields, message in [
        ({"kind": "l2"}, "Loss.kind: found 'l2'"),
        ({"weight": -1.0}, "Loss.weight"),
        ({"temperature": 0.0}, "Loss.temperature"),
        ({"kind": "ce", "temperature": 2.0}, "plain targets"),
        ({"beta": 1.0}, "Loss.beta"),
        ({"alpha": math.nan}, "Loss.alpha"),
    ]:
        with pytest.raises(InputError, match=message):
            Loss(**fields)


# hidden states


# weights that change
