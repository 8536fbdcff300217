"""HQQ: Half-Quadratic Quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog), without data.

Fits the zero point of each group so that the rounding error is sparse rather than small: minimise ‖W - s·(Q - z)‖_p^p,
p < 1, by alternating a shrinkage of the error, e = shrink(W - s·(Q - z), β), and z = mean(Q - (W - e) / s), β growing.
An integer zero point rarely moves in that scheme (a float one does), and a symmetric one never, so the scale is fitted in the
same sweep: s = Σ(W - e)·(Q - z) / Σ(Q - z)². Letters: N, K, G and g as in `quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from .grid_search import find_grid, round_to_grid
from .linear_specs import named_specs, targets
from .mapped_memory import keeper

P, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20
ROWS = (
    1 << 17
)  # weights at a time on the CPU, where an iterate's temporaries then stay in the cache; a GPU takes 128 times as many


@dataclass(frozen=True)
class HQQ:
    """Quantizes every linear (the head only if `head`), or those that a mapping names; layer by layer, no data; a large
    model's results are kept on disk (mapped_memory.py)."""

    spec: QuantSpec | Mapping[str, QuantSpec] = field(default_factory=lambda: QuantSpec(symmetric=False))
    head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))
        for spec in self.spec.values() if isinstance(self.spec, Mapping) else [self.spec]:
            if spec.search == "lpbq":
                raise InputError("HQQ.spec", spec, "a grid without -lpbq; RTN or GPTQ search such scales")

    def __call__(self, graph: Graph) -> Graph:
        found = {
            graph.config.weight_name(name): (name, spec) for name, spec in targets(graph, self.spec, self.head).items()
        }
        keep = keeper(
            (math.prod(graph.weights.entries[weight].shape), spec.bits) for weight, (_, spec) in found.items()
        )
        changed = {}
        for weight, (name, spec) in tqdm(found.items(), desc=f"HQQ {self.spec}", unit="linear", delay=2):
            changed[weight] = keep(hqq_quantize(graph.tensor(weight), spec, name))
        return graph.replace(weights=changed, by=self)


def hqq_quantize(weight: Tensor, spec: QuantSpec, name: str = "weight") -> QuantTensor:
    """weight float [N, K] to a QuantTensor; of the iterates the one with the smallest ‖error‖_p is kept, group by group."""
    rows = max(1, (ROWS if weight.device.type == "cpu" else 128 * ROWS) // weight.shape[1])
    return stacked([_half_quadratic(part.float(), spec, name) for part in weight.split(rows)])


def _half_quadratic(weight: Tensor, spec: QuantSpec, name: str) -> QuantTensor:
    scales, zeros = find_grid(name, weight, dataclasses.replace(spec, search="minmax"))
    w = weight.reshape(*scales.shape, -1)  # (N, G, g)
    top = 2**spec.bits - 1
    s, z = (
        scales[..., None].clone(),
        torch.full_like(scales, spec.zero)[..., None] if zeros is None else zeros[..., None].float(),
    )
    best_s, best_z, best = s, z, torch.full_like(s, float("inf"))
    beta = BETA
    for _ in range(ITERATIONS):
        kept = z if spec.symmetric or spec.float_zero else z.round().clamp(0, top)
        q, error, slope = _rounded(w, s, kept, top)
        loss = (error.abs() * slope).sum(-1, keepdim=True)
        better = loss < best
        best, best_s, best_z = (
            torch.where(better, loss, best),
            torch.where(better, s, best_s),
            torch.where(better, kept, best_z),
        )
        if kept is not z:
            q, error, slope = _rounded(w, s, z, top)
        e = error.abs().sub_(slope.div_(beta)).clamp_min_(0).copysign_(error)
        target = torch.sub(w, e, out=e)
        if not spec.symmetric:
            z = (q - target / s).mean(-1, keepdim=True)
        centred = q.sub_(z)
        s = target.mul_(centred).sum(-1, keepdim=True) / centred.square_().sum(-1, keepdim=True).clamp_min(1e-10)
        s = torch.where(s.abs() < 1e-10, best_s, s)
        beta *= KAPPA
    scales, zeros = (
        best_s[..., 0].contiguous(),
        None if spec.symmetric else best_z[..., 0] if spec.float_zero else best_z[..., 0].to(torch.uint8),
    )
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)


def _rounded(w: Tensor, s: Tensor, z: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, error and |error|^(p-1) of groups w [N, G, g] on grids s, z [N, G, 1]; the last is |error|^p over |error|."""
    q = (w / s).add_(z).round_().clamp_(0, top)
    error = (q - z).mul_(s)
    error = torch.sub(w, error, out=error)
    return q, error, error.abs().clamp_min_(1e-8).pow_(P - 1)
