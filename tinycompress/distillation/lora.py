"""LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685).

    y = x Wᵀ + (α/r) · x Aᵀ Bᵀ,   W [N, K] frozen, A [r, K] normal, B [N, r] zero at the start

so training starts from the very model that was given, and ends with one dense weight again, W + (α/r) · B A.
Letters: N out_features, K in_features, r rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..graph.config import LINEARS
from ..graph.graph import Graph
from ..model.matmul import product
from .student import Network


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of the linears of every layer.

    Fields:
        rank: r, at least 1. Default 16.
        alpha: α, above 0: the update is multiplied by α/r. Default 32.
        targets: which linears get one, by the last part of their names. Default all of them.

    Errors: an `InputError` for numbers outside their range and for unknown targets.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEARS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError("LoRA.rank", self.rank, "a positive integer")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError("LoRA.alpha", self.alpha, "a positive number")
        if not self.targets or set(self.targets) - set(LINEARS):
            raise InputError("LoRA.targets", self.targets, f"one or more of {', '.join(LINEARS)}")


class LoRALinear(nn.Module):
    """x [..., K] → [..., N]; only A and B learn."""

    def __init__(self, base: nn.Linear, lora: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        N, K = base.weight.shape
        self.weight, self.bias, self.scale = base.weight, base.bias, lora.alpha / lora.rank
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        a = torch.randn(lora.rank, K, generator=generator, dtype=torch.float32) / math.sqrt(K)
        self.lora_a = nn.Parameter(a.to(base.weight))
        self.lora_b = nn.Parameter(base.weight.new_zeros(N, lora.rank))

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a) * self.scale, self.lora_b)


def add_lora(network: Network, graph: Graph, lora: LoRA, seed: int) -> None:
    """Freezes everything and gives each target linear its A and B, drawn by `seed` in model order."""
    network.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in network.transformer.linears().items():
        if name.rsplit(".", 1)[1] in lora.targets:
            assert isinstance(module, nn.Linear)
            network.transformer.replace_linear(name, LoRALinear(module, lora, generator))


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight [N, K] + scale · b [N, r] a [r, K], summed in float64, in the dtype of `weight`."""
    return (weight.double() + scale * (b.double() @ a.double())).to(weight.dtype)
