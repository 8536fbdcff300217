"""FFN channels alone, the same share of every layer (or one share for each layer), in one walk: the quick, uniform case
of `Prune`.

Score of channel j (Wanda, arXiv:2306.11695, summed over a column): ‖W_down[:, j]‖² · Σ_t x_j², the energy that the
channel adds to the output. After the cut, the down projection is refitted in closed form to give the output that it
gave with all channels (refit.py). Each layer is scored and refitted on the activations that the already pruned layers
before it produce. Letters: D hidden, F ffn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.config import Config
from ..graph.edit import cut
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed
from .refit import refit_columns


@dataclass(frozen=True)
class PruneFFN:
    """Keeps a share of each FFN's channels.

    Fields:
        tokens: calibration ids [windows, seq_len]: a tensor, or an iterable of tensors or a DataLoader.
        keep: the share of the channels that stays, above 0 and at most 1 (0.75 by default): one number, or a tuple with
            one number for each layer.
        multiple_of: kept widths are rounded to multiples of it, 1 by default.
        refit: whether the down projection is refitted to the output that it gave with all channels. True by default.
        damping: the ridge of the refit, as a share of the mean of diag(H), 0.01 by default.
        device: where the calibration runs; None: where the tokens are.
        progress: whether a progress bar is shown.

    An `InputError` names a field with a value it does not accept, or a share that leaves a layer without channels.
    """

    tokens: Tensor = field(repr=False, compare=False)
    keep: float | tuple[float, ...] = 0.75
    multiple_of: int = 1
    refit: bool = True
    damping: float = 0.01
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,)
        if not all(0 < share <= 1 for share in shares):
            raise InputError("PruneFFN.keep", self.keep, "shares above 0 and at most 1")
        if self.multiple_of < 1:
            raise InputError("PruneFFN.multiple_of", self.multiple_of, "a positive number of channels")

    def plan(self, config: Config) -> Config:
        """The config with the widths that each layer keeps; needs no data."""
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,) * config.n_layers
        if len(shares) != config.n_layers:
            accepted = f"one number, or one for each of the {config.n_layers} layers"
            raise InputError("PruneFFN.keep", f"{len(shares)} shares", accepted)
        layers = []
        for i, (layer, share) in enumerate(zip(config.layers, shares)):
            rounded = round(layer.ffn_dim * share / self.multiple_of) * self.multiple_of
            width = min(layer.ffn_dim, rounded)
            if layer.ffn_dim and width == 0:
                given = f"{share} of {layer.ffn_dim} channels in layer {i}, rounded to 0"
                raise InputError("PruneFFN.keep", given, f"a share that leaves at least {self.multiple_of}")
            layers.append(dataclasses.replace(layer, ffn_dim=width))
        return dataclasses.replace(config, layers=tuple(layers))

    def __call__(self, graph: Graph) -> Graph:
        planned = self.plan(graph.config).layers
        kept: dict[str, Tensor] = {}

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            if feed.layer is None or feed.role != "ffn_out":
                return None
            name = f"{feed.readers[0]}.weight"
            weight = graph.tensor(name)
            width = planned[feed.layer].ffn_dim
            if width == weight.shape[1]:
                return None
            hessian = gram(feed, inputs)
            W = weight.to(hessian.device)
            channels = torch.topk(channel_scores(W, hessian), width).indices.sort().values
            (axis,) = feed.axes
            kept[axis] = channels
            masked = torch.zeros_like(W)  # a zeroed column computes what a cut one does; shapes change once, at the end
            if self.refit:
                masked[:, channels] = refit_columns(W, hessian, channels, self.damping).to(W.dtype)
            else:
                masked[:, channels] = W[:, channels]
            return {name: masked.to(weight.device)}

        tokens = self.tokens if self.device is None else self.tokens.to(self.device)
        pruned = walk(graph, tokens, visit, kept=kept, progress="PruneFFN" if self.progress else None)
        for axis, channels in kept.items():
            pruned = cut(pruned, axis, channels)
        return pruned.replace(by=self)


def channel_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """The energy of each input channel, float64 [F], by a down projection's weight [D, F] and Σ x xᵀ [F, F]."""
    return weight.double().square().sum(0) * hessian.diagonal()
