"""AWQ: Activation-aware Weight Quantization (arXiv:2306.00978), as an exact fold that any quantizer can follow.

Channels that matter get a finer share of the grid: with m_j = mean|x_j| of a feed, s_j = max(m_j^r, 1e-4) normalised
by √(max·min), the readers' columns are multiplied by s and the feed's source divided by it, which changes nothing in
float. r is searched over {0, 0.05, … 0.95} for the smallest output error of the readers on their grid, which the
Gram matrix gives exactly: Σ‖(Q(W·s)/s - W)x‖² = tr(Δ H Δᵀ), H = Σ x xᵀ.

Sources are norms (read by query, key and value, and by gate and up), the up projection (read by down) and the value
projection (read by output). For the last under grouped-query attention one KV channel is read by `repeat` query heads:
m is averaged over them and s repeated. That fold is exact as well, and it is the one that other implementations skip.

Grids are searched with the error weighted by E[x²], in place of the paper's search (`clip`), which covers the range of
each group, then shrinks it by the output error of the group alone, tr(Δ_g H_gg Δ_gᵀ), except for queries and keys.

Letters: N out_features, K in_features, G groups of g = K / G inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.gram import gram
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.config import Linear
from ..graph.edit import fold
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import Feed
from .grid_search import find_grid, pack_on_grid, round_to_nearest
from .linear_specs import Spec, Specs, each_spec, named_specs, targets

RATIOS = tuple(i / 20 for i in range(20))
CLIPS = tuple(1 - i / 20 for i in range(10))  # parts of a group's range
NOT_CLIPPED = ("query", "key")  # kinds of linears whose errors multiply in the attention scores


@dataclass(frozen=True)
class AWQ:
    """Folds searched scales of the activations into the graph, and rounds the readers to their grids.

    Fields:
        tokens: ids [windows, seq_len], or an iterable of them such as a DataLoader. Their device does the work.
        spec: the grid of every linear of the layers, as text ("w4g64") or a QuantSpec; or a mapping from names of
            linears to such, where linears that are not named stay float and their feeds are not scaled. Default w4g64.
        quantize: whether the readers are rounded. False leaves a float graph that computes what it did, for GPTQ or
            another quantizer. Default True.
        gqa: whether values are folded into the output projection where several query heads read one KV head. Other
            implementations do not. Default True.
        clip: whether the paper's grids and its clip search are taken, to compare; only for specs whose search is "auto"
            or "minmax". Default False.
        device: where the work is done, such as "cuda". Default None: the device of `tokens`.
        progress: whether a bar over the layers is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for tokens that are not of the model, groups that do not divide a linear's inputs, weights
    that are packed already, and weights or activations that are not finite.
    """

    tokens: Tensor | Iterable[Any] = field(repr=False, compare=False)
    spec: Specs = field(default_factory=QuantSpec)
    quantize: bool = True
    gqa: bool = True
    clip: bool = False
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        object.__setattr__(self, "spec", named_specs(self.spec))
        for spec in each_spec(self.spec):
            if self.clip and spec.search not in ("auto", "minmax"):
                found = f"True with the {spec.search} scales of {spec}"
                raise InputError("AWQ.clip", found, "clip=False, or a spec that leaves the scales open")

    def __call__(self, graph: Graph) -> Graph:
        specs = targets(graph, self.spec)
        linears = {linear.name: linear for linear in graph.config.linears() if linear.name in specs}
        kept: dict[str, Weight] = {}  # what is no longer as the graph has it

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            readers = [linears[name] for name in feed.readers if name in linears]
            if not readers:
                return None
            current = graph.replace(weights=kept)
            hessian = gram(feed, inputs)
            scale = torch.ones(len(hessian), device=hessian.device)
            if self.gqa or feed.repeat == 1:
                scale = self._scale(feed, inputs, hessian, current, readers, specs)
            kept.update(fold(current, feed, scale))
            current = graph.replace(weights=kept)
            if not self.quantize:
                return None  # nothing that the walk computes has changed
            folded = hessian / torch.outer(scale.double(), scale.double())
            packed: dict[str, QuantTensor] = {}
            for linear in readers:
                weight = current.tensor(linear.weight).to(hessian.device).float()
                packed[linear.weight] = self._quantized(linear, weight, folded, specs[linear.name])
            kept.update(packed)
            # The walk's inputs are those of the graph before any fold.
            return {name: weight.dequantize() / scale for name, weight in packed.items()}

        tokens = as_tokens(self.tokens).to(self.device)
        bar = f"AWQ {self.spec}" if self.progress else None
        walk(graph, tokens, visit, kept=kept, collect=False, progress=bar)
        return graph.replace(weights=kept, by=self)

    def _scale(
        self,
        feed: Feed,
        inputs: Inputs,
        hessian: Tensor,
        graph: Graph,
        readers: Sequence[Linear],
        specs: Mapping[str, QuantSpec],
    ) -> Tensor:
        """The searched scale [K] of a feed's activation, the same for all query heads that read one KV head."""
        head_dim = graph.config.head_dim
        magnitude = mean_magnitude(inputs, feed.repeat, head_dim)
        weights = [graph.tensor(linear.weight).to(hessian.device).float() for linear in readers]
        grids = [_covering(specs[linear.name]) if self.clip else specs[linear.name] for linear in readers]
        scale = awq_scale(weights, hessian, magnitude, grids, ", ".join(linear.name for linear in readers))
        if feed.repeat == 1:
            return scale
        heads = scale.reshape(
            -1, feed.repeat, head_dim
        )  # vectorized powers of equal numbers may differ in the last bit
        return heads[:, :1].expand_as(heads).reshape(-1)

    def _quantized(self, linear: Linear, weight: Tensor, hessian: Tensor, spec: QuantSpec) -> QuantTensor:
        if not self.clip:
            return round_to_nearest(linear.weight, weight, spec, hessian.diagonal().float())
        clips = (1.0,) if linear.kind in NOT_CLIPPED else CLIPS
        scales, zeros = clip_grid(linear.weight, weight, hessian, spec, clips)
        return pack_on_grid(weight, scales, zeros, spec)


