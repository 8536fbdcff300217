"""What a pruned model may keep: one target for several axes together, or a budget an axis; checked on the config alone.

Shares of `keep` are of all units of an axis, counts are for each layer; "layers" and "hidden" are cut first and whole.
Errors name the fields of the pass Prune, which hands them through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..graph.config import Config
from ..graph.topology import axes
from .allocation import AXES, Item, Target, apply, check_budget, fixed_price, uniform
from .allocation import items as prunable


@dataclass(frozen=True)
class Budget:
    """`target` ("params=0.8", "bytes=300MB", "flops=0.8"), taken from `axes` together, or `keep`, a share or a count an axis.
    multiple_of: what widths are multiples of. floors: what every layer keeps of an axis, a share or a count. sublayers: whole
    sublayers may go. uneven_kv: KV heads may differ between layers."""

    target: str | None = None
    keep: Mapping[str, float] | None = None
    axes: tuple[str, ...] = ("ffn",)
    multiple_of: int = 64
    floors: Mapping[str, float] | None = None
    sublayers: bool = False
    uneven_kv: bool = False

    def __post_init__(self) -> None:
        if (self.target is None) == (self.keep is None):
            raise InputError(
                "Prune", "both target and keep" if self.target else "neither target nor keep", "one of the two"
            )
        if self.target is not None:
            Target.parse(self.target, "Prune.target")
        for name, known in (("keep", (*AXES, "layers", "hidden")), ("floors", AXES)):
            if unknown := [key for key in getattr(self, name) or {} if key not in known]:
                raise InputError(f"Prune.{name}", unknown, " | ".join(known))
        for key, value in (self.keep or {}).items():
            if not (0 <= value <= 1 if isinstance(value, float) else isinstance(value, int) and value >= 0):
                raise InputError(f"Prune.keep[{key!r}]", value, "a share (a float up to 1.0) or a count (an integer)")
        cuts = self.cuts
        if unknown := [name for name in cuts if name not in AXES]:
            raise InputError("Prune.axes", unknown, " | ".join(AXES))
        if {"heads", "kv_heads"} <= set(cuts):
            raise InputError(
                "Prune", "heads and kv_heads in one pass", "one of them a pass: each changes what the other may be"
            )
        if self.target and "kv_heads" in cuts and not self.uneven_kv:
            raise InputError(
                "Prune.axes",
                "kv_heads under one target",
                'keep={"kv_heads": n}, the same in every layer, or uneven_kv=True',
            )
        if not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise InputError("Prune.multiple_of", self.multiple_of, "a positive integer")

    @property
    def cuts(self) -> tuple[str, ...]:
        """The axes of layers that are cut."""
        return self.axes if self.keep is None else tuple(key for key in self.keep if key in AXES)

    def reshaped(self, config: Config) -> Config:
        """The config once whole layers and hidden channels are cut; of unequal layers, as if the last ones went."""
        config = dataclasses.replace(config, layers=config.layers[: self.kept("layers", config.n_layers, 1)])
        return dataclasses.replace(config, hidden_size=self.kept("hidden", config.hidden_size, self.multiple_of))

    def kept(self, key: str, size: int, multiple: int) -> int:
        """How many layers or hidden channels stay."""
        if not self.keep or key not in self.keep:
            return size
        count = _count(self.keep[key], size, multiple)
        if not 0 < count <= size:
            raise InputError(f"Prune.keep[{key!r}]", self.keep[key], f"1 … {size}, or a share of them")
        if count < size and count % multiple:
            raise InputError(f"Prune.keep[{key!r}]", self.keep[key], f"a multiple of {multiple} (Prune.multiple_of)")
        return count

    def items(self, config: Config, itemsize: int) -> list[tuple[list[Item], int]]:
        """The items that share a limit, and it, for every limit; an InputError for one that cannot be met."""
        if self.target is not None:
            target = Target.parse(self.target, "Prune.target")
            choices = prunable(config, self.axes, target, self.multiple_of, self.floors, self.sublayers, itemsize)
            fixed = fixed_price(config, choices, target, itemsize)
            least = sum(item.prices[0] for item in choices)
            limit = target.limit(config, itemsize) - fixed
            check_budget(choices, limit, self.target, target.nearest(fixed + least, config, itemsize))
            return [(choices, limit)]
        out = []
        for key in self.cuts:
            choices = [dataclasses.replace(item, prices=item.sizes) for item in self._items_of(key, config, itemsize)]
            wanted = (self.keep or {})[key]
            if isinstance(wanted, int) or (key == "kv_heads" and not self.uneven_kv):
                choices = [self._fixed(item, key, wanted) for item in choices]
                out.append((choices, sum(item.sizes[-1] for item in choices)))
                continue
            total = sum(item.now for item in choices)
            least = sum(item.sizes[0] for item in choices)
            if wanted * total < least:
                raise InputError(
                    f"Prune.keep[{key!r}]",
                    wanted,
                    f"{-(-1000 * least // max(total, 1)) / 1000} or more, by the floors and multiples",
                )
            out.append((choices, int(wanted * total + 1e-6)))
        return out

    def _items_of(self, key: str, config: Config, itemsize: int) -> list[Item]:
        found = prunable(config, (key,), Target("params", 1.0), self.multiple_of, self.floors, self.sublayers, itemsize)
        if not found:
            raise InputError(
                "Prune.keep",
                key,
                "an axis that the model has: " + ", ".join(sorted({a.rsplit(".", 1)[-1] for a in axes(config)})),
            )
        return found

    def _fixed(self, item: Item, key: str, wanted: float) -> Item:
        """The item with one size only, the count that was asked for."""
        size = min(_count(wanted, item.now, 1), item.now)
        if size not in item.sizes:
            raise InputError(
                f"Prune.keep[{key!r}]",
                wanted,
                f"for {item.axis} one of {list(item.sizes)}" + ("" if size else ", or sublayers=True"),
            )
        return dataclasses.replace(item, sizes=(size,), prices=(size,))

    def expected(self, config: Config, itemsize: int) -> Config:
        """A config that meets the budget: limits are shared out uniformly."""
        config = self.reshaped(config)
        sizes: dict[str, int] = {}
        for some, limit in self.items(config, itemsize):
            sizes |= {item.axis: size for item, size in zip(some, uniform(some, limit))}
        return apply(config, sizes)


def _count(wanted: float, size: int, multiple: int) -> int:
    """A share (float) of `size`, rounded to the multiple, or a count (int) as it is."""
    return wanted if isinstance(wanted, int) else round(wanted * size / multiple) * multiple
