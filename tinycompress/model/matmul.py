"""Matrix products on the CPU, by whichever library uses the processor's widest vectors.

torch multiplies float32 matrices with MKL, which on AMD processors with AVX-512 computes with vectors of half that
width; oneDNN, which torch carries as well, uses the whole. On such a processor products of many rows go there (about
twice the speed, benchmarks/forward.py); everywhere else, for other dtypes and for few rows, torch's own are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_TRAINED = 256  # rows from which a product with gradients goes to oneDNN
MIN_ROWS = 2048  # below it, logits stay bit for bit what torch's own products give, and so what transformers computes


def _prefer_onednn() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


PREFER_ONEDNN = _prefer_onednn()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, min_rows: int = MIN_ROWS) -> Tensor:
    """x [..., K] · weight [N, K]ᵀ + bias [N], as torch.nn.functional.linear; oneDNN from `min_rows` rows of x on, or
    from MIN_TRAINED where gradients are wanted."""
    if not (
        PREFER_ONEDNN and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    ) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if x.numel() < x.shape[-1] * (MIN_TRAINED if trained else min_rows):
        return F.linear(x, weight, bias)
    if not trained:
        return _onednn(x, weight, bias)
    rows: Tensor = _Product.apply(x.flatten(0, -2), weight, bias)
    return rows.view(
        *x.shape[:-1], len(weight)
    )  # outside: what a Function returns as a view must not be written to, as residuals are


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ_n a_n b_nᵀ of a [n, K] and b [n, J]: [K, J]."""
    return product(a.T.contiguous(), b.T.contiguous(), min_rows=1)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), rows = ctx.saved_tensors, grads[0]
        to_x = _onednn(rows.contiguous(), weight.T.contiguous()) if ctx.needs_input_grad[0] else None
        to_weight = _onednn(rows.T.contiguous(), x.T.contiguous()) if ctx.needs_input_grad[1] else None
        return to_x, to_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
