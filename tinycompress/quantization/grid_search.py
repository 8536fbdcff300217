"""How a grid is found for a weight, and how weights are rounded to it: the arithmetic of QuantSpec, on plain tensors.

Searches try shrunken ranges and score them by squared error, plain or weighted by E[x²] of the inputs. Letters as in quantize.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.quant_tensor import QuantSpec
from .lpbq import snap_scales

SHRINKS, FITS = (0.0, 0.06, 0.12, 0.18), 3  # of the search for float zero points: parts of the range cut off at an end


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """The nearest grid points as uint8 [N, K], for float `weight` [N, K] and per-group `scales`, `zeros` [N, G]."""
    w = weight.reshape(*scales.shape, -1)
    zero = spec.zero if zeros is None else zeros[..., None].to(w.dtype)
    return nearest_ints(w / scales[..., None].to(w.dtype), zero, spec).to(torch.uint8).reshape(weight.shape)


def nearest_ints(steps: Tensor, zero: Tensor | float, spec: QuantSpec) -> Tensor:
    """The grid's integers nearest to steps + zero, in place, as floats; steps = w / s. An integer zero point is added after
    rounding, so that no bit of a small `steps` is lost to it."""
    steps = steps.add_(zero).round_() if spec.float_zero else steps.round_().add_(zero)
    return steps.clamp_(0, 2**spec.bits - 1)


def find_grid(
    name: str, weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [N, G] for a float weight [N, K]; `importance` is E[x²] of the inputs, [K].

    The searches try shrunken ranges; symmetric candidates are scored after a least-squares refit of the scale
    (s = Σh·w·q / Σh·q², so the error falls by (Σh·w·q)² / Σh·q²), in both signs; those with float zero points after one of
    scale and zero point together.
    """
    g = spec.group(name, weight.shape[1])
    if not torch.isfinite(weight).all():
        raise InputError(name, "NaN or infinite weights", "finite weights")
    if spec.search == "lpbq":
        how = "mse" if importance is None else "weighted"
    else:
        how = spec.search if spec.search != "auto" else ("minmax" if importance is None else "weighted")
    if how == "weighted" and importance is None:
        raise InputError(
            "QuantSpec.search",
            "'weighted' without activation statistics",
            "'minmax' or 'mse', or a pass that calibrates",
        )
    h = None
    if how == "weighted":
        assert importance is not None
        h = (importance / importance.mean().clamp_min(1e-30)).clamp_min(1e-6).reshape(-1, g).to(weight.dtype)
    scales, zeros = [], []
    rows = max(1, 65536 // weight.shape[1])  # a chunk of rows that stays in the processor's cache over the search
    for chunk in weight.split(rows):
        w = chunk.reshape(len(chunk), -1, g)
        find = _symmetric if spec.symmetric else _float_zero if spec.float_zero else _asymmetric
        s, z = find(w, h, spec.bits, search=how != "minmax")
        scales.append(s)
        zeros.append(z)
    if spec.search == "lpbq":
        return snap_scales(weight, torch.cat(scales), spec.bits, importance), None
    return torch.cat(scales), None if spec.symmetric else torch.cat(zeros)  # type: ignore[arg-type]


def _symmetric(w: Tensor, h: Tensor | None, bits: int, search: bool) -> tuple[Tensor, None]:
    top = 2 ** (bits - 1)
    peak = w.abs().amax(-1).clamp_min(1e-10)  # (N, G)
    if not search:
        return peak / max(top - 1, 1), None  # the whole range on the shorter side, so nothing is clipped
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
    return torch.where(scale.abs() < 1e-10, peak / top, scale), None


def _asymmetric(w: Tensor, h: Tensor | None, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low, high = w.amin(-1).clamp_max(0), w.amax(-1).clamp_min(0)
    best: Tensor | None = None
    scale = zero = low
    for shrink in torch.linspace(1.0, 0.6, 17).tolist() if search else (1.0,):
        s = ((high - low) * shrink / top).clamp_min(1e-10)
        z = (-low * shrink / s).round_().clamp_(0, top)
        q = (w / s[..., None]).round_().add_(z[..., None]).clamp_(0, top)
        error = (q.sub_(z[..., None]).mul_(s[..., None]) - w).square_()
        loss = (error if h is None else error.mul_(h)).sum(-1)
        better = torch.ones_like(loss, dtype=torch.bool) if best is None else loss < best
        best = loss if best is None else torch.where(better, loss, best)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero.to(torch.uint8)


def _float_zero(w: Tensor, h: Tensor | None, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    """Groups w [n, G, g]. Every candidate range (shrunk from either end) and its `FITS` Lloyd steps, integers to the nearest
    and then a line through (q, w), is scored by the error of that line: each lowers it."""
    top = 2**bits - 1
    low, high = w.amin(-1), w.amax(-1)
    span = (high - low).clamp_min(1e-10)
    scale, zero = span / top, -low / span * top
    if not search:
        return scale, zero
    weights = torch.ones_like(w) if h is None else h.expand_as(w)
    total = weights.sum(-1).clamp_min(1e-30)
    mean = (weights * w).sum(-1) / total
    best = torch.full_like(low, torch.inf)
    for below, above in itertools.product(SHRINKS, SHRINKS):
        s, z = span * (1 - below - above) / top, -(low + below * span) / (span * (1 - below - above)) * top
        for _ in range(FITS):
            q = (w / s[..., None]).add_(z[..., None]).round_().clamp_(0, top)
            level = (weights * q).sum(-1) / total
            spread = (weights * q * q).sum(-1) - total * level * level
            s = ((weights * q * w).sum(-1) - total * level * mean) / spread
            z = level - mean / s
            sound = (spread > 1e-10 * total) & (s > 1e-10)
            error = (q.sub_(z[..., None]).mul_(s[..., None]).sub_(w).square_().mul_(weights)).sum(-1)
            better = sound & (error < best)
            best, scale, zero = (
                torch.where(better, error, best),
                torch.where(better, s, scale),
                torch.where(better, z, zero),
            )
            s, z = torch.where(sound, s, span / top), torch.where(sound, z, -low / span * top)
    return scale, zero
