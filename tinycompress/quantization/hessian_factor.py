"""The factor of a Hessian's inverse by which GPTQ spreads errors, and the order in which it visits the columns.

Letters: K in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

DAMPING_TRIES = 6
LEAST = 256  # rows from which halving a triangle pays
PART = 1 << 20  # numbers that are moved together
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
        factor = damped[backwards[:, None], backwards]
        info = torch.empty((), dtype=torch.int32, device=H.device)
        torch.linalg.cholesky_ex(factor, out=(factor, info))
        if info == 0:
            U = turned_around(invert_lower(factor))
            if torch.isfinite(U.sum()):
                return damped, U, perm
    raise InputError(
        f"Hessian of {name}",
        f"not positive definite, even damped by {damping * 10 ** (DAMPING_TRIES - 1):g} of its diagonal",
        "more, or more varied, calibration text",
    )


def invert_lower(L: Tensor) -> Tensor:
    """The inverse of a lower triangular L [K, K], in its place, by halves: a sixth of the work of solving for the
    identity."""
    K = len(L)
    if K <= LEAST:
        return L.copy_(torch.linalg.solve_triangular(L, torch.eye(K, dtype=L.dtype, device=L.device), upper=False))
    half = K // 2
    first = invert_lower(L[:half, :half])
    last = invert_lower(L[half:, half:])
    corner = upper_times(first.T, L[half:, :half].T).T
    L[half:, :half] = lower_times(last, corner).neg_()
    return L


def turned_around(matrix: Tensor) -> Tensor:
    """J · matrix · J, rows and columns in reverse, in its place; the matrix must be contiguous."""
    flat = matrix.view(-1)
    n = len(flat)
    for i in range(0, n // 2, PART):
        j = min(i + PART, n // 2)
        first = flat[i:j].flip(0)
        flat[i:j] = flat[n - j : n - i].flip(0)
        flat[n - j : n - i] = first
    return matrix


def lower_times(L: Tensor, x: Tensor) -> Tensor:
    """L x for a lower triangular L [K, K] and x [K, n], by halves: a product that skips the zeros."""
    half = len(L) // 2
    if half < LEAST:
        return L @ x
    below = lower_times(L[half:, half:], x[half:])
    return torch.cat((lower_times(L[:half, :half], x[:half]), below.addmm_(L[half:, :half], x[:half])))


def upper_times(U: Tensor, x: Tensor) -> Tensor:
    """U x for an upper triangular U [K, K], likewise."""
    half = len(U) // 2
    if half < LEAST:
        return U @ x
    above = upper_times(U[:half, :half], x[:half])
    return torch.cat((above.addmm_(U[:half, half:], x[half:]), upper_times(U[half:, half:], x[half:])))


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
