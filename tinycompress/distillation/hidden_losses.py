"""Losses between a student's and a teacher's states inside the model: what a pass is told, and plain tensor functions.

  cosine, mse   1 - cos(s, t), or mean (s - t)², of the outputs of layers; with a projection P [D_t, D_s] between
                widths, s becomes P s (cosine on the last layers: Minitron, arXiv:2407.14679; projections: TinyBERT,
                arXiv:1909.10351)
  relation      Σ over q, k and v of KL(R_t ‖ R_s) with R = softmax(A Aᵀ / √d), A the queries, keys or values: which
                positions resemble which, whatever the widths (MiniLMv2, arXiv:2012.15828). Taken before the rotation:
                rotary positions do not learn
  attention     the same KL of the attention itself, A = q, B = k as attention sees them, and of the values' relations
                (MiniLM, arXiv:2002.10957)

Relations are causal, as attention is. Like the logit losses they make their gradients along with their value, some
queries at a time: [T, T] exists for a few heads only, once. Letters: n tokens, B batch, T positions, H heads, K KV
heads, D_s and D_t widths of student and teacher, h relation heads, d their width, c queries of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError
from .early_gradients import hand_over
from .schedule import Ramp, check_weight, weight_at

if TYPE_CHECKING:
    from ..graph.config import Config

OF_STATES = ("cosine", "mse")
OF_RELATIONS = {"relation": (("q", "q"), ("k", "k"), ("v", "v")), "attention": (("q", "k"), ("v", "v"))}
HIDDEN_KINDS = (*OF_STATES, *OF_RELATIONS)
SCORES = 1 << 21  # scores of positions with positions that exist at a time, of each model

Tap: TypeAlias = int | tuple[int, str]  # what is wanted of a forward: the output of a layer, or of its q, k or v


@dataclass(frozen=True)
class HiddenLoss:
    """A loss between layers of student and teacher. A learned projection joins different widths of states; it is thrown
    away at the end.

    Fields:
        kind: one of HIDDEN_KINDS. Default "cosine".
        weight: a number of at least 0, or a `Ramp` over the run. Default 1.
        layers: (student, teacher) pairs of indices. Default None: the last `last` of an even spread; relations look at
            layers with attention only.
        last: pairs of that spread. Default None: two for states, one for relations.
        heads: relation heads. Default None: the most that cut no head of either model.

    Errors: an `InputError` for another kind, for a weight or heads outside their range; `pairs` for layers that do not
    fit.
    """

    kind: str = "cosine"
    weight: float | Ramp = 1.0
    layers: tuple[tuple[int, int], ...] | None = None
    last: int | None = None
    heads: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in HIDDEN_KINDS:
            raise InputError("HiddenLoss.kind", repr(self.kind), " | ".join(HIDDEN_KINDS))
        check_weight("HiddenLoss.weight", self.weight)
        if self.heads is not None and (self.heads < 1 or self.kind in OF_STATES):
            raise InputError(
                "HiddenLoss.heads", f"{self.heads} for {self.kind}", "at least 1 for relation or attention, None else"
            )

    @property
    def of_states(self) -> bool:
        return self.kind in OF_STATES

    def at(self, step: int, total: int) -> HiddenLoss:
        """The loss of one step: its weight is a number."""
        return replace(self, weight=weight_at(self.weight, step, total))

    def pairs(self, student: Config, teacher: Config) -> tuple[tuple[int, int], ...]:
        """The (student, teacher) layers; an InputError for some that are not there or do not fit."""
        student_layers = self._possible(student)
        teacher_layers = self._possible(teacher)
        if not student_layers or not teacher_layers:
            raise InputError(f"HiddenLoss of {self.kind}", "a model without attention", "one with")
        last = self.last or (2 if self.of_states else 1)
        pairs = self.layers
        if not pairs:
            spread = layer_pairs(len(student_layers), len(teacher_layers), min(last, len(student_layers)))
            pairs = tuple((student_layers[s], teacher_layers[t]) for s, t in spread)
        for pair in pairs:
            if pair[0] not in student_layers or pair[1] not in teacher_layers:
                raise InputError(
                    "HiddenLoss.layers", pair, f"(student, teacher) layers{'' if self.of_states else ' with attention'}"
                )
            if not self.of_states:
                self.relation_heads(student, teacher, pair)
        return pairs

    def _possible(self, config: Config) -> list[int]:
        """The layers that have what the loss compares."""
        return [i for i, layer in enumerate(config.layers) if self.of_states or layer.n_heads]

    def relation_heads(self, student: Config, teacher: Config, pair: tuple[int, int]) -> int:
        """The number of relation heads for a pair of layers."""
        layers = student.layers[pair[0]], teacher.layers[pair[1]]
        counts = [n for layer in layers for n in (layer.n_heads, layer.n_kv_heads)]
        if self.heads is None:
            return math.gcd(*counts)
        widths = [
            n * config.head_dim
            for layer, config in zip(layers, (student, teacher))
            for n in (layer.n_heads, layer.n_kv_heads)
        ]
        # a rotated head must not be cut
        whole = [layer.n_heads for layer in layers] if self.kind == "attention" else []
        if any(n % self.heads for n in (*widths, *whole)):
            sizes = f"{', '.join(map(str, counts))} heads and widths {', '.join(map(str, widths))}"
            given = f"{self.heads} at layers {pair}, of {sizes}"
            raise InputError(
                "HiddenLoss.heads", given, "a divisor of all widths, and for attention of the numbers of heads"
            )
        return self.heads

    def taps(self, layer: int) -> list[Tap]:
        """What the loss needs of a layer."""
        return [layer] if self.of_states else [(layer, name) for name in "qkv"]


def relation_sum(
    kind: str, heads: int, student: list[Tensor], teacher: list[Tensor], turn: tuple[QueryKeyRotation, QueryKeyRotation]
) -> Tensor:
    """The sum of the relations that a kind is made of. student, teacher: q, k, v [B, T, width] of a layer; turn: of
    each model, what gives (q, k) as attention multiplies them, [B, T, H·d] both."""
    named = [dict(zip("qkv", states)) for states in (student, teacher)]
    total = student[0].new_zeros(())
    for a, b in OF_RELATIONS[kind]:
        if a == b:
            total = total + relation_loss(named[0][a], named[1][a], heads)
        else:
            student_q, student_k = turn[0](named[0][a], named[0][b])
            teacher_q, teacher_k = turn[1](named[1][a], named[1][b])
            total = total + relation_loss(student_q, teacher_q, heads, student_keys=student_k, teacher_keys=teacher_k)
    return total


QueryKeyRotation: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    kind: str = "cosine",
    project: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """How far a student's hidden states are from a teacher's: the mean over tokens of 1 - cos(s, t), or of mean (s -
    t)² ("mse"; over channels), in float32 or better. After depth pruning, cosine on the last layers helps (Minitron,
    arXiv:2407.14679).

    student [n, D_s], teacher [n, D_t]; project [D_t, D_s] maps the student's width to the teacher's (and can be
    trained); valid and denominator as in `fused_loss`. An InputError for widths that do not fit or an unknown kind.
    """
    if kind not in ("cosine", "mse"):
        raise InputError("kind of hidden_loss", repr(kind), "cosine | mse")
    reached = student.shape[-1] if project is None else project.shape[0]
    if (
        len(student) != len(teacher)
        or reached != teacher.shape[-1]
        or (project is not None and project.shape[1] != student.shape[-1])
    ):
        shape = None if project is None else tuple(project.shape)
        given = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, project {shape}"
        raise InputError(
            "hidden states", given, "[n, D_s], [n, D_t] and a projection [D_t, D_s] (which equal widths can do without)"
        )
    if valid is not None:  # first, so that nothing in the others can do harm
        student = student[valid]
        teacher = teacher[valid]
    projected = student if project is None else student @ project.T.to(student.dtype)
    s = _at_least_float32(projected)
    t = _at_least_float32(teacher.detach())
    values = 1 - F.cosine_similarity(s, t, -1) if kind == "cosine" else (s - t).square().mean(-1)
    return _mean(values, denominator)


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    heads: int,
    *,
    student_keys: Tensor | None = None,
    teacher_keys: Tensor | None = None,
    valid: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Attention relations of one layer: KL(teacher ‖ student) between softmax(A Bᵀ / √d), causal, averaged over `heads`
    and tokens. MiniLM (arXiv:2002.10957) and MiniLMv2 (arXiv:2012.15828).

    student [B, T, D_s] and teacher [B, T, D_t] are the outputs of a layer's q, k or v (A); B is A itself (MiniLMv2's
    query, key and value relations) or the keys given (MiniLM's attention). Both are cut into `heads` relation heads of
    their own width d, so that neither widths nor numbers of heads need be alike. valid: bool [B, T], queries that
    count. Call backward once.
    """
    pairs = [
        (student, student if student_keys is None else student_keys),
        (teacher, teacher if teacher_keys is None else teacher_keys),
    ]
    for name, (a, b) in zip(("student", "teacher"), pairs):
        if heads < 1 or a.dim() != 3 or a.shape[-1] % heads or a.shape != b.shape:
            raise InputError(
                f"{name} of relation_loss",
                f"{tuple(a.shape)} with keys {tuple(b.shape)}",
                f"[B, T, D] with D a multiple of {heads} heads",
            )
    if (student_keys is None) != (teacher_keys is None) or student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            "relation_loss",
            f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            "equal [B, T], and keys for both or for neither",
        )
    counted = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if valid is None else valid
    student_heads = [_heads(_at_least_float32(x), heads) for x in pairs[0]]
    teacher_heads = [_heads(_at_least_float32(x), heads).detach() for x in pairs[1]]
    total = _Relations.apply(*student_heads, *teacher_heads, counted.repeat_interleave(heads, 0)) / heads
    return total / (counted.sum().clamp_min(1) if denominator is None else denominator)


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, h·d] to [B·h, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1)


