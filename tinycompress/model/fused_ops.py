"""What a model computes beside its matrix products: rows of the embedding, rotation, RMSNorm and SwiGLU.

Where gradients are wanted, each is one step of autograd with its gradient written out. Left to autograd, a step of
training on the CPU reads and writes its activations about twice as often, and keeps more of them. Without gradients
they work in place. Letters: B batch, V vocabulary, H heads, T positions, d head_dim, D hidden, F ffn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu_memory


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D] for ids [B, T]: [B, T, D]."""
    on_cpu = weight.device.type == "cpu"  # elsewhere torch's own gradient is faster, and deterministic
    return _Embed.apply(ids, weight) if on_cpu and torch.is_grad_enabled() else F.embedding(ids, weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, d] by the half-split rule: pairs (i, i + d/2); cos, sin [T, d/2]."""
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() and x.requires_grad else _turned(x, cos, sin)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv:1910.07467): x / √(mean(x²) + ε) · w over x [..., D], the mean in float32 or better."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    wide = _wide(x)
    normed = wide * _inverse_rms(wide, eps)
    return normed.mul_(weight) if wide is x else weight * normed.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of two [..., F] (arXiv:2002.05202). Without gradients `gate` is overwritten."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)  # keeps x's memory order
    (a, b), (first, second) = x.chunk(2, -1), out.chunk(2, -1)
    # No fused multiply-add: rounded twice, as transformers does it, logits agree to the last bit.
    torch.mul(a, cos, out=first).sub_(b * sin)
    torch.mul(b, cos, out=second).add_(a * sin)
    return out


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.like = tuple(weight.shape), weight.dtype, weight.device
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        return None, cpu_memory.zeros(*ctx.like).index_add_(0, ids.flatten(), grad.flatten(0, -2))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turned(x.to(torch.promote_types(x.dtype, cos.dtype)), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin).to(ctx.dtype), None, None


class _RMSNorm(torch.autograd.Function):
    """With r = 1/√(mean(x²) + ε): ∂x = r (g·w - x r² mean(g·w·x)), ∂w = Σ g·x·r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight) if weight.dtype == x.dtype else normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        g, wide, w = grad.to(r.dtype), x.to(r.dtype), weight.to(r.dtype)
        products = g * wide
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (r.reshape(1, -1) @ products.reshape(-1, products.shape[-1]))[0].to(weight.dtype)
        mean = (products @ w)[..., None] / x.shape[-1]
        return (g * w).mul_(r).addcmul_(wide, mean * r**3, value=-1).to(x.dtype), to_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
