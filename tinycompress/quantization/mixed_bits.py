"""MixedBits: the grid of each linear from what its rounding costs the model, under one budget for all of them.

What a change ΔW of one linear costs, to second order, in nats of KL(float ‖ quantized) per token:

    L(ΔW) ≈ ½ · (1 / T) · Σ_t (g_tᵀ ΔW x_t)²

x_t is the linear's input at position t and g_t the gradient at its output of -Σ log p(y), with every y drawn from the
model's own p: the outer products of such gradients are the Fisher matrix, which is the Hessian of that KL divergence
(arXiv:1412.1193), while the labels of the text would give the empirical Fisher, which is not (arXiv:1905.12558).
Positions count as independent, as in K-FAC (arXiv:1503.05671); within a linear nothing is assumed, where the diagonal
Fisher of SqueezeLLM (arXiv:2306.07629) takes weights, and the traces of HAWQ-V2 (arXiv:1911.03852) directions, as
alike. Costs of different linears are added up.

One sweep: a forward that keeps only what enters each block, and a backward block by block that computes the block
again. The choice is a multiple-choice knapsack, solved exactly (knapsack.py).

Letters: N out_features, K in_features, G groups of g = K / G inputs, T positions, D hidden_size, b windows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.data import as_tokens
from ..calibration.gram import gram
from ..calibration.walk import Inputs, Stream, blocks, check_calibration
from ..checkpoints.unfinished import open_stage
from ..errors import InputError
from ..graph.config import FINAL_NORM, HEAD
from ..graph.graph import Graph, Pass
from ..graph.quant_tensor import QuantSpec, QuantTensor, packed_bytes
from ..graph.topology import Feed, feeds
from ..knapsack import knapsack
from ..model.linear import linear
from ..model.transformer import Block, Norm, RotaryTables
from ..progress import tqdm
from .grid_search import round_to_nearest
from .linear_specs import LinearSpecs, Spec, targets

Rounding = Callable[[Tensor, Tensor, QuantSpec], QuantTensor]
Seen = dict[str, list[tuple[Tensor, Tensor]]]  # by linear: inputs [b, T, K] and gradients at outputs [b, T, N]
HEAD_ROWS = 512  # positions whose logits exist at one time


def weighted_rounding(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> QuantTensor:
    """weight [N, K] at the nearest points of its grid, searched with the error weighted by E[x²] ∝ diag(hessian) [K,
    K]."""
    return round_to_nearest("weight", weight, spec, hessian.diagonal().float())


@dataclass(frozen=True)
class MixedBits:
    """Chooses a grid for every linear of the layers (not the head) under a budget, and has a quantizer round to them.

    Fields:
        tokens: ids [windows, seq_len], or an iterable of them such as a DataLoader; 8 windows of 512 will do. Their
            device does the work.
        quantizer: makes the pass that rounds, from a mapping of linears' names to their QuantSpecs: `RTN`, or
            `lambda specs: GPTQ(tokens, specs)`.
        bytes: the budget as all that the packed linears may take, scales and zero points included.
        bits: the budget as an average per weight, counted likewise (w3g64 takes 3.5 with its float32 scales). One of
            `bytes` and `bits` is given.
        choices: the grids to choose from, each as text ("w4g64") or a QuantSpec. Default w2g64, w3g64, w4g64 and w8g64.
        rounding: what is measured: a function from weight [N, K], hessian [K, K] and spec to a QuantTensor, such as
            `gptq_quantize` for a measurement that is slower and closer to that quantizer. Default: to the nearest
            points of a grid weighted by E[x²].
        seed: of the labels that are drawn from the model. Default 0.
        device: where the costs are measured, such as "cuda"; the quantizer has a device of its own. Default None: the
            device of `tokens`.
        progress: whether bars over the layers are shown once they take longer than two seconds. Default True.

    Errors: an `InputError` for both budgets or none, for a budget below what the smallest choices take, for no choices
    or groups that do not divide a linear's inputs, for tokens that are not of the model, for weights that are packed
    already, and for activations that are not finite.
    """

    tokens: Tensor | Iterable[Any] = field(repr=False, compare=False)
    quantizer: Callable[[Mapping[str, QuantSpec]], Pass] = field(repr=False, compare=False)
    bytes: int | None = None
    bits: float | None = None
    choices: Sequence[Spec] = ("w2g64", "w3g64", "w4g64", "w8g64")
    rounding: Rounding = field(default=weighted_rounding, repr=False, compare=False)
    seed: int = 0
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        object.__setattr__(self, "choices", tuple(self.choices))
        if (self.bytes is None) == (self.bits is None):
            raise InputError("MixedBits", f"bytes={self.bytes} and bits={self.bits}", "one of the two")
        if not self.specs:
            raise InputError("MixedBits.choices", "none", "at least one, such as w4g64")
        for name in ("bytes", "bits"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"MixedBits.{name}", value, "a positive number")

    @property
    def specs(self) -> list[QuantSpec]:
        """The choices, text parsed."""
        return [QuantSpec.of(choice) for choice in self.choices]

    def __call__(self, graph: Graph) -> Graph:
        specs = self.specs
        sizes = linear_shapes(graph, specs)
        limit = self.limit(sizes, specs)
        tokens = as_tokens(self.tokens).to(self.device)
        costs = sensitivity(graph, tokens, specs, self.rounding, self.seed, self.progress)
        return self.quantizer(choose(costs, sizes, specs, limit))(graph).replace(by=self)

    def limit(self, sizes: Mapping[str, tuple[int, int]], specs: Sequence[QuantSpec]) -> int:
        """The budget in bytes; an InputError naming the nearest that can be met if even the smallest grids take
        more."""
        count = sum(N * K for N, K in sizes.values())
        least = sum(min(packed_bytes(shape, spec) for spec in specs) for shape in sizes.values())
        if self.bytes is not None:
            limit = self.bytes
            found = f"bytes={self.bytes}"
            possible = f"bytes={least}"
        else:
            limit = math.floor((self.bits or 0) * count / 8 + 1e-6)
            found = f"bits={self.bits}"
            possible = f"bits={least * 8 / count:g}"
        if least > limit:
            raise InputError("MixedBits", found, f"{possible} or more, by the choices {', '.join(map(str, specs))}")
        return limit


def choose(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, tuple[int, int]], specs: Sequence[QuantSpec], limit: int
) -> LinearSpecs:
    """The grid of each linear with the least sum of `costs` (one for each spec) and at most `limit` packed bytes."""
    prices = [[packed_bytes(sizes[name], spec) for spec in specs] for name in costs]
    options = knapsack(prices, list(costs.values()), limit)
    return LinearSpecs({name: specs[option] for name, option in zip(costs, options)})


def linear_shapes(graph: Graph, specs: Sequence[QuantSpec]) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear of the layers, after checking that each is dense and that every spec divides its
    inputs."""
    names = {name for spec in specs for name in targets(graph, spec)}
    return {linear.name: linear.shape for linear in graph.config.linears() if linear.name in names}


