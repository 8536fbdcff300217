"""What a pruned model may keep: one target for several axes together, or a budget for each axis; checked on the config.

Shares of `keep` are of all units of an axis, counts are for each layer; "layers" and "hidden" are cut first and whole.
Errors name the fields of the pass `Prune`, which hands them through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..graph.config import Config
from ..graph.topology import axes
from .allocation import PRUNABLE, Choice, check_budget, choices_of, fixed_price, resize, uniform
from .layout import LAYOUTS, alike, check_layout, within_layout
from .target import BudgetTarget, Itemsize


@dataclass(frozen=True)
class Limited:
    """Choices that share one limit.

    Fields:
        choices: what each of them may be, with its prices.
        limit: what the prices of the chosen sizes may add up to.
    """

    choices: list[Choice]
    limit: int


@dataclass(frozen=True)
class Budget:
    """What may be kept. The fields are those of `Prune`, which explains them; one of `target` and `keep` is given.

    Fields:
        target: a budget, such as "params=0.8". Default None.
        keep: a share or count of each axis by its kind. Default None.
        axes: kinds of axes that a target is taken from. Default ("ffn",).
        multiple_of: what kept FFN widths are multiples of. Default 64.
        floors: what every layer keeps of an axis by its kind, a share or a count above 1. Default None: nothing is
            held.
        sublayers: whether whole sublayers may go. Default False.
        uneven_kv: whether layers may end with different numbers of KV heads. Default False.
        layout: what the result must fit, one of `LAYOUTS`. Default None: each layer has its own widths.
    """

    target: str | None = None
    keep: Mapping[str, float] | None = None
    axes: tuple[str, ...] = ("ffn",)
    multiple_of: int = 64
    floors: Mapping[str, float] | None = None
    sublayers: bool = False
    uneven_kv: bool = False
    layout: str | None = None

    def __post_init__(self) -> None:
        if (self.target is None) == (self.keep is None):
            given = "both target and keep" if self.target else "neither target nor keep"
            raise InputError("Prune", given, "one of the two")
        if self.target is not None:
            BudgetTarget.parse(self.target, "Prune.target")
        for field, accepted in (("keep", (*PRUNABLE, "layers", "hidden")), ("floors", PRUNABLE)):
            if unknown := [key for key in getattr(self, field) or {} if key not in accepted]:
                raise InputError(f"Prune.{field}", unknown, " | ".join(accepted))
        for key, value in (self.keep or {}).items():
            if not _is_amount(value):
                raise InputError(f"Prune.keep[{key!r}]", value, "a share (a float up to 1.0) or a count (an integer)")
        self._check_axes()
        if not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise InputError("Prune.multiple_of", self.multiple_of, "a positive integer")
        if self.layout is not None and self.layout not in LAYOUTS:
            raise InputError("Prune.layout", repr(self.layout), " | ".join(LAYOUTS))

    def _check_axes(self) -> None:
        kinds = self.kinds
        if unknown := [kind for kind in kinds if kind not in PRUNABLE]:
            raise InputError("Prune.axes", unknown, " | ".join(PRUNABLE))
        if {"heads", "kv_heads"} <= set(kinds):
            accepted = "one of them a pass: each changes what the other may be"
            raise InputError("Prune", "heads and kv_heads in one pass", accepted)
        if self.target and "kv_heads" in kinds and not self.uneven_kv:
            accepted = 'keep={"kv_heads": n}, the same in every layer, or uneven_kv=True'
            raise InputError("Prune.axes", "kv_heads under one target", accepted)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of axes that single layers are cut along."""
        if self.keep is None:
            return self.axes
        return tuple(key for key in self.keep if key in PRUNABLE)

    def kept(self, key: str, size: int, multiple: int) -> int:
        """How many of `size` layers (key "layers") or hidden channels ("hidden") stay."""
        if not self.keep or key not in self.keep:
            return size
        count = _count(self.keep[key], size, multiple)
        if not 0 < count <= size:
            raise InputError(f"Prune.keep[{key!r}]", self.keep[key], f"1 … {size}, or a share of them")
        if count < size and count % multiple:
            raise InputError(f"Prune.keep[{key!r}]", self.keep[key], f"a multiple of {multiple} (Prune.multiple_of)")
        return count

    def reshaped(self, config: Config) -> Config:
        """The config once whole layers and hidden channels are cut; of unequal layers, as if the last ones went."""
        config = dataclasses.replace(config, layers=config.layers[: self.kept("layers", config.n_layers, 1)])
        hidden = self.kept("hidden", config.hidden_size, self.multiple_of)
        if hidden == config.hidden_size:
            return config
        norm_eps = config.norm_eps * config.hidden_size / hidden  # the mean of a norm runs over fewer channels
        return dataclasses.replace(config, hidden_size=hidden, norm_eps=norm_eps)

    def limits(self, config: Config, itemsize: Itemsize) -> list[Limited]:
        """The choices that share a limit, for every limit; an `InputError` for a limit that cannot be met."""
        check_layout(config, self.layout, self.kinds)
        if self.target is not None:
            return [self._limit_of_target(self.target, config, itemsize)]
        return [self._limit_of_axis(kind, config, itemsize) for kind in self.kinds]

    def _limit_of_target(self, text: str, config: Config, itemsize: Itemsize) -> Limited:
        target = BudgetTarget.parse(text, "Prune.target")
        choices = choices_of(config, self.axes, target, self.multiple_of, self.floors, self.sublayers, itemsize)
        choices = within_layout(choices, self.layout)
        fixed = fixed_price(config, choices, target, itemsize)
        least = sum(choice.prices[0] for choice in choices)
        limit = target.limit(config, itemsize) - fixed
        check_budget(choices, limit, text, target.nearest(fixed + least, config, itemsize))
        return Limited(alike(choices, limit) if self.layout == "uniform" else choices, limit)

    def _limit_of_axis(self, kind: str, config: Config, itemsize: Itemsize) -> Limited:
        """The limit of one entry of `keep`, counted in units of the axis."""
        choices = self._choices_in_units(kind, config, itemsize)
        wanted = (self.keep or {})[kind]
        if isinstance(wanted, int) or (kind == "kv_heads" and not self.uneven_kv):
            choices = [self._fixed(choice, wanted) for choice in choices]
            return Limited(choices, sum(choice.sizes[-1] for choice in choices))
        total = sum(choice.now for choice in choices)
        least = sum(choice.sizes[0] for choice in choices)
        if wanted * total < least:
            share = -(-1000 * least // max(total, 1)) / 1000  # rounded up
            raise InputError(f"Prune.keep[{kind!r}]", wanted, f"{share} or more, by the floors and multiples")
        limit = int(wanted * total + 1e-6)
        return Limited(alike(choices, limit) if self.layout == "uniform" else choices, limit)

    def _choices_in_units(self, kind: str, config: Config, itemsize: Itemsize) -> list[Choice]:
        """The choices on one kind of axis, where a unit costs one."""
        everything = BudgetTarget("params", 1.0)
        choices = choices_of(config, (kind,), everything, self.multiple_of, self.floors, self.sublayers, itemsize)
        if not choices:
            kinds = sorted({axis.kind for axis in axes(config).values()})
            raise InputError("Prune.keep", kind, "an axis that the model has: " + ", ".join(kinds))
        return [dataclasses.replace(choice, prices=choice.sizes) for choice in within_layout(choices, self.layout)]

    def _fixed(self, choice: Choice, wanted: float) -> Choice:
        """The choice with one size only, the count that was asked for."""
        size = min(_count(wanted, choice.now, 1), choice.now)
        if size not in choice.sizes:
            remedy = "" if size else ", or sublayers=True"
            accepted = f"for {choice.axis} one of {list(choice.sizes)}{remedy}"
            raise InputError(f"Prune.keep[{choice.kind!r}]", wanted, accepted)
        return dataclasses.replace(choice, sizes=(size,), prices=(size,))

    def plan(self, config: Config, itemsize: Itemsize) -> Config:
        """A config that meets the budget: limits are shared out uniformly."""
        config = self.reshaped(config)
        sizes: dict[str, int] = {}
        for limited in self.limits(config, itemsize):
            chosen = uniform(limited.choices, limited.limit)
            sizes |= {choice.axis: size for choice, size in zip(limited.choices, chosen)}
        return resize(config, sizes)


def _is_amount(value: float) -> bool:
    """Whether a value of `keep` is a share or a count."""
    if isinstance(value, float):
        return 0 <= value <= 1
    return isinstance(value, int) and value >= 0


def _count(wanted: float, size: int, multiple: int) -> int:
    """A share (float) of `size`, rounded to the multiple, or a count (int) as it is."""
    return wanted if isinstance(wanted, int) else round(wanted * size / multiple) * multiple
