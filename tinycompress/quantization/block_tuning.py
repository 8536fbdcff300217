"""Block tuning of rounding and ranges: AutoRound / SignRound (arXiv:2309.05516).

A block is already quantized (by RTN, GPTQ, …). Given what reaches it and what it should make of that, signed gradient
descent moves, for every packed linear of the block, a latent u [N, K] and the scales s [N, G]:

    ŵ = (clamp(round(u), 0, 2^bits - 1) - z) · s            s starts at the given scales
    v ← v - η · sign(∂L/∂v)                                 η falls linearly to 0; round is passed straight through

The target lies between what the float block makes of the same inputs and what the float graph has there, `propagate` of
the way. At 1, as in the paper, a block is to make good all that the blocks before it have lost.

Of scales in HTP's form (lpbq.py) only the row's float moves, so they keep that form.

u starts where the float weight lies within the step of the given integer, so those that were rounded farthest move
first, as in the paper. (Started in the middle of their steps, all would be as ready as each other, and the block's
error rises instead of falling.) An integer that GPTQ put elsewhere, to make good for others, starts at the edge of its
step and falls back at once: after GPTQ, let scales and norms move alone (`rate=0`). The norms' weights of the block,
which stay float in every export, may move along (`norms`).

The loss of a token is its squared error over its squared norm: the next norm divides by the latter, so the few tokens
with massive activations do not drown the others. The block as given is kept where tuning does not lower the loss of the
whole calibration text.

Letters: N out_features, K in_features, G groups of g = K / G inputs, W windows, b windows of a batch, T positions,
D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graph.config import layer_prefix
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantTensor
from ..model.matmul import product
from ..model.transformer import Block, Norm, RotaryTables
from .fake_quant import learned_scales, no_change


@dataclass(frozen=True)
class BlockTuning:
    """How a quantized block is tuned; a part of `AutoRound` and of `GPTQ`.

    Fields:
        steps: of signed gradient descent for each block, at least 1. Default 200.
        batch: windows of calibration text in each step, at least 1. Default 2.
        rate: the first step of the integers' latents, in steps of the grid, from 0 (no integer moves) to 1. Default
            0.005.
        scale_rate: the first step of scales and norms, relative to their size, from 0 to below 0.1. Default 0.002.
        norms: whether the norms of the block move along. Default True.
        propagate: the share, from 0 (none) to 1 (all), of what the blocks before it have lost that a block is to make
            good. Default 0.5.
        seed: of the order in which windows are drawn. Default 0.

    Errors: an `InputError` for values out of these ranges.
    """

    steps: int = 200
    batch: int = 2
    rate: float = 0.005
    scale_rate: float = 0.002
    norms: bool = True
    propagate: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.propagate <= 1:
            accepted = "a number from 0 (the same inputs) to 1 (the float graph's own)"
            raise InputError("BlockTuning.propagate", self.propagate, accepted)
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

        Arguments:
            reference: the float graph.
            inputs: batches [b, T, D] of what reaches the block.
            targets: batches [b, T, D] of what the block of the reference makes of its own inputs.
            tables: cos and sin of the windows' positions.
        """
        block = TunableBlock(graph, reference, layer, inputs[0], self.norms)
        if not block.rounded:
            return {}
        if self.propagate < 1:
            whole = Block(reference, layer, inputs[0].device, inputs[0].dtype)
            targets = [whole(x.clone(), tables).lerp_(y, self.propagate) for x, y in zip(inputs, targets)]
        before = sum(block.error(x, y, tables).sum().item() for x, y in zip(inputs, targets))
        generator = torch.Generator().manual_seed(self.seed * graph.config.n_layers + layer)
        x = torch.cat(inputs)
        y = torch.cat(targets)
        tune(block, x, y, tables, self.steps, self.batch, self.rate, self.scale_rate, generator)
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
    """A packed linear with a latent for its integers and a relative change of its scales as parameters.

    Arguments:
        weight: the packed weight [N, K].
        bias: [N], or None.
        dtype: what it computes in.
        near: [N, K], the weight before rounding, which says where in its step each integer starts; None: in the middle.

    Parameters: `u` [N, G, g] in steps of the grid, and `delta` [N, G], or [N, 1] where the scales have HTP's form.
    """

    def __init__(
        self, weight: QuantTensor, bias: Tensor | None, dtype: torch.dtype, near: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid = weight.grid
        self.shape = weight.shape
        self.bias = bias
        self.zeros: Tensor | float = float(weight.grid.zero)
        if weight.zeros is not None:
            self.zeros = weight.zeros.to(dtype)[..., None]
        self.start = weight.scales.to(dtype)
        u = weight.ints().view(*self.start.shape, -1).to(dtype)
        if near is not None:
            step = self.start[..., None]
            at = torch.where(step == 0, u, near.to(u.device, dtype).view_as(u) / step + self.zeros)
            u = torch.maximum(torch.minimum(at, u + 0.499), u - 0.499)
        self.u = nn.Parameter(u)
        self.delta = nn.Parameter(no_change(weight, self.start))

    def forward(self, x: Tensor) -> Tensor:
        scales = learned_scales(self.start, self.delta)
        return product(x, _Round.apply(self.u, scales, self.zeros, 2**self.grid.bits - 1), self.bias)

    def packed(self) -> QuantTensor:
        """The weight as it is now."""
        with torch.no_grad():
            q = self.u.round().clamp_(0, 2**self.grid.bits - 1).view(self.shape)
            zeros = self.zeros[..., 0] if isinstance(self.zeros, Tensor) else None
            return QuantTensor.from_ints(q.to(torch.uint8), learned_scales(self.start, self.delta), zeros, self.grid)


class TunableBlock(nn.Module):
    """One block of a quantized graph whose packed linears and norms can be moved by gradients.

    It computes in float32 at least, whatever the stream is in: bfloat16 has no room for a step of u or of a scale.

    Arguments:
        graph: the quantized graph; block `layer` of it is taken.
        reference: the float graph, whose weights say where integers start.
        like: a tensor on the device and in the dtype of the stream.
        norms: whether the norms may move.

    Attributes: `rounded`, its packed linears by the name of their weight, and `norms`, the norms that may move, by
    their name in the block.
    """

    def __init__(self, graph: Graph, reference: Graph, layer: int, like: Tensor, norms: bool) -> None:
        super().__init__()
        self.at = layer_prefix(layer)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.block = Block(graph, layer, like.device, dtype)
        self.rounded: dict[str, RoundedLinear] = {}
        for name, linear in self.block.linears().items():
            weight: Any = linear.weight
            if not isinstance(weight, QuantTensor):
                continue
            parameter = f"{name}.weight"
            near = reference.weights.get(parameter)
            if not isinstance(near, Tensor) or tuple(near.shape) != weight.shape:  # cut or quantized since
                near = None
            bias: Any = linear.bias
            self.rounded[parameter] = RoundedLinear(weight, bias, dtype, near)
            self.block.replace_linear(name, self.rounded[parameter])
        self.norms: dict[str, Norm] = {}
        if norms:
            self.norms = {name: norm for name, norm in self.block.named_children() if isinstance(norm, Norm)}
        for norm in self.norms.values():
            norm.weight = nn.Parameter(norm.weight.detach().clone())

    def error(self, x: Tensor, target: Tensor, tables: RotaryTables) -> Tensor:
        """x, target [b, T, D] to the relative squared error of each token, [b, T]."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        target = target.to(torch.promote_types(target.dtype, torch.float32))
        y = self.block(x if torch.is_grad_enabled() else x.clone(), tables)
        return (y - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)

    def weights(self) -> dict[str, Weight]:
        """The parameters as they are now, by their names in the graph."""
        weights: dict[str, Weight] = {name: linear.packed() for name, linear in self.rounded.items()}
        return weights | {f"{self.at}.{name}.weight": norm.weight.detach() for name, norm in self.norms.items()}


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
    """`steps` of signed gradient descent on windows drawn from inputs and targets [W, T, D]; rates as in
    `BlockTuning`."""
    picks = draws(len(inputs), batch, generator)
    latents = [linear.u for linear in block.rounded.values()] if rate else []
    deltas = [linear.delta for linear in block.rounded.values()]
    gains = [norm.weight for norm in block.norms.values()]
    sizes = [gain.detach().abs() for gain in gains]
    for step in range(steps):
        pick = next(picks)
        with torch.enable_grad():
            loss = block.error(inputs[pick], targets[pick], tables).mean()
            grads = torch.autograd.grad(loss, latents + deltas + gains)
        left = 1 - step / steps
        for parameter, grad in zip(latents + deltas, grads):
            parameter.add_(grad.sign_(), alpha=-left * (rate if parameter.dim() == 3 else scale_rate))
        for gain, grad, size in zip(gains, grads[len(latents) + len(deltas) :], sizes):
            gain.addcmul_(grad.sign_(), size, value=-left * scale_rate)


def draws(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices below `count`, from one random order after another: every index once before any comes
    again. With few epochs, drawing with replacement would leave some windows out and see others twice as often."""
    pool = torch.empty(0, dtype=torch.long)
    while True:
        while len(pool) < batch:
            pool = torch.cat((pool, torch.randperm(count, generator=generator)))
        yield pool[:batch]
        pool = pool[batch:]
