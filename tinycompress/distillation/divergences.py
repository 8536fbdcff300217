"""Divergences between a teacher and a student over a few positions, with their gradients to the student's logits.

With teacher p, student q = softmax(z / τ), and m a mixture of the two:

  kl           KL(p ‖ q) = Σ p log(p / q)                        arXiv:1503.02531; Minitron, arXiv:2407.14679
  reverse_kl   KL(q ‖ p)                                         MiniLLM, arXiv:2306.08543
  jsd          β KL(p ‖ m) + (1-β) KL(q ‖ m),  m = βp + (1-β)q   GKD, arXiv:2306.13649
  skew_kl      KL(p ‖ m),  m = αp + (1-α)q                       DistiLLM, arXiv:2402.03898
  ce           -log q[label]

Every one is a sum over outcomes, so with a = q · ∂L/∂q (element by element) its gradient is, whatever the divergence,

    ∂L/∂(z / τ) = a - q · Σ a

and where outcomes are buckets of tokens (a teacher's top k, and the rest in one), a token gets its share of its
bucket's a. Values and gradients are multiplied by τ², so that weights mean the same at every temperature. Letters: r
positions, V vocabulary, k stored ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from .schedule import Ramp, check_weight, weight_at

LOSS_KINDS = ("kl", "reverse_kl", "jsd", "skew_kl", "ce")


@dataclass(frozen=True)
class Loss:
    """One loss of logits, in a mixture.

    Fields:
        kind: one of LOSS_KINDS. Default "kl".
        weight: a number of at least 0, or a `Ramp` over the run. Default 1.
        temperature: τ, above 0, that both logits are divided by; 1 for ce. Default 1.
        beta: of jsd, between 0 and 1: the teacher's share of the mixture. Default 0.5.
        alpha: of skew_kl, between 0 and 1: the teacher's share of the mixture. Default 0.1.

    Errors: an `InputError` for another kind, and for a number outside its range.
    """

    kind: str = "kl"
    weight: float | Ramp = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in LOSS_KINDS:
            raise InputError("Loss.kind", repr(self.kind), " | ".join(LOSS_KINDS))
        check_weight("Loss.weight", self.weight)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InputError("Loss.temperature", self.temperature, "a positive number")
        if self.kind == "ce" and self.temperature != 1:
            raise InputError("Loss.temperature", f"{self.temperature} for ce", "1: plain targets have no temperature")
        for name in ("beta", "alpha"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(
                    f"Loss.{name}", getattr(self, name), "a number between 0 and 1 (at the ends use kl or reverse_kl)"
                )

    def at(self, step: int, total: int) -> Loss:
        """The loss of one step: its weight is a number."""
        return replace(self, weight=weight_at(self.weight, step, total))


@dataclass(frozen=True)
class Softmax:
    """A softmax that keeps what logarithms need.

    Fields:
        probs: float [r, n].
        logs: float [r, n], their natural logarithms.
    """

    probs: Tensor
    logs: Tensor

    @staticmethod
    def of(logits: Tensor, temperature: float) -> Softmax:
        logs = logits / temperature if temperature != 1 else logits.clone()
        logs -= logs.amax(-1, keepdim=True)
        probs = logs.exp()
        total = probs.sum(-1, keepdim=True)
        return Softmax(probs.div_(total), logs.sub_(total.log()))


def divergence(loss: Loss, p: Softmax, q: Softmax) -> tuple[Tensor, Tensor]:
    """Teacher p and student q over the same outcomes [r, n] to values [r] and a = q · ∂L/∂q [r, n]."""
    ratio = p.logs - q.logs
    if loss.kind == "kl":
        return (p.probs * ratio).sum(-1), -p.probs
    if loss.kind == "reverse_kl":
        return -(q.probs * ratio).sum(-1), _weighted_slope(ratio.neg_(), q)
    share = loss.beta if loss.kind == "jsd" else loss.alpha
    mixed = torch.logaddexp(ratio + math.log(share), ratio.new_tensor(math.log1p(-share)))  # log(m / q)
    ratio -= mixed  # log(p / m)
    value = (p.probs * ratio).sum(-1)
    if loss.kind == "skew_kl":
        return value, _weighted_slope(ratio.exp_().mul_(share - 1), q)
    value = share * value - (1 - share) * (q.probs * mixed).sum(-1)
    return value, _weighted_slope(mixed.mul_(share - 1), q)


def _weighted_slope(slope: Tensor, q: Softmax) -> Tensor:
    """q · slope, up to the multiple of q that changes no gradient: the slope of the likeliest outcome becomes 0, since
    a confident student's gradient is the small difference of slopes, and would be lost to rounding."""
    top = slope.gather(-1, q.probs.argmax(-1, keepdim=True))
    return slope.sub_(top).mul_(q.probs)


def full(loss: Loss, p: Softmax, q: Softmax) -> tuple[Tensor, Tensor]:
    """Values [r] and gradients [r, V] to z / τ, from a teacher that is known over the whole vocabulary."""
    value, a = divergence(loss, p, q)
    return value, a.sub_(q.probs * a.sum(-1, keepdim=True))


def labelled(labels: Tensor, q: Softmax) -> tuple[Tensor, Tensor]:
    """Cross-entropy to token ids [r]."""
    at = labels[:, None]
    return -q.logs.gather(-1, at)[:, 0], q.probs.scatter_add(-1, at, q.probs.new_full(at.shape, -1.0))


def sampled(ids: Tensor, t: Tensor, q: Softmax) -> tuple[Tensor, Tensor]:
    """KL(t ‖ q) to a distribution that is t [r, k] on `ids` and zero elsewhere; an entry with t = 0 says nothing."""
    value = (torch.xlogy(t, t) - t * q.logs.gather(-1, ids)).sum(-1)
    return value, (q.probs * t.sum(-1, keepdim=True)).scatter_add_(-1, ids, -t)


def bucketed(loss: Loss, ids: Tensor, t: Tensor, q: Softmax) -> tuple[Tensor, Tensor]:
    """A divergence over k + 1 outcomes: the (distinct) `ids` [r, k], of teacher mass t, and all other tokens
    together."""
    tiny = torch.finfo(t.dtype).tiny
    left = (1 - t.double().sum(-1, keepdim=True)).clamp_min(0)  # in float32 a thin tail would be mostly rounding error
    teacher = torch.cat((t, left.to(t.dtype)), -1)
    rest = q.probs.scatter(-1, ids, 0.0)
    tail = rest.sum(-1, keepdim=True).clamp_min(tiny)  # summed, not 1 - Σ, for the same reason
    p = Softmax(teacher, teacher.clamp_min(tiny).log())
    top_logs = q.logs.gather(-1, ids)
    student = Softmax(torch.cat((top_logs.exp(), tail), -1), torch.cat((top_logs, tail.log()), -1))
    value, a = divergence(loss, p, student)
    inside = (rest * (a[:, -1:] / tail)).scatter_(-1, ids, a[:, :-1])
    return value, inside.sub_(q.probs * a.sum(-1, keepdim=True))
