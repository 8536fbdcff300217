"""SmoothQuant (arXiv:2211.10438): outliers of activations moved into the weights, as an exact fold.

A few channels of an activation are far larger than the others and take its 8-bit range for themselves. Dividing channel
j by s_j and multiplying column j of the readers by it changes nothing in float, and shares the difficulty out:

    s_j = max|x_j|^α / max|W_:j|^(1-α)

α = 1 makes all channels of the activation alike, α = 0 all columns of the weights; the paper takes 0.5, and 0.8 or more
for models whose activations are harder. Divided are norms (read by q,k,v and by gate,up), as in the paper, and with
`writers` also v_proj (o) and up_proj (down). One KV channel is read by `repeat` query heads under grouped-query
attention: it has one s, from the largest activation and weight of them all.

It leaves a float graph: a quantizer follows. Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.edit import fold
from ..graph.graph import Graph, Weight
from ..graph.topology import Feed


@dataclass(frozen=True)
class SmoothQuant:
    """Folds the scales of calibration `tokens` [windows, seq_len] into the norms and, if `writers`, into v_proj and
    up_proj. The head's feed stays as it is: heads keep float inputs."""

    tokens: Tensor = field(repr=False, compare=False)
    alpha: float = 0.5
    writers: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(
                "SmoothQuant.alpha", self.alpha, "a number between 0 (weights alike) and 1 (activations alike)"
            )

    def __call__(self, graph: Graph) -> Graph:
        current = graph

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            nonlocal current
            if feed.layer is None or not (self.writers or "norm" in feed.source):
                return None
            peak = peaks(inputs)
            if not torch.isfinite(peak).all():
                raise InputError(
                    f"inputs of {', '.join(feed.readers)}",
                    "NaN or infinite values",
                    "finite activations (look at the weights before it)",
                )
            weights = [current.tensor(current.config.weight_name(name)).to(peak.device) for name in feed.readers]
            scale = smooth_scale(peak, weights, self.alpha, feed.repeat, graph.config.head_dim)
            current = current.replace(weights=fold(current, feed, scale))
            return None  # nothing that the walk computes has changed

        walk(graph, self.tokens, visit, progress="SmoothQuant")
        return current.replace(by=self)


def peaks(inputs: Inputs) -> Tensor:
    """max|x_j| over all positions, float32 [K]."""
    return torch.stack([batch.flatten(0, -2).float().abs().amax(0) for batch in inputs]).amax(0)


def smooth_scale(peak: Tensor, weights: Sequence[Tensor], alpha: float, repeat: int = 1, head_dim: int = 1) -> Tensor:
    """s float64 [K] from max|x_j| [K] and the readers' weights [N, K]; 1 for channels that are never active or never read.
    The `repeat` query heads of one KV head (repeat > 1) get the same s."""
    x = peak.double()
    w = torch.cat([weight.double().abs().amax(0, keepdim=True) for weight in weights]).amax(0)
    if repeat > 1:  # query head h reads KV head h // repeat
        x, w = (t.reshape(-1, repeat, head_dim).amax(1) for t in (x, w))  # (KV heads, head_dim)
    s = torch.where((x > 0) & (w > 0), x.pow(alpha) / w.pow(1 - alpha), 1.0)
    return s if repeat == 1 else s[:, None].expand(-1, repeat, -1).reshape(-1)