def mean_magnitude(inputs: Inputs, repeat: int = 1, head_dim: int = 1) -> Tensor:
    """mean|x_j| over all positions, float32 [K]. Where each KV head is read by `repeat` query heads it is averaged over
    them, channel by channel."""
    sums = [(x.abs().sum(0), len(x)) for x in (batch.flatten(0, -2).float() for batch in inputs)]
    mean = torch.stack([total for total, _ in sums]).sum(0) / sum(count for _, count in sums)
    if repeat == 1:
        return mean
    heads = mean.reshape(-1, repeat, head_dim)  # query head h reads KV head h // repeat
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def awq_scale(
    weights: list[Tensor], hessian: Tensor, magnitude: Tensor, spec: Spec | Sequence[Spec], name: str = "weight"
) -> Tensor:
    """The scale [K] with the smallest output error of the readers of one feed; ones if none helps.

    Arguments:
        weights: of the readers, float [N, K] each.
        hessian: Σ x xᵀ [K, K] of the feed.
        magnitude: mean|x_j| of the feed, [K].
        spec: the grid of all readers, or one for each.
        name: what an InputError for weights that cannot be used names.
    """
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        specs = [QuantSpec.of(each) for each in spec]
    else:
        specs = [QuantSpec.of(spec)] * len(weights)
    H = hessian.float()
    best = float("inf")
    best_scale = torch.ones_like(magnitude)
    for ratio in RATIOS:
        s = magnitude.pow(ratio).clamp_min(1e-4)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for W, own in zip(weights, specs):
            delta = round_to_nearest(name, W * s, own, H.diagonal() / s.square()).dequantize() / s - W
            error += ((delta @ H) * delta).sum().item()
        if error < best:
            best = error
            best_scale = s
    return best_scale


def clip_grid(
    name: str, weight: Tensor, hessian: Tensor, spec: QuantSpec, clips: Sequence[float] = CLIPS
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [N, G] of the grids that cover one of `clips` of each group's range: the one with the
    smallest output error of the group, tr(Δ_g H_gg Δ_gᵀ), for weight [N, K] and hessian [K, K]."""
    g = spec.group(name, weight.shape[1])
    w = weight.reshape(len(weight), -1, g)
    H = torch.stack([hessian[i : i + g, i : i + g] for i in range(0, len(hessian), g)]).to(w)  # (G, g, g)
    peak = w.abs().amax(-1, keepdim=True)
    best = torch.full(w.shape[:2], torch.inf, device=w.device)
    scales: Tensor | None = None
    zeros: Tensor | None = None
    for clip in clips:
        s, z = find_grid(name, w.clamp(-clip * peak, clip * peak).flatten(1), _covering(spec))
        delta = pack_on_grid(weight, s, z, spec).dequantize().view_as(w) - w
        error = torch.einsum("ngi,gij,ngj->ng", delta, H, delta)
        better = error < best
        best = torch.where(better, error, best)
        scales = s if scales is None else torch.where(better, s, scales)
        zeros = z if zeros is None or z is None else torch.where(better, z, zeros)
    assert scales is not None
    return scales, zeros


def _covering(spec: QuantSpec) -> QuantSpec:
    return replace(spec, search="minmax")
