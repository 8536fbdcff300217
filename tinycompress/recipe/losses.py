"""Losses written as text, such as kl+0.5*ce."""

from __future__ import annotations

from typing import Any

from ..distillation.divergences import Loss
from ..distillation.hidden_losses import OF_RELATIONS, HiddenLoss
from ..distillation.schedule import Ramp
from ..errors import InputError


def parse_losses(text: str, temperature: float = 1.0) -> tuple[Any, ...]:
    """`kl`, `kl+ce`, `0.8*kl+0.2*ce` or `kl+1:0*ce` as losses."""
    return tuple(Loss(kind, weight, 1.0 if kind == "ce" else temperature) for kind, weight in weighted("--loss", text))


def parse_hidden(text: str | None, heads: int | None = None) -> tuple[Any, ...]:
    """`cosine`, `0.5*mse+relation` or none as losses of inner states; `heads` is for relations."""
    parts = weighted("--hidden", text) if text else []
    return tuple(HiddenLoss(kind, weight, heads=heads if kind in OF_RELATIONS else None) for kind, weight in parts)


def weighted(option: str, text: str) -> list[tuple[str, Any]]:
    """(kind, weight) of parts joined by +. A weight is a number before a *, or a ramp `start:end` or
    `start:end:shape`."""
    out: list[tuple[str, Any]] = []
    for part in text.split("+"):
        before, _, kind = part.rpartition("*")
        start, *ends = before.split(":") if before else ["1"]
        try:
            if ends:
                end, shape = ends if len(ends) == 2 else (*ends, "linear")
                out.append((kind.strip(), Ramp(float(start), float(end), shape)))
            else:
                out.append((kind.strip(), float(start)))
        except InputError:  # which is a ValueError
            raise
        except ValueError:
            accepted = "kinds joined by +, such as kl+0.5*ce (a weight and * before a kind); 1:0*ce goes from 1 to 0"
            raise InputError(option, repr(text), accepted) from None
    return out
