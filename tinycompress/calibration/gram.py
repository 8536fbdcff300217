"""Sums of outer products over the inputs of a feed: what quantizers and pruners know of the calibration text.

Letters: K width of the feed, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.topology import Feed
from ..model.matmul import outer, product
from .walk import Inputs


def cross_gram(inputs: Inputs) -> Tensor:
    """Σ x xᵣᵀ transposed: float64 [K, K] with the reference's inputs as rows and the present ones as columns."""
    if inputs.reference is None:
        raise InputError("inputs", "no reference", "walk(..., reference=True)")
    total: Tensor | None = None
    for x, r in zip(inputs, inputs.reference):
        part = outer(r.flatten(0, -2).float(), x.flatten(0, -2).float()).double()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def stream_gram(inputs: Inputs, weight: Tensor) -> Tensor:
    """Σ (W xᵣ + hᵣ - h) xᵀ, float64 [D, K]: by the present inputs x, what the reference's residual stream is behind a
    linear W [D, K] that writes to it, less the present stream h in front of it."""
    if inputs.reference is None:
        raise InputError("inputs", "no reference", "walk(..., reference=True)")
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for x, r, h, hr in zip(inputs, inputs.reference, inputs.residual, inputs.reference.residual):
        y = product(r, weight.to(r.dtype)).add_(hr).sub_(h)
        total += outer(y.flatten(0, 1).float(), x.flatten(0, 1).float())
    return total


def output_gap(inputs: Inputs, weight: Tensor, stream: bool = False) -> Tensor:
    """Σ (W (xᵣ - x) + [hᵣ - h]) xᵀ, float64 [D, K]: by the present inputs x, what the output of a linear W [D, K] that
    writes the residual stream should gain to be the reference's; with `stream` what the stream h in front of it should
    gain too. For D below K it takes less time and memory than `cross_gram`."""
    if inputs.reference is None:
        raise InputError("inputs", "no reference", "walk(..., reference=True)")
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for batch, (x, r) in enumerate(zip(inputs, inputs.reference)):
        y = product(r - x, weight.to(r.dtype))
        if stream:
            y.add_(inputs.reference.residual[batch]).sub_(inputs.residual[batch])
        total += outer(y.flatten(0, 1).float(), x.flatten(0, 1).float())
    return total


def gram(feed: Feed, inputs: Inputs) -> Tensor:
    """Σ x xᵀ over all positions, float64 [K, K]; an InputError naming the readers if an activation is not finite.

    Only the lower block triangle is multiplied out: a symmetric product needs little more than half the work.
    """
    total: Tensor | None = None
    step = 0
    for batch in inputs:
        x = batch.flatten(0, -2)  # (b·T, K)
        if not x.is_floating_point() or x.dtype.itemsize < 4:
            x = x.float()
        K = x.shape[1]
        if total is None:
            total = torch.zeros(K, K, dtype=torch.float64, device=x.device)
            step = max(128, -(-K // 8))
        columns = x.T.contiguous()
        for i in range(0, K, step):
            total[i:, i : i + step] += product(columns[i:], columns[i : i + step], min_rows=1)
    assert total is not None
    diagonal = total.diagonal().clone()
    if not torch.isfinite(diagonal).all():
        bad = int((~torch.isfinite(diagonal)).sum())
        raise InputError(
            f"inputs of {', '.join(feed.readers)}",
            f"NaN or infinite values in {bad} channels",
            "finite activations (look at the weights before it)",
        )
    for i in range(0, len(total), step):  # in its place: of a wide FFN the matrix takes hundreds of megabytes
        j = i + step
        total[i:j, j:] = total[j:, i:j].T
        square = torch.tril(total[i:j, i:j])
        total[i:j, i:j] = square + torch.tril(square, -1).T
    return total
