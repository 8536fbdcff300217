"""Refining a rounded weight against its Hessian: the best scales for the integers, the best integers for the scales.

GPTQ rounds each column once and never looks back. With H = Σ x xᵀ and the float weight W, the error of Q = (q - z)·s is

    E = tr((Q - W) H (Q - W)ᵀ)

- in the scales of a row (q fixed) a quadratic: they are solved jointly over its groups, G equations in G unknowns;
- likewise in the offsets -z·s, where zero points are floats;
- in scales of HTP's form, s = f·i (lpbq.py): every integer i moves to the best of 1 … 16 in turn, then the row's f;
- in one integer (all else fixed) a parabola: q_j moves to the grid point nearest to Q_j - ((Q - W) H)_j / H_jj
  (cyclic coordinate descent, as in QuantEase, arXiv:2309.01885).

No step can raise E, so alternating them cannot either.

Letters: N out_features, K in_features, G groups of g = K / G inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.quant_tensor import Grid, QuantSpec
from .grid_search import nearest_ints
from .lpbq import STEPS

BLOCK = 32  # columns whose updates of the others are gathered into one product


def refine(
    weight: Tensor, hessian: Tensor, ints: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec, rounds: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`rounds` times: scales (and float zero points) for the integers, then integers for those; ends with the former.

    weight float [N, K], hessian [K, K] positive definite, ints [N, K], scales [N, G], zeros [N, G] or None (symmetric).
    Scales that were searched in HTP's form keep it. Returns (ints uint8 [N, K], scales [N, G], zeros).
    """
    H = hessian.to(weight.dtype)
    target = weight @ H  # (N, K)
    if zeros is None:
        offsets = torch.full((1, 1), float(spec.zero), dtype=H.dtype, device=H.device)
    else:
        offsets = zeros.to(H.dtype)
    refit = refit_lpbq if spec.search == "lpbq" else refit_scales
    for done in range(rounds + 1):
        if rounds:
            scales = refit(ints, H, target, scales, offsets)
        if rounds and spec.float_zero:
            offsets = refit_zeros(ints, H, target, scales, offsets)
        if done < rounds:
            ints = descend(ints, H, target, scales, offsets, spec)
    return ints, scales, offsets if spec.float_zero else zeros


def refit_scales(ints: Tensor, H: Tensor, target: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The scales [N, G] that minimise E for these integers; target = W·H [N, K]. A group of zeros keeps its scale."""
    A, b = scale_equations(ints, H, target, scales.shape[1], zeros)
    # The ridge pulls towards the present scales, so directions the data does not determine stay put.
    ridge = 1e-6 * A.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(1e-30)  # (N, 1)
    residual = b - (A @ scales.double()[..., None])[..., 0]
    A.diagonal(dim1=1, dim2=2).add_(ridge)
    new = scales + torch.linalg.solve(A, residual).to(scales.dtype)
    return torch.where(new.abs() > 1e-10, new, scales)


def refit_lpbq(ints: Tensor, H: Tensor, target: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Scales f_n · (1 … 16), 16 in every row, to such scales with a lower E, by coordinate descent; the block that has
    16 keeps it. A row's f stays positive."""
    A, b = scale_equations(ints, H, target, scales.shape[1], zeros)
    f = scales.double().amax(1, keepdim=True) / STEPS
    i = (scales.double() / f).round()
    largest = i.argmax(1)
    for g in range(i.shape[1]):
        slope = b[:, g] / f[:, 0] - (A[:, g] * i).sum(-1)  # of -E / 2f² along i_g
        best = (i[:, g] + slope / A[:, g, g].clamp_min(1e-30)).round().clamp(1, STEPS)
        i[:, g] = torch.where((largest == g) | (A[:, g, g] <= 0), i[:, g], best)
    best = (i * b).sum(-1, keepdim=True) / (i * (A @ i[..., None])[..., 0]).sum(-1, keepdim=True).clamp_min(1e-30)
    return (torch.where(best > 0, best, f) * i).to(scales.dtype)


def scale_equations(ints: Tensor, H: Tensor, target: Tensor, G: int, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """A [N, G, G] and b [N, G] in float64, for which E = sᵀA s - 2 bᵀs + a constant in the scales s of a row."""
    N = len(ints)
    D = (ints.to(H.dtype).view(N, G, -1) - zeros.to(H.dtype)[..., None]).view(N, -1)  # (N, K), in steps of the grid
    g = D.shape[1] // G
    A = torch.empty(N, G, G, dtype=torch.float64, device=D.device)
    for i in range(G):  # symmetric: what is right of the diagonal is below it too
        first = i * g
        products = (D[:, first : first + g] @ H[first : first + g, first:]).mul_(D[:, first:])
        A[:, i, i:] = products.view(N, G - i, g).sum(-1)
        A[:, i:, i] = A[:, i, i:]
    return A, (D * target).view(N, G, g).sum(-1).double()


def refit_zeros(ints: Tensor, H: Tensor, target: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The float zero points [N, G] that minimise E for these integers and scales; target = W·H [N, K]."""
    N, G = scales.shape
    Q = ((ints.to(H.dtype).view(N, G, -1) - zeros[..., None]) * scales.to(H.dtype)[..., None]).view(N, -1)
    A = H.double().view(G, -1, G, H.shape[0] // G).sum((1, 3))  # the same for every row: offsets move whole groups
    A.diagonal().add_(1e-6 * A.diagonal().mean().clamp_min(1e-30))
    residual = (target - Q @ H).view(N, G, -1).sum(-1).double()
    return zeros - (torch.linalg.solve(A, residual.T).T / scales).to(zeros.dtype)


def descend(ints: Tensor, H: Tensor, target: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """One sweep of coordinate descent over the columns; target = W·H [N, K]. Returns uint8 [N, K]."""
    N, G = scales.shape
    K = ints.shape[1]
    group = torch.arange(K, device=H.device) // (K // G)
    S = scales.T.contiguous()  # columns become rows: contiguous steps
    Z = zeros.to(H.dtype).expand(N, G).T.contiguous()
    q = ints.T.to(H.dtype).contiguous()  # (K, N)
    Q = (q - Z[group]).mul_(S[group])
    R = H @ Q - target.T  # (K, N): half the gradient
    for i in range(0, K, BLOCK):
        j = min(i + BLOCK, K)
        h = H[i:j, i:j]
        r = R[i:j]
        moved = torch.zeros(j - i, N, dtype=H.dtype, device=H.device)
        for c in range(j - i):
            s = S[group[i + c]]
            z = Z[group[i + c]]
            value = Q[i + c] - r[c] / h[c, c]
            new = nearest_ints(value / s, z, grid)
            q[i + c] = new
            moved[c] = (new - z).mul_(s) - Q[i + c]
            if c + 1 < j - i:
                r[c + 1 :].addr_(h[c + 1 :, c], moved[c])
        R[j:].addmm_(H[j:, i:j], moved)  # this block is done; only later ones still read their gradient
    return q.T.to(torch.uint8).contiguous()
