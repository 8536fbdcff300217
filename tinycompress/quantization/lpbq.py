"""LPBQ-native scales: block scales of the form that Qualcomm's HTP stores (low power blockwise quantization).

    s_ng = f_n · i_ng,   f_n > 0 a float a row (channel), i_ng an integer in 1 … 16 a block, max_g i_ng = 16

HTP's compiler brings any block scales to this form, with f_n = max_g s_ng / 16. Scales that already have it pass unchanged, so what was optimised is
what runs; others are rounded once more, by up to half a step of i. So the form is imposed first, and the weights are
rounded (by GPTQ or to the nearest) on the grid that is left: `QuantSpec(..., search="lpbq")`, or w4g64-lpbq.

For each row some f near max_g(s_ng) / 16 are tried; for each f every block takes the integer near s_ng / f with the least
error (the one with the largest scale takes 16), and the row the f with the least sum

    E(f) = Σ_g min_i Σ_{k in g} h_k · (w_k - f·i·q(w_k / (f·i)))²,   h = E[x²] of the inputs, or 1

Letters: N rows, K inputs, G blocks of g = K / G.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from ..graph.quant_tensor import QuantTensor

STEPS = 16  # integers a block's scale can be
SHARES = torch.linspace(
    0.8, 1.25, 19
).tolist()  # tried: f = share · max(s) / 16; below 1 the largest blocks are clipped
ROWS = 1 << 16  # weights a chunk of rows holds, so that the search stays in the processor's cache


def snap_scales(weight: Tensor, scales: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Symmetric scales [N, G] for a weight [N, K] to f_n · (1 … 16), 16 in every row, positive, in the scales' dtype; a negative scale is
    taken by its size. `importance` [K] weights the squared error. With one block a row its scale is searched alone."""
    N, G = scales.shape
    if weight.shape[0] != N or weight.shape[1] % G:
        raise InputError(
            "scales", tuple(scales.shape), f"[N, G] for a weight {tuple(weight.shape)}, G dividing its columns"
        )
    h = (
        None
        if importance is None
        else (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-6).float().reshape(G, -1)
    )
    rows = max(1, ROWS // weight.shape[1])
    parts = [
        _snap(w.float().reshape(len(w), G, -1), s.float().abs(), bits, h)
        for w, s in zip(weight.split(rows), scales.split(rows))
    ]
    return torch.cat(parts).to(scales.dtype)


def _snap(blocks: Tensor, wanted: Tensor, bits: int, h: Tensor | None) -> Tensor:
    """The best scales [n, G] of a chunk of rows, blocks [n, G, g]."""
    largest = wanted.amax(1, keepdim=True).clamp_min(1e-10)
    least, out = torch.full((len(wanted),), torch.inf, device=wanted.device), wanted
    for share in SHARES:
        s, error = _nearest(blocks, wanted, largest * (share / STEPS), bits, h)
        better = error < least
        least, out = torch.where(better, error, least), torch.where(better[:, None], s, out)
    return out


def _nearest(blocks: Tensor, wanted: Tensor, f: Tensor, bits: int, h: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each block the best of three integers around wanted / f: scales [n, G] and each row's error [n]."""
    top = 2 ** (bits - 1)
    least, out = torch.full_like(wanted, torch.inf), wanted
    fixed = torch.zeros_like(wanted, dtype=torch.bool).scatter_(1, wanted.argmax(1, keepdim=True), True)
    for offset in (-1, 0, 1):
        s = f * ((wanted / f).round() + offset).clamp(1, STEPS).masked_fill(fixed, STEPS)
        q = (blocks / s[..., None]).round_().clamp_(-top, top - 1)
        error = q.mul_(s[..., None]).sub_(blocks).square_()
        loss = (error if h is None else error.mul_(h)).sum(-1)
        better = loss < least
        least, out = torch.where(better, loss, least), torch.where(better, s, out)
    return out, least.sum(1)


def is_lpbq(weight: QuantTensor, tolerance: float = 1e-5) -> bool:
    """Whether a packed weight is symmetric and the scales of every row are its largest times 1/16 … 16/16, up to float32
    rounding: HTP's compiler then changes nothing."""
    largest = weight.scales.double().amax(1, keepdim=True)
    multiple = weight.scales.double() / largest * STEPS
    whole = ((multiple - multiple.round()).abs() <= tolerance * STEPS) & (multiple > 0.5)
    return weight.zeros is None and bool((largest > 0).all() and whole.all())
