"""MixedBits: the grid of each linear from what its rounding costs the model, under one budget for all of them.

What a change ΔW of one linear costs, to second order, in nats of KL(float ‖ quantized) a token:

    L(ΔW) ≈ ½ · (1 / T) · Σ_t (g_tᵀ ΔW x_t)²

x_t is the linear's input at position t and g_t the gradient at its output of -Σ log p(y), with every y drawn from the
model's own p: the outer products of such gradients are the Fisher matrix, which is the Hessian of that KL divergence
(arXiv:1412.1193), while the labels of the text would give the empirical Fisher, which is not (arXiv:1905.12558).
Positions count as independent, as in K-FAC (arXiv:1503.05671); within a linear nothing is assumed, where the diagonal
Fisher of SqueezeLLM (arXiv:2306.07629) takes weights, and the traces of HAWQ-V2 (arXiv:1911.03852) directions, as alike.
Costs of different linears are added up.

One sweep: a forward that keeps only what enters each block, and a backward block by block that computes the block again.
The choice is a multiple-choice knapsack, solved exactly (`knapsack`).
Letters: N out_features, K in_features, T positions, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..calibration.gram import gram
from ..calibration.walk import BATCH_TOKENS, Inputs, check_calibration
from ..errors import InputError
from ..graph.config import layer_prefix, shapes
from ..graph.graph import Graph, Pass
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import Feed, feeds
from ..knapsack import knapsack
from ..model.linear import linear
from ..model.transformer import Block, Embedding, Norm, RotaryTables
from .grid_search import find_grid, round_to_grid
from .linear_specs import LinearSpecs, targets

Rounding = Callable[[Tensor, Tensor, QuantSpec], QuantTensor]
HEAD_ROWS = 512  # positions whose logits exist at one time


def nearest(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> QuantTensor:
    """weight [N, K] at the nearest points of its grid, searched with the error weighted by E[x²] ∝ diag(hessian) [K, K]."""
    scales, zeros = find_grid("weight", weight, spec, hessian.diagonal().float())
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)


@dataclass(frozen=True)
class MixedBits:
    """Measures every linear of the layers (not the head) at every one of `choices` on calibration `tokens` [windows,
    seq_len] (8 windows of 512 will do), chooses under a budget, and hands the choice to `quantizer`, such as
    `lambda specs: GPTQ(tokens, specs)`.

    The budget is one of `bytes`, all that the packed linears may take, scales and zero points included, and `bits`, the
    same as an average a weight (w3g64 takes 3.5 with its float32 scales). `rounding` is what is measured: a function of
    weight, hessian and spec, such as `gptq_quantize`, for a measurement that is slower and closer to that quantizer."""

    tokens: Tensor = field(repr=False, compare=False)
    quantizer: Callable[[Mapping[str, QuantSpec]], Pass] = field(repr=False, compare=False)
    bytes: int | None = None
    bits: float | None = None
    choices: tuple[str, ...] = ("w2g64", "w3g64", "w4g64", "w8g64")
    rounding: Rounding = field(default=nearest, repr=False, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.bits is None):
            raise InputError("MixedBits", f"bytes={self.bytes} and bits={self.bits}", "one of the two")
        if not self.choices:
            raise InputError("MixedBits.choices", "none", "at least one, such as w4g64")
        for text in self.choices:
            QuantSpec.parse(text)
        for name, value in (("bytes", self.bytes), ("bits", self.bits)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"MixedBits.{name}", value, "a positive number")

    def __call__(self, graph: Graph) -> Graph:
        specs = [QuantSpec.parse(text) for text in self.choices]
        sizes = linear_shapes(graph, specs)
        limit = self.limit(sizes, specs)
        costs = sensitivity(graph, self.tokens, specs, self.rounding, self.seed)
        return self.quantizer(choose(costs, sizes, specs, limit))(graph).replace(by=self)

    def limit(self, sizes: Mapping[str, tuple[int, int]], specs: Sequence[QuantSpec]) -> int:
        """The budget in bytes; an InputError naming the nearest that can be met if even the smallest grids take more."""
        count = sum(N * K for N, K in sizes.values())
        limit = self.bytes if self.bytes is not None else math.floor((self.bits or 0) * count / 8 + 1e-6)
        least = sum(min(packed_bytes(shape, spec) for spec in specs) for shape in sizes.values())
        if least > limit:
            found, nearest = (
                (f"bytes={self.bytes}", f"bytes={least}")
                if self.bytes is not None
                else (f"bits={self.bits}", f"bits={least * 8 / count:g}")
            )
            raise InputError("MixedBits", found, f"{nearest} or more, by the choices {', '.join(self.choices)}")
        return limit


def choose(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, int]], specs: Sequence[QuantSpec], limit: int
) -> LinearSpecs:
    """The grid of each linear with the least sum of `costs` (one a spec) and at most `limit` packed bytes."""
    prices = [[packed_bytes(sizes[name], spec) for spec in specs] for name in costs]
    picked = knapsack(prices, list(costs.values()), limit)
    return LinearSpecs({name: specs[option] for name, option in zip(costs, picked)})


def linear_shapes(graph: Graph, specs: Sequence[QuantSpec]) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear of the layers, after checking that each is dense and that every spec divides its inputs."""
    names = [name for spec in specs for name in targets(graph, spec)]
    parameters = shapes(graph.config)
    return {name: (parameters[f"{name}.weight"][0], parameters[f"{name}.weight"][1]) for name in names}


