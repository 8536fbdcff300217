"""What a pruned model may cost, as one number: parameters, bytes, or operations.

params=0.8     a share of the non-embedding parameters; above 1, a number of them
bytes=300MB    bytes of all weights in the graph's dtype; at most 1, a share of them
flops=0.8      a share of the operations that the linears of the layers take for one token
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from ..errors import InputError
from ..graph.config import Config, attention_shapes, ffn_shapes

TARGET_KINDS = ("params", "bytes", "flops")
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
PATTERN = re.compile(r"(params|bytes|flops)=(\d*\.?\d+(?:e\d+)?)(kb|mb|gb|)", re.IGNORECASE)


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

    def price(self, config: Config, itemsize: int = 4) -> int:
        """What the layers of a config cost in this kind; `itemsize` is the bytes of one weight."""
        if self.kind == "flops":
            linears = (
                shape
                for layer in config.layers
                for shape in (*attention_shapes(config, layer).values(), *ffn_shapes(config, layer).values())
            )
            return 2 * sum(math.prod(shape) for shape in linears)
        layers = config.n_body_params - config.hidden_size  # the last norm stays
        return layers * itemsize if self.kind == "bytes" else layers

    def limit(self, config: Config, itemsize: int = 4) -> int:
        """What the layers may cost, out of the whole."""
        fixed = self._fixed(config, itemsize)
        total = self.price(config, itemsize) + fixed
        allowed = self.amount * total if self.amount <= 1 else self.amount
        return math.floor(allowed + 1e-6) - fixed

    def nearest(self, price: int, config: Config, itemsize: int = 4) -> str:
        """The target, in the form it was given in, at which the layers may cost `price`; rounded up."""
        whole = dataclasses.replace(self, amount=1.0)
        fixed = self._fixed(config, itemsize)
        amount = price + fixed
        if self.amount > 1:
            return f"{self.kind}={amount}"
        share = math.ceil(1000 * amount / (whole.price(config, itemsize) + fixed)) / 1000
        return f"{self.kind}={share:g}"

    def _fixed(self, config: Config, itemsize: int) -> int:
        """What no cut of a layer saves: the last norm, and for bytes the embedding and the head too."""
        if self.kind == "flops":
            return 0
        if self.kind == "params":
            return config.hidden_size
        ends = config.n_params - config.n_body_params
        return (ends + config.hidden_size) * itemsize
