"""Structured pruning of FFN channels, query heads, KV groups and whole sublayers under one budget, with refitting.

Three steps. On a few windows (`probe`) the graph is measured: what each axis of each layer carries, and what an error
there costs in nats (importance.py, sensitivity.py). Then sizes are chosen within the budget (budget.py, allocation.py).
Then one walk over all tokens cuts layer by layer on the activations that the already pruned layers produce, and refits
the linears behind the cuts in closed form (cutting.py, refit.py).

With `one_shot` the walk is left out: scores and refits come from one collection of the whole graph's statistics
(Minitron, LLM-Pruner, FLAP), which any number of budgets can share (`from_statistics`).

The result is a plain graph whose shapes are smaller: nothing is masked and nothing is left to do at run time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.walk import check_calibration
from ..errors import InputError
from ..graph.config import Config
from ..graph.edit import cut
from ..graph.graph import Graph, LazyTensor
from ..graph.topology import axes
from .allocation import ALLOCATIONS, Choice, by_threshold, optimal, uniform
from .axis_statistics import Statistics, collect, measure
from .budget import Budget
from .cutting import REFITS, ChosenSizes, Refit, cut_by_statistics, cut_in_a_walk
from .importance import CRITERIA, Criterion, block_influence, hidden_importance
from .refit import by_turns, keep_best, plain_curve, refit_curve
from .sensitivity import Sensitivity, sensitivities
from .target import Itemsize, Storage


@dataclass(frozen=True)
class Prune:
    """Cuts a graph to one `target` over several axes, or to a budget for each axis (`keep`).

    Fields:
        tokens: calibration ids [windows, seq_len]: a tensor, or an iterable of tensors or a DataLoader.
        target: what the result may cost: "params=0.8" (a share of the non-embedding parameters, or a number of them
            above 1), "bytes=300MB" (of all weights in the graph's dtype, or a share), "flops=0.8" (of the layers'
            linears). Taken from `axes` together.
        keep: in place of `target`, what each axis keeps: {"ffn": 0.75} a share of all channels, {"ffn": 1024} that many
            in each layer. Keys: "ffn", "heads", "kv_heads", and "layers" and "hidden", which are cut first.
        axes: the axes that `target` is taken from, of "ffn", "heads", "kv_heads". FFNs alone by default: each head is
            cheap on its own, many together are not, and no loss measured layer by layer shows it.
        criterion: which units go: a name of `importance.CRITERIA` ("obs" by default), or a function from `Statistics`
            to scores, of which the lowest go first.
        allocation: how the budget is shared out: "optimal" (the default: least expected loss), "global" (one threshold
            for all scores) or "uniform" (every layer the same share).
        refit: how the linears behind a cut make up for it: "reference" (the default) towards the float model's residual
            stream, True to what the linear gave before, "bias" by a bias at the output and down projections (FLAP),
            False not at all.
        multiple_of: widths become multiples of it (64 by default); no smaller than the group size of a quantizer.
        floors: what every layer keeps of an axis, a share or a count above 1: {"ffn": 0.25}.
        sublayers: whether whole attentions and FFNs may go. False by default.
        uneven_kv: whether KV heads may differ between layers, which some runtimes refuse. False by default.
        layout: what the result must fit: "uniform" (layers all alike, which any tool opens), "deci" (llama.cpp's GGUF
            of uneven layers) or "nemotron-nas" (DeciLM's layout, which vLLM reads). None by default: anything.
        stored: how a target in bytes counts, where the model will be quantized behind the cut: {"linears": "w4g64",
            "tables": "w8g64"} are the grids to come, and {"head": "own"} a tied head that a rotation unties. None by
            default: all in the graph's dtype.
        probe: how many windows the measuring takes before sizes are chosen, 8 by default.
        damping: the ridge of refits and losses, as a share of the mean of diag(H), between 0 and 1; 0.01 by default.
        propagate: how far the refit to the reference goes, from 0 (what the linear gave before) to 1 (the float
            model's residual stream); 0.5 by default.
        gradients: whether gradients are measured for a criterion of your own that reads them. False by default.
        one_shot: whether every layer is scored and refitted on the inputs that the whole graph gives it. Their Gram
            matrices stay in memory. False by default; not together with refit="reference".
        seed: of the labels that are drawn for the Fisher matrices.
        device: where the calibration runs; None: where the tokens are.
        progress: whether progress bars are shown.

    An `InputError` names a field with a value it does not accept, a budget that cannot be met (and the nearest that
    can), or a weight that is quantized already.
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
    layout: str | None = None
    stored: Mapping[str, str] | None = None
    probe: int = 8
    damping: float = 0.01
    propagate: float = 0.5
    gradients: bool = False
    one_shot: bool = False
    seed: int = 0
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        _ = self.budget  # it checks itself
        if self.stored is not None:
            Storage.of(self.stored, 4, "Prune.stored")
        if isinstance(self.criterion, str) and self.criterion not in CRITERIA:
            accepted = " | ".join(CRITERIA) + " | a function of Statistics"
            raise InputError("Prune.criterion", repr(self.criterion), accepted)
        if self.allocation not in ALLOCATIONS:
            raise InputError("Prune.allocation", repr(self.allocation), " | ".join(ALLOCATIONS))
        if self.refit not in REFITS:
            raise InputError("Prune.refit", repr(self.refit), "True | False | 'reference' | 'bias'")
        if self.one_shot and self.refit == "reference":
            accepted = "True | False | 'bias': what a cut prefix gives is never seen in one shot"
            raise InputError("Prune.refit", "'reference' with one_shot", accepted)
        if not isinstance(self.probe, int) or self.probe < 1:
            raise InputError("Prune.probe", self.probe, "a positive integer")
        if not 0 < self.damping < 1:
            raise InputError("Prune.damping", self.damping, "a fraction of the mean of diag(H), between 0 and 1")
        if not 0 <= self.propagate <= 1:
            accepted = "a number from 0 (what each linear gave) to 1 (the float model's stream)"
            raise InputError("Prune.propagate", self.propagate, accepted)

    @property
    def budget(self) -> Budget:
        return Budget(
            self.target,
            self.keep,
            self.axes,
            self.multiple_of,
            self.floors,
            self.sublayers,
            self.uneven_kv,
            self.layout,
        )

    def storage(self, graph: Graph) -> Itemsize:
        """What a target in bytes counts in."""
        itemsize = graph.dtype.itemsize
        return itemsize if self.stored is None else Storage.of(self.stored, itemsize, "Prune.stored")

    def plan(self, config: Config, itemsize: Itemsize = 4) -> Config:
        """A config like the one that the pass will arrive at, without data: its budgets are shared out uniformly.

        `itemsize`: what a target in bytes counts in: the bytes of one weight, or how weights will be stored.
        """
        return self.budget.plan(config, itemsize)

    def __call__(self, graph: Graph) -> Graph:
        self.check(graph)
        check_calibration(graph, self.tokens)
        if self.uneven_kv and "kv_heads" in self.budget.kinds:
            warnings.warn(
                "KV heads that differ between layers: the ort profile loses Optimum, which has one cache shape for all "
                "layers, and onnxruntime-genai before 0.15; the other profiles carry them; transformers loads the "
                "model through tinycompress only",
                stacklevel=2,
            )
        graph = self.reshape(graph)
        if self.one_shot:
            return self._in_one_shot(graph, self.collect(graph))
        return self.cut_to(graph, self.choose(graph)).replace(by=self)

    def check(self, graph: Graph) -> None:
        """An `InputError` for whatever could not work, without reading a weight."""
        for name, entry in graph.weights.entries.items():
            if not isinstance(entry, Tensor | LazyTensor):
                raise InputError(name, f"a weight quantized to {entry.grid}", "a dense one (quantize last)")
        self.budget.limits(self.budget.reshaped(graph.config), self.storage(graph))

    def reshape(self, graph: Graph) -> Graph:
        """The graph without the layers of least block influence, then without the hidden channels of least importance
        (Minitron), where `keep` names them."""
        layers = self.budget.kept("layers", graph.config.n_layers, 1)
        if layers < graph.config.n_layers:
            influence = block_influence(graph, self._calibration, self.progress)
            graph = cut(graph, "layers", keep_best(influence, layers))
        hidden = self.budget.kept("hidden", graph.config.hidden_size, self.multiple_of)
        if hidden < graph.config.hidden_size:
            importance = hidden_importance(graph, self._calibration, self.progress)
            graph = cut(graph, "hidden", keep_best(importance, hidden))
        return graph

    # measuring

    def sensitivity(self, graph: Graph) -> Sensitivity | None:
        """Fisher matrices and gradients, as far as allocation and criterion read them."""
        # a named criterion other than obs reads no Fisher matrix, nor do shares of its scores
        named = isinstance(self.criterion, str) and self.criterion != "obs"
        fisher = self.allocation == "optimal" or (self.allocation == "global" and not named)
        if not (fisher or self._needs_gradients):
            return None
        windows = self._calibration[: max(1, self.probe // 4)]
        return sensitivities(
            graph, windows, self._needs_gradients, self.seed, fisher=fisher or not named, progress=self.progress
        )

    def collect(self, graph: Graph) -> dict[str, Statistics]:
        """The statistics of every axis that is budgeted, by its name, which `from_statistics` reads; with gradients
        where the criterion wants them."""
        names = [choice.axis for choice in self._choices(graph)]
        return collect(graph, self._calibration, names, self.sensitivity(graph), self.progress)

    def from_statistics(self, graph: Graph, measured: Mapping[str, Statistics]) -> Graph:
        """The cut in one shot by statistics of this graph that `collect` gave, for whatever budget."""
        self.check(graph)
        if not self.one_shot:
            raise InputError("Prune.one_shot", False, "True where the statistics are given")
        if reshaped := [key for key in ("layers", "hidden") if key in (self.keep or {})]:
            accepted = "axes of layers: layers and hidden width change what statistics say"
            raise InputError("Prune.keep", reshaped, accepted)
        self._check_statistics(graph, measured)
        return self._in_one_shot(graph, measured)

    def _check_statistics(self, graph: Graph, measured: Mapping[str, Statistics]) -> None:
        known = axes(graph.config)
        for axis in (choice.axis for choice in self._choices(graph)):
            if axis not in measured:
                accepted = "those of every axis in the budget (Prune.collect)"
                raise InputError("statistics", f"none of {axis}", accepted)
            stats = measured[axis]
            same_weight = stats.axis == known[axis] and torch.equal(
                stats.weight, graph.tensor(stats.axis.reader).to(stats.weight.device)
            )
            if not same_weight:
                raise InputError("statistics", f"{axis} of another graph", "statistics of the graph that is cut")
            if self.allocation == "optimal" and stats.sensitivity is None:
                accepted = "statistics that Prune.collect made for this allocation"
                raise InputError("statistics", f"no Fisher matrix for {axis}", accepted)

    def _in_one_shot(self, graph: Graph, measured: Mapping[str, Statistics]) -> Graph:
        return self.cut_to(graph, self.choose(graph, measured), measured).replace(by=self)

    # choosing

    def choose(self, graph: Graph, measured: Mapping[str, Statistics] | None = None) -> ChosenSizes:
        """The sizes within the budget; where the allocation needs data, from `probe` windows or from what was
        `measured` before."""
        limits = self.budget.limits(graph.config, self.storage(graph))
        candidates = {choice.axis: choice.sizes for limited in limits for choice in limited.choices}
        needs_data = self.allocation != "uniform" and any(len(sizes) > 1 for sizes in candidates.values())
        sensitivity = None
        if candidates and measured is None and (needs_data or self._needs_gradients):
            sensitivity = self.sensitivity(graph)

        def for_every_axis(use: Callable[[Statistics], Tensor]) -> dict[str, Tensor]:
            if measured is not None:
                return {axis: use(measured[axis]) for axis in candidates}
            windows = self._calibration[: self.probe]
            return measure(graph, windows, candidates, use, sensitivity, self.progress)

        losses: dict[str, list[float]] = {}
        scores: dict[str, Tensor] = {}
        if needs_data and self.allocation == "optimal":
            curves = for_every_axis(
                lambda stats: torch.tensor(self.curve(stats, candidates[stats.axis.name]), dtype=torch.float64)
            )
            losses = {axis: curve.tolist() for axis, curve in curves.items()}
        elif needs_data:
            scores = for_every_axis(self.scores)
        sizes: dict[str, int] = {}
        for limited in limits:
            if losses:
                chosen = optimal(limited.choices, [losses[c.axis] for c in limited.choices], limited.limit)
            elif scores:
                chosen = by_threshold(limited.choices, [scores[c.axis] for c in limited.choices], limited.limit)
            else:
                chosen = uniform(limited.choices, limited.limit)
            sizes |= {choice.axis: size for choice, size in zip(limited.choices, chosen)}
        return ChosenSizes(graph.config, sizes, candidates, losses, sensitivity)

    def scores(self, stats: Statistics) -> Tensor:
        """The criterion's score of each unit of an axis [n]."""
        criterion = CRITERIA[self.criterion] if isinstance(self.criterion, str) else self.criterion
        scores = criterion(stats)
        if scores.shape != (stats.axis.size,) or not torch.isfinite(scores).all():
            given = f"{tuple(scores.shape)} scores for {stats.axis.name}"
            raise InputError("Prune.criterion", given, f"{stats.axis.size} finite ones")
        return scores

    def curve(self, stats: Statistics, sizes: Sequence[int]) -> list[float]:
        """The expected loss of an axis in nats a token at each of `sizes`."""
        order = self.scores(stats).argsort()
        if stats.axis.groups > 1:
            order = by_turns(order, stats.axis.groups)
        H = stats.gram / stats.positions
        if self.refit in (True, "reference"):
            curve = refit_curve(stats.weight_in_nats, H, order, stats.width, self.damping)
        else:
            curve = plain_curve(stats.weight_in_nats, H, order, stats.width)
        return [float(curve[stats.axis.size - size]) for size in sizes]

    def cut_to(self, graph: Graph, chosen: ChosenSizes, measured: Mapping[str, Statistics] | None = None) -> Graph:
        """`graph` cut to sizes chosen for it, in a walk over the tokens, or by what was `measured` before."""
        refit = Refit(self.refit, self.damping, self.propagate)
        if measured is not None:
            return cut_by_statistics(graph, measured, chosen, self.scores, refit)
        return cut_in_a_walk(graph, self._calibration, chosen, self.scores, refit, self.progress)

    @property
    def _calibration(self) -> Tensor:
        return self.tokens if self.device is None else self.tokens.to(self.device)

    @property
    def _needs_gradients(self) -> bool:
        return self.gradients or self.criterion == "taylor" or self.criterion is CRITERIA["taylor"]

    def _choices(self, graph: Graph) -> list[Choice]:
        limits = self.budget.limits(graph.config, self.storage(graph))
        return [choice for limited in limits for choice in limited.choices]
