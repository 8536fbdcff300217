"""Losses between a student's and a teacher's states inside the model: plain tensor functions, with the layers' mapping.

  hidden_loss     1 - cos(s, t), or mean (s - t)²; with a projection P [D_t, D_s] between widths, s becomes P s
                  (cosine on the last layers: Minitron, arXiv:2407.14679; projections: TinyBERT, arXiv:1909.10351)
  relation_loss   KL(R_t ‖ R_s) with R = softmax(A Bᵀ / √d): which positions resemble which, whatever the widths
                  (MiniLM, arXiv:2002.10957; MiniLMv2, arXiv:2012.15828)

Letters: n tokens, B batch, T positions, D_s and D_t widths of student and teacher, d width of a relation head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError


def hidden_loss(
    student: Tensor,
    teacher: Tensor,
    kind: str = "cosine",
    project: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """How far a student's hidden states are from a teacher's: the mean over tokens of 1 - cos(s, t), or of mean (s - t)²
    ("mse"; over channels), in float32 or better. After depth pruning, cosine on the last layers helps (Minitron,
    arXiv:2407.14679).

    student [n, D_s], teacher [n, D_t]; project [D_t, D_s] maps the student's width to the teacher's (and can be trained);
    valid and denominator as in `fused_loss`. An InputError for widths that do not fit or an unknown kind.
    """
    if kind not in ("cosine", "mse"):
        raise InputError("kind of hidden_loss", repr(kind), "cosine | mse")
    reached = student.shape[-1] if project is None else project.shape[0]
    if len(student) != len(teacher) or reached != teacher.shape[-1] or (project is not None and project.shape[1] != student.shape[-1]):
        found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, project {None if project is None else tuple(project.shape)}"
        raise InputError("hidden states", found, "[n, D_s], [n, D_t] and a projection [D_t, D_s] (which equal widths can do without)")
    if valid is not None:  # first, so that nothing in the others can do harm
        student, teacher = student[valid], teacher[valid]
    s = student if project is None else student @ project.T.to(student.dtype)
    s, t = _wide(s), _wide(teacher.detach())
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
    their own width d, so that neither widths nor numbers of heads need be alike. valid: bool [B, T], queries that count.
    """
    pairs = [(student, student if student_keys is None else student_keys), (teacher, teacher if teacher_keys is None else teacher_keys)]
    for name, (a, b) in zip(("student", "teacher"), pairs):
        if heads < 1 or a.dim() != 3 or a.shape[-1] % heads or a.shape != b.shape:
            raise InputError(
                f"{name} of relation_loss", f"{tuple(a.shape)} with keys {tuple(b.shape)}", f"[B, T, D] with D a multiple of {heads} heads"
            )
    if (student_keys is None) != (teacher_keys is None) or student.shape[:2] != teacher.shape[:2]:
        raise InputError("relation_loss", f"{tuple(student.shape)} and {tuple(teacher.shape)}", "equal [B, T], and keys for both or for neither")
    q, p = (_relation_logs(_wide(a), _wide(b), heads) for a, b in pairs)  # (B, heads, T, T)
    p = p.detach()
    causal = torch.ones(p.shape[-2:], dtype=torch.bool, device=p.device).tril()
    values = (p.exp() * (p - q)).masked_fill(~causal, 0.0).sum(-1).mean(1)  # (B, T)
    return _mean(values.flatten() if valid is None else values[valid], denominator)


def _relation_logs(a: Tensor, b: Tensor, heads: int) -> Tensor:
    a, b = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (a, b))  # (B, heads, T, d)
    scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
    return scores.masked_fill(later, torch.finfo(a.dtype).min / 2).log_softmax(-1)


def layer_pairs(student_layers: int, teacher_layers: int, last: int | None = None) -> tuple[tuple[int, int], ...]:
    """Which of the teacher's layers each student layer follows: (student, teacher) pairs, evenly spread, ending with
    the last of both; only the `last` few pairs if given."""
    if not 1 <= student_layers <= teacher_layers or (last is not None and last < 1):
        raise InputError(
            "layers", f"{student_layers} for {teacher_layers}, last {last}", "a student of at most the teacher's depth, last of at least 1"
        )
    pairs = [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]
    return tuple(pairs if last is None else pairs[-last:])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _mean(values: Tensor, denominator: Tensor | float | None) -> Tensor:
    return values.sum() / (max(len(values), 1) if denominator is None else denominator)
