"""The fused losses against a dense float64 oracle that autograd differentiates."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.distillation import fused_loss as losses
from tinycompress.distillation import hidden_losses
from tinycompress.distillation.divergences import KINDS
from tinycompress.distillation.fused_loss import (
    HiddenTarget,
    Loss,
    SampledTarget,
    TopKTarget,
    fused_loss,
    hidden_loss,
    layer_pairs,
    relation_loss,
)
from tinycompress.distillation.hidden_losses import HiddenLoss
from tinycompress.distillation.schedule import Ramp
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.grid_search import find_grid, round_to_grid

DIVERGENCES = [kind for kind in KINDS if kind != "ce"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(n=11, V=37, D=8, D_t=12, seed=0, dtype=torch.float64):
    """Hidden states, heads, labels (some ignored)."""
    g = rng(seed)
    hidden, head = torch.randn(n, D, generator=g, dtype=dtype), torch.randn(V, D, generator=g, dtype=dtype)
    teacher = HiddenTarget(
        torch.randn(n, D_t, generator=g, dtype=dtype), torch.randn(V, D_t, generator=g, dtype=dtype) * 0.7
    )
    labels = torch.randint(V, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.2] = -100
    return hidden, head, labels, teacher


def cached(teacher, kind, seed=0, k=5, draws=20):
    """Targets as a cache would hold them."""
    probs = (teacher.hidden.double() @ teacher.head.double().T).softmax(-1)
    if kind == "topk":
        p, ids = probs.topk(min(k, probs.shape[1]), -1)
        return TopKTarget(ids.int(), p.to(teacher.hidden.dtype))
    ids = torch.multinomial(probs, draws, replacement=True, generator=rng(seed)).sort(-1).values
    shares = torch.full(ids.shape, 1 / draws, dtype=teacher.hidden.dtype)
    shares[:, -1], ids[:, -1] = 0, 0  # padding
    return SampledTarget(ids.int(), shares)


def dense(loss, z, labels, teacher, w):
    """Per-token loss [n] by the textbook, from logits z [n, V] in float64. Ignored tokens hold anything."""
    if loss.kind == "ce":
        return F.cross_entropy(z, labels, reduction="none", ignore_index=-100)
    tau = loss.temperature
    q = (z / tau).softmax(-1)
    if isinstance(teacher, HiddenTarget):
        p = (teacher.hidden.double() @ w.T / tau).softmax(-1)
    else:
        t, ids = teacher.probs.double(), teacher.ids.long()
        if isinstance(teacher, SampledTarget):
            p = torch.zeros_like(q).scatter_add(-1, ids, t)
            spread = torch.zeros_like(q).scatter_add(-1, ids, torch.xlogy(t, t))  # a repeated id counts entry by entry
            return tau**2 * (spread - p * q.log()).sum(-1)
        p = torch.cat((t, 1 - t.sum(-1, keepdim=True)), -1)
        top = q.gather(-1, ids)
        q = torch.cat((top, 1 - top.sum(-1, keepdim=True)), -1)

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if loss.kind == "jsd":
        m = loss.beta * p + (1 - loss.beta) * q
        return tau**2 * (loss.beta * kl(p, m) + (1 - loss.beta) * kl(q, m))
    pair = {"kl": (p, q), "reverse_kl": (q, p), "skew_kl": (p, loss.alpha * p + (1 - loss.alpha) * q)}[loss.kind]
    return tau**2 * kl(*pair)


def oracle(hidden, head, losses, labels=None, teacher=None, token_weights=None, denominator=None):
    """Value and gradients to hidden and head, dense and in float64."""
    h, W = (x.detach().double().requires_grad_() for x in (hidden, head))
    w = None
    if isinstance(teacher, HiddenTarget):
        w = teacher.head.double() if isinstance(teacher.head, torch.Tensor) else teacher.head.dequantize(torch.float64)
    total = 0.0
    for loss in losses:
        given = token_weights.get(loss.kind) if isinstance(token_weights, dict) else token_weights
        weights = torch.ones(len(h), dtype=torch.float64) if given is None else given.double()
        if labels is not None:
            weights = weights * (labels != -100)
        keep = weights > 0
        value = loss.weight * (weights * dense(loss, h @ W.T, labels, teacher, w))[keep].sum()
        total = total + value / ((weights.sum() if keep.any() else 1) if denominator is None else denominator)
    total.backward()
    return total.detach(), h.grad, W.grad


def ours(hidden, head, losses, **arguments):
    h, W = (x.detach().clone().requires_grad_() for x in (hidden, head))
    total = fused_loss(h, W, losses, **arguments)
    total.backward()
    return total.detach(), h.grad, W.grad


def error(a, b):
    """Relative, by norm."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def assert_equal(found, expected, tolerance):
    for name, a, b in zip(("value", "hidden", "head"), found, expected):
        assert error(a, b) < tolerance, (name, error(a, b))


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
    real, made = losses._logits, []
    monkeypatch.setattr(losses, "_logits", lambda h, head, out: (made.append(head), real(h, head, out))[1])
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


