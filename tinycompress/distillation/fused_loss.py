"""Distillation losses whose [tokens × vocabulary] logits never exist: they are fused with the head, chunk by chunk.

For a chunk of c tokens with hidden states h [c, D] and the head W [V, D],

    z = h Wᵀ,   L += Σ loss(z, target),   G = ∂L/∂z,   ∂L/∂h = G W,   ∂L/∂W += Gᵀ h

all in the forward: G overwrites z, and backward only scales what was computed. So one chunk of logits exists (and one
of the teacher's, made from its hidden states and its head), whatever the number of tokens, and all losses of a mixture
share them. The same idea: Liger-Kernel, arXiv:2410.10989. Softmax and losses are in float32 (float64 for float64
inputs).

The losses themselves and their papers are in divergences.py, the forms of a teacher's answer in teacher_targets.py,
and the losses on hidden states in hidden_losses.py. Letters: n tokens, c tokens of a chunk, r tokens whose softmax is
made at a time, D hidden size, V vocabulary, k stored ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import InputError
from ..graph.quant_tensor import QuantTensor
from ..model import cpu_memory
from .divergences import Loss, Softmax, bucketed, full, labelled, sampled
from .early_gradients import hand_over
from .head_products import add_head_gradient, head_logits, product_dtype, through_head
from .schedule import Ramp
from .teacher_targets import HiddenTarget, SampledTarget, SparseTarget, TeacherTarget, TopKTarget

__all__ = ["HiddenTarget", "Loss", "SampledTarget", "SparseTarget", "TeacherTarget", "TopKTarget", "fused_loss"]

IGNORED = -100  # the label of a token that does not count, as in torch's cross_entropy
BLOCK = 1 << 19  # logits whose softmax is made at a time: on a CPU the intermediates stay in its cache
GPU_BLOCK = 1 << 25

ChunkTarget: TypeAlias = Tensor | SparseTarget | None  # of one chunk: logits [c, V], or what a cache holds


def fused_loss(
    hidden: Tensor,
    head: Tensor | QuantTensor,
    losses: Sequence[Loss],
    *,
    labels: Tensor | None = None,
    teacher: TeacherTarget | None = None,
    token_weights: Tensor | Mapping[str, Tensor] | None = None,
    denominator: Tensor | float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """The weighted sum of `losses` over tokens, divided by `denominator`: a scalar to call backward on, once.

    Arguments:
        hidden: the student's last hidden states [n, D], after the norm; bfloat16, float16, float32 or float64.
        head: the student's head [V, D]: a parameter, the result of other operations, or packed (then without gradient).
        losses: at least one `Loss`, with numbers as weights.
        labels: int [n], the next tokens, -100 where there is none. The loss ce needs them; for every loss a token
            without a label does not count.
        teacher: what the teacher says of the n positions; every loss but ce needs it.
        token_weights: float or bool [n], how much each token counts (0: not at all), or one such tensor for each kind
            of loss (for a kind that is missing, all tokens count 1).
        denominator: the sum of the token weights over the whole step, with all of its micro-batches and processes. By
            default the sum of those given here, for each loss its own.
        chunk: the number of tokens whose logits exist at a time.

    Returns a scalar in float32, or float64 for float64 inputs. Raises InputError for arguments that do not fit
    together.
    """
    _check(hidden, head, losses, labels, teacher, chunk)
    counting = tuple(loss for loss in losses if loss.weight)
    weights = {
        kind: _token_weights(hidden, labels, _of_kind(token_weights, kind)) for kind in {loss.kind for loss in losses}
    }
    if denominator is None and isinstance(token_weights, Mapping):
        weights = {kind: w / w.sum() if w.any() else w for kind, w in weights.items()}
        denominator = 1.0
    index = torch.stack([w > 0 for w in weights.values()]).any(0).nonzero()[:, 0]
    if all(loss.kind == "ce" for loss in counting):
        teacher = None  # no loss needs it
    elif isinstance(teacher, SparseTarget):
        teacher = teacher.to(hidden.device)  # a cache is read on the CPU
    work = _Work(counting, labels, teacher, weights, index, chunk)
    if torch.is_grad_enabled():
        total = _Fused.apply(hidden, head, work)
    else:
        total = work.run(hidden, head, False, False)[0]
    if denominator is None:
        denominator = next(iter(weights.values())).sum().item() or 1.0
    return total / denominator


def _of_kind(weights: Tensor | Mapping[str, Tensor] | None, kind: str) -> Tensor | None:
    return weights.get(kind) if isinstance(weights, Mapping) else weights


def _token_weights(hidden: Tensor, labels: Tensor | None, given: Tensor | None) -> Tensor:
    """How much each token counts, float [n]; one without a label does not."""
    n = len(hidden)
    if given is None:
        weights = torch.ones(n, dtype=torch.float64, device=hidden.device)
    elif tuple(given.shape) != (n,) or not (given.dtype == torch.bool or given.is_floating_point()):
        raise InputError(
            "token_weights", f"{given.dtype} {tuple(given.shape)}", f"floats or bools [{n}], one for each token"
        )
    elif not bool((given >= 0).all() & given.isfinite().all()):
        raise InputError(
            "token_weights", f"{given.min().item()} … {given.max().item()}", "finite numbers of at least 0"
        )
    else:
        weights = given.to(hidden.device, torch.float64)
    return weights if labels is None else weights.masked_fill(labels == IGNORED, 0)


def _check(
    hidden: Tensor,
    head: Tensor | QuantTensor,
    losses: Sequence[Loss],
    labels: Tensor | None,
    teacher: TeacherTarget | None,
    chunk: int,
) -> None:
    if hidden.dim() != 2 or len(head.shape) != 2 or hidden.shape[1] != head.shape[1]:
        raise InputError(
            "hidden and head", f"{tuple(hidden.shape)} and {tuple(head.shape)}", "[tokens, D] and [vocabulary, D]"
        )
    if not losses:
        raise InputError("losses", "none", "at least one Loss")
    if chunk < 1:
        raise InputError("chunk", chunk, "a positive number of tokens")
    n = len(hidden)
    V = head.shape[0]
    if labels is not None:
        if tuple(labels.shape) != (n,):
            raise InputError("labels", tuple(labels.shape), f"[{n}], one for each token")
        if n and (int(labels.max()) >= V or bool(((labels < 0) & (labels != IGNORED)).any())):
            raise InputError(
                "labels",
                f"{int(labels.min())} … {int(labels.max())}",
                f"0 … {V - 1}, or {IGNORED} for a token to ignore",
            )
    for loss in losses:
        if isinstance(loss.weight, Ramp):
            raise InputError("Loss.weight", loss.weight, "a number: loss.at(step, total) is the loss of one step")
        if loss.kind == "ce" and labels is None:
            raise InputError("labels", "none", "the next tokens, for the loss ce")
        if loss.kind != "ce":
            _check_teacher(loss, teacher, n, V)


def _check_teacher(loss: Loss, teacher: TeacherTarget | None, n: int, V: int) -> None:
    if teacher is None:
        raise InputError("teacher", "none", f"a target for the loss {loss.kind}")
    if isinstance(teacher, HiddenTarget):
        if teacher.head.shape[0] != V:
            raise InputError("teacher", f"a vocabulary of {teacher.head.shape[0]}", f"the student's, {V}")
        if tuple(teacher.hidden.shape) != (n, teacher.head.shape[1]):
            raise InputError("teacher.hidden", tuple(teacher.hidden.shape), (n, teacher.head.shape[1]))
        return
    if len(teacher.ids) != n or teacher.ids.shape != teacher.probs.shape:
        raise InputError(
            "teacher", f"ids {tuple(teacher.ids.shape)}, probs {tuple(teacher.probs.shape)}", f"two of [{n}, k]"
        )
    if teacher.ids.numel() and (int(teacher.ids.max()) >= V or int(teacher.ids.min()) < 0):
        raise InputError(
            "teacher.ids",
            f"{int(teacher.ids.min())} … {int(teacher.ids.max())}",
            f"0 … {V - 1}: the student's vocabulary",
        )
    if loss.temperature != 1:
        raise InputError(
            "Loss.temperature", f"{loss.temperature} with a cached teacher", "1, at which its targets were made"
        )
    if isinstance(teacher, SampledTarget) and loss.kind != "kl":
        raise InputError(
            "Loss.kind",
            f"{loss.kind} with a sampled teacher",
            "kl, the one divergence that a sample estimates without bias, or top-k targets",
        )


class _Fused(torch.autograd.Function):
    """Makes the gradients along with the loss; backward scales them, in place, and hands them over."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor | QuantTensor, work: _Work) -> Tensor:
        total, *ctx.gradients = work.run(hidden, head, *ctx.needs_input_grad[:2])
        ctx.dtypes = hidden.dtype, head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = hand_over(ctx, scale, "fused_loss")
        return *(None if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes)), None


