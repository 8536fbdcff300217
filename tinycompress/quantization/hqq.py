"""HQQ: Half-Quadratic Quantization (Badri & Shaji 2023, mobiusml.github.io/hqq_blog), without data.

Fits the zero point of each group so that the rounding error is sparse rather than small: minimise ‖W - s·(Q - z)‖_p^p,
p < 1, by alternating a shrinkage of the error and a new zero point while β grows by κ:

    e = sign(d)·max(|d| - |d|^(p-1) / β, 0),   d = W - s·(Q - z)
    z = mean(Q - (W - e) / s)

An integer zero point rarely moves in that scheme (a float one does), and a symmetric one never, so the scale is fitted
in the same sweep: s = Σ(W - e)·(Q - z) / Σ(Q - z)².

Letters: N out_features, K in_features, G groups of g = K / G inputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from .grid_search import find_grid, pack_on_grid
from .linear_by_linear import quantize_linears
from .linear_specs import Spec, Specs, each_spec, named_specs, targets

P = 0.7  # the norm of the error
BETA = 10.0  # the first β
KAPPA = 1.01  # what β grows by in each sweep
ITERATIONS = 20
ROWS = 1 << 17  # weights at a time on a CPU, where the temporaries of a sweep then stay in the cache
GPU_ROWS = 128 * ROWS  # weights at a time elsewhere


@dataclass(frozen=True)
class HQQ:
    """Quantizes linears by half-quadratic splitting, one linear after the other, without data.

    Fields:
        spec: the grid of every linear, as text ("w4g64-asym") or a QuantSpec; or a mapping from names of linears to
            such, where linears that are not named stay float. Its search is not used. Default w4g64-asym.
        head: whether one spec for all is also for the head; an untied one only. Default False.
        device: where weights are quantized, such as "cuda"; the results return to where the weights were. Default None:
            where the weights are.
        progress: whether a bar over the linears is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for a spec with -lpbq, if a group does not divide a linear's inputs, a weight is packed
    already or not finite, or a name is no linear of the graph.
    """

    spec: Specs = field(default_factory=lambda: QuantSpec(symmetric=False))
    head: bool = False
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))
        for spec in each_spec(self.spec):
            if spec.search == "lpbq":
                raise InputError("HQQ.spec", spec, "a grid without -lpbq; RTN or GPTQ search such scales")

    def __call__(self, graph: Graph) -> Graph:
        specs = targets(graph, self.spec, self.head)
        bar = f"HQQ {self.spec}" if self.progress else None
        return graph.replace(weights=quantize_linears(graph, specs, hqq_quantize, self.device, bar), by=self)


def hqq_quantize(weight: Tensor, spec: Spec, name: str = "weight") -> QuantTensor:
    """weight float [N, K] to a QuantTensor; of the sweeps the one with the smallest ‖error‖_p is kept, group by
    group."""
    spec = QuantSpec.of(spec)
    rows = max(1, (ROWS if weight.device.type == "cpu" else GPU_ROWS) // weight.shape[1])
    return stacked([_half_quadratic(part.float(), spec, name) for part in weight.split(rows)])


def _half_quadratic(weight: Tensor, spec: QuantSpec, name: str) -> QuantTensor:
    scales, zeros = find_grid(name, weight, dataclasses.replace(spec, search="minmax"))
    w = weight.reshape(*scales.shape, -1)  # (N, G, g)
    top = 2**spec.bits - 1
    s = scales[..., None].clone()  # (N, G, 1), as are z and the best of both
    z = torch.full_like(s, spec.zero) if zeros is None else zeros[..., None].float()
    best_s = s
    best_z = z
    best = torch.full_like(s, float("inf"))
    beta = BETA
    for _ in range(ITERATIONS):
        stored_z = z if spec.symmetric or spec.float_zero else z.round().clamp(0, top)
        q, error, slope = _rounded(w, s, stored_z, top)
        loss = (error.abs() * slope).sum(-1, keepdim=True)
        better = loss < best
        best = torch.where(better, loss, best)
        best_s = torch.where(better, s, best_s)
        best_z = torch.where(better, stored_z, best_z)
        if stored_z is not z:
            q, error, slope = _rounded(w, s, z, top)
        e = error.abs().sub_(slope.div_(beta)).clamp_min_(0).copysign_(error)
        target = torch.sub(w, e, out=e)
        if not spec.symmetric:
            z = (q - target / s).mean(-1, keepdim=True)
        centred = q.sub_(z)
        s = target.mul_(centred).sum(-1, keepdim=True) / centred.square_().sum(-1, keepdim=True).clamp_min(1e-10)
        s = torch.where(s.abs() < 1e-10, best_s, s)
        beta *= KAPPA
    scales = best_s[..., 0].contiguous()
    zeros = None if spec.symmetric else best_z[..., 0]
    if zeros is not None and not spec.float_zero:
        zeros = zeros.to(torch.uint8)
    return pack_on_grid(weight, scales, zeros, spec)


def _rounded(w: Tensor, s: Tensor, z: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, error and |error|^(p-1) of groups w [N, G, g] on grids s, z [N, G, 1]; the last is |error|^p over
    |error|."""
    q = (w / s).add_(z).round_().clamp_(0, top)
    error = (q - z).mul_(s)
    error = torch.sub(w, error, out=error)
    return q, error, error.abs().clamp_min_(1e-8).pow_(P - 1)
