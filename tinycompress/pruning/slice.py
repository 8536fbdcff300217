"""Hidden width by rotation: SliceGPT (arXiv:2401.15024), folded so that the result is a plain graph.

The residual stream is turned to its principal axes and the last of them are cut. With the norms folded, C = Σ x xᵀ over the
normalised states in front of every sublayer and of the head, each weighed alike, and C = Q Λ Qᵀ with Λ falling:

    x → x Q[:, :D'],   writers and embedding · Q[:, :D'],   readers Q[:, :D']ᵀ ·

SliceGPT turns each block to axes of its own and keeps the change between them as a matrix on every residual connection;
one Q for all layers keeps the graph plain, at some loss. The head is untied, as the last norm is folded into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.edit import cut, fold_norms, turn
from ..graph.graph import Graph
from ..graph.topology import Feed


@dataclass(frozen=True)
class Slice:
    """Cuts the hidden width to `hidden` channels on calibration `tokens` [windows, seq_len]."""

    tokens: Tensor = field(repr=False, compare=False)
    hidden: int

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise InputError("Slice.hidden", self.hidden, "a positive number of channels")

    def __call__(self, graph: Graph) -> Graph:
        if self.hidden > graph.config.hidden_size:
            raise InputError("Slice.hidden", self.hidden, f"at most the model's {graph.config.hidden_size}")
        folded = fold_norms(graph)
        turned = turn(folded, self.rotation(folded).to(graph.weights["model.norm.weight"].device))
        return cut(turned, "hidden", range(self.hidden)).replace(by=self)

    def rotation(self, folded: Graph) -> Tensor:
        """The principal axes Q [D, D] of a graph with folded norms; no matter how many of them stay."""
        covariances: list[Tensor] = []

        def visit(feed: Feed, inputs: Inputs) -> None:
            if "norm" in feed.source:
                covariances.append(gram(feed, inputs))

        walk(folded, self.tokens, visit, progress="Slice")
        return principal_axes(covariances)


def principal_axes(covariances: Sequence[Tensor]) -> Tensor:
    """Eigenvectors of the sum of Σ x xᵀ [D, D], the largest first: orthogonal, float64 [D, D]."""
    _, vectors = torch.linalg.eigh(torch.stack([c.double() for c in covariances]).sum(0))
    return vectors.flip(1)
