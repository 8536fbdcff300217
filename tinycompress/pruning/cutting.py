"""A graph cut to chosen sizes, the linears behind the cuts refitted (refit.py).

  cut_in_a_walk       every layer is scored and refitted on what the already pruned layers before it give
  cut_by_statistics   every layer is scored and refitted on what the whole graph gives it (one shot)

Letters: D hidden, K inputs of a linear, n units of an axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.gram import gram, stream_gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.config import KINDS, Config
from ..graph.edit import cut
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed, axes, feeds
from .allocation import resize
from .axis_statistics import Statistics, axis_statistics
from .refit import bias_for, keep_best, refit_columns, wanted_output
from .sensitivity import Sensitivity

REFITS = (True, False, "reference", "bias")
Scores = Callable[[Statistics], Tensor]


@dataclass(frozen=True, eq=False)
class ChosenSizes:
    """Sizes chosen for the axes of a graph.

    Fields:
        config: the config of the graph that they were chosen for.
        sizes: the units that each axis keeps, by the name of the axis.
        candidates: the sizes that each axis could have had, rising.
        losses: the expected loss in nats a token at each of `candidates`, for the axes where it was measured.
        sensitivity: Fisher matrices and gradients, where they were measured: the criterion reads them again at the cut.
    """

    config: Config
    sizes: Mapping[str, int]
    candidates: Mapping[str, tuple[int, ...]]
    losses: Mapping[str, list[float]]
    sensitivity: Sensitivity | None = None

    @property
    def pruned(self) -> Config:
        """The config after the cut."""
        return resize(self.config, self.sizes)

    def draw(self, path: str | Path) -> None:
        """Writes a PNG: widths of every layer before and after, and the loss of every axis against its size."""
        from .plot import draw_widths

        curves = {axis: (self.candidates[axis], losses) for axis, losses in self.losses.items()}
        draw_widths(path, self.config, self.pruned, curves)

    def changes(self, config: Config) -> dict[str, int]:
        """The sizes that differ from those of a graph with `config`, which must be the one they were chosen for."""
        if self.config != config:
            raise InputError("sizes", "sizes chosen for another graph", "those chosen for the graph that is cut")
        now = axes(config)
        return {axis: size for axis, size in self.sizes.items() if size < now[axis].size}


@dataclass(frozen=True)
class Refit:
    """How a linear whose inputs are cut makes up for them.

    Fields:
        mode: "reference": towards the float model's residual stream; True: to what the linear gave before; "bias": by
            its bias, which takes over what the lost inputs gave on average; False: not at all.
        damping: the ridge, as a share of the mean of diag(H).
        propagate: how far "reference" goes, from 0 (what the linear gave before) to 1 (the float model's stream).
    """

    mode: bool | str
    damping: float
    propagate: float

    def columns(self, weight: Tensor, hessian: Tensor, channels: Tensor, inputs: Inputs | None) -> Tensor:
        """The weight [D, K'] on the `channels` that stay, of `weight` [D, K]; hessian Σ x xᵀ [K, K] of its `inputs`."""
        if self.mode in (False, "bias"):
            return weight[:, channels]
        wanted = None
        if self.mode == "reference" and inputs is not None:
            wanted = wanted_output(weight, hessian, stream_gram(inputs, weight), self.propagate)
        return refit_columns(weight, hessian, channels, self.damping, wanted)

    def reduced(
        self, graph: Graph, stats: Statistics, scores: Scores, size: int, inputs: Inputs | None = None
    ) -> tuple[Tensor, dict[str, Weight]]:
        """The units of an axis that stay, and what changes of the linear that reads it.

        The linear stays at full width, with zeros where units went, as a zeroed column computes what a cut one does;
        shapes change once, at the end.
        """
        name = stats.axis.reader
        units = keep_best(scores(stats), size, stats.axis.groups if size else 1)
        channels = torch.arange(stats.weight.shape[1], device=stats.gram.device).view(-1, stats.width)[units].flatten()
        masked = torch.zeros_like(stats.weight)
        if len(channels):
            masked[:, channels] = self.columns(stats.weight, stats.gram, channels, inputs).to(masked.dtype)
        changed: dict[str, Weight] = self._biases(graph, name.removesuffix(".weight"), stats, channels)
        changed[name] = masked.to(graph.tensor(name).device)
        return units, changed

    def _biases(self, graph: Graph, name: str, stats: Statistics, channels: Tensor) -> dict[str, Weight]:
        """The bias of the linear `name`, where it changes: it takes over the mean of what went (FLAP), or is zero where
        the whole sublayer goes."""
        bias = f"{name}.bias"
        if bias not in graph.weights:
            return {}
        old = graph.tensor(bias)
        if not len(channels):
            return {bias: torch.zeros_like(old)}
        if self.mode != "bias":
            return {}
        removed = torch.ones(len(stats.mean), dtype=torch.bool, device=channels.device)
        removed[channels] = False
        added = bias_for(stats.weight, stats.mean, removed).to(old.device)
        return {bias: (old.double() + added).to(old.dtype)}


def cut_in_a_walk(
    graph: Graph, tokens: Tensor, chosen: ChosenSizes, scores: Scores, refit: Refit, progress: bool = True
) -> Graph:
    """`graph` cut to the chosen sizes in one walk over tokens [N, T]; `scores` says which units of an axis stay."""
    sizes = chosen.changes(graph.config)
    if not sizes:
        return graph
    known = axes(graph.config)
    graph = with_biases(graph) if refit.mode == "bias" else graph
    kept: dict[str, Tensor] = {}

    def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
        axis = next((name for name in feed.axes if name in sizes), None)
        if axis is not None:
            stats = axis_statistics(graph, known[axis], feed, inputs, sensitivity=chosen.sensitivity)
            kept[axis], changed = refit.reduced(graph, stats, scores, sizes[axis], inputs)
            return changed
        if not (refit.mode == "reference" and kept and feed.writes_stream):
            return None
        # nothing is cut here, but the inputs are no longer the float model's: the linear corrects the stream
        name = f"{feed.readers[0]}.weight"
        weight = graph.tensor(name)
        hessian = gram(feed, inputs)
        everything = torch.arange(weight.shape[1], device=hessian.device)
        return {name: refit.columns(weight.to(hessian.device), hessian, everything, inputs).to(weight)}

    needs_reference = refit.mode == "reference"
    bar = "Prune" if progress else None
    walked = walk(graph, tokens, visit, reference=needs_reference, kept=kept, progress=bar)
    return _cut_all(walked, kept)


def cut_by_statistics(
    graph: Graph, measured: Mapping[str, Statistics], chosen: ChosenSizes, scores: Scores, refit: Refit
) -> Graph:
    """`graph` cut to the chosen sizes by statistics of this graph that were `measured` before, by axis."""
    sizes = chosen.changes(graph.config)
    if not sizes:
        return graph
    graph = with_biases(graph) if refit.mode == "bias" else graph
    kept: dict[str, Tensor] = {}
    changed: dict[str, Weight] = {}
    for axis, size in sizes.items():
        kept[axis], weights = refit.reduced(graph, measured[axis], scores, size)
        changed |= weights
    return _cut_all(graph.replace(weights=changed), kept)


def _cut_all(graph: Graph, kept: Mapping[str, Tensor]) -> Graph:
    for axis, units in kept.items():
        graph = cut(graph, axis, units)
    return graph


def with_biases(graph: Graph) -> Graph:
    """The same function with a bias (zero, where there was none) at every linear that writes to the residual stream."""
    writers = {name for name, (kind, _) in KINDS.items() if kind in ("output", "down")}
    config = dataclasses.replace(graph.config, biases=graph.config.biases | writers)
    names = [f"{feed.readers[0]}.bias" for feed in feeds(config) if feed.writes_stream]
    zeros = {name: torch.zeros(config.hidden_size, dtype=graph.dtype) for name in names if name not in graph.weights}
    return graph.replace(config=config, weights=zeros)