@torch.no_grad()
def sensitivity(
    graph: Graph,
    tokens: Tensor,
    specs: Sequence[QuantSpec],
    rounding: Rounding = weighted_rounding,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[float]]:
    """For every linear of the layers, what each spec costs, in nats of KL per token.

    tokens [windows, T] ids; `rounding`, `seed` and `progress` as the fields of `MixedBits`. Memory, and disk in a
    pipeline with a work folder: what enters every block, [layers, windows, T, D], and one block's activations.
    """
    tokens = check_calibration(graph, tokens)
    linear_shapes(graph, specs)
    n_layers = graph.config.n_layers
    stream = Stream(graph, tokens)
    entering: dict[str, Tensor] = {}  # batches [b, T, D] by layer and number
    costs: dict[str, Tensor] = {}  # by linear, float64 [specs]
    stage = open_stage("sensitivity", stream.device, entering=entering, costs=costs)
    stream.hidden = stage.live.get("hidden", stream.hidden)
    gradients = stage.live.get("gradients", [])
    bar = "MixedBits forward" if progress else None
    for layer, block in enumerate(blocks(graph, stream.device, stream.dtype, bar, stage.done), stage.done):
        entering |= {f"{layer} {i}": h.clone() for i, h in enumerate(stream.hidden)}  # the block works in place
        stream.step(block)
        stream.check_finite(layer)
        stage.save(layer + 1, hidden=stream.hidden)
    if not gradients and not stage.finished:
        for i, h in enumerate(stream.hidden):
            gradients.append(_head_gradient(graph, h, torch.Generator(stream.device).manual_seed(seed + i)))
    feeds_of: dict[int | None, list[Feed]] = {}
    for feed in feeds(graph.config):
        feeds_of.setdefault(feed.layer, []).append(feed)
    behind = max(0, stage.done - n_layers)
    layers = tqdm(
        reversed(range(n_layers - behind)),
        total=n_layers,
        initial=behind,
        desc="MixedBits backward",
        unit="layer",
        delay=2,
        disable=not progress,
    )
    for layer in layers:
        block = Block(graph, layer, stream.device, stream.dtype)
        enter = [entering.pop(f"{layer} {i}") for i in range(len(stream.hidden))]
        seen = _backward(block, enter, gradients, stream.tables)
        for feed in feeds_of.get(layer, ()):
            measured = _costs(graph, feed, seen, specs, rounding, tokens.numel())
            costs |= {name: torch.tensor(values, dtype=torch.float64) for name, values in measured.items()}
        stage.save(2 * n_layers - layer, gradients=gradients)
    stage.finish()
    return {linear.name: costs[linear.name].tolist() for linear in graph.config.linears() if linear.name in costs}


