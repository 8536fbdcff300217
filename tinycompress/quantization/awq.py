"""AWQ: Activation-aware Weight Quantization (arXiv:2306.00978), as an exact fold that any quantizer can follow.

Channels that matter get a finer share of the grid: with m_j = mean|x_j| of a feed, s_j = max(m_j^r, 1e-4) normalised
by √(max·min), the readers' columns are multiplied by s and the feed's source divided by it, which changes nothing in
float. r is searched over {0, 0.05, … 0.95} for the smallest output error of the readers on their grid, which the
Gram matrix gives exactly: Σ‖(Q(W·s)/s - W)x‖² = tr(Δ H Δᵀ), H = Σ x xᵀ.

Sources are norms (q,k,v and gate,up), up_proj (down) and v_proj (o). For the last under grouped-query attention one KV
channel is read by `repeat` query heads: m is averaged over them and s repeated. That fold is exact as well, and it is
the one that other implementations skip.

Grids are searched with the error weighted by E[x²], in place of the paper's search (`clip`), which covers the range of each
group, then shrinks it by the output error of the group alone, tr(Δ_g H_gg Δ_gᵀ), except for q_proj and k_proj. Letters as
in `quantize`: N out_features, K in_features, G groups, g their size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.edit import fold
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import Feed
from .grid_search import find_grid, round_to_grid
from .linear_specs import named_specs, targets

RATIOS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 20 for i in range(10))  # parts of a group's range
NOT_CLIPPED = ("q_proj", "k_proj")  # errors of these two multiply in the scores


@dataclass(frozen=True)
class AWQ:
    """Folds the searched scales into the graph and, if `quantize`, rounds the readers to their grids. With
    `quantize=False` the graph stays float (and computes what it did): GPTQ or another quantizer takes it from there.
    `gqa=False` leaves out the v → o fold where several query heads read one KV head, as other implementations do; `clip=True`
    takes the paper's grids and its clip search, to compare."""

    tokens: Tensor = field(repr=False, compare=False)
    spec: QuantSpec | Mapping[str, QuantSpec] = field(default_factory=QuantSpec)
    quantize: bool = True
    gqa: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))
        for spec in self.spec.values() if isinstance(self.spec, Mapping) else (self.spec,):
            if self.clip and spec.search not in ("auto", "minmax"):
                raise InputError(
                    "AWQ.clip",
                    f"True with the {spec.search} scales of {spec}",
                    "clip=False, or a spec that leaves the scales open",
                )

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
                specs = [_covering(todo[name]) if self.clip else todo[name] for name in keys]
                scale = awq_scale(weights, hessian, magnitude, specs, ", ".join(keys))
                if feed.repeat > 1:  # vectorized powers of equal numbers may differ in the last bit
                    heads = scale.reshape(-1, feed.repeat, graph.config.head_dim)
                    scale = heads[:, :1].expand_as(heads).reshape(-1)
            current = current.replace(weights=fold(current, feed, scale))
            if not self.quantize:
                return None  # nothing that the walk computes has changed
            folded = hessian / torch.outer(scale.double(), scale.double())
            out: dict[str, Weight] = {
                key: self._quantized(key, current.tensor(key).float(), folded, todo[name]) for name, key in keys.items()
            }
            current = current.replace(weights=out)
            return {
                key: current.linear(key.removesuffix(".weight")).dequantize() / scale for key in out
            }  # what the unfolded inputs need

        walk(graph, self.tokens, visit, progress=f"AWQ {self.spec}")
        return current.replace(by=self)

    def _quantized(self, key: str, weight: Tensor, hessian: Tensor, spec: QuantSpec) -> QuantTensor:
        if not self.clip:
            return _round(key, weight, hessian.diagonal().float(), spec)
        clips = (1.0,) if key.split(".")[-2] in NOT_CLIPPED else CLIPS
        scales, zeros = clip_grid(key, weight, hessian, spec, clips)
        return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)


def mean_magnitude(inputs: Inputs, repeat: int = 1, head_dim: int = 1) -> Tensor:
    """mean|x_j| over all positions, float32 [K]; for a v_proj feed averaged over the query heads of each KV channel."""
    sums = [(x.abs().sum(0), len(x)) for x in (batch.flatten(0, -2).float() for batch in inputs)]
    mean = torch.stack([s for s, _ in sums]).sum(0) / sum(n for _, n in sums)
    if repeat == 1:
        return mean
    heads = mean.reshape(-1, repeat, head_dim)  # query head h reads KV head h // repeat
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def awq_scale(
    weights: list[Tensor],
    hessian: Tensor,
    magnitude: Tensor,
    spec: QuantSpec | Sequence[QuantSpec],
    name: str = "weight",
) -> Tensor:
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


def clip_grid(
    name: str, weight: Tensor, hessian: Tensor, spec: QuantSpec, clips: Sequence[float] = CLIPS
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [N, G] of the grids that cover one of `clips` of each group's range: the one with the smallest
    output error of the group, tr(Δ_g H_gg Δ_gᵀ), for weight [N, K] and hessian [K, K]."""
    g = spec.group(name, weight.shape[1])
    w = weight.reshape(len(weight), -1, g)
    H = torch.stack([hessian[i : i + g, i : i + g] for i in range(0, len(hessian), g)]).to(w)  # (G, g, g)
    peak = w.abs().amax(-1, keepdim=True)
    best = torch.full(w.shape[:2], torch.inf, device=w.device)
    scales = zeros = None
    for clip in clips:
        s, z = find_grid(name, w.clamp(-clip * peak, clip * peak).flatten(1), _covering(spec))
        delta = QuantTensor.from_ints(round_to_grid(weight, s, z, spec), s, z, spec).dequantize().view_as(w) - w
        error = torch.einsum("ngi,gij,ngj->ng", delta, H, delta)
        better = error < best
        best = torch.where(better, error, best)
        scales = s if scales is None else torch.where(better, s, scales)
        zeros = z if zeros is None or z is None else torch.where(better, z, zeros)
    assert scales is not None
    return scales, zeros


def _covering(spec: QuantSpec) -> QuantSpec:
    return replace(spec, search="minmax")


def _round(name: str, weight: Tensor, importance: Tensor, spec: QuantSpec) -> QuantTensor:
    scales, zeros = find_grid(name, weight, spec, importance)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
