"""Block tuning of rounding and ranges: AutoRound / SignRound (arXiv:2309.05516).

For a block that is already quantized (by RTN, GPTQ, …), what reaches it and what it should make of that. Signed gradient
descent moves, for every packed linear of the block, a latent u [N, K] and the scales s [N, G]:

    ŵ = (clamp(round(u), 0, 2^bits - 1) - z) · s            s starts at the given scales
    v ← v - η · sign(∂L/∂v)                                 η falls linearly to 0; round is passed straight through

The target lies between what the float block makes of the same inputs and what the float graph has there, `propagate` of
the way: the whole way, as in the paper, a block answers for all that the blocks before it have lost.

Of scales made for HTP (lpbq.py) only the row's float moves, so they keep HTP's form.

u starts where the float weight lies within the step of the given integer, so those that were rounded farthest move first, as in
the paper; started in the middle, all are as ready as each other, and the block's error rises instead of falling. An integer that
GPTQ put elsewhere, to make good for others, starts at the edge of its step and falls back at once: behind GPTQ, let scales and
norms move alone (`rate=0`). The norms' weights of the block, which stay float in every export, may move along (`norms`).
The loss of a token is its squared error over its squared norm: the next norm divides by the latter, so the few tokens with
massive activations do not drown the others.
The block as given is kept where tuning does not lower the loss of the whole calibration text.
Letters: N out_features, K in_features, G groups, W windows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graph.config import LINEARS, layer_prefix
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantTensor
from ..model.matmul import product
from ..model.transformer import Block, Norm, RotaryTables
from .lpbq import is_lpbq


@dataclass(frozen=True)
class BlockTuning:
    """`steps` a block, `batch` windows a step; `propagate` from 0, the float block's outputs on the same inputs, to 1, the float
    graph's own; `rate` is the first step of u in grid steps (0: no integer moves), `scale_rate` that of scales and norms, relative to
    their size."""

    steps: int = 200
    batch: int = 2
    rate: float = 0.005
    scale_rate: float = 0.002
    norms: bool = True
    propagate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.propagate <= 1:
            raise InputError(
                "BlockTuning.propagate",
                self.propagate,
                "a number from 0 (the same inputs) to 1 (the float graph's own)",
            )
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"BlockTuning.{name}", getattr(self, name), "a positive number")
        if not 0 <= self.rate <= 1:
            raise InputError("BlockTuning.rate", self.rate, "a part of a grid step, at least 0 and at most 1")
        if not 0 <= self.scale_rate < 0.1:
            raise InputError("BlockTuning.scale_rate", self.scale_rate, "a relative step of at least 0 and below 0.1")

    def tuned(
        self,
        graph: Graph,
        reference: Graph,
        layer: int,
        inputs: list[Tensor],
        targets: list[Tensor],
        tables: RotaryTables,
    ) -> dict[str, Weight]:
        """The parameters that replace block `layer` of a quantized graph; none where tuning does not help.

        inputs: batches [b, T, D] of what reaches it; targets: what the block of the float `reference` makes of its own inputs."""
        block = TunableBlock(graph, reference, layer, inputs[0], self.norms)
        if not block.rounded:
            return {}
        if self.propagate < 1:
            whole = Block(reference, layer, inputs[0].device, inputs[0].dtype)
            targets = [whole(x.clone(), tables).lerp_(y, self.propagate) for x, y in zip(inputs, targets)]
        before = sum(block.error(x, y, tables).sum().item() for x, y in zip(inputs, targets))
        generator = torch.Generator().manual_seed(self.seed * graph.config.n_layers + layer)
        tune(
            block,
            torch.cat(inputs),
            torch.cat(targets),
            tables,
            self.steps,
            self.batch,
            self.rate,
            self.scale_rate,
            generator,
        )
        after = sum(block.error(x, y, tables).sum().item() for x, y in zip(inputs, targets))
        return block.weights() if after < before else {}


class _Round(torch.autograd.Function):
    """u [N, G, g] in grid steps, scales [N, G], zeros [N, G, 1] or a number, to the weight [N, K]."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scales: Tensor, zeros: Tensor | float, top: int) -> Tensor:
        q = u.round().clamp_(0, top)
        ctx.save_for_backward(u, q, scales)
        ctx.zeros = zeros
        return (q - zeros).mul_(scales[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, q, scales = ctx.saved_tensors
        grad = grads[0].view_as(u)
        inside = (u - q).abs_() <= 0.5
        to_scales = (grad * (q - ctx.zeros)).sum(-1)
        return (grad * inside).mul_(scales[..., None]), to_scales, None, None


class RoundedLinear(nn.Module):
    """A packed linear with its latent u [N, G, g] and the relative change of its scales, delta [N, G] or [N, 1], as parameters.
    `near` [N, K], the weight before rounding, says where in its step each integer starts (None: in the middle)."""

    def __init__(
        self, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype, near: Tensor | None = None
    ) -> None:
        super().__init__()
        self.spec, self.shape, self.bias = weight.grid, weight.shape, bias
        self.zeros: Tensor | float = (
            float(weight.grid.zero) if weight.zeros is None else weight.zeros.to(dtype)[..., None]
        )
        self.start = weight.scales.to(dtype)
        u = weight.ints().view(*self.start.shape, -1).to(dtype)
        if near is not None:
            step = self.start[..., None]
            at = torch.where(step == 0, u, near.to(u.device, dtype).view_as(u) / step + self.zeros)
            u = torch.maximum(torch.minimum(at, u + 0.499), u - 0.499)
        self.u = nn.Parameter(u)
        # All scales of a row alike, where the integers between them are what the runtime stores.
        self.delta = nn.Parameter(torch.zeros_like(self.start[:, :1] if is_lpbq(weight) else self.start))

    def forward(self, x: Tensor) -> Tensor:
        scales = self.start * (1 + self.delta)
        return product(x, _Round.apply(self.u, scales, self.zeros, 2**self.spec.bits - 1), self.bias)

    def packed(self) -> QuantTensor:
        with torch.no_grad():
            q = self.u.round().clamp_(0, 2**self.spec.bits - 1).view(self.shape)
            zeros = self.zeros[..., 0] if isinstance(self.zeros, Tensor) else None
            return QuantTensor.from_ints(q.to(torch.uint8), self.start * (1 + self.delta), zeros, self.spec)


class TunableBlock(nn.Module):
    """Block `layer` of a graph, its packed linears as `rounded`, its norms as `norms`; the float `reference` says where integers start.
    In float32 at least, whatever the stream is in: bfloat16 has no room for a step of u or of a scale."""

    def __init__(self, graph: Graph, reference: Graph, layer: int, like: Tensor, norms: bool) -> None:
        super().__init__()
        self.at = layer_prefix(layer)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.block = Block(graph, layer, like.device, dtype)
        self.rounded: dict[str, RoundedLinear] = {}
        for part in (self.block.self_attn, self.block.mlp):
            for name in LINEARS:
                weight = getattr(getattr(part, name, None), "weight", None)
                if isinstance(weight, QuantTensor):
                    full = f"{self.at}.{'self_attn' if part is self.block.self_attn else 'mlp'}.{name}.weight"
                    near = reference.weights.get(full)
                    if not isinstance(near, Tensor) or tuple(near.shape) != weight.shape:  # cut or quantized since
                        near = None
                    self.rounded[full] = RoundedLinear(weight, getattr(part, name).bias, dtype, near)
                    setattr(part, name, self.rounded[full])
        self.norms = {n: m for n, m in self.block.named_children() if isinstance(m, Norm)} if norms else {}
        self.start = {n: m.weight.detach().clone() for n, m in self.norms.items()}
        for n, m in self.norms.items():
            m.weight = nn.Parameter(self.start[n].clone())

    def error(self, x: Tensor, target: Tensor, tables: RotaryTables) -> Tensor:
        """x, target [b, T, D] to the relative squared error of each token, [b, T]."""
        x, target = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, target))
        y = self.block(x if torch.is_grad_enabled() else x.clone(), tables)
        return (y - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)

    def weights(self) -> dict[str, Weight]:
        out: dict[str, Weight] = {name: linear.packed() for name, linear in self.rounded.items()}
        return out | {f"{self.at}.{n}.weight": m.weight.detach() for n, m in self.norms.items()}


