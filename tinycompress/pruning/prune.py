"""Structured pruning of FFN channels, query heads, KV groups and whole sublayers under one budget, with the survivors refitted.

Three steps. On a few windows (`probe`) the graph is measured: what each axis of each layer carries, and what an error
there costs in nats (importance.py). Then sizes are chosen within the budget (budget.py, allocation.py). Then one walk over all tokens
cuts layer by layer on the activations that the already pruned layers produce, and refits down_proj and o_proj in closed
form (refit.py), towards the float model's residual stream (`refit="reference"`) or to what the linear gave before
(True). With `one_shot` the walk is left out: scores and refits come from one collection of the whole graph's statistics
(Minitron, LLM-Pruner, FLAP), which any number of budgets can share (`from_statistics`).

The result is a plain graph whose shapes are smaller: nothing is masked and nothing is left to do at run time.
Letters: D hidden, F ffn, K inputs of a linear, n units of an axis.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..calibration.gram import gram, stream_gram
from ..calibration.walk import Inputs, check_calibration, walk
from ..errors import InputError
from ..graph.config import Config
from ..graph.edit import cut
from ..graph.graph import Graph, LazyTensor, Weight
from ..graph.topology import Feed, axes, feeds
from .allocation import ALLOCATIONS, apply, by_threshold, optimal, uniform
from .budget import Budget
from .importance import (
    CRITERIA,
    Criterion,
    Sensitivity,
    Statistics,
    block_influence,
    collect,
    hidden_importance,
    measure,
    reads,
    sensitivities,
    statistics,
)
from .refit import bias_for, by_turns, keep_best, plain_curve, refit_columns, refit_curve, wanted_output

T = TypeVar("T")
REFITS = (True, False, "reference", "bias")


@dataclass(frozen=True, eq=False)
class Plan:
    """Sizes chosen for the axes of a graph with this config. `losses`: for each axis the expected loss in nats a token at
    each of `sizes_of[axis]`, where the allocation measured it."""

    config: Config
    sizes: Mapping[str, int]
    sizes_of: Mapping[str, Sequence[int]]
    losses: Mapping[str, Sequence[float]]
    sensitivity: Sensitivity | None = None

    @property
    def pruned(self) -> Config:
        return apply(self.config, self.sizes)

    def draw(self, path: str | Path) -> None:
        """A PNG: widths of every layer before and after, and the loss of every axis against its size."""
        from .plot import draw_widths

        draw_widths(path, self.config, self.pruned, {a: (self.sizes_of[a], self.losses[a]) for a in self.losses})


@dataclass(frozen=True)
class Prune:
    """Cuts a graph to `target` ("params=0.8", "bytes=300MB", "flops=0.8"), taken from `axes` together (FFNs unless others are
    named: each head is cheap alone, many together are not, which no loss by layer shows), or to `keep`, one
    budget an axis: {"ffn": 0.75} a share of all channels, {"ffn": 1024} that many in each layer; also "layers" and
    "hidden", cut first.

    tokens: calibration ids [windows, seq_len]. criterion: a name of `importance.CRITERIA`, or a function of `Statistics`.
    allocation: "optimal" | "global" | "uniform". refit: "reference" | True | False | "bias" (FLAP's, which gives o_proj and
    down_proj a bias). sublayers: whole sublayers may go. floors: what every layer keeps of an axis, a share or a count.
    uneven_kv: KV heads may differ between layers. probe: windows that the measuring ahead takes. propagate: how far the
    refit to the reference goes, from 0 (what the linear gave before) to 1 (the float model's residual stream). one_shot:
    every layer is scored and refitted on the inputs that the whole graph gives it; their Gram matrices stay in memory.
    """

    tokens: Tensor = field(repr=False, compare=False)
    target: str | None = None
    keep: Mapping[str, float] | None = None
    axes: tuple[str, ...] = ("ffn",)
    criterion: str | Criterion = "obs"
    allocation: str = "optimal"
    refit: bool | str = "reference"
    multiple_of: int = 64
    floors: Mapping[str, float] | None = None
    sublayers: bool = False
    uneven_kv: bool = False
    probe: int = 8
    damping: float = 0.01
    propagate: float = 0.5
    gradients: bool = False
    one_shot: bool = False

    def __post_init__(self) -> None:
        _ = self.budget  # it checks itself
        if isinstance(self.criterion, str) and self.criterion not in CRITERIA:
            raise InputError(
                "Prune.criterion", repr(self.criterion), " | ".join(CRITERIA) + " | a function of Statistics"
            )
        if self.allocation not in ALLOCATIONS:
            raise InputError("Prune.allocation", repr(self.allocation), " | ".join(ALLOCATIONS))
        if self.refit not in REFITS:
            raise InputError("Prune.refit", repr(self.refit), "True | False | 'reference' | 'bias'")
        if self.one_shot and self.refit == "reference":
            raise InputError(
                "Prune.refit",
                "'reference' with one_shot",
                "True | False | 'bias': what a cut prefix gives is never seen in one shot",
            )
        if not isinstance(self.probe, int) or self.probe < 1:
            raise InputError("Prune.probe", self.probe, "a positive integer")
        if not 0 < self.damping < 1:
            raise InputError("Prune.damping", self.damping, "a fraction of the mean of diag(H), between 0 and 1")
        if not 0 <= self.propagate <= 1:
            raise InputError(
                "Prune.propagate",
                self.propagate,
                "a number from 0 (what each linear gave) to 1 (the float model's stream)",
            )

    @property
    def budget(self) -> Budget:
        return Budget(self.target, self.keep, self.axes, self.multiple_of, self.floors, self.sublayers, self.uneven_kv)

    def __call__(self, graph: Graph) -> Graph:
        self.check(graph)
        check_calibration(graph, self.tokens)
        if self.uneven_kv and "kv_heads" in self.budget.cuts:
            warnings.warn(
                "KV heads that differ between layers: the ort profile loses Optimum, which has one cache shape for all layers, and "
                "onnxruntime-genai before 0.15; the other profiles carry them; transformers loads the model through tinycompress only",
                stacklevel=2,
            )
        graph = self.reshape(graph)
        if self.one_shot:
            return self._in_one_shot(graph, self.collect(graph))
        return self.apply(graph, self.plan(graph)).replace(by=self)

    def collect(self, graph: Graph) -> dict[str, Statistics]:
        """What `from_statistics` reads: the statistics of every axis that is budgeted, gradients where the criterion wants them."""
        names = [item.axis for some, _ in self.budget.items(graph.config, graph.dtype.itemsize) for item in some]
        return collect(graph, self.tokens, names, self.sensitivity(graph))

    def from_statistics(self, graph: Graph, measured: Mapping[str, Statistics]) -> Graph:
        """The cut in one shot by statistics of this graph that are there already, whatever the budget they were collected for."""
        self.check(graph)
        if not self.one_shot:
            raise InputError("Prune.one_shot", False, "True where the statistics are given")
        if reshaped := [key for key in ("layers", "hidden") if key in (self.keep or {})]:
            raise InputError(
                "Prune.keep", reshaped, "axes of layers: layers and hidden width change what statistics say"
            )
        self._check_statistics(graph, measured)
        return self._in_one_shot(graph, measured)

    def _in_one_shot(self, graph: Graph, measured: Mapping[str, Statistics]) -> Graph:
        return self.apply(graph, self.plan(graph, measured), measured).replace(by=self)

    def _check_statistics(self, graph: Graph, measured: Mapping[str, Statistics]) -> None:
        known = axes(graph.config)
        for axis in (item.axis for some, _ in self.budget.items(graph.config, graph.dtype.itemsize) for item in some):
            if axis not in measured:
                raise InputError("statistics", f"none of {axis}", "those of every axis in the budget (Prune.collect)")
            found = measured[axis]
            if found.axis != known[axis] or not torch.equal(
                found.weight, graph.tensor(found.axis.reader).to(found.weight.device)
            ):
                raise InputError("statistics", f"{axis} of another graph", "statistics of the graph that is cut")
            if self.allocation == "optimal" and found.sensitivity is None:
                raise InputError(
                    "statistics",
                    f"no Fisher matrix for {axis}",
                    "statistics that Prune.collect made for this allocation",
                )

    def check(self, graph: Graph) -> None:
        """An InputError for whatever could not work, from the config alone."""
        for name, entry in graph.weights.entries.items():
            if not isinstance(entry, Tensor | LazyTensor):
                raise InputError(name, f"a weight quantized to {entry.grid}", "a dense one (quantize last)")
        self.budget.items(self.budget.reshaped(graph.config), graph.dtype.itemsize)

    def reshape(self, graph: Graph) -> Graph:
        """Whole layers by block influence, then hidden channels by Minitron's sum, where `keep` names them."""
        layers = self.budget.kept("layers", graph.config.n_layers, 1)
        if layers < graph.config.n_layers:
            graph = cut(graph, "layers", keep_best(block_influence(graph, self.tokens), layers))
        hidden = self.budget.kept("hidden", graph.config.hidden_size, self.multiple_of)
        if hidden < graph.config.hidden_size:
            graph = cut(graph, "hidden", keep_best(hidden_importance(graph, self.tokens), hidden))
        return graph

    def expected(self, graph: Graph) -> Config:
        """A config like the one that the pass will arrive at, without data: the same budgets shared out uniformly."""
        self.check(graph)
        return self.budget.expected(graph.config, graph.dtype.itemsize)

    def sensitivity(self, graph: Graph) -> Sensitivity | None:
        """Fisher matrices and gradients, as far as allocation and criterion read them."""
        named = (
            isinstance(self.criterion, str) and self.criterion != "obs"
        )  # reads no Fisher matrix, nor do shares of its scores
        fisher = self.allocation == "optimal" or (self.allocation == "global" and not named)
        if not (fisher or self._gradients):
            return None
        return sensitivities(graph, self.tokens[: max(1, self.probe // 4)], self._gradients, fisher=fisher or not named)

    def plan(self, graph: Graph, known: Mapping[str, Statistics] | None = None) -> Plan:
        """The sizes, where the allocation measures from `probe` windows or the statistics that are `known`."""
        budgets = self.budget.items(graph.config, graph.dtype.itemsize)
        choices = [item for some, _ in budgets for item in some]
        measured = self.allocation != "uniform" and any(len(item.sizes) > 1 for item in choices)
        sensitivity = self.sensitivity(graph) if choices and known is None and (measured or self._gradients) else None
        sizes_of = {item.axis: item.sizes for item in choices}
        losses: dict[str, list[float]] = {}
        scores: dict[str, Tensor] = {}

        def every(use: Callable[[Statistics], T]) -> dict[str, T]:
            if known is not None:
                return {name: use(known[name]) for name in sizes_of}
            return measure(graph, self.tokens[: self.probe], sizes_of, use, sensitivity)

        if measured and self.allocation == "optimal":
            losses = every(lambda s: self.curve(s, sizes_of[s.axis.name]))
        elif measured:
            scores = every(self.scores)
        sizes: dict[str, int] = {}
        for some, limit in budgets:
            if losses:
                chosen = optimal(some, [losses[item.axis] for item in some], limit)
            elif scores:
                chosen = by_threshold(some, [scores[item.axis] for item in some], limit)
            else:
                chosen = uniform(some, limit)
            sizes |= {item.axis: size for item, size in zip(some, chosen)}
        return Plan(graph.config, sizes, sizes_of, losses, sensitivity)

    @property
    def _gradients(self) -> bool:
        return self.gradients or self.criterion == "taylor" or self.criterion is CRITERIA["taylor"]

    def scores(self, stats: Statistics) -> Tensor:
        criterion = CRITERIA[self.criterion] if isinstance(self.criterion, str) else self.criterion
        scores = criterion(stats)
        if scores.shape != (stats.axis.size,) or not torch.isfinite(scores).all():
            raise InputError(
                "Prune.criterion",
                f"{tuple(scores.shape)} scores for {stats.axis.name}",
                f"{stats.axis.size} finite ones",
            )
        return scores

    def curve(self, stats: Statistics, sizes: Sequence[int]) -> list[float]:
        """The expected loss in nats a token at each size."""
        order = self.scores(stats).argsort()
        if stats.axis.groups > 1:
            order = by_turns(order, stats.axis.groups)
        H = stats.gram / stats.positions
        refitted = self.refit in (True, "reference")
        curve = (
            refit_curve(stats.seen_weight, H, order, stats.width, self.damping)
            if refitted
            else plain_curve(stats.seen_weight, H, order, stats.width)
        )
        return [float(curve[stats.axis.size - size]) for size in sizes]

    def apply(self, graph: Graph, plan: Plan, known: Mapping[str, Statistics] | None = None) -> Graph:
        """`graph` cut to the sizes of a plan made for it, in a walk that shows every layer what the pruned layers before it
        give, or by the statistics that are `known`."""
        if plan.config != graph.config:
            raise InputError("plan", "sizes chosen for another graph", "a plan of the graph that is cut")
        every = axes(graph.config)
        todo = {axis: size for axis, size in plan.sizes.items() if size < every[axis].size}
        if not todo:
            return graph
        graph = with_biases(graph) if self.refit == "bias" else graph
        kept: dict[str, Tensor] = {}

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            axis = next((a for a in reads(feed) if a in todo), None)
            if axis is not None:
                stats = statistics(graph, every[axis], feed, inputs, sensitivity=plan.sensitivity)
                kept[axis], changed = self._reduced(graph, stats, todo[axis], inputs)
                return changed
            if not (self.refit == "reference" and kept and reads(feed)):
                return None
            name = f"{feed.readers[0]}.weight"
            weight, hessian = graph.tensor(name), gram(feed, inputs)
            whole = torch.arange(weight.shape[1], device=hessian.device)
            return {name: self._refitted(weight.to(hessian.device), hessian, whole, inputs).to(weight)}

        if known is None:
            out = walk(graph, self.tokens, visit, reference=self.refit == "reference", progress="Prune")
        else:
            changed: dict[str, Weight] = {}
            for axis, size in todo.items():
                kept[axis], new = self._reduced(graph, known[axis], size)
                changed |= new
            out = graph.replace(weights=changed)
        for axis, units in kept.items():
            out = cut(out, axis, units)
        return out

    def _reduced(
        self, graph: Graph, stats: Statistics, size: int, inputs: Inputs | None = None
    ) -> tuple[Tensor, dict[str, Weight]]:
        """The units of an axis that stay, and what changes of the linear that reads it: at full width, with zeros where units
        went, as a zeroed column computes what a cut one does; shapes change once, at the end."""
        name = stats.axis.reader
        units = keep_best(self.scores(stats), size, stats.axis.groups if size else 1)
        channels = torch.arange(stats.weight.shape[1], device=stats.gram.device).view(-1, stats.width)[units].flatten()
        masked = torch.zeros_like(stats.weight)
        if len(channels):
            masked[:, channels] = self._refitted(stats.weight, stats.gram, channels, inputs).to(masked.dtype)
        return units, self._biases(graph, name.removesuffix(".weight"), stats, channels) | {
            name: masked.to(graph.tensor(name).device)
        }

    def _refitted(self, weight: Tensor, hessian: Tensor, channels: Tensor, inputs: Inputs | None) -> Tensor:
        if self.refit in (False, "bias"):
            return weight[:, channels]
        wanted = None
        if self.refit == "reference" and inputs is not None:
            wanted = wanted_output(weight, hessian, stream_gram(inputs, weight), self.propagate)
        return refit_columns(weight, hessian, channels, self.damping, wanted)

    def _biases(self, graph: Graph, name: str, stats: Statistics, channels: Tensor) -> dict[str, Weight]:
        """The bias of a linear whose inputs are cut, where it changes: FLAP's compensation, or none of a sublayer that goes."""
        bias = f"{name}.bias"
        if bias not in graph.weights:
            return {}
        old = graph.tensor(bias)
        if not len(channels):
            return {bias: torch.zeros_like(old)}
        if self.refit != "bias":
            return {}
        removed = torch.ones(len(stats.mean), dtype=torch.bool, device=channels.device)
        removed[channels] = False
        return {bias: (old.double() + bias_for(stats.weight, stats.mean, removed).to(old.device)).to(old.dtype)}


def with_biases(graph: Graph) -> Graph:
    """The same function with a bias (zero, where there was none) at every o_proj and down_proj."""
    config = dataclasses.replace(graph.config, biases=graph.config.biases | {"o_proj", "down_proj"})
    owners = [feed.readers[0] for feed in feeds(config) if reads(feed)]
    new = {
        f"{o}.bias": torch.zeros(config.hidden_size, dtype=graph.dtype)
        for o in owners
        if f"{o}.bias" not in graph.weights
    }
    return graph.replace(config=config, weights=new)
