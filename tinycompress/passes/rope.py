"""RoPE context scaling: positions beyond the trained length L, by a factor s = context / L. No data, no weights change.

  linear   position interpolation (arXiv:2306.15595):   f / s
  ntk      NTK-aware: theta · s^(d/(d-2)), so that the lowest frequency is divided by s and the highest kept
  yarn     arXiv:2309.00071: f/s below one turn in L, f above 32 turns, a ramp between; cos, sin × (0.1·ln s + 1)

The equations live in `tinycompress.rope.Rope`; model and export read them there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import InputError
from ..graph import Graph
from ..rope import Rope

METHODS = ("linear", "ntk", "yarn")


@dataclass(frozen=True)
class ScaleRope:
    """Stretches the context to `context` positions by `method`."""

    context: int
    method: str = "yarn"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError("ScaleRope.method", repr(self.method), " | ".join(METHODS))

    def __call__(self, graph: Graph) -> Graph:
        config = graph.config
        if self.context < config.max_position:
            raise InputError("ScaleRope.context", self.context, f"at least the model's present context, {config.max_position}")
        rope = scale_rope(config.rope, self.context, config.max_position, config.head_dim, self.method)
        return graph.replace(config=dataclasses.replace(config, rope=rope, max_position=self.context), by=self)


def scale_rope(rope: Rope, context: int, trained: int, head_dim: int, method: str) -> Rope:
    """The Rope for `context` positions of a model trained on `trained`. Scaling again starts from the first length."""
    original = rope.original_max_position or trained
    factor = context / original
    if rope.type not in ("default", method) or (rope.type == "default" and original != trained):
        raise InputError(
            "rope", f"already scaled ({rope.type}, {original} → {trained})", "an unscaled model, or the same linear or yarn method again"
        )
    if method == "ntk":
        theta = rope.theta * factor ** (head_dim / (head_dim - 2))
        return Rope(theta=theta, original_max_position=original)
    return dataclasses.replace(rope, type=method, factor=factor, original_max_position=original)
