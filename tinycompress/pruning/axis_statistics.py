"""What calibration text says of one axis of one layer: the inputs of the linear that reads it, and its weights.

W is the linear that reads the axis channel by channel (the output projection of an attention, the down projection of an
FFN), x its input. Letters: D hidden, K inputs of W, n units of the axis, N windows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..checkpoints.unfinished import Group
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.topology import Axis, Feed, axes
from .sensitivity import Sensitivity


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of one axis.

    Fields:
        axis: the axis.
        weight: W [D, K], which reads the axis.
        gram: Σ x xᵀ [K, K] over the positions, float64.
        mean: E[x] [K], float64.
        absolute: the mean of |x| in each window [N, K].
        positions: how many positions were seen.
        coupled: the parameters that a cut of the axis cuts, by name.
        gradients: ∂L/∂w of each of `coupled`, or None where they were not asked for.
        sensitivity: the Fisher matrix [D, D] at W's output, or None where it was not asked for.
    """

    axis: Axis
    weight: Tensor
    gram: Tensor
    mean: Tensor
    absolute: Tensor
    positions: int
    coupled: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor] | None = None
    sensitivity: Tensor | None = None

    @property
    def width(self) -> int:
        """Inputs of W that a unit of the axis has: 1 for an FFN channel, head_dim for a head."""
        return self.weight.shape[1] // self.axis.size

    def units(self, channels: Tensor) -> Tensor:
        """Values of input channels [K] summed over each unit [n]."""
        return channels.view(self.axis.size, self.width).sum(1)

    def coupled_units(self, values: Mapping[str, Tensor]) -> Tensor:
        """Values of the axis's parameters, shaped like them, summed over all that belongs to a unit: float64 [n]."""
        total = torch.zeros(self.axis.size, dtype=torch.float64, device=self.weight.device)
        for name, (dim, stride) in self.axis.cuts.items():
            rows = values[name].double().movedim(dim, 0).reshape(self.axis.size * stride, -1).sum(1)
            total += rows.view(self.axis.size, stride).sum(1).to(total.device)
        return total

    @property
    def weight_in_nats(self) -> Tensor:
        """√(G/2) · W in float64, so that squared norms are nats; W itself where no sensitivity is known."""
        W = self.weight.double()
        if self.sensitivity is None:
            return W
        return root(self.sensitivity / 2) @ W


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix, float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def axis_statistics(
    graph: Graph,
    axis: Axis,
    feed: Feed,
    inputs: Inputs,
    hessian: Tensor | None = None,
    sensitivity: Sensitivity | None = None,
) -> Statistics:
    """The statistics of `axis` from the inputs of the linear that reads it (a feed of `walk`); `hessian` is their Gram
    matrix, where it is known already."""
    device = torch.device("cpu")
    total: Tensor | None = None
    absolute = []
    positions = 0
    for batch in inputs:  # (b, T, K)
        sums = batch.sum((0, 1), dtype=torch.float64)
        total = sums if total is None else total + sums
        absolute.append(batch.abs().mean(1))
        positions += batch.shape[0] * batch.shape[1]
        device = batch.device
    assert total is not None
    gram_matrix = gram(feed, inputs) if hessian is None else hessian
    return _assembled(graph, axis, gram_matrix, total / positions, torch.cat(absolute), positions, sensitivity, device)


def _assembled(
    graph: Graph,
    axis: Axis,
    gram_matrix: Tensor,
    mean: Tensor,
    absolute: Tensor,
    positions: int,
    sensitivity: Sensitivity | None,
    device: torch.device,
) -> Statistics:
    """What was measured of an axis, with what the graph and its sensitivity say of it."""
    name = axis.reader.removesuffix(".weight")
    gradients = None
    fisher = None
    if sensitivity is not None:
        if sensitivity.gradients is not None:
            gradients = {part: sensitivity.gradients[part].to(device) for part in axis.cuts}
        if name in sensitivity.fisher:
            fisher = sensitivity.fisher[name].to(device)
    return Statistics(
        axis=axis,
        weight=graph.tensor(axis.reader).to(device),
        gram=gram_matrix,
        mean=mean,
        absolute=absolute,
        positions=positions,
        coupled={part: graph.tensor(part).to(device) for part in axis.cuts},
        gradients=gradients,
        sensitivity=fisher,
    )


def measure(
    graph: Graph,
    tokens: Tensor,
    names: Collection[str],
    use: Callable[[Statistics], Tensor],
    sensitivity: Sensitivity | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """`use` of the statistics of each named axis (`layers.i.ffn`, `layers.i.heads`, `layers.i.kv_heads`), from one walk
    over `tokens` [N, T].

    What `use` does not keep is gone when the walk moves on: a Gram matrix of every layer is gigabytes.
    """
    results: dict[str, Tensor] = {}

    def note(name: str, stats: Statistics) -> None:
        results[name] = use(stats)

    _walk_axes(graph, tokens, names, note, results, sensitivity, progress)
    return results


def _walk_axes(
    graph: Graph,
    tokens: Tensor,
    names: Collection[str],
    note: Callable[[str, Statistics], None],
    kept: Group,
    sensitivity: Sensitivity | None,
    progress: bool,
) -> None:
    """Shows `note`, which fills `kept`, the statistics of each named axis."""
    known = axes(graph.config)
    if unknown := [name for name in names if name not in known or known[name].layer is None]:
        accepted = "layers.i.ffn, layers.i.heads and layers.i.kv_heads of sublayers that are there"
        raise InputError("axes", unknown, accepted)

    def visit(feed: Feed, inputs: Inputs) -> None:
        wanted = [name for name in feed.axes if name in names]
        hessian = gram(feed, inputs) if wanted else None
        for name in wanted:
            note(name, axis_statistics(graph, known[name], feed, inputs, hessian, sensitivity))

    walk(graph, tokens, visit, kept=kept, progress="statistics" if progress else None)


def collect(
    graph: Graph,
    tokens: Tensor,
    names: Collection[str],
    sensitivity: Sensitivity | None = None,
    progress: bool = True,
) -> dict[str, Statistics]:
    """The statistics of each named axis themselves, all at once: their Gram matrices stay in memory."""
    kept: dict[str, Tensor] = {}

    def note(name: str, stats: Statistics) -> None:
        kept.update({f"{name} gram": stats.gram, f"{name} mean": stats.mean, f"{name} absolute": stats.absolute})

    _walk_axes(graph, tokens, names, note, kept, sensitivity, progress)
    known = axes(graph.config)
    seen = [key.removesuffix(" gram") for key in kept if key.endswith(" gram")]
    collected: dict[str, Statistics] = {}
    for name in seen:
        gram_matrix, mean, absolute = (kept[f"{name} {part}"] for part in ("gram", "mean", "absolute"))
        device = gram_matrix.device
        collected[name] = _assembled(
            graph, known[name], gram_matrix, mean, absolute, tokens.numel(), sensitivity, device
        )
    return collected
