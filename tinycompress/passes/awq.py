"""AWQ: Activation-aware Weight Quantization (arXiv:2306.00978), as an exact fold that any quantizer can follow.

Channels that matter get a finer share of the grid: with m_j = mean|x_j| of a feed, s_j = max(m_j^r, 1e-4) normalised
by √(max·min), the readers' columns are multiplied by s and the feed's source divided by it, which changes nothing in
float. r is searched over {0, 0.05, … 0.95} for the smallest output error of the readers on their grid, which the
Gram matrix gives exactly: Σ‖(Q(W·s)/s - W)x‖² = tr(Δ H Δᵀ), H = Σ x xᵀ.

Sources are norms (q,k,v and gate,up), up_proj (down) and v_proj (o). For the last under grouped-query attention one KV
channel is read by `repeat` query heads: m is averaged over them and s repeated. That fold is exact as well, and it is
the one that other implementations skip.

Grids are searched with the error weighted by E[x²], which takes the place of the paper's clip search. Letters as in
`quantize`: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate import Inputs, gram, walk
from ..graph import Feed, Graph, Weight, fold
from ..quantize import QuantSpec, QuantTensor, find_grid, round_to_grid, targets

RATIOS = tuple(i / 20 for i in range(20))


@dataclass(frozen=True)
class AWQ:
    """Folds the searched scales into the graph and, if `quantize`, rounds the readers to their grids. With
    `quantize=False` the graph stays float (and computes what it did): GPTQ or another quantizer takes it from there."""

    tokens: Tensor = field(repr=False, compare=False)
    spec: QuantSpec = field(default_factory=QuantSpec)
    quantize: bool = True

    def __call__(self, graph: Graph) -> Graph:
        todo = set(targets(graph, self.spec))
        current = graph

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            nonlocal current
            if not todo.issuperset(feed.readers):
                return None
            hessian = gram(feed, inputs)
            magnitude = mean_magnitude(inputs, feed.repeat, graph.config.head_dim)
            keys = [graph.config.weight_name(name) for name in feed.readers]
            weights = [current.tensor(key).to(hessian.device).float() for key in keys]
            scale = awq_scale(weights, hessian, magnitude, self.spec, ", ".join(feed.readers))
            changed = fold(current, feed, scale)
            current = current.replace(weights=changed)
            if not self.quantize:
                return None  # nothing that the walk computes has changed
            s = scale.double()
            out: dict[str, Weight] = {}
            for key in keys:
                out[key] = _round(key, current.tensor(key).float(), (hessian.diagonal() / s.square()).float(), self.spec)
            current = current.replace(weights=out)
            return {key: current.linear(key.removesuffix(".weight")).dequantize() / scale for key in out}  # what the unfolded inputs need

        walk(graph, self.tokens, visit, progress=f"AWQ {self.spec}")
        return current.replace(by=self)


def mean_magnitude(inputs: Inputs, repeat: int = 1, head_dim: int = 1) -> Tensor:
    """mean|x_j| over all positions, float32 [K]; for a v_proj feed averaged over the query heads of each KV channel."""
    sums = [(x.abs().sum(0), len(x)) for x in (batch.flatten(0, -2).float() for batch in inputs)]
    mean = torch.stack([s for s, _ in sums]).sum(0) / sum(n for _, n in sums)
    if repeat == 1:
        return mean
    heads = mean.reshape(-1, repeat, head_dim)  # query head h reads KV head h // repeat
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def awq_scale(weights: list[Tensor], hessian: Tensor, magnitude: Tensor, spec: QuantSpec, name: str = "weight") -> Tensor:
    """The scale [K] with the smallest output error for readers `weights` [N, K] of one feed; ones if none helps."""
    H, W = hessian.float(), torch.cat(weights)
    best, choice = float("inf"), torch.ones_like(magnitude)
    for ratio in RATIOS:
        s = magnitude.pow(ratio).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        q = _round(name, W * s, (H.diagonal() / s.square()), spec)
        delta = q.dequantize() / s - W
        error = ((delta @ H) * delta).sum().item()
        if error < best:
            best, choice = error, s
    return choice


def _round(name: str, weight: Tensor, importance: Tensor, spec: QuantSpec) -> QuantTensor:
    scales, zeros = find_grid(name, weight, spec, importance)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
