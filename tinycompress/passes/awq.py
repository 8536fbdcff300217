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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate import Inputs, gram, walk
from ..graph import Feed, Graph, Weight, fold
from ..grids import find_grid, round_to_grid
from ..quantize import QuantSpec, QuantTensor, named_specs, targets

RATIOS = tuple(i / 20 for i in range(20))


@dataclass(frozen=True)
class AWQ:
    """Folds the searched scales into the graph and, if `quantize`, rounds the readers to their grids. With
    `quantize=False` the graph stays float (and computes what it did): GPTQ or another quantizer takes it from there.
    `gqa=False` leaves out the v → o fold where several query heads read one KV head, as other implementations do."""

    tokens: Tensor = field(repr=False, compare=False)
    spec: QuantSpec | Mapping[str, QuantSpec] = field(default_factory=QuantSpec)
    quantize: bool = True
    gqa: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))

    def __call__(self, graph: Graph) -> Graph:
        todo = targets(graph, self.spec)
        current = graph

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            nonlocal current
            keys = {name: graph.config.weight_name(name) for name in feed.readers if name in todo}
            if not keys:
                return None
            hessian = gram(feed, inputs)
            scale = torch.ones(len(hessian), device=hessian.device)
            if self.gqa or feed.repeat == 1:
                magnitude = mean_magnitude(inputs, feed.repeat, graph.config.head_dim)
                weights = [current.tensor(key).to(hessian.device).float() for key in keys.values()]
                scale = awq_scale(weights, hessian, magnitude, [todo[name] for name in keys], ", ".join(keys))
                if feed.repeat > 1:  # vectorized powers of equal numbers may differ in the last bit
                    heads = scale.reshape(-1, feed.repeat, graph.config.head_dim)
                    scale = heads[:, :1].expand_as(heads).reshape(-1)
            current = current.replace(weights=fold(current, feed, scale))
            if not self.quantize:
                return None  # nothing that the walk computes has changed
            importance = (hessian.diagonal() / scale.double().square()).float()
            out: dict[str, Weight] = {key: _round(key, current.tensor(key).float(), importance, todo[name]) for name, key in keys.items()}
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


def awq_scale(weights: list[Tensor], hessian: Tensor, magnitude: Tensor, spec: QuantSpec | Sequence[QuantSpec], name: str = "weight") -> Tensor:
    """The scale [K] with the smallest output error for readers `weights` [N, K] of one feed, all on the grid of `spec` or
    each on its own; ones if none helps."""
    specs = [spec] * len(weights) if isinstance(spec, QuantSpec) else spec
    H = hessian.float()
    best, choice = float("inf"), torch.ones_like(magnitude)
    for ratio in RATIOS:
        s = magnitude.pow(ratio).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for W, own in zip(weights, specs):
            delta = _round(name, W * s, H.diagonal() / s.square(), own).dequantize() / s - W
            error += ((delta @ H) * delta).sum().item()
        if error < best:
            best, choice = error, s
    return choice


def _round(name: str, weight: Tensor, importance: Tensor, spec: QuantSpec) -> QuantTensor:
    scales, zeros = find_grid(name, weight, spec, importance)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
