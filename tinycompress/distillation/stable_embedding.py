"""A stable embedding: the table is trained behind a norm, which is folded away at the end.

8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861) puts a layer norm on the embedding's output. A row of
the output depends on its token alone, so such a norm is only another way to write the table, and it folds exactly:

    E'[t] = rms(E₀[t]) · E[t] / √(mean(E[t]²) + ε) · g

with E₀ the table at the start and g = 1, so that training starts from the very model that was given: a step turns a row
and scales a channel, but cannot blow up one row. All of it, and the optimizer's state, is 32-bit. A tied head uses E'
too. Letters: V vocabulary, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


class StableEmbedding(nn.Module):
    """Token ids [B, T] to rows of E' [B, T, D]. `table` and `gain` learn."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(weight.detach().clone())
        self.gain = nn.Parameter(torch.ones_like(weight[0]))
        self.length: Tensor
        self.register_buffer("length", weight.detach().square().mean(-1, keepdim=True).add(EPS).sqrt())  # (V, 1)

    @property
    def weight(self) -> Tensor:
        """E' [V, D], differentiable."""
        return stable_rows(self.table, self.length, self.gain)

    def forward(self, ids: Tensor) -> Tensor:
        return stable_rows(F.embedding(ids, self.table), F.embedding(ids, self.length), self.gain)


def stable_rows(rows: Tensor, length: Tensor, gain: Tensor) -> Tensor:
    """Rows [..., D] at their lengths [..., 1], scaled by channel with gain [D]."""
    return rows * (length * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)) * gain


class TiedHead(nn.Module):
    """A head that reads the embedding's table as it is now."""

    def __init__(self, embedding: StableEmbedding) -> None:
        super().__init__()
        self.owner = [embedding]  # in a list: not a submodule a second time

    @property
    def weight(self) -> Tensor:
        return self.owner[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
