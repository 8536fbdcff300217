"""How much each layer keeps: what a width costs, and three ways to share a cut out.

  uniform   every layer the same share; what rounding leaves over is dealt out evenly
  global    one threshold for all scores, each layer's standardized first (FLAP, arXiv:2312.11983): (s - mean) / std
  optimal   the sizes with the least total loss within the budget, from a loss curve for each axis: a multiple-choice
            knapsack, solved by dynamic programming over the budget

A `Choice` is one axis of one layer (`layers.3.ffn`) with the sizes it may have and their prices. No tensor of a model
is read here, so what cannot be met is known before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config, Layer
from ..graph.edit import resized
from ..graph.topology import Axis, axes, axis_name
from ..knapsack import knapsack
from .target import BudgetTarget, Itemsize

ALLOCATIONS = ("uniform", "global", "optimal")
PRUNABLE = ("ffn", "heads", "kv_heads")  # the kinds of axes that single layers are cut along


@dataclass(frozen=True)
class Choice:
    """One axis of one layer, whose size is to be chosen.

    Fields:
        axis: the name of the axis, such as `layers.3.ffn`.
        kind: the kind of the axis, one of `PRUNABLE`.
        sizes: the numbers of units it may have, rising.
        prices: what the sublayer costs at each of `sizes`.
        now: how many units it has now.
    """

    axis: str
    kind: str
    sizes: tuple[int, ...]
    prices: tuple[int, ...]
    now: int


def resize(config: Config, sizes: Mapping[str, int]) -> Config:
    """The config after the cuts `{axis: size}`."""
    known = axes(config)
    layers = list(config.layers)
    for name, size in sizes.items():
        axis = known[name]
        assert axis.layer is not None
        layers[axis.layer] = resized(layers[axis.layer], axis.kind, size)
    return dataclasses.replace(config, layers=tuple(layers))


def choices_of(
    config: Config,
    kinds: Sequence[str],
    target: BudgetTarget,
    multiple_of: int,
    floors: Mapping[str, float] | None = None,
    remove: bool = False,
    itemsize: Itemsize = 4,
) -> list[Choice]:
    """Every choice on the axes of these kinds.

    FFN widths become multiples of `multiple_of` (unless they are narrower than that). Query heads stay equal in number
    in every KV group, and where heads go, those that stay are a multiple of `multiple_of` wide. Nothing goes below its
    floor (a share, or a count above 1), or to 0 unless sublayers may go (`remove`).
    """
    choices = []
    known = axes(config)
    for i, layer in enumerate(config.layers):
        for kind in kinds:
            axis = known.get(axis_name(i, kind))
            if axis is None:
                continue
            sizes = _sizes(config, layer, axis, multiple_of, (floors or {}).get(kind, 0), remove)
            prices = tuple(_price(config, layer, kind, size, target, itemsize) for size in sizes)
            choices.append(Choice(axis.name, kind, sizes, prices, axis.size))
    return choices


def _sizes(config: Config, layer: Layer, axis: Axis, multiple_of: int, floor: float, remove: bool) -> tuple[int, ...]:
    """The sizes that an axis may have, rising."""
    channels = {"ffn": 1, "heads": config.head_dim, "kv_heads": config.head_dim * layer.group}[axis.kind]  # of one unit
    least = math.ceil(floor * axis.size if floor <= 1 else floor)
    least = max(least, 0 if remove else 1)
    sizes = [
        size for size in range(0, axis.size + 1, axis.groups) if least <= size and size * channels % multiple_of == 0
    ]
    narrow = not sizes or sizes == [0]  # no multiple fits
    if axis.size not in sizes and (axis.kind != "ffn" or narrow):
        sizes.append(axis.size)
    return tuple(sizes)


def fixed_price(config: Config, choices: Sequence[Choice], target: BudgetTarget, itemsize: Itemsize = 4) -> int:
    """What the sublayers cost that no choice can change."""
    return target.price(resize(config, {choice.axis: 0 for choice in choices}), itemsize)


def _price(config: Config, layer: Layer, kind: str, size: int, target: BudgetTarget, itemsize: Itemsize) -> int:
    """The price of the sublayer alone: the other one of the layer is left out."""
    alone = Layer(0, 0, layer.ffn_dim) if kind == "ffn" else Layer(layer.n_heads, layer.n_kv_heads, 0)
    return target.price(dataclasses.replace(config, layers=(resized(alone, kind, size),)), itemsize)


def check_budget(choices: Sequence[Choice], limit: int, text: str, nearest: str) -> None:
    """An `InputError` naming the nearest budget if even the smallest sizes cost more than `limit`; `text` is the budget
    as it was given."""
    least = sum(choice.prices[0] for choice in choices)
    if least <= limit:
        return
    kinds = sorted({choice.kind for choice in choices})
    remedy = ""
    if not {"heads", "kv_heads"} & set(kinds):
        remedy = f'; less where heads go too: axes=("ffn", "heads"), or --prune {text},ffn,heads'
    accepted = f"{nearest} or more, by these axes ({', '.join(kinds)}), floors and multiples{remedy}"
    raise InputError("target", text, accepted)


def uniform(choices: Sequence[Choice], limit: int) -> list[int]:
    """The largest common share within the limit.

    Error diffusion: layer i gets ⌊(i+1)·share⌋ - ⌊i·share⌋ steps of its axis, so that rounding evens out over the
    layers.
    """

    def sizes_at(share: float) -> list[int]:
        carried: dict[str, float] = {}
        sizes = []
        for choice in choices:
            wanted = choice.now * share + carried.get(choice.kind, 0.0)
            size = max((s for s in choice.sizes if s <= wanted + 1e-9), default=choice.sizes[0])
            carried[choice.kind] = min(wanted - size, choice.now)
            sizes.append(size)
        return sizes

    if _total(choices, sizes_at(1.0)) <= limit:
        return sizes_at(1.0)
    low = 0.0
    high = 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if _total(choices, sizes_at(middle)) <= limit:
            low = middle
        else:
            high = middle
    return sizes_at(low)


def by_threshold(choices: Sequence[Choice], scores: Sequence[Tensor], limit: int) -> list[int]:
    """Sizes at the lowest threshold of standardized scores that fits: what scores above it stays, rounded to sizes."""
    standard = [_standardized(s) for s in scores]
    steps = torch.cat(standard).unique().cpu()

    def sizes_at(threshold: Tensor) -> list[int]:
        counts = (len(s) - int(torch.searchsorted(s, threshold.to(s.device))) for s in standard)
        return [min(choice.sizes, key=lambda size: (abs(size - count), size)) for choice, count in zip(choices, counts)]

    low = 0
    high = len(steps)  # at `high` everything that may go has gone
    while low < high:
        middle = (low + high) // 2
        if _total(choices, sizes_at(steps[middle])) <= limit:
            high = middle
        else:
            low = middle + 1
    return sizes_at(steps[low] if low < len(steps) else steps[-1] + 1)


def _standardized(scores: Tensor) -> Tensor:
    """Scores of mean 0 and deviation 1 in float64, rising; one alone is 0."""
    if len(scores) <= 1:
        return (scores * 0).double()
    return ((scores - scores.mean()) / scores.std().clamp_min(1e-300)).double().sort().values


def optimal(choices: Sequence[Choice], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """Sizes that minimise the sum of `losses` (for each choice one loss a size) with prices within the limit."""
    options = knapsack([choice.prices for choice in choices], losses, limit)
    return [choice.sizes[option] for choice, option in zip(choices, options)]


def _total(choices: Sequence[Choice], sizes: Sequence[int]) -> int:
    return sum(choice.prices[choice.sizes.index(size)] for choice, size in zip(choices, sizes))