class _Relations(torch.autograd.Function):
    """Σ over queries of KL(softmax(a_t b_tᵀ / √d_t) ‖ softmax(a bᵀ / √d)), with its gradients: of the scores, q - p."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor, counted: Tensor) -> Tensor:
        """a, b [P, T, d], a_t, b_t [P, T, d_t], counted bool [P, T]; P pairs of sequence and relation head."""
        P, T = counted.shape
        total = torch.zeros((), dtype=torch.float64, device=a.device)
        to_a = torch.zeros_like(a) if ctx.needs_input_grad[0] else None
        to_b = torch.zeros_like(b) if ctx.needs_input_grad[1] else None
        together = max(1, SCORES // (T * T))
        rows = max(1, min(T, SCORES // T))
        for start in range(0, P, together):
            g = slice(start, min(P, start + together))
            for first in range(0, T, rows):
                stop = min(T, first + rows)
                here = (g, slice(first, stop))
                before = (g, slice(0, stop))
                q = _relation_logs(a[here], b[before], first)  # [g, c, stop]
                p = _relation_logs(a_t[here], b_t[before], first)
                probs = p.exp()
                skip = ~counted[here][..., None]
                total += p.sub_(q).mul_(probs).masked_fill_(skip, 0.0).sum(dtype=torch.float64)
                if to_a is None and to_b is None:
                    continue
                slope = q.exp_().sub_(probs).masked_fill_(skip, 0.0).div_(math.sqrt(a.shape[-1]))
                if to_a is not None:
                    to_a[here] = slope @ b[before]
                if to_b is not None:
                    to_b[before] += slope.transpose(1, 2) @ a[here]
        ctx.gradients = (to_a, to_b)
        return total.to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return *hand_over(ctx, scale, "relation_loss"), None, None, None


def _relation_logs(a: Tensor, b: Tensor, first: int) -> Tensor:
    """log softmax of queries a [g, c, d], from position `first` on, over keys b [g, S, d] up to each: [g, c, S]."""
    scores = (a @ b.transpose(1, 2)).div_(math.sqrt(a.shape[-1]))
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=a.device).triu(first + 1)
    return scores.masked_fill_(later, torch.finfo(a.dtype).min / 2).log_softmax(-1)


def layer_pairs(student_layers: int, teacher_layers: int, last: int | None = None) -> tuple[tuple[int, int], ...]:
    """Which of the teacher's layers each student layer follows: (student, teacher) pairs, evenly spread, ending with
    the last of both; only the `last` few pairs if given."""
    if not 1 <= student_layers <= teacher_layers or (last is not None and last < 1):
        raise InputError(
            "layers",
            f"{student_layers} for {teacher_layers}, last {last}",
            "a student of at most the teacher's depth, last of at least 1",
        )
    pairs = [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]
    return tuple(pairs if last is None else pairs[-last:])


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _mean(values: Tensor, denominator: Tensor | float | None) -> Tensor:
    return values.sum() / (max(len(values), 1) if denominator is None else denominator)
