"""Products of a few tokens with the head, which is never copied whole: rows of it are converted or unpacked at a time.

A head is a dense matrix [V, D] of any floating dtype, or packed integers. Letters: c tokens of a chunk, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..graph.quant_tensor import QuantTensor
from ..model.matmul import PREFER_ONEDNN, outer, product

HEAD_ROWS = 4096  # rows of a head that are converted or unpacked at a time


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrices are multiplied in: `dtype`, but that of `x` for 16-bit states on a GPU, which has fast
    products for those."""
    return x.dtype if x.device.type != "cpu" and x.dtype.itemsize == 2 else dtype


def _head_parts(head: Tensor | QuantTensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head in `dtype`: whole, or `HEAD_ROWS` at a time where it must be converted or unpacked or is multiplied in
    parts."""
    if isinstance(head, Tensor) and head.dtype == dtype and not _in_parts(head):
        yield slice(None), head
        return
    for i in range(0, head.shape[0], HEAD_ROWS):
        rows = slice(i, i + HEAD_ROWS)
        if isinstance(head, Tensor):
            yield rows, head[rows].to(dtype)
        else:
            yield rows, head.rows(i, i + HEAD_ROWS).dequantize(dtype)


def head_logits(h: Tensor, head: Tensor | QuantTensor, out: Tensor) -> None:
    """out [c, V] = h headᵀ."""
    for rows, weight in _head_parts(head, h.dtype):
        if h.dtype == out.dtype and not _in_parts(h):
            torch.mm(h, weight.T, out=out[:, rows])
        else:
            out[:, rows] = product(h, weight, min_rows=1)


def through_head(gradient: Tensor, head: Tensor | QuantTensor, dtype: torch.dtype) -> Tensor:
    """gradient [c, V] · head [V, D]: [c, D], with products in `dtype`, summed in the dtype of the gradient."""
    total = gradient.new_zeros(len(gradient), head.shape[1])
    for rows, weight in _head_parts(head, dtype):
        part = gradient[:, rows].to(dtype)
        if _in_parts(part):
            total += product(part.contiguous(), weight.T.contiguous(), min_rows=1)
        else:
            total += part @ weight
    return total


def add_head_gradient(total: Tensor, gradient: Tensor, h: Tensor, keep: int) -> None:
    """total [V, D] = keep · total + gradientᵀ h, with keep 0 or 1; where it is 0, total may be uninitialised."""
    if h.dtype == total.dtype and not _in_parts(h):
        total.addmm_(gradient.T, h, beta=keep)
        return
    for rows, part in zip(total.split(HEAD_ROWS), gradient.split(HEAD_ROWS, 1)):
        update = outer(part.to(h.dtype), h)
        if keep:
            rows.add_(update)
        else:
            rows.copy_(update)


def _in_parts(x: Tensor) -> bool:
    """Whether products are made in parts: oneDNN has no output argument, so each part is copied to its place, and a
    part is small enough to stay in the processor's cache until then."""
    return PREFER_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu"
