"""What a pruned model may cost, as one number: parameters, bytes, or operations.

params=0.8     a share of the non-embedding parameters; above 1, a number of them
bytes=300MB    bytes of all weights in the graph's dtype, or as they will be stored; at most 1, a share of them
flops=0.8      a share of the operations that the linears of the layers take for one token
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..graph.config import Config, attention_shapes, ffn_shapes
from ..graph.quant_tensor import Grid, QuantSpec, packed_bytes

TARGET_KINDS = ("params", "bytes", "flops")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
PATTERN = re.compile(r"(params|bytes|flops)=(\d*\.?\d+(?:e\d+)?)(kb|mb|gb|)", re.IGNORECASE)

STORED = ("linears", "tables", "head")
ENTRY = 128  # bytes that name and place one tensor in the header of a file


@dataclass(frozen=True)
class Storage:
    """How weights will lie on disk, once a model that is pruned is quantized too.

    Fields:
        itemsize: bytes of a number that stays as it is.
        linears: the grid of the linears of the layers. Default None: they stay.
        tables: the grid of the embedding and the head. Default None: they stay.
        untied: whether the head, tied now, will have a table of its own. Default False.
    """

    itemsize: int
    linears: Grid | None = None
    tables: Grid | None = None
    untied: bool = False

    @staticmethod
    def of(stored: Mapping[str, str], itemsize: int, field: str = "stored") -> Storage:
        """From text: {"linears": "w4g64", "tables": "w8g64", "head": "own"}; an `InputError` names `field`."""
        if unknown := [key for key in stored if key not in STORED]:
            raise InputError(field, unknown, " | ".join(STORED))
        if stored.get("head", "own") != "own":
            raise InputError(field, f"head = {stored['head']!r}", '"own", for a table of its own, or no head')
        grids = {key: QuantSpec.parse(stored[key]).grid for key in ("linears", "tables") if key in stored}
        return Storage(itemsize, grids.get("linears"), grids.get("tables"), "head" in stored)

    def layers(self, config: Config) -> int:
        """Bytes of the layers, with what names their tensors in the file."""
        numbers = config.n_body_params - config.hidden_size  # the last norm stays
        linears = [
            shape
            for layer in config.layers
            for shape in (*attention_shapes(config, layer).values(), *ffn_shapes(config, layer).values())
            if math.prod(shape)
        ]
        if self.linears is None:
            return numbers * self.itemsize + ENTRY * len(linears)
        dense = numbers - sum(math.prod(shape) for shape in linears)
        return dense * self.itemsize + sum(self._packed(shape, self.linears) for shape in linears)

    def ends(self, config: Config) -> int:
        """Bytes of the embedding, the head and the last norm, and of the rest of the header."""
        table = (config.vocab_size, config.hidden_size)
        tables = 2 if self.untied or not config.tie_embeddings else 1
        each = self._packed(table, self.tables) if self.tables else math.prod(table) * self.itemsize
        rest = config.n_params - config.n_body_params - math.prod(table) * (1 if config.tie_embeddings else 2)
        names = ENTRY * (8 + 2 * config.n_layers)  # norms, tables and what the file says about itself
        return tables * each + (rest + config.hidden_size) * self.itemsize + names

    @staticmethod
    def _packed(shape: tuple[int, int], grid: Grid) -> int:
        if grid.group_size and shape[1] % grid.group_size:  # a width that no group divides is refused later
            grid = dataclasses.replace(grid, group_size=None)
        return packed_bytes(shape, grid) + ENTRY * (2 if grid.symmetric else 3)


Itemsize = int | Storage


@dataclass(frozen=True)
class BudgetTarget:
    """The limit of a model's cost.

    Fields:
        kind: what is counted, one of `TARGET_KINDS`.
        amount: up to 1 a share of what the model costs now; above 1 a number of parameters, bytes or operations.
    """

    kind: str
    amount: float

    @staticmethod
    def parse(text: str, field: str = "target") -> BudgetTarget:
        """The target that `text` says ("params=0.8"); an `InputError` names `field`."""
        match = PATTERN.fullmatch(text.strip())
        amount = float(match[2]) * UNITS[match[3].lower()] if match else 0.0
        if not match or amount <= 0 or (match[3] and match[1].lower() != "bytes"):
            accepted = "params=SHARE, flops=SHARE or bytes=SIZE, such as params=0.8 or bytes=300MB"
            raise InputError(field, repr(text), accepted)
        return BudgetTarget(match[1].lower(), amount)

    def price(self, config: Config, itemsize: Itemsize = 4) -> int:
        """What the layers of a config cost in this kind; `itemsize` is the bytes of one weight, or how all
        will be stored."""
        if self.kind == "flops":
            linears = (
                shape
                for layer in config.layers
                for shape in (*attention_shapes(config, layer).values(), *ffn_shapes(config, layer).values())
            )
            return 2 * sum(math.prod(shape) for shape in linears)
        if self.kind == "bytes" and isinstance(itemsize, Storage):
            return itemsize.layers(config)
        layers = config.n_body_params - config.hidden_size  # the last norm stays
        return layers * _plain(itemsize) if self.kind == "bytes" else layers

    def limit(self, config: Config, itemsize: Itemsize = 4) -> int:
        """What the layers may cost, out of the whole."""
        fixed = self._fixed(config, itemsize)
        allowed = self.amount * self._whole(config, itemsize) if self.amount <= 1 else self.amount
        return math.floor(allowed + 1e-6) - fixed

    def nearest(self, price: int, config: Config, itemsize: Itemsize = 4) -> str:
        """The target, in the form it was given in, at which the layers may cost `price`; rounded up."""
        fixed = self._fixed(config, itemsize)
        amount = price + fixed
        if self.amount > 1:
            return f"{self.kind}={amount}"
        share = math.ceil(1000 * amount / self._whole(config, itemsize)) / 1000
        return f"{self.kind}={share:g}"

    def _whole(self, config: Config, itemsize: Itemsize) -> int:
        """What the model costs now, of which a target may be a share."""
        now = _plain(itemsize)
        return self.price(config, now) + self._fixed(config, now)

    def _fixed(self, config: Config, itemsize: Itemsize) -> int:
        """What no cut of a layer saves: the last norm, and for bytes the embedding and the head too."""
        if self.kind == "flops":
            return 0
        if self.kind == "params":
            return config.hidden_size
        if isinstance(itemsize, Storage):
            return itemsize.ends(config)
        ends = config.n_params - config.n_body_params
        return (ends + config.hidden_size) * itemsize


def _plain(itemsize: Itemsize) -> int:
    """Bytes of one weight as it is now."""
    return itemsize.itemsize if isinstance(itemsize, Storage) else itemsize