def grad_hidden_of(hidden, head, labels):
    return oracle(hidden, head, [Loss("ce")], labels=labels)[1]


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


def cached_draws(teacher, draws, seed=0):
    probs = (teacher.hidden @ teacher.head.T).softmax(-1)
    ids = torch.multinomial(probs, draws, replacement=True, generator=rng(seed))
    return SampledTarget(ids, torch.full(ids.shape, 1 / draws, dtype=torch.float64))


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


def test_hidden_losses_by_the_textbook():
    g = rng()
    s, t, P = (
        torch.randn(7, 4, generator=g),
        torch.randn(7, 6, generator=g),
        torch.randn(6, 4, generator=g, requires_grad=True),
    )
    projected = s @ P.T
    assert torch.allclose(hidden_loss(s, t, "mse", P), F.mse_loss(projected, t))
    cosine = 1 - torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(projected, t)])
    assert torch.allclose(hidden_loss(s, t, "cosine", P), cosine.mean())
    valid = torch.tensor([True] * 5 + [False] * 2)
    s[5:] = math.nan
    loss = hidden_loss(s, t, "cosine", P, valid=valid, denominator=10.0)
    assert torch.allclose(loss, cosine[:5].sum() / 10)
    loss.backward()
    assert torch.isfinite(P.grad).all() and P.grad.any()
    with pytest.raises(InputError, match="a projection"):
        hidden_loss(s, t)
    with pytest.raises(InputError, match="accepted: cosine"):
        hidden_loss(s, s, "l1")


def test_relations_by_the_textbook():
    """Loops over batch, heads and queries; other widths; keys of their own."""
    g = rng()
    B, T, heads = 2, 5, 2
    s, sk = (torch.randn(B, T, 8, generator=g, requires_grad=True) for _ in "ab")
    t, tk = (torch.randn(B, T, 12, generator=g) for _ in "ab")
    for student_keys, teacher_keys in ((None, None), (sk, tk)):
        expected = 0.0
        for b in range(B):
            for h in range(heads):
                for i in range(T):
                    logs = []
                    for a, keys, d in ((t, teacher_keys, 6), (s, student_keys, 4)):
                        keys = a if keys is None else keys
                        query = a[b, i, h * d : (h + 1) * d]
                        logs.append((keys[b, : i + 1, h * d : (h + 1) * d] @ query / math.sqrt(d)).log_softmax(-1))
                    expected = expected + (logs[0].exp() * (logs[0] - logs[1])).sum() / (B * heads * T)
        found = relation_loss(s, t, heads, student_keys=student_keys, teacher_keys=teacher_keys)
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(found, s)[0], torch.autograd.grad(expected, s)[0], atol=1e-6)
    assert relation_loss(s, s, 4).abs() < 1e-7
    with pytest.raises(InputError, match="a multiple of 3 heads"):
        relation_loss(s, t, 3)
    with pytest.raises(InputError, match="keys for both or for neither"):
        relation_loss(s, t, 2, student_keys=sk)


@pytest.mark.parametrize("scores", [1, 60, 1 << 21])  # query by query; some queries; all at once
@pytest.mark.parametrize("own_keys", [False, True])
def test_relations_and_their_gradients_are_the_dense_ones(scores, own_keys, monkeypatch):
    """float64, autograd through whole [T, T] matrices; queries that do not count may hold anything."""
    monkeypatch.setattr(hidden_losses, "SCORES", scores)
    g = rng(2)
    B, T, h, D, D_t = 2, 7, 3, 12, 18
    s, sk, t, tk = (torch.randn(B, T, d, generator=g, dtype=torch.float64) for d in (D, D, D_t, D_t))
    valid = torch.rand(B, T, generator=g) < 0.7

    def logs(a, b):
        a, b = (x.unflatten(-1, (h, -1)).transpose(1, 2) for x in (a, b))
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        return (a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])).masked_fill(~causal, -1e300).log_softmax(-1)

    def run(loss):
        wanted = [x.clone().requires_grad_() for x in (s, sk)]
        value = 3 * loss(*wanted)  # another scale than 1 on the way back
        return value.detach(), *(x for x in torch.autograd.grad(value, wanted, allow_unused=True) if x is not None)

    def oracle(a, b):
        p, q = logs(t, tk if own_keys else t), logs(a, b if own_keys else a)
        return (p.exp() * (p - q)).sum(-1).mean(1)[valid].sum() / 5

    def ours(a, b):
        keys = {"student_keys": b, "teacher_keys": tk} if own_keys else {}
        return relation_loss(a, t, h, valid=valid, denominator=5.0, **keys)

    for a, b in zip(run(ours), run(oracle)):
        assert error(a, b) < 1e-12
    bad = s.masked_fill(~valid[..., None], math.nan)
    if own_keys:
        assert (
            error(
                relation_loss(bad, t, h, valid=valid, denominator=5.0, student_keys=sk, teacher_keys=tk),
                run(oracle)[0] / 3,
            )
            < 1e-12
        )