@dataclass(frozen=True, eq=False)
class _Work:
    """The arguments of `fused_loss` that are not differentiated."""

    losses: tuple[Loss, ...]
    labels: Tensor | None
    teacher: TeacherTarget | None
    weights: Mapping[str, Tensor]  # of the tokens [n], by kind of loss
    index: Tensor  # of the tokens that count for any of the losses
    chunk: int

    def run(
        self, hidden: Tensor, head: Tensor | QuantTensor, want_hidden: bool, want_head: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The sum of the losses and, where wanted, its gradients, in float32 (float64 for float64 inputs)."""
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
        V = head.shape[0]
        device = hidden.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if want_hidden else None
        chunks: Sequence[Tensor] = self.index.split(self.chunk) if self.losses and len(self.index) else ()
        grad_head: Tensor | None = None
        if want_head:
            new = cpu_memory.empty if chunks else cpu_memory.zeros
            grad_head = new(tuple(head.shape), dtype, device)
        c = min(self.chunk, len(self.index))
        spaces = [cpu_memory.empty((c, V), dtype, device) for _ in range(1 + isinstance(self.teacher, HiddenTarget))]
        with torch.autocast(device.type, enabled=False):  # autocast would choose other dtypes than those below
            for rows in chunks:
                h = hidden[rows].to(product_dtype(hidden, dtype))
                z, *t = (space[: len(rows)] for space in spaces)
                head_logits(h, head, z)
                total += self._losses(z, t[0] if t else None, rows)
                if grad_hidden is not None:
                    grad_hidden[rows] = through_head(z, head, h.dtype)
                if grad_head is not None:
                    add_head_gradient(grad_head, z, h, 0 if rows is chunks[0] else 1)
        return total.to(dtype), grad_hidden, grad_head

    def _losses(self, z: Tensor, t: Tensor | None, rows: Tensor) -> Tensor:
        """The sum over a chunk's logits z [c, V], which become the gradients; `t` is space for the teacher's logits."""
        labels = None if self.labels is None else self.labels[rows]
        target: ChunkTarget = None
        if isinstance(self.teacher, HiddenTarget):
            assert t is not None
            teacher_hidden = self.teacher.hidden[rows]
            head_logits(teacher_hidden.to(product_dtype(teacher_hidden, t.dtype)), self.teacher.head, t)
            target = t
        elif self.teacher is not None:
            target = self.teacher.rows(rows)
        weights = {kind: w[rows].to(z.dtype) for kind, w in self.weights.items()}
        step = max(1, (BLOCK if z.device.type == "cpu" else GPU_BLOCK) // z.shape[1])
        total = z.new_zeros((), dtype=torch.float64)
        for i in range(0, len(z), step):
            block = slice(i, i + step)
            block_labels = None if labels is None else labels[block]
            block_weights = {kind: w[block] for kind, w in weights.items()}
            total += _mixture(self.losses, z[block], block_labels, block_weights, _rows(target, block))
        return total


def _rows(target: ChunkTarget, index: slice) -> ChunkTarget:
    if target is None or isinstance(target, Tensor):
        return None if target is None else target[index]
    return target.rows(index)


def _mixture(
    losses: Sequence[Loss], z: Tensor, labels: Tensor | None, weights: Mapping[str, Tensor], target: ChunkTarget
) -> Tensor:
    """The weighted losses over logits z [r, V] of tokens of `weights` [r] by kind, summed in float64; z becomes the
    gradient."""
    total = z.new_zeros((), dtype=torch.float64)
    gradient: Tensor | None = None
    students: dict[float, Softmax] = {}  # by temperature
    teachers: dict[float, Softmax] = {}
    for loss in losses:
        assert not isinstance(loss.weight, Ramp)  # see _check
        tau = loss.temperature
        if tau not in students:
            students[tau] = Softmax.of(z, tau)
        q = students[tau]
        if loss.kind == "ce":
            assert labels is not None
            value, grad = labelled(labels, q)
        elif isinstance(target, Tensor):
            if tau not in teachers:
                teachers[tau] = Softmax.of(target, tau)
            value, grad = full(loss, teachers[tau], q)
        elif isinstance(target, SampledTarget):
            value, grad = sampled(target.ids.long(), target.probs.to(z.dtype), q)
        else:
            assert target is not None
            value, grad = bucketed(loss, target.ids.long(), target.probs.to(z.dtype), q)
        total += (value * weights[loss.kind]).sum(dtype=torch.float64) * (loss.weight * tau**2)
        grad *= weights[loss.kind][:, None] * (loss.weight * tau)
        gradient = grad if gradient is None else gradient.add_(grad)
    assert gradient is not None
    z.copy_(gradient)
    return total
