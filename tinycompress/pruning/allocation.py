"""How much each layer keeps: budgets, what a width costs, and three ways to share a cut out.

  uniform   every layer the same share; what rounding leaves over is dealt out evenly
  global    one threshold for all scores, each layer's standardized first (FLAP, arXiv:2312.11983): (s - mean) / std
  optimal   the sizes with the least total loss within the budget, from a loss curve for each item: a multiple-choice
            knapsack, solved by dynamic programming over the budget

An item is one axis of one layer (`layers.3.ffn`) with the sizes it may have and their prices. No tensor of a model is
read here, so what cannot be met is known before any work is done.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config, Layer, attention_shapes, ffn_shapes
from ..graph.edit import resized
from ..graph.topology import axes
from ..knapsack import knapsack

ALLOCATIONS = ("uniform", "global", "optimal")
KINDS = ("params", "bytes", "flops")
AXES = ("ffn", "heads", "kv_heads")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True)
class Target:
    """`params=0.8`: a share of the non-embedding parameters (or a number of them, above 1); `bytes=300MB`: of all weights
    in the graph's dtype (or a share of them); `flops=0.8`: a share of what the layers' linears take."""

    kind: str
    amount: float

    @staticmethod
    def parse(text: str, field: str = "target") -> Target:
        match = re.fullmatch(r"(params|bytes|flops)=(\d*\.?\d+(?:e\d+)?)(kb|mb|gb|)", text.strip(), re.IGNORECASE)
        amount = float(match[2]) * UNITS[match[3].lower()] if match else 0.0
        if not match or amount <= 0 or (match[3] and match[1].lower() != "bytes"):
            raise InputError(
                field, repr(text), "params=SHARE, flops=SHARE or bytes=SIZE, such as params=0.8 or bytes=300MB"
            )
        return Target(match[1].lower(), amount)

    def price(self, config: Config, itemsize: int = 4) -> int:
        """What the layers of a config cost in this kind."""
        if self.kind == "flops":
            linears = (
                s
                for layer in config.layers
                for s in (*attention_shapes(config, layer).values(), *ffn_shapes(config, layer).values())
            )
            return 2 * sum(math.prod(shape) for shape in linears)
        layers = config.n_body_params - config.hidden_size  # the last norm stays
        return layers * itemsize if self.kind == "bytes" else layers

    def limit(self, config: Config, itemsize: int = 4) -> int:
        """What the layers may cost, out of the whole."""
        fixed = self._fixed(config, itemsize)
        total = self.price(config, itemsize) + fixed
        return math.floor((self.amount * total if self.amount <= 1 else self.amount) + 1e-6) - fixed

    def nearest(self, price: int, config: Config, itemsize: int = 4) -> str:
        """The target, in the form it was given in, at which the layers may cost `price`; rounded up."""
        whole = dataclasses.replace(self, amount=1.0)
        fixed = self._fixed(config, itemsize)
        amount = price + fixed
        share = math.ceil(1000 * amount / (whole.price(config, itemsize) + fixed)) / 1000
        return f"{self.kind}={share:g}" if self.amount <= 1 else f"{self.kind}={amount}"

    def _fixed(self, config: Config, itemsize: int) -> int:
        """What no cut of a layer saves."""
        ends = config.n_params - config.n_body_params
        return {"params": config.hidden_size, "bytes": (ends + config.hidden_size) * itemsize, "flops": 0}[self.kind]


@dataclass(frozen=True)
class Item:
    """One axis of one layer, `now` units wide: the `sizes` it may have, rising, and the `prices` of its sublayer at each."""

    axis: str
    sizes: tuple[int, ...]
    prices: tuple[int, ...]
    now: int


def items(
    config: Config,
    names: Sequence[str],
    target: Target,
    multiple_of: int,
    floors: Mapping[str, float] | None = None,
    remove: bool = False,
    itemsize: int = 4,
) -> list[Item]:
    """Every item of the named axes. FFN widths become multiples of `multiple_of` (unless they are narrower than that);
    query heads the same in every KV group, and where heads go, those that stay a multiple of `multiple_of` wide. Nothing
    goes below its floor (a share, or a count above 1), or to 0 unless sublayers may go (`remove`)."""
    out = []
    known = axes(config)
    for i, layer in enumerate(config.layers):
        for name in names:
            axis = known.get(f"layers.{i}.{name}")
            if axis is None:
                continue
            wide = {"ffn": 1, "heads": config.head_dim, "kv_heads": config.head_dim * layer.group}[name]
            floor = (floors or {}).get(name, 0)
            least = max(math.ceil(floor * axis.size if floor <= 1 else floor), 0 if remove else 1)
            sizes = [s for s in range(0, axis.size + 1, axis.groups) if least <= s and s * wide % multiple_of == 0]
            if axis.size not in sizes and (name != "ffn" or not sizes or sizes == [0]):
                sizes.append(axis.size)
            out.append(
                Item(
                    axis.name,
                    tuple(sizes),
                    tuple(_price(config, layer, name, size, target, itemsize) for size in sizes),
                    axis.size,
                )
            )
    return out


def fixed_price(config: Config, choices: Sequence[Item], target: Target, itemsize: int = 4) -> int:
    """What the sublayers cost that no item can change."""
    return target.price(apply(config, {item.axis: 0 for item in choices}), itemsize)


def _price(config: Config, layer: Layer, axis: str, size: int, target: Target, itemsize: int) -> int:
    """Of the sublayer alone: the other one of the layer is left out on both sides."""
    alone = Layer(0, 0, layer.ffn_dim) if axis == "ffn" else Layer(layer.n_heads, layer.n_kv_heads, 0)
    new = resized(alone, axis, size)
    return target.price(dataclasses.replace(config, layers=(new,)), itemsize)


def check_budget(choices: Sequence[Item], limit: int, said: str, nearest: str) -> None:
    """An InputError naming the nearest budget if even the smallest sizes cost more than `limit`."""
    least = sum(item.prices[0] for item in choices)
    if least > limit:
        kinds = sorted({item.axis.rsplit(".", 1)[1] for item in choices})
        more = (
            ""
            if {"heads", "kv_heads"} & set(kinds)
            else f'; less where heads go too: axes=("ffn", "heads"), or --prune {said},ffn,heads'
        )
        raise InputError(
            "target", said, f"{nearest} or more, by these axes ({', '.join(kinds)}), floors and multiples{more}"
        )


def uniform(choices: Sequence[Item], limit: int) -> list[int]:
    """The largest common share within the limit. Error diffusion: layer i gets ⌊(i+1)·share⌋ - ⌊i·share⌋ steps of its axis,
    so that rounding evens out over the layers."""

    def sizes(share: float) -> list[int]:
        carried: dict[str, float] = {}
        out = []
        for item in choices:
            kind = item.axis.rsplit(".", 1)[1]
            wanted = item.now * share + carried.get(kind, 0.0)
            size = max((s for s in item.sizes if s <= wanted + 1e-9), default=item.sizes[0])
            carried[kind] = min(wanted - size, item.now)
            out.append(size)
        return out

    low, high = 0.0, 1.0
    if _total(choices, sizes(1.0)) <= limit:
        return sizes(1.0)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(choices, sizes(middle)) <= limit else (low, middle)
    return sizes(low)


def by_threshold(choices: Sequence[Item], scores: Sequence[Tensor], limit: int) -> list[int]:
    """Sizes at the lowest threshold of standardized scores that fits: what scores above it stays, rounded to sizes."""
    standard = [
        ((s - s.mean()) / s.std().clamp_min(1e-300) if len(s) > 1 else s * 0).double().sort().values for s in scores
    ]
    steps = torch.cat(standard).unique().cpu()

    def sizes(threshold: Tensor) -> list[int]:
        counts = (len(s) - int(torch.searchsorted(s, threshold.to(s.device))) for s in standard)
        return [min(item.sizes, key=lambda size: (abs(size - count), size)) for item, count in zip(choices, counts)]

    low, high = 0, len(steps)  # at `high` everything that may go has gone
    top = steps[-1] + 1
    while low < high:
        middle = (low + high) // 2
        fits = _total(choices, sizes(steps[middle])) <= limit
        low, high = (low, middle) if fits else (middle + 1, high)
    return sizes(steps[low] if low < len(steps) else top)


def optimal(choices: Sequence[Item], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """Sizes that minimise the sum of `losses` (for each item one a size) with prices within the limit (`knapsack`)."""
    picked = knapsack([item.prices for item in choices], losses, limit)
    return [item.sizes[option] for item, option in zip(choices, picked)]


def _total(choices: Sequence[Item], sizes: Sequence[int]) -> int:
    return sum(item.prices[item.sizes.index(size)] for item, size in zip(choices, sizes))


def apply(config: Config, sizes: Mapping[str, int]) -> Config:
    """The config after the cuts `{axis: size}`."""
    layers = list(config.layers)
    for axis, size in sizes.items():
        _, i, name = axis.split(".")
        layers[int(i)] = resized(layers[int(i)], name, size)
    return dataclasses.replace(config, layers=tuple(layers))