def test_relations_never_hold_all_heads_at_once(monkeypatch):
    """The largest tensor that any operation makes, beside the dense [B · heads, T, T]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        x.untyped_storage().nbytes()
                        for x in (out if isinstance(out, tuple) else (out,))
                        if isinstance(x, torch.Tensor)
                    ),
                ]
            )
            return out

    monkeypatch.setattr(hidden_losses, "SCORES", 1 << 14)
    B, T, h = 2, 256, 4
    s, t = torch.randn(B, T, 32, requires_grad=True), torch.randn(B, T, 64)
    with Watch():
        relation_loss(s, t, h).backward()
    assert 0 < largest <= 2 * 4 * hidden_losses.SCORES < 4 * B * h * T * T / 10  # a sequence's states are half of that


def test_which_relation_heads():
    student = Config(vocab_size=8, hidden_size=8, head_dim=4, layers=(Layer(6, 2, 8), Layer(0, 0, 8)))
    teacher = Config(vocab_size=8, hidden_size=8, head_dim=2, layers=(Layer(8, 4, 8), Layer(8, 4, 8), Layer(0, 0, 8)))
    loss = HiddenLoss("relation")
    assert loss.pairs(student, teacher) == ((0, 1),) and loss.relation_heads(student, teacher, (0, 1)) == 2
    assert (
        HiddenLoss("relation", heads=8).relation_heads(student, teacher, (0, 0)) == 8
    )  # heads of width 1 of k; MiniLMv2's are free
    for bad, message in (
        (HiddenLoss("attention", heads=8), "a divisor of all widths, and for attention of the numbers of heads"),
        (HiddenLoss("relation", heads=3), "HiddenLoss.heads: found 3 at layers"),
        (HiddenLoss("relation", layers=((1, 1),)), "layers with attention"),
    ):
        with pytest.raises(InputError, match=message):
            bad.pairs(student, teacher)
    with pytest.raises(InputError, match=r"HiddenLoss\.heads"):
        HiddenLoss("cosine", heads=2)


# weights that change


def test_a_ramp_goes_from_start_to_end():
    assert [Ramp(1, 0).at(t) for t in (0, 0.25, 1)] == [1, 0.75, 0]
    late = Ramp(0.2, 1.0, "cosine", 0.5, 0.9)
    assert late.at(0.4) == 0.2 and late.at(0.95) == 1 and late.at(0.7) == pytest.approx(0.6) and late.at(0.6) < 0.4
    weights = [Loss("kl", Ramp(1, 0)).at(step, 5).weight for step in range(5)]
    assert weights == [1, 0.75, 0.5, 0.25, 0] and Loss("kl", 0.3).at(7, 9) == Loss("kl", 0.3)
    for make, message in (
        (lambda: Ramp(-1, 0), "Ramp.start"),
        (lambda: Ramp(1, math.inf), "Ramp.end"),
        (lambda: Ramp(1, 0, "step"), "linear"),
        (lambda: Ramp(1, 0, begin=0.5, finish=0.5), "0 ≤ begin < finish ≤ 1"),
        (lambda: fused_loss(*problem()[:2], [Loss("ce", Ramp(1, 0))], labels=problem()[2]), "Loss.weight: found Ramp"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_layers_are_mapped_evenly_and_end_together():
    assert layer_pairs(3, 6) == ((0, 1), (1, 3), (2, 5))
    assert layer_pairs(4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_pairs(22, 32, last=2) == ((20, 29), (21, 31))
    with pytest.raises(InputError, match="at most the teacher's depth"):
        layer_pairs(5, 4)
