"""FFN channels alone, the same share of every layer (or a share a layer), in one walk: the quick, uniform case of `Prune`.

Score of channel j (Wanda, arXiv:2306.11695, summed over a column): ‖W_down[:, j]‖² · Σ_t x_j², the energy the channel
adds to the output. After the cut, down_proj is refitted in closed form to give the output it gave with all channels
(refit.py). Each layer is scored and refitted on the activations that the already pruned layers before it produce.
Letters: D hidden, F ffn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.edit import cut
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed
from .refit import refit_columns


@dataclass(frozen=True)
class PruneFFN:
    """Keeps a share `keep` of each FFN's channels (one number, or one a layer), rounded to `multiple_of`."""

    tokens: Tensor = field(repr=False, compare=False)
    keep: float | tuple[float, ...] = 0.75
    multiple_of: int = 1
    refit: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if not all(0 < share <= 1 for share in shares):
            raise InputError("PruneFFN.keep", self.keep, "shares above 0 and at most 1")
        if self.multiple_of < 1:
            raise InputError("PruneFFN.multiple_of", self.multiple_of, "a positive number of channels")

    def __call__(self, graph: Graph) -> Graph:
        widths = self.widths(graph)
        kept: dict[int, Tensor] = {}

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            if feed.layer is None or not feed.readers[0].endswith("down_proj"):
                return None
            name = feed.readers[0]
            weight = graph.tensor(f"{name}.weight")
            width = widths[feed.layer]
            if width == weight.shape[1]:
                return None
            hessian = gram(feed, inputs)
            W = weight.to(hessian.device)
            kept[feed.layer] = keep = torch.topk(channel_scores(W, hessian), width).indices.sort().values
            masked = torch.zeros_like(W)  # a zeroed column computes what a cut one does; shapes change once, at the end
            masked[:, keep] = refit_columns(W, hessian, keep, self.damping).to(W.dtype) if self.refit else W[:, keep]
            return {f"{name}.weight": masked.to(weight.device)}

        out = walk(graph, self.tokens, visit, progress="PruneFFN")
        for layer, keep in kept.items():
            out = cut(out, f"layers.{layer}.ffn", keep)
        return out.replace(by=self)

    def widths(self, graph: Graph) -> list[int]:
        """Kept channels of each layer; needs no data."""
        layers = graph.config.layers
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(layers)
        if len(shares) != len(layers):
            raise InputError(
                "PruneFFN.keep", f"{len(shares)} shares", f"one number, or one for each of the {len(layers)} layers"
            )
        m = self.multiple_of
        out = [min(layer.ffn_dim, round(layer.ffn_dim * share / m) * m) for layer, share in zip(layers, shares)]
        for i, (width, layer) in enumerate(zip(out, layers)):
            if layer.ffn_dim and width == 0:
                raise InputError(
                    "PruneFFN.keep",
                    f"{shares[i]} of {layer.ffn_dim} channels in layer {i}, rounded to 0",
                    f"a share that leaves at least {m}",
                )
        return out


def channel_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """down_proj weight [D, F] and Σ x xᵀ [F, F] to the energy of each input channel, float64 [F]."""
    return weight.double().square().sum(0) * hessian.diagonal()
