"""Estimates with intervals: bootstrapped ones, shares of right answers, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

DRAWN = 20_000_000  # indices of one bootstrap over the items of a task, about


@dataclass(frozen=True)
class Interval:
    """An estimate with an interval.

    Fields:
        value: the estimate, on all windows or questions.
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


def percentile(values: Tensor, share: float, seed: int = 0) -> Interval:
    """The smallest of `values` [windows, positions] that at least `share` (above 0, at most 1) of them do not exceed,
    over resampled windows. Found by bisection in the sorted values: nothing is sorted again for a draw."""
    levels = values.flatten().sort().values
    rank = math.ceil(share * len(levels) - 1e-9)  # a share of 0.999 is a little more in binary
    reached = torch.searchsorted(values.sort(1).values, levels.expand(len(values), -1).contiguous(), right=True)

    def statistic(index: Tensor) -> Tensor:
        low = torch.zeros(len(index), dtype=torch.long)
        high = low + len(levels) - 1
        while (low < high).any():
            middle = (low + high) // 2
            enough = reached[index, middle[:, None]].sum(1) >= rank
            high = torch.where(enough, middle, high)
            low = torch.where(enough, low, middle + 1)
        return levels[low]

    return bootstrap(statistic, len(values), seed)


def closure(baseline: Tensor, method: Tensor, reference: Tensor, seed: int = 0) -> Interval:
    """The share of the baseline's loss that a method wins back, (ln RTN - ln M) / (ln RTN - ln FP), from NLLs
    [windows]."""

    def statistic(index: Tensor) -> Tensor:
        base = baseline[index].mean(-1)
        return (base - method[index].mean(-1)) / (base - reference[index].mean(-1))

    return bootstrap(statistic, len(baseline), seed)


def proportion(right: Tensor, level: float = 0.95) -> Interval:
    """The share of true entries of right [n] with Wilson's interval."""
    n = len(right)
    share = right.double().mean().item()
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True)
class McNemar:
    """Two models on the same questions.

    Fields:
        difference: of their shares of right answers, with Bonett and Price's interval for paired shares (2012).
        gained: questions that only the model answers right.
        lost: questions that only the reference answers right.
        p: of the exact two-sided test that both are as likely.
    """

    difference: Interval
    gained: int
    lost: int
    p: float


def mcnemar(model: Tensor, reference: Tensor, level: float = 0.95) -> McNemar:
    """Right answers (bool [n]) of a model and of a reference to the same n questions."""
    n = len(model)
    gained = int((model & ~reference).sum())
    lost = int((reference & ~model).sum())
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    won, given = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((won + given - (won - given) ** 2) / (n + 2))
    low, high = max(-1.0, won - given - half), min(1.0, won - given + half)
    return McNemar(Interval((gained - lost) / n, low, high), gained, lost, min(1.0, 2 * tail))


def estimate(values: Tensor) -> Interval:
    """A metric over items: the share of bool [n] (Wilson), the mean of float [n], or of float [n, 2] the ratio of the
    columns' sums (bootstrap over items)."""
    if values.dtype == torch.bool:
        return proportion(values)
    return bootstrap(lambda index: _mean(values, index), len(values), draws=_draws(len(values)))


def paired(model: Tensor, reference: Tensor) -> McNemar | Interval:
    """What a metric of a model is above that of a reference on the same items, values as in `estimate`: McNemar's test
    for bool, else the bootstrap over items."""
    if model.dtype == torch.bool:
        return mcnemar(model, reference)

    def statistic(index: Tensor) -> Tensor:
        return _mean(model, index) - _mean(reference, index)

    return bootstrap(statistic, len(model), draws=_draws(len(model)))


def _mean(values: Tensor, index: Tensor) -> Tensor:
    chosen = values[index]
    if values.dim() == 1:
        return chosen.mean(-1)
    sums = chosen.sum(-2)
    return sums[..., 0] / sums[..., 1]


def _draws(items: int) -> int:
    """Resamplings whose indices fit in memory."""
    return max(1000, min(10000, DRAWN // items))
