"""The multiple-choice knapsack: one option of each item, the least total loss within a budget.

    minimise Σ_i loss[i, o_i]   subject to   Σ_i price[i, o_i] ≤ limit,   one option o_i of each item i

by dynamic programming over the budget: with best_i(b) the least loss of the first i items for a budget of b,

    best_i(b) = min over the options o of item i:   best_{i-1}(b - price[i, o]) + loss[i, o]

and best_0 = 0. Only what is spent above the cheapest option of every item is counted, in steps of the prices' common
divisor. Time is items · options · steps of the budget.

Letters: i an item, o one of its options, b a budget in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .errors import InputError

STEPS = 100_000  # the finest division of a budget that the knapsack works in


def knapsack(prices: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """The option of each item with which the sum of losses is least and the sum of prices is at most the limit.

    It is exact when the prices' common divisor divides the budget into at most `STEPS` steps. Otherwise prices are
    rounded up to the next step, so that the limit still holds.

    Arguments:
        prices: of each item the price of each option, at least 0.
        losses: of each item the loss of each option, in the same order.
        limit: what all chosen options may cost together; an `InputError` if even the cheapest ones cost more.
    """
    cheapest = sum(min(row) for row in prices)
    budget = limit - cheapest
    if budget < 0:
        raise InputError("limit", limit, f"at least {cheapest}")
    extras = [[price - min(row) for price in row] for row in prices]
    divisor = math.gcd(*(price for extra in extras for price in extra))
    step = max(divisor or 1, -(-budget // STEPS), 1)
    steps = budget // step
    best = np.zeros(steps + 1)  # best[b]: the least loss of the items so far with b steps to spend
    taken = np.zeros((len(prices), steps + 1), dtype=np.int16)
    for item, (extra, loss) in enumerate(zip(extras, losses)):
        new = np.full(steps + 1, np.inf)
        for option, (price, value) in enumerate(zip(extra, loss)):
            cost = -(-price // step)
            if cost > steps:
                continue
            total = best[: steps + 1 - cost] + float(value)
            better = total < new[cost:]
            new[cost:][better] = total[better]
            taken[item, cost:][better] = option
        best = new
    chosen: list[int] = []
    left = steps
    for item in reversed(range(len(prices))):
        option = int(taken[item, left])
        left -= -(-extras[item][option] // step)
        chosen.append(option)
    return chosen[::-1]
