"""How a grid is found for a weight, and how weights are rounded to it, on plain tensors.

    q = clamp(round(w / s) + z, 0, 2^bits - 1)      w ≈ (q - z) · s

with a scale s and a zero point z for each group of g inputs. Searches try shrunken ranges and score them by the squared
error Σ h·(w - (q - z)·s)², h = 1 or, weighted, E[x²] of the inputs over its mean.

Letters: N out_features, K in_features, G groups of g = K / G inputs, n a chunk of rows.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.quant_tensor import Grid, QuantSpec, QuantTensor
from .lpbq import snap_scales

CHUNK = 65536  # weights a chunk of rows holds, so that it stays in the processor's cache over the search
SHRINKS = (0.0, 0.06, 0.12, 0.18)  # of the search for float zero points: parts of the range cut off at either end
FITS = 3  # steps of the search for float zero points from each of those ranges


def round_to_nearest(name: str, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> QuantTensor:
    """weight float [N, K] to the nearest points of the grid that is found for it; `name` and `importance` as in
    `find_grid`."""
    scales, zeros = find_grid(name, weight, spec, importance)
    return pack_on_grid(weight, scales, zeros, spec)


def pack_on_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> QuantTensor:
    """weight float [N, K] to the nearest points of a grid with `scales` and `zeros` [N, G]."""
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, grid), scales, zeros, grid)


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> Tensor:
    """The nearest grid points as uint8 [N, K], for float `weight` [N, K] and per-group `scales`, `zeros` [N, G]."""
    w = weight.reshape(*scales.shape, -1)  # (N, G, g)
    zero = grid.zero if zeros is None else zeros[..., None].to(w.dtype)
    return nearest_ints(w / scales[..., None].to(w.dtype), zero, grid).to(torch.uint8).reshape(weight.shape)


def nearest_ints(steps: Tensor, zero: Tensor | float, grid: Grid) -> Tensor:
    """The grid's integers nearest to steps + zero, in place, as floats; steps = w / s. An integer zero point is added
    after rounding, so that no bit of a small `steps` is lost to it."""
    steps = steps.add_(zero).round_() if grid.float_zero else steps.round_().add_(zero)
    return steps.clamp_(0, 2**grid.bits - 1)


def find_grid(
    name: str, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [N, G] for a float weight [N, K]; zero points are None for a symmetric grid.

    The searches try shrunken ranges. Symmetric candidates are scored after a least-squares refit of the scale
    (s = Σh·w·q / Σh·q², so the error falls by (Σh·w·q)² / Σh·q²), in both signs; those with float zero points after
    one of scale and zero point together.

    Arguments:
        name: of the weight, for errors.
        importance: E[x²] of the inputs, [K], for the "weighted" search.

    Errors: an `InputError` for weights that are not finite, groups that do not divide K, and a "weighted" search
    without `importance`.
    """
    g = spec.group(name, weight.shape[1])
    if not torch.isfinite(weight).all():
        raise InputError(name, "NaN or infinite weights", "finite weights")
    search = _search(spec, importance)
    h = None
    if search == "weighted":
        assert importance is not None
        h = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-6).reshape(-1, g).to(weight.dtype)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        w = rows.reshape(len(rows), -1, g)  # (n, G, g)
        s, z = _chunk_grid(w, h, spec, search != "minmax")
        scales.append(s)
        if z is not None:
            zeros.append(z)
    if spec.search == "lpbq":
        return snap_scales(weight, torch.cat(scales), spec.bits, importance), None
    return torch.cat(scales), torch.cat(zeros) if zeros else None


def _search(spec: QuantSpec, importance: Tensor | None) -> str:
    """What is minimised: "minmax" | "mse" | "weighted"."""
    if spec.search == "weighted" and importance is None:
        remedy = "'minmax' or 'mse', or a pass that calibrates"
        raise InputError("QuantSpec.search", "'weighted' without activation statistics", remedy)
    if spec.search == "auto":
        return "minmax" if importance is None else "weighted"
    if spec.search == "lpbq":
        return "mse" if importance is None else "weighted"
    return spec.search


