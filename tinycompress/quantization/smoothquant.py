"""SmoothQuant (arXiv:2211.10438): outliers of activations moved into the weights, as an exact fold.

A few channels of an activation are far larger than the others and take its 8-bit range for themselves. Dividing channel
j by s_j and multiplying column j of the readers by it changes nothing in float, and shares the difficulty out:

    s_j = max|x_j|^α / max|W_:j|^(1-α)

α = 1 makes all channels of the activation alike, α = 0 all columns of the weights; the paper takes 0.5, and 0.8 or more
for models whose activations are harder. Divided are norms (read by query, key and value, and by gate and up), as in the
paper, and with `writers` also the value projection (read by output) and the up projection (read by down). One KV
channel is read by `repeat` query heads under grouped-query attention: it has one s, from the largest activation and
weight of them all.

It leaves a float graph: a quantizer follows.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.edit import fold
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed


@dataclass(frozen=True)
class SmoothQuant:
    """Folds scales of the activations into norms and weights. The head's inputs stay as they are: heads keep float
    inputs.

    Fields:
        tokens: ids [windows, seq_len], or an iterable of them such as a DataLoader. Their device does the work.
        alpha: how much of the difficulty moves into the weights, from 0 (all their columns alike) to 1 (all channels of
            the activation alike). Default 0.5.
        writers: whether the inputs of the output and the down projection are scaled too. Default True.
        device: where the work is done, such as "cuda". Default None: the device of `tokens`.
        progress: whether a bar over the layers is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for an alpha out of range, tokens that are not of the model, weights that are packed
    already, and activations that are not finite.
    """

    tokens: Tensor | Iterable[Any] = field(repr=False, compare=False)
    alpha: float = 0.5
    writers: bool = True
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if not 0 <= self.alpha <= 1:
            accepted = "a number between 0 (weights alike) and 1 (activations alike)"
            raise InputError("SmoothQuant.alpha", self.alpha, accepted)

    def __call__(self, graph: Graph) -> Graph:
        kept: dict[str, Weight] = {}  # what is no longer as the graph has it

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            if feed.role == "head" or (feed.writes_stream and not self.writers):
                return None
            peak = peaks(inputs)
            if not torch.isfinite(peak).all():
                readers = ", ".join(feed.readers)
                remedy = "finite activations (look at the weights before it)"
                raise InputError(f"inputs of {readers}", "NaN or infinite values", remedy)
            current = graph.replace(weights=kept)
            weights = [current.tensor(current.config.weight_name(name)).to(peak.device) for name in feed.readers]
            scale = smooth_scale(peak, weights, self.alpha, feed.repeat, graph.config.head_dim)
            kept.update(fold(current, feed, scale))
            return None  # nothing that the walk computes has changed

        tokens = as_tokens(self.tokens).to(self.device)
        walk(graph, tokens, visit, kept=kept, progress="SmoothQuant" if self.progress else None)
        return graph.replace(weights=kept, by=self)


def peaks(inputs: Inputs) -> Tensor:
    """max|x_j| over all positions, float32 [K]."""
    return torch.stack([batch.flatten(0, -2).float().abs().amax(0) for batch in inputs]).amax(0)


def smooth_scale(peak: Tensor, weights: Sequence[Tensor], alpha: float, repeat: int = 1, head_dim: int = 1) -> Tensor:
    """s float64 [K] from max|x_j| [K] and the readers' weights [N, K]; 1 for channels that are never active or never
    read. The `repeat` query heads of one KV head (repeat > 1) get the same s."""
    x = peak.double()
    w = torch.cat([weight.double().abs().amax(0, keepdim=True) for weight in weights]).amax(0)
    if repeat > 1:  # query head h reads KV head h // repeat
        x = x.reshape(-1, repeat, head_dim).amax(1)  # (KV heads, head_dim)
        w = w.reshape(-1, repeat, head_dim).amax(1)
    s = torch.where((x > 0) & (w > 0), x.pow(alpha) / w.pow(1 - alpha), 1.0)
    return s if repeat == 1 else s[:, None].expand(-1, repeat, -1).reshape(-1)
