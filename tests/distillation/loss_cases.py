"""What the tests of losses share: random problems, dense oracles, and comparisons."""

import torch
import torch.nn.functional as F

from tinycompress.distillation.divergences import LOSS_KINDS, Loss
from tinycompress.distillation.fused_loss import HiddenTarget, SampledTarget, TopKTarget, fused_loss

DIVERGENCES = [kind for kind in LOSS_KINDS if kind != "ce"]


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


def grad_hidden_of(hidden, head, labels):
    return oracle(hidden, head, [Loss("ce")], labels=labels)[1]


def cached_draws(teacher, draws, seed=0):
    probs = (teacher.hidden @ teacher.head.T).softmax(-1)
    ids = torch.multinomial(probs, draws, replacement=True, generator=rng(seed))
    return SampledTarget(ids, torch.full(ids.shape, 1 / draws, dtype=torch.float64))