def packed_bytes(shape: tuple[int, int], spec: QuantSpec) -> int:
    """What a QuantTensor [N, K] takes: integers, float32 scales and, where there are any, zero points."""
    N, K = shape
    g = spec.group("a packed weight", K)
    return N * (K // g) * (-(-g // 8) * spec.bits + 4 + (0 if spec.symmetric else 4 if spec.float_zero else 1))


@torch.no_grad()
def sensitivity(
    graph: Graph, tokens: Tensor, specs: Sequence[QuantSpec], rounding: Rounding = nearest, seed: int = 0
) -> dict[str, list[float]]:
    """For every linear of the layers, what each spec costs, in nats of KL a token.

    tokens [windows, T] ids. Memory: what enters every block, [layers, windows, T, D], and one block's activations.
    """
    tokens = check_calibration(graph, tokens)
    linear_shapes(graph, specs)
    device, T = tokens.device, tokens.shape[1]
    dtype = torch.float32 if device.type == "cpu" and graph.dtype.itemsize < 4 else graph.dtype
    tables = RotaryTables(graph.config.rope, graph.config.head_dim, 0, T, device, dtype)
    embed = Embedding(graph.weights["model.embed_tokens.weight"].to(device, dtype))
    entering = [[embed(batch).to(dtype) for batch in tokens.split(max(1, BATCH_TOKENS // T))]]
    for i in tqdm(range(graph.config.n_layers), desc="MixedBits forward", unit="layer", delay=2):
        block = Block(graph, i, device, dtype)
        entering.append([block(h.clone(), tables) for h in entering[-1]])
        if not all(torch.isfinite(h).all() for h in entering[-1]):
            raise InputError(
                f"output of {layer_prefix(i)}",
                "NaN or infinite values",
                "finite activations (look at the weights before it)",
            )
    grads = [
        _head_gradient(graph, h, torch.Generator(device).manual_seed(seed + i)) for i, h in enumerate(entering.pop())
    ]
    costs: dict[str, list[float]] = {}
    for i in tqdm(
        reversed(range(graph.config.n_layers)),
        total=graph.config.n_layers,
        desc="MixedBits backward",
        unit="layer",
        delay=2,
    ):
        readers = [feed for feed in feeds(graph.config) if feed.layer == i]
        seen = _backward(Block(graph, i, device, dtype), layer_prefix(i), readers, entering.pop(), grads, tables)
        for feed in readers:
            costs |= _costs(graph, feed, seen, specs, rounding, tokens.numel())
    return {name: costs[name] for feed in feeds(graph.config) for name in feed.readers if name in costs}


def _head_gradient(graph: Graph, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient at hidden [b, T, D], the last block's output, of -Σ log p(y) with every y drawn from p."""
    norm = Norm(graph.tensor("model.norm.weight").to(hidden.device, hidden.dtype), graph.config.norm_eps)
    head = linear(graph.linear("lm_head").to(hidden.device, hidden.dtype), None)
    out = torch.empty_like(hidden).flatten(0, 1)
    for rows, into in zip(hidden.flatten(0, 1).split(HEAD_ROWS), out.split(HEAD_ROWS)):
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            logits = head(norm(rows)).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            into.copy_(torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), rows)[0])
    return out.view_as(hidden)


Seen = dict[str, list[tuple[Tensor, Tensor]]]  # by linear: inputs [b, T, K] and gradients at outputs [b, T, N]


def _backward(
    block: Block,
    at: str,
    readers: Sequence[Feed],
    entering: Sequence[Tensor],
    grads: list[Tensor],
    tables: RotaryTables,
) -> Seen:
    """Computes the block again and turns the gradients at its output, in place in the list, into those at its input."""
    now: dict[str, tuple[Tensor, Tensor]] = {}
    names = [name for feed in readers for name in feed.readers]
    for name in names:
        module = block.get_submodule(name.removeprefix(f"{at}."))
        module.register_forward_hook(lambda _, args, out, name=name: now.__setitem__(name, (args[0], out)))  # type: ignore[misc]
    seen: Seen = {name: [] for name in names}
    for i, h in enumerate(entering):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            out = block(h, tables)
            grads[i], *inner = torch.autograd.grad(out, [h, *(now[name][1] for name in names)], grads[i])
        for name, grad in zip(names, inner):
            seen[name].append((now[name][0].detach(), grad))
    return seen


def _costs(
    graph: Graph, feed: Feed, seen: Seen, specs: Sequence[QuantSpec], rounding: Rounding, positions: int
) -> dict[str, list[float]]:
    hessian = gram(feed, Inputs(lambda: (x for x, _ in seen[feed.readers[0]])))
    out: dict[str, list[float]] = {}
    for name in feed.readers:
        weight = graph.tensor(graph.config.weight_name(name)).to(hessian.device).float()
        deltas = [rounding(weight, hessian, spec).dequantize() - weight for spec in specs]
        out[name] = [sum(quadratic_cost(delta, x, g) for x, g in seen[name]) / positions for delta in deltas]
    return out


def quadratic_cost(delta: Tensor, inputs: Tensor, grads: Tensor) -> float:
    """½ Σ_t (g_tᵀ ΔW x_t)² for delta [N, K], inputs [..., K], grads [..., N]."""
    change = F.linear(inputs, delta.to(inputs.dtype))
    return 0.5 * (change * grads).sum(-1).double().square().sum().item()
