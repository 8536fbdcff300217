"""The multiple-choice knapsack, by dynamic programming over the budget: one option of each item, the least total loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .errors import InputError

STEPS = 100_000  # the finest division of a budget that the knapsack works in


def knapsack(prices: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """One option of each item, such that the sum of `losses` is least with the sum of `prices` within the limit: exact when
    the prices' common divisor divides the limit into at most STEPS; otherwise prices are rounded up to that, never over
    the limit."""
    base = sum(min(row) for row in prices)
    room = limit - base
    if room < 0:
        raise InputError("limit", limit, f"at least {base}")
    extras = [[p - min(row) for p in row] for row in prices]
    step = max(math.gcd(*(p for extra in extras for p in extra)) or 1, -(-room // STEPS), 1)
    slots = room // step
    best = np.zeros(slots + 1)  # best[b]: the least loss of the items so far with b steps to spend
    taken = np.zeros((len(prices), slots + 1), dtype=np.int16)
    for i, (extra, loss) in enumerate(zip(extras, losses)):
        new = np.full(slots + 1, np.inf)
        for option, (price, value) in enumerate(zip(extra, loss)):
            cost = -(-price // step)
            if cost > slots:
                continue
            total = best[: slots + 1 - cost] + float(value)
            better = total < new[cost:]
            new[cost:][better] = total[better]
            taken[i, cost:][better] = option
        best = new
    out, left = [], slots
    for i in reversed(range(len(prices))):
        option = int(taken[i, left])
        left -= -(-extras[i][option] // step)
        out.append(option)
    return out[::-1]