def _head_gradient(graph: Graph, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient at hidden [b, T, D], the last block's output, of -Σ log p(y) with every y drawn from p."""
    norm = Norm(graph.tensor(f"{FINAL_NORM}.weight").to(hidden.device, hidden.dtype), graph.config.norm_eps)
    head = linear(graph.linear(HEAD).to(hidden.device, hidden.dtype), None)
    gradient = torch.empty_like(hidden).flatten(0, 1)
    for rows, into in zip(hidden.flatten(0, 1).split(HEAD_ROWS), gradient.split(HEAD_ROWS)):
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            logits = head(norm(rows)).float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            into.copy_(torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), rows)[0])
    return gradient.view_as(hidden)


def _backward(block: Block, entering: Sequence[Tensor], gradients: list[Tensor], tables: RotaryTables) -> Seen:
    """Computes the block again and turns the gradients at its output, in place in the list, into those at its input.

    Returns what its linears read and the gradients at what they give."""
    now: dict[str, tuple[Tensor, Tensor]] = {}  # of the present batch: input and output of each linear

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            now[name] = (args[0], output)

        return note

    for name, module in block.linears().items():
        module.register_forward_hook(listen(name))
    names = list(block.linears())
    seen: Seen = {name: [] for name in names}
    for i, h in enumerate(entering):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            out = block(h, tables)
            gradients[i], *inner = torch.autograd.grad(out, [h, *(now[name][1] for name in names)], gradients[i])
        for name, gradient in zip(names, inner):
            seen[name].append((now[name][0].detach(), gradient))
    return seen


def _costs(
    graph: Graph, feed: Feed, seen: Seen, specs: Sequence[QuantSpec], rounding: Rounding, positions: int
) -> dict[str, list[float]]:
    """By reader of a feed, what each spec costs."""
    hessian = gram(feed, Inputs(lambda: (x for x, _ in seen[feed.readers[0]])))
    costs: dict[str, list[float]] = {}
    for name in feed.readers:
        weight = graph.tensor(graph.config.weight_name(name)).to(hessian.device).float()
        deltas = [rounding(weight, hessian, spec).dequantize() - weight for spec in specs]
        costs[name] = [sum(quadratic_cost(delta, x, g) for x, g in seen[name]) / positions for delta in deltas]
    return costs


def quadratic_cost(delta: Tensor, inputs: Tensor, grads: Tensor) -> float:
    """½ Σ_t (g_tᵀ ΔW x_t)² for delta [N, K], inputs [..., K], grads [..., N]."""
    change = F.linear(inputs, delta.to(inputs.dtype))
    return 0.5 * (change * grads).sum(-1).double().square().sum().item()
