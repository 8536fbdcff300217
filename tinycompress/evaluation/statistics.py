"""Estimates with bootstrap intervals, and paired differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap interval.

    Fields:
        value: the estimate, on all windows.
        low, high: the ends of the interval, in the unit of `value`.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(
    statistic: Callable[[Tensor], Tensor], windows: int, seed: int = 0, draws: int = 10000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over windows. `statistic` maps resampled indices [draws, windows] to values [draws]; its
    value at the identity is the estimate. The indices are shared by every array it reads: that is the pairing."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(windows, (draws, windows), generator=generator)
    values = statistic(index).sort().values
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)).tolist()
    return Interval(statistic(torch.arange(windows)[None]).item(), low, high)


def paired_difference(a: Tensor, b: Tensor, seed: int = 0) -> Interval:
    """Mean of a - b over windows (per-window NLLs of two models on the same windows), in nats a token."""
    difference = a - b
    return bootstrap(lambda index: difference[index].mean(-1), len(difference), seed)


def closure(baseline: Tensor, method: Tensor, reference: Tensor, seed: int = 0) -> Interval:
    """The share of the baseline's loss that a method wins back, (ln RTN - ln M) / (ln RTN - ln FP), from NLLs
    [windows]."""

    def statistic(index: Tensor) -> Tensor:
        base = baseline[index].mean(-1)
        return (base - method[index].mean(-1)) / (base - reference[index].mean(-1))

    return bootstrap(statistic, len(baseline), seed)