def tune(
    block: TunableBlock,
    inputs: Tensor,
    targets: Tensor,
    tables: RotaryTables,
    steps: int,
    batch: int,
    rate: float,
    scale_rate: float,
    generator: torch.Generator,
) -> None:
    """`steps` of signed gradient descent on windows drawn from inputs and targets [W, T, D]: every one once before any comes again."""
    picks = draws(len(inputs), batch, generator)
    latents = [linear.u for linear in block.rounded.values()] if rate else []
    deltas = [linear.delta for linear in block.rounded.values()]
    gains = [m.weight for m in block.norms.values()]
    starts = [p.detach().abs() for p in gains]
    for step in range(steps):
        pick = next(picks)
        with torch.enable_grad():
            loss = block.error(inputs[pick], targets[pick], tables).mean()
            grads = torch.autograd.grad(loss, latents + deltas + gains)
        left = 1 - step / steps
        for p, grad in zip(latents + deltas, grads):
            p.add_(grad.sign_(), alpha=-left * (rate if p.dim() == 3 else scale_rate))
        for p, grad, size in zip(gains, grads[len(latents) + len(deltas) :], starts):
            p.addcmul_(grad.sign_(), size, value=-left * scale_rate)


def draws(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices below `count`, from one random order after another: with few epochs, drawing with replacement
    would leave some windows out and see others twice as often."""
    pool = torch.empty(0, dtype=torch.long)
    while True:
        while len(pool) < batch:
            pool = torch.cat((pool, torch.randperm(count, generator=generator)))
        yield pool[:batch]
        pool = pool[batch:]
