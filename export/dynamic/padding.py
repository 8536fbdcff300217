"""Batches padded on the left, in graphs whose attention counts a row's keys from its first slot.

GroupQueryAttention takes a length a row and reads that many slots from the first on: padding is free behind a prompt
and wrong before it. So the tokens of a left-padded row move to the front as they come in, and what the head reads of
them moves back:

  input_ids ─ GatherElements t + p ─ tokens first, padding last ─ the layers ─ GatherND t - p ─ head

  p [B] = zeros of the mask before the first 1, of the new positions t = 0 … T - 1

Where nothing is padded on the left, p = 0 and both are copies: of T ids and of T rows, a few microseconds a step. The
cache is then that of a right-padded batch, and so is every step behind it.

Letters: B batch, T new positions, S all positions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .draw import Draw

if TYPE_CHECKING:
    import onnx_ir as ir

AT = "left_padding"


@dataclass(frozen=True)
class Moved:
    """Input ids with the tokens of every row first, and how to undo that.

    Fields:
        ids: int64 [B, T].
        back: int64 [B, T, 1], for each position the row of the moved ones that belongs to it.
    """

    ids: ir.Value
    back: ir.Value


def tokens_first(draw: Draw, ids: ir.Value, mask: ir.Value) -> Moved:
    """From input_ids int64 [B, T] and attention_mask int64 [B, S]."""
    zero, one = (draw.constant(f"{AT}.{n}", torch.tensor(n)) for n in (0, 1))
    last_axis, second_axis = (draw.constant(f"{AT}.axis_{n}", torch.tensor([n])) for n in (-1, 1))
    end = draw.constant(f"{AT}.end", torch.tensor([torch.iinfo(torch.int64).max]))
    length = draw.op(f"{AT}.length", "Shape", [ids], start=1, end=2)  # (1)
    new = draw.op(f"{AT}.new", "Slice", [mask, draw.op(f"{AT}.start", "Neg", [length]), end, second_axis])  # (B, T)
    padded = draw.op(AT, "ArgMax", [new], axis=1, keepdims=1)  # (B, 1): the first 1
    stop = draw.op(f"{AT}.length", "Squeeze", [length])
    places = draw.op(AT, "Range", [zero, stop, one])  # (T)
    last = draw.op(f"{AT}.last", "Sub", [length, one])
    forward = draw.op(f"{AT}.forward", "Min", [draw.op(f"{AT}.forward", "Add", [places, padded]), last])
    back = draw.op(f"{AT}.back", "Max", [draw.op(f"{AT}.back", "Sub", [places, padded]), zero])
    return Moved(
        draw.op(f"{AT}.ids", "GatherElements", [ids, forward], axis=1),
        draw.op(f"{AT}.back", "Unsqueeze", [back, last_axis]),
    )


def put_back(draw: Draw, x: ir.Value, moved: Moved) -> ir.Value:
    """x [B, T, D] of the moved tokens to where they were."""
    return draw.op(f"{AT}.rows", "GatherND", [x, moved.back], batch_dims=1)
