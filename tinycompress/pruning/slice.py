"""Hidden width by rotation: SliceGPT (arXiv:2401.15024), folded so that the result is a plain graph.

The residual stream is turned to its principal axes and the last of them are cut. With the norms folded, C = Σ x xᵀ over
the normalised states in front of every sublayer and of the head, each weighed alike, and C = Q Λ Qᵀ with Λ falling:

    x → x Q[:, :D'],   writers and embedding · Q[:, :D'],   readers Q[:, :D']ᵀ ·

SliceGPT turns each block to axes of its own and keeps the change between them as a matrix on every residual connection;
one Q for all layers keeps the graph plain, at some loss. The head is untied, as the last norm is folded into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.config import FINAL_NORM, Config
from ..graph.edit import cut, fold_norms, turn
from ..graph.graph import Graph
from ..graph.topology import Feed


@dataclass(frozen=True)
class Slice:
    """Cuts the hidden width to the channels that carry most, after a rotation.

    Fields:
        tokens: calibration ids [windows, seq_len]: a tensor, or an iterable of tensors or a DataLoader.
        hidden: how many hidden channels stay, from 1 to the model's hidden size.
        device: where the calibration runs; None: where the tokens are.
        progress: whether a progress bar is shown.

    An `InputError` names `hidden` where the model has fewer channels.
    """

    tokens: Tensor = field(repr=False, compare=False)
    hidden: int
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise InputError("Slice.hidden", self.hidden, "a positive number of channels")

    def plan(self, config: Config) -> Config:
        """The config with `hidden` channels and a head of its own; needs no data."""
        if self.hidden > config.hidden_size:
            raise InputError("Slice.hidden", self.hidden, f"at most the model's {config.hidden_size}")
        norm_eps = config.norm_eps * config.hidden_size / self.hidden  # the mean of a norm runs over fewer channels
        return dataclasses.replace(config, hidden_size=self.hidden, norm_eps=norm_eps, tie_embeddings=False)

    def __call__(self, graph: Graph) -> Graph:
        self.plan(graph.config)  # refuses what the model is too narrow for
        folded = fold_norms(graph)
        turned = turn(folded, self.rotation(folded).to(graph.weights[f"{FINAL_NORM}.weight"].device))
        return cut(turned, "hidden", range(self.hidden)).replace(by=self)

    def rotation(self, folded: Graph) -> Tensor:
        """The principal axes Q [D, D] of a graph with folded norms; no matter how many of them stay."""
        covariances: dict[str, Tensor] = {}

        def visit(feed: Feed, inputs: Inputs) -> None:
            if feed.behind_norm:
                covariances[str(len(covariances))] = gram(feed, inputs)

        tokens = self.tokens if self.device is None else self.tokens.to(self.device)
        walk(folded, tokens, visit, kept=covariances, progress="Slice" if self.progress else None)
        return principal_axes(list(covariances.values()))


def principal_axes(covariances: Sequence[Tensor]) -> Tensor:
    """Eigenvectors of the sum of Σ x xᵀ [D, D], the largest first: orthogonal, float64 [D, D]."""
    _, vectors = torch.linalg.eigh(torch.stack([c.double() for c in covariances]).sum(0))
    return vectors.flip(1)
