"""Linears: dense ones, multiplied as matmul.py chooses, and packed ones.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..graph.quant_tensor import QuantTensor
from .matmul import product


class QuantLinear(nn.Module):
    """x [..., K] → [..., N] with a packed weight, unpacked a block of rows at a time: never whole in memory."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.spec, self.shape = weight.grid, weight.shape
        self.packed: Tensor  # buffers, so that they move with the module
        self.scales: Tensor
        self.out_features, self.in_features = weight.shape
        for suffix, tensor in weight.tensors().items():
            self.register_buffer(suffix[1:], tensor)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> QuantTensor:
        return QuantTensor(self.packed, self.scales, getattr(self, "zeros", None), self.spec, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        rows = max(64, (1 << 20) // self.in_features)  # a million weights at a time
        weight = self.weight
        parts = [product(x, weight.rows(i, i + rows).dequantize(x.dtype)) for i in range(0, self.out_features, rows)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias


class Linear(nn.Linear):
    """nn.Linear, multiplied as matmul.py chooses."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def linear(weight: Tensor | QuantTensor, bias: Tensor | None) -> nn.Module:
    """The module that multiplies by a weight of the graph, sharing its memory."""
    if isinstance(weight, QuantTensor):
        return QuantLinear(weight, bias)
    module = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module
