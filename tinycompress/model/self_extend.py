"""Self-Extend: a longer context at inference, with nothing changed in the model.

LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning (arXiv:2401.01325). Keys nearer than the window w keep
their positions; farther ones share a position by groups of G, so that no distance is new to the model:

  distance(i, j) = i - j                                    if i - j < w
                   (⌊i / G⌋ + w - ⌊w / G⌋) - ⌊j / G⌋         otherwise

With L trained positions the reach is (L - w)·G + w. Within the window, and for G = 1, it is ordinary attention. It is
an option of the forward, not of the weights: `graph.module().extend(SelfExtend(group=4, window=256))`. No export has
it.

Letters: B batch, T new positions, S all positions, H heads, K KV heads, G group, w window, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

ROWS = 128  # queries whose scores [H, ROWS, S] exist at one time
Turn = Callable[[Tensor, Tensor], Tensor]  # x [B, H, T, d] and positions [T] to x turned


@dataclass(frozen=True)
class SelfExtend:
    """Positions merged by groups beyond a window of those that are left alone.

    Fields:
        group: how many positions share one, G.
        window: how many of the nearest are left alone, w.
    """

    group: int = 4
    window: int = 256

    def __post_init__(self) -> None:
        for name in ("group", "window"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"SelfExtend.{name}", value, "a positive integer")

    def context(self, trained: int) -> int:
        """How many positions a model trained on `trained` then reaches."""
        if self.window >= trained:
            raise InputError("SelfExtend.window", self.window, f"less than the trained length, {trained}")
        return (trained - self.window) * self.group + self.window

    def attend(self, q: Tensor, k: Tensor, v: Tensor, turn: Turn) -> Tensor:
        """q [B, H, T, d] and k, v [B, K, S, d], all un-rotated, to the heads' outputs [B, H, T, d]; query t stands at
        S - T + t. Memory is that of ROWS rows of scores."""
        T, S, repeat = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        place = torch.arange(S, device=q.device)
        near, far = turn(k, place), turn(k, place // self.group)
        near, far, v = (x.repeat_interleave(repeat, 1) for x in (near, far, v))  # (B, H, S, d)
        out = []
        for rows, at in zip(q.split(ROWS, 2), place[S - T :].split(ROWS)):
            shifted = at // self.group + self.window - self.window // self.group
            last = int(at[-1]) + 1
            distance = at[:, None] - place[None, :last]
            scores = torch.where(
                distance < self.window,
                turn(rows, at) @ near[:, :, :last].transpose(-1, -2),
                turn(rows, shifted) @ far[:, :, :last].transpose(-1, -2),
            )
            scores = (scores * q.shape[-1] ** -0.5).masked_fill(distance < 0, -torch.inf)
            out.append(scores.softmax(-1) @ v[:, :, :last])
        return torch.cat(out, 2)
