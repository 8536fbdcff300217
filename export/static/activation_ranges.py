"""Static activation ranges: what integer grid each activation of a graph gets, from what it holds on real text.

  minmax      the smallest and the largest value seen: nothing saturates
  percentile  the range that leaves out a share of the values, half at each end
  mse         the range, shrunk towards zero in steps, whose rounding and clipping errors add up to the least square

A grid of n steps over [low, high] (which always holds 0, so that 0 is exact):  x ≈ (q - z)·s,  s = (high - low) / n, z
= round(q_min - low / s). Percentile and mse read a histogram whose bins double in width when a value falls outside, so
one pass over the data serves all three.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tinycompress.errors import InputError

METHODS = ("minmax", "percentile", "mse")
GRIDS = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
BINS = 4096
SHRINKS = 64  # ranges tried by "mse": 1, 63/64, …
Array = npt.NDArray[Any]
SMALLEST = 1e-6  # a tensor that is always zero still needs a step


@dataclass(frozen=True)
class ActivationGrid:
    """Integer steps of one activation: x ≈ (q - zero) · scale.

    Fields:
        scale: of a step, above 0.
        zero: the integer that stands for 0.
        dtype: of q, one of GRIDS, such as "uint16".
    """

    scale: float
    zero: int
    dtype: str

    @staticmethod
    def over(low: float, high: float, dtype: str) -> ActivationGrid:
        """The grid over [low, high], widened to hold 0."""
        if dtype not in GRIDS:
            raise InputError("activation type", repr(dtype), " | ".join(GRIDS))
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise InputError("activation range", f"{low} … {high}", "two finite numbers, the lower first")
        first, last = GRIDS[dtype]
        low = min(low, 0.0)
        high = max(high, 0.0)
        scale = float(np.float32(max(high - low, SMALLEST) / (last - first)))
        return ActivationGrid(scale, int(np.clip(round(first - low / scale), first, last)), dtype)

    def round(self, x: Array) -> Array:
        """x on the grid, in float: what Quantize- and DequantizeLinear make of it."""
        first, last = GRIDS[self.dtype]
        q = np.clip(np.rint(x / np.float32(self.scale)) + self.zero, first, last)
        return ((q - self.zero) * np.float32(self.scale)).astype(np.float32)


@dataclass(frozen=True)
class Activations:
    """How the activations of a graph lie on integers.

    Fields:
        grids: the grid of each activation by its key.
        key_scales: for each attention, by its prefix, float [K, d]: keys are divided by it and queries multiplied with
            it, so that all channels of the keys fill one grid. Default none.
        attention_bits: of keys and values as attention reads them, 16 (default) or 8.
    """

    grids: Mapping[str, ActivationGrid]
    key_scales: Mapping[str, Tensor] = field(default_factory=dict)
    attention_bits: int = 16


@dataclass
class Observer:
    """What was seen of one activation.

    Fields:
        histogram: whether values are counted too, some ten times the work. Default True.
        low: least value seen. Default inf: none yet.
        high: greatest value seen. Default -inf.
        reach: half the width of the histogram. Default 0: nothing seen.
        counts: int64 [BINS], values by bin over [-reach, reach].
    """

    histogram: bool = True
    low: float = math.inf
    high: float = -math.inf
    reach: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def see(self, name: str, x: Array) -> None:
        """Adds values; NaN or infinity is an `InputError` that names the activation."""
        low = float(x.min())
        high = float(x.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(
                f"activation {name}", "NaN or infinite values", "finite ones (look at the weights before it)"
            )
        self.low = min(self.low, low)
        self.high = max(self.high, high)
        self._widen(max(abs(low), abs(high)))
        if self.histogram:
            self.counts += np.histogram(x, BINS, (-self.reach, self.reach))[0]

    def _widen(self, peak: float) -> None:
        """Bins twice as wide, as often as needed: pairs of them merge, around zero."""
        if not self.reach:
            self.reach = max(peak, SMALLEST)
        while self.reach < peak:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(merged, BINS // 4)
            self.reach *= 2

    @property
    def centres(self) -> Array:
        return (np.arange(BINS) + 0.5) * (2 * self.reach / BINS) - self.reach


def choose(
    name: str,
    seen: Observer,
    dtype: str,
    method: str = "minmax",
    *,
    clip: float = 1e-4,
    saturation: float = 0.01,
    headroom: float = 1.0,
) -> ActivationGrid:
    """The grid of one activation. `clip` is the share of values that "percentile" leaves out; more than `saturation` of
    them outside the chosen range, by whatever method, is an `InputError`. `headroom` widens the range for unseen
    text."""
    if method not in METHODS:
        raise InputError("activation ranges", repr(method), " | ".join(METHODS))
    if not math.isfinite(seen.low):
        raise InputError(f"activation {name}", "no values", "calibration text that reaches it")
    low = seen.low
    high = seen.high
    if method != "minmax" and seen.histogram:
        low, high = _percentile(seen, clip) if method == "percentile" else _mse(seen, dtype)
        if (lost := outside(seen, low, high)) > saturation:
            found = f"{lost:.1%} of its values outside {low:.4g} … {high:.4g}"
            raise InputError(f"activation {name}", found, f"at most {saturation:.1%} (minmax has none)")
    return ActivationGrid.over(low * headroom, high * headroom, dtype)


def outside(seen: Observer, low: float, high: float) -> float:
    """The share of the values seen, by the histogram's bins, that a range cuts off."""
    half = seen.reach / BINS
    beyond = (seen.centres + half < low) | (seen.centres - half > high)
    return float(seen.counts[beyond].sum() / seen.counts.sum())


def observe(observers: dict[str, Observer], batch: Iterable[tuple[str, Array]], method: str = "minmax") -> None:
    """Adds named arrays to their observers; several arrays may share a name, and then a range."""
    for name, x in batch:
        observers.setdefault(name, Observer(histogram=method != "minmax")).see(name, x)


def grids(
    observers: Mapping[str, Observer], dtype: str, method: str = "minmax", *, headroom: float = 1.0
) -> dict[str, ActivationGrid]:
    """`choose` for every observer."""
    return {name: choose(name, seen, dtype, method, headroom=headroom) for name, seen in observers.items()}


def _percentile(seen: Observer, clip: float) -> tuple[float, float]:
    if not 0 <= clip < 1:
        raise InputError("clip", clip, "a share from 0 to below 1")
    share = np.cumsum(seen.counts) / seen.counts.sum()
    half = seen.reach / BINS
    low = seen.centres[int(np.searchsorted(share, clip / 2, side="right"))] - half
    high = seen.centres[int(np.searchsorted(share, 1 - clip / 2))] + half
    return max(low, seen.low), min(high, seen.high)


def _mse(seen: Observer, dtype: str) -> tuple[float, float]:
    """Clipping errors by the histogram; rounding errors s²/12 a value, as for values spread evenly within a step."""
    first, last = GRIDS[dtype]
    x = seen.centres
    n = seen.counts
    least = math.inf
    chosen = (seen.low, seen.high)
    low = min(seen.low, 0.0)
    high = max(seen.high, 0.0)
    for i in range(SHRINKS, 0, -1):
        a = low * i / SHRINKS
        b = high * i / SHRINKS
        step = max(b - a, SMALLEST) / (last - first)
        inside = (x >= a) & (x <= b)
        error = (n[inside].sum() * step**2 / 12) + (n * np.square(x - np.clip(x, a, b)))[~inside].sum()
        if error < least:
            least = error
            chosen = (a, b)
    return chosen
