"""What a cache keeps of a teacher's distribution, and how that becomes bytes: a few ids a token, 3 or 4 bytes each.

Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs (arXiv:2503.16870): N draws from the teacher, with
t̂ = counts / N, so that E[t̂] = t, whatever the vocabulary. Beside it, the k largest probabilities as they are.
Letters: r positions, V vocabulary, n draws (or k), e entries of all r positions together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

CACHE_KINDS = ("sample", "topk")
SHARE_SEEN = 0.36  # entries an estimate of disk space counts for each draw: text has about 0.24 (12 ids of 50 draws)


@dataclass(frozen=True)
class Form:
    """What is kept of a teacher's distribution of a token.

    Fields:
        kind: "sample" (draws) or "topk" (the largest probabilities).
        n: how many draws, or how many ids: from 1 to 255.
        vocab_size: how many ids there are to choose from.

    An `InputError` names an unknown kind or an `n` out of its range.
    """

    kind: str
    n: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.kind not in CACHE_KINDS:
            raise InputError("kind of cache", repr(self.kind), " | ".join(CACHE_KINDS))
        most = 255 if self.kind == "sample" else min(255, self.vocab_size)
        if not 1 <= self.n <= most:
            raise InputError("draws" if self.kind == "sample" else "k", self.n, f"1 … {most}")

    @property
    def id_bits(self) -> int:
        return (self.vocab_size - 1).bit_length()

    @property
    def width(self) -> int:
        """Bytes of an entry."""
        if self.kind == "sample":
            return 3 if self.id_bits + self.n.bit_length() <= 24 else 4
        return (3 if self.id_bits <= 24 else 4) + 2

    def expected_bytes(self, tokens: int) -> int:
        """Disk space to ask for before it is known how many different ids are drawn."""
        return int(tokens * (1 + self.width * (self.n if self.kind == "topk" else max(1.0, SHARE_SEEN * self.n))))

    def encode(self, logits: Tensor, uniforms: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Logits [r, V] to the counts uint8 [r] and the entries uint8 [e, width]; `uniforms` [r, n] are the draws."""
        if self.kind == "topk":
            top = logits.softmax(-1).topk(self.n, -1)
            places = _bytes(top.indices.flatten(), self.width - 2)
            values = top.values.flatten().cpu().numpy().astype("<f2").view(np.uint8).reshape(-1, 2)
            return np.full(len(logits), self.n, np.uint8), np.concatenate((places, values), 1)
        ids, counts, per_row = count(draw(logits, uniforms.to(logits.device)))
        return per_row.cpu().numpy().astype(np.uint8), _bytes(ids | counts << self.id_bits, self.width)

    def decode(self, counts: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse: ids int64 [r, k] and probabilities float32 [r, k], padded with probability 0."""
        per_row = counts.astype(np.int64)
        row = np.repeat(np.arange(len(per_row)), per_row)
        column = np.arange(len(row)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        ids = np.zeros((len(per_row), int(per_row.max())), np.int64)
        probs = np.zeros(ids.shape, np.float32)
        if self.kind == "topk":
            ids[row, column] = _ints(entries[:, :-2])
            probs[row, column] = np.ascontiguousarray(entries[:, -2:]).view("<f2")[:, 0]
        else:
            values = _ints(entries)
            ids[row, column] = values & ((1 << self.id_bits) - 1)
            probs[row, column] = (values >> self.id_bits) / self.n
        return ids, probs


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sorted ids [r, n] drawn from softmax(logits [r, V]) by inverting its cumulative sum at float64 `uniforms` [r,
    n]."""
    cumulative = logits.float().softmax(-1).double().cumsum(-1)
    ids = torch.searchsorted(cumulative, uniforms.sort(-1).values * cumulative[:, -1:], right=True)
    return ids.clamp_max(logits.shape[-1] - 1)


def count(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted ids [r, n] to the different ones of each row, one row after the other, [e], how often each is there, [e],
    and how many there are of each row, [r]."""
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at = first.flatten().nonzero()[:, 0]
    return ids.flatten()[at], torch.diff(at, append=at.new_tensor([ids.numel()])), first.sum(-1)


def _bytes(values: Tensor, width: int) -> np.ndarray:
    """Integers [e] to their low bytes [e, width]."""
    return values.cpu().numpy().astype("<u4").view(np.uint8).reshape(-1, 4)[:, :width]


def _ints(data: np.ndarray) -> np.ndarray:
    """The inverse: uint8 [e, width] to int64 [e]."""
    out = np.zeros(len(data), np.int64)
    for i in range(data.shape[1]):
        out |= data[:, i].astype(np.int64) << (8 * i)
    return out