def _chunk_grid(w: Tensor, h: Tensor | None, grid: Grid, search: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [n, G] of groups w [n, G, g], with the range as it is or searched by the error weighted by
    h [G, g] (None: plain)."""
    if grid.symmetric:
        return _symmetric(w, h, grid.bits, search), None
    if grid.float_zero:
        return _float_zero(w, h, grid.bits, search)
    return _asymmetric(w, h, grid.bits, search)


def _symmetric(w: Tensor, h: Tensor | None, bits: int, search: bool) -> Tensor:
    top = 2 ** (bits - 1)
    peak = w.abs().amax(-1).clamp_min(1e-10)  # (n, G)
    if not search:
        return peak / max(top - 1, 1)  # the whole range on the shorter side, so nothing is clipped
    hw = w if h is None else w * h
    best = torch.full_like(peak, -1.0)
    scale = peak / top
    shrinks = torch.linspace(1.0, 0.45 if bits < 4 else 0.6, 12)
    for sign in (1.0, -1.0):
        for shrink in shrinks.tolist():
            s = peak * (sign * shrink / top)
            q = (w / s[..., None]).round_().clamp_(-top, top - 1)
            cross = (hw * q).sum(-1)
            square = (q * q if h is None else (q * q).mul_(h)).sum(-1).clamp_min(1e-30)
            gain = cross * cross / square
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better, cross / square, scale)
    return torch.where(scale.abs() < 1e-10, peak / top, scale)


def _asymmetric(w: Tensor, h: Tensor | None, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low = w.amin(-1).clamp_max(0)
    high = w.amax(-1).clamp_min(0)
    best: Tensor | None = None
    scale = low
    zero = low
    for shrink in torch.linspace(1.0, 0.6, 17).tolist() if search else (1.0,):
        s = ((high - low) * shrink / top).clamp_min(1e-10)
        z = (-low * shrink / s).round_().clamp_(0, top)
        q = (w / s[..., None]).round_().add_(z[..., None]).clamp_(0, top)
        error = (q.sub_(z[..., None]).mul_(s[..., None]) - w).square_()
        loss = (error if h is None else error.mul_(h)).sum(-1)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss < best
        best = loss if best is None else torch.where(better, loss, best)
        scale = torch.where(better, s, scale)
        zero = torch.where(better, z, zero)
    return scale, zero.to(torch.uint8)


def _float_zero(w: Tensor, h: Tensor | None, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """Every candidate range (shrunk from either end) and its `FITS` Lloyd steps, integers to the nearest and then a
    line through (q, w), is scored by the error of that line: each step lowers it."""
    top = 2**bits - 1
    low = w.amin(-1)
    span = (w.amax(-1) - low).clamp_min(1e-10)
    widest_scale = span / top
    widest_zero = -low / span * top
    if not search:
        return widest_scale, widest_zero
    weights = torch.ones_like(w) if h is None else h.expand_as(w)
    total = weights.sum(-1).clamp_min(1e-30)
    mean = (weights * w).sum(-1) / total
    best = torch.full_like(low, torch.inf)
    scale = widest_scale
    zero = widest_zero
    for below, above in itertools.product(SHRINKS, SHRINKS):
        s = span * (1 - below - above) / top
        z = -(low + below * span) / (span * (1 - below - above)) * top
        for _ in range(FITS):
            q = (w / s[..., None]).add_(z[..., None]).round_().clamp_(0, top)
            level = (weights * q).sum(-1) / total
            spread = (weights * q * q).sum(-1) - total * level * level
            s = ((weights * q * w).sum(-1) - total * level * mean) / spread
            z = level - mean / s
            sound = (spread > 1e-10 * total) & (s > 1e-10)
            error = (q.sub_(z[..., None]).mul_(s[..., None]).sub_(w).square_().mul_(weights)).sum(-1)
            better = sound & (error < best)
            best = torch.where(better, error, best)
            scale = torch.where(better, s, scale)
            zero = torch.where(better, z, zero)
            s = torch.where(sound, s, widest_scale)
            z = torch.where(sound, z, widest_zero)
    return scale, zero
