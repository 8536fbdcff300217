"""The factor of a Hessian's inverse by which GPTQ spreads errors, and the order in which it visits the columns.

Letters: K in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

DAMPING_TRIES = 6
ORDERS = ("act", "gar", "natural")  # by falling H_jj; within groups, then groups (arXiv:2505.14638); as they stand


def damped_factor(H: Tensor, group: int, order: str, damping: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """H + λI [K, K], the upper Cholesky factor U of its inverse = UᵀU in the order `perm` [K], and `perm`; float64.

    H backwards is LLᵀ with L lower. With J the reversal, H = (JLJ)(JLJ)ᵀ, so U = (JLJ)⁻¹ = J L⁻¹ J, which is upper and
    unique: one factorization and one inverse of a triangle.
    λ = damping · mean(diag H), ×10 until the factorization succeeds. Dead channels (H_jj = 0) get H_jj = 1: nothing is
    known of them and nothing depends on them.
    """
    damped = H.clone()  # of a wide FFN each of these matrices takes hundreds of megabytes
    diagonal = damped.diagonal()
    perm = column_order(diagonal, group, order)
    backwards = perm.flip(0)
    diagonal[diagonal <= 0] = 1
    alone = diagonal.clone()
    for attempt in range(DAMPING_TRIES):
        diagonal.copy_(alone + damping * 10**attempt * alone.mean())
        L, info = torch.linalg.cholesky_ex(damped[backwards[:, None], backwards])
        if info == 0:
            U = invert_lower(L).flip(0, 1)
            if torch.isfinite(U).all():
                return damped, U, perm
    raise InputError(
        f"Hessian of {name}",
        f"not positive definite, even damped by {damping * 10 ** (DAMPING_TRIES - 1):g} of its diagonal",
        "more, or more varied, calibration text",
    )


def invert_lower(L: Tensor) -> Tensor:
    """The inverse of a lower triangular L [K, K], in its place, by halves: a third of the work of solving for the
    identity."""
    K = len(L)
    if K <= 256:
        return L.copy_(torch.linalg.solve_triangular(L, torch.eye(K, dtype=L.dtype, device=L.device), upper=False))
    half = K // 2
    first = invert_lower(L[:half, :half])
    last = invert_lower(L[half:, half:])
    L[half:, :half] = (last @ L[half:, :half] @ first).neg_()
    return L


def column_order(diagonal: Tensor, group: int, order: str) -> Tensor:
    """The columns [K] in the order they are rounded, by diag(H) [K]."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    whole = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None])[whole].flatten()
