"""Weights of losses that change in the course of a run.

With the share t of the way from `begin` to `finish` (shares of the run), cut to 0 … 1,

    linear   w(t) = start + (end - start) · t
    cosine   w(t) = start + (end - start) · (1 - cos πt) / 2

A weight is a function of the step alone: a run that is killed and goes on sees the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InputError

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Ramp:
    """A weight that changes over a run.

    Fields:
        start: the weight until `begin`.
        end: the weight from `finish` on.
        shape: of the way between, one of SHAPES. Default "linear".
        begin: a share of the steps. Default 0.
        finish: a share of the steps. Default 1.

    Errors: an `InputError` for another shape and for numbers outside their range.
    """

    start: float
    end: float
    shape: str = "linear"
    begin: float = 0.0
    finish: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"Ramp.{name}", getattr(self, name), "a number of at least 0")
        if self.shape not in SHAPES:
            raise InputError("Ramp.shape", repr(self.shape), " | ".join(SHAPES))
        if not 0 <= self.begin < self.finish <= 1:
            raise InputError(
                "Ramp.begin and finish",
                f"{self.begin} and {self.finish}",
                "two shares of the steps, 0 ≤ begin < finish ≤ 1",
            )

    def at(self, share: float) -> float:
        """The weight when this share of the run is done."""
        t = min(1.0, max(0.0, (share - self.begin) / (self.finish - self.begin)))
        t = (1 - math.cos(math.pi * t)) / 2 if self.shape == "cosine" else t
        return self.start + (self.end - self.start) * t


def weight_at(weight: float | Ramp, step: int, total: int) -> float:
    """The weight of a step, from 0: the first sees a ramp's start, the last of `total` its end."""
    return weight.at(step / max(1, total - 1)) if isinstance(weight, Ramp) else weight


def check_weight(name: str, weight: float | Ramp) -> None:
    """A weight is a finite number of at least 0, or a ramp between two."""
    if not isinstance(weight, Ramp) and not (math.isfinite(weight) and weight >= 0):
        raise InputError(name, weight, "a number of at least 0, or a Ramp")
