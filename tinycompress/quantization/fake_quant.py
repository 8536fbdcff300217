"""Fake quantization: the forward sees the weight that the packed model will have, the backward passes through.

    ŵ = (clamp(round(w / s) + z, 0, 2^bits - 1) - z) · s        the numbers of quantize.QuantTensor, in the same operations
    ∂L/∂w = ∂L/∂ŵ inside the range, 0 where the clamp holds      (straight-through, arXiv:1308.3432)
    ∂L/∂s = Σ_group ∂L/∂ŵ · (q - z - [inside] · w / s)           (learned step size, LSQ, arXiv:1902.08153)

The grid is found again for every forward ("refind", what RTN finds for the weight at hand) or starts from the best grid
of the given weight, s₀, and learns s = s₀ (1 + δ) ("learn": a step of δ is a relative change, as AdamW's learning rate
is meant). torchao's fake-quantizers are not used: their symmetric scale is
max / (2^bits - 1) · 2 and they multiply by the reciprocal, which is not this grid, so that what was trained would not be
what is packed.

A weight that is packed already keeps its integers, and only its scales learn, s = s₀ (1 + δ) (`PackedLinear`; the second,
end-to-end phase of EfficientQAT, arXiv:2407.11062): ∂L/∂s = Σ_group ∂L/∂ŵ · (q - z).
Letters: N out_features, K in_features, G groups.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..model.matmul import product
from .grid_search import find_grid, round_to_grid
from .lpbq import is_lpbq

GRIDS = ("refind", "learn")


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
        """weight [N, K] on its grid, scales and zeros [N, G]."""
        ctx.save_for_backward(weight, scales, *(() if zeros is None else (zeros,)))
        ctx.spec = spec
        q = round_to_grid(weight, scales, zeros, spec).reshape(*scales.shape, -1).to(weight.dtype)
        zero: Any = spec.zero if zeros is None else zeros.to(weight.dtype)[..., None]
        return q.sub_(zero).mul_(scales[..., None]).reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        weight, scales, *rest = ctx.saved_tensors
        spec, grad = ctx.spec, grads[0].reshape(*scales.shape, -1)
        zero = rest[0].to(weight.dtype)[..., None] if rest else float(spec.zero)
        u = weight.reshape(grad.shape) / scales[..., None]
        q = u.add(zero).round_() if spec.float_zero else u.round().add_(zero)
        inside = (q >= 0) & (q <= 2**spec.bits - 1)
        to_scales = None
        if ctx.needs_input_grad[1]:
            steps = q.clamp_(0, 2**spec.bits - 1).sub_(zero).sub_(u.mul_(inside))
            to_scales = (grad * steps).sum(-1)
        return (grad * inside).reshape(weight.shape), to_scales, None, None


def fake_quantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """weight float32 [N, K] at its grid's points, differentiable in weight and scales [N, G]."""
    return _FakeQuantize.apply(weight, scales, zeros, spec)


class FakeQuantLinear(nn.Module):
    """x [..., K] → [..., N] with the weight that `packed` will hold. `scales_delta` [N, G] is a parameter if the grid learns."""

    def __init__(self, name: str, base: nn.Linear, spec: QuantSpec, learn: bool) -> None:
        super().__init__()
        self.name, self.spec, self.learn = name, spec, learn
        self.weight, self.bias = base.weight, base.bias
        zeros: Tensor | None = None
        if learn:
            start = dataclasses.replace(spec, search="mse") if spec.search in ("auto", "weighted") else spec
            scales, zeros = find_grid(name, base.weight.detach(), start)
            self.start: Tensor
            self.register_buffer("start", scales)
            self.scales_delta = nn.Parameter(torch.zeros_like(scales))
        self.zeros: Tensor | None
        self.register_buffer("zeros", zeros)

    def grid(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.learn:
            return learned_scales(self.start, self.scales_delta), self.zeros
        with torch.no_grad():
            return find_grid(self.name, weight.detach(), self.spec)

    def forward(self, x: Tensor) -> Tensor:
        scales, zeros = self.grid(self.weight)
        return product(x, fake_quantize(self.weight, scales, zeros, self.spec), self.bias)


class _Unpack(torch.autograd.Function):
    """packed and scales [N, G] to the weight [N, K]. Keeps the packed integers for the backward pass, not unpacked ones."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        ctx.weight = QuantTensor(packed, scales.detach(), zeros, spec, shape)
        return ctx.weight.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None, None]:
        weight: QuantTensor = ctx.weight
        q = weight.ints().view(*weight.scales.shape, -1).to(grads[0].dtype)
        zero: Any = weight.grid.zero if weight.zeros is None else weight.zeros.to(q.dtype)[..., None]
        return None, q.sub_(zero).mul_(grads[0].view(q.shape)).sum(-1), None, None, None


class PackedLinear(nn.Module):
    """x [..., K] → [..., N] with the integers of `weight`; `scales_delta` [N, G] learns, or [N, 1] where the scales of a row have
    HTP's form (lpbq.py), which keeps it."""

    def __init__(self, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.shape, self.bias = weight.grid, weight.shape, bias
        self.integers: Tensor
        self.start: Tensor
        self.zeros: Tensor | None
        self.register_buffer("integers", weight.packed)
        self.register_buffer("start", weight.scales.to(dtype))
        self.register_buffer(
            "zeros", weight.zeros.to(dtype) if weight.zeros is not None and weight.grid.float_zero else weight.zeros
        )
        self.scales_delta = nn.Parameter(torch.zeros_like(self.start[:, :1] if is_lpbq(weight) else self.start))

    def forward(self, x: Tensor) -> Tensor:
        scales = learned_scales(self.start, self.scales_delta)
        return product(x, _Unpack.apply(self.integers, scales, self.zeros, self.spec, self.shape), self.bias)


def learned_scales(start: Tensor, delta: Tensor) -> Tensor:
    """s₀ (1 + δ): one function, so that packing computes what the forward did."""
    return start * (1 + delta)


def packed(name: str, weight: Tensor, spec: QuantSpec, scales: Tensor | None, zeros: Tensor | None) -> QuantTensor:
    """The weight that the forward saw, packed: on the learned grid, or on the one found again for it."""
    if scales is None:
        scales, zeros = find_grid(name, weight, spec)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
