"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv:2210.17323).

Rounds the columns of W one after the other and lets the columns not yet rounded absorb each error, so as to minimise
‖WX - QX‖². With H = Σ x xᵀ + λI and U the upper Cholesky factor of H⁻¹, for column j:

    q_j = Q(w_j),   e = (w_j - q_j) / U_jj,   W[:, j:] -= e ⊗ U[j, j:]

applied lazily by blocks of columns. Grids are fixed first, for whole groups of the original order ("static groups"),
so that columns can be visited by falling H_jj ("act-order") and the result still loads anywhere, without a g_idx.
Scales are searched with the error weighted by E[x²] = diag(H).

Error propagation, QEP (arXiv:2504.09629): the inputs X̂ of a linear already differ from the float model's X, so the
target WX is approached from a corrected weight, W* = W + α·W·(X - X̂)X̂ᵀ(X̂X̂ᵀ + λI)⁻¹. For α = 1, λ = 0 that is exact:
‖QX̂ - WX‖² = ‖(Q - W*)X̂‖² + a constant. It takes a second, float stream through the walk.
Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate import Inputs, cross_gram, gram, walk
from ..errors import InputError
from ..graph import Feed, Graph, Weight
from ..quantize import QuantSpec, QuantTensor, find_grid, targets

DAMPING_TRIES = 6


@dataclass(frozen=True)
class GPTQ:
    """Quantizes every linear (the head only if `head`) on calibration `tokens` [windows, seq_len], true-sequentially:
    each piece of each block sees the inputs that the already quantized prefix produces. `propagate` is QEP's α (0: off,
    0.5 in the paper)."""

    tokens: Tensor = field(repr=False, compare=False)
    spec: QuantSpec = field(default_factory=QuantSpec)
    act_order: bool = True
    damping: float = 0.01
    propagate: float = 0.0
    head: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise InputError("GPTQ.damping", self.damping, "a fraction of the mean of diag(H), between 0 and 1")
        if not 0 <= self.propagate <= 1:
            raise InputError("GPTQ.propagate", self.propagate, "a number between 0 (off) and 1")

    def __call__(self, graph: Graph) -> Graph:
        todo = set(targets(graph, self.spec, self.head))

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            if not todo.issuperset(feed.readers):
                return None
            hessian = gram(feed, inputs)
            rows = [graph.tensor(graph.config.weight_name(name)).to(hessian.device) for name in feed.readers]
            joined = torch.cat(rows)  # the readers share H, hence U and every step but their own rounding
            if self.propagate:
                joined = propagate_error(joined, hessian, cross_gram(inputs), self.propagate, self.damping)
            quantized = gptq_quantize(joined, hessian, self.spec, act_order=self.act_order, damping=self.damping, name=", ".join(feed.readers))
            out: dict[str, Weight] = {}
            start = 0
            for name, weight in zip(feed.readers, rows):
                out[graph.config.weight_name(name)] = quantized.rows(start, start + len(weight))
                start += len(weight)
            return out

        return walk(graph, self.tokens, visit, reference=self.propagate > 0, progress=f"GPTQ {self.spec}").replace(by=self)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    act_order: bool = True,
    damping: float = 0.01,
    block: int = 128,
    name: str = "weight",
) -> QuantTensor:
    """weight float [N, K], hessian Σ x xᵀ [K, K] (any positive scale) to a QuantTensor on the grid of `spec`."""
    N, K = weight.shape
    W = weight.float()
    H = hessian.double()
    importance = H.diagonal().float()
    scales, zeros = find_grid(name, W, spec, importance)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(K, device=W.device)
    dead = H.diagonal()[order] <= 0
    U = inverse_factor(H[order][:, order], damping, name).float()
    group = torch.arange(K, device=W.device) // (K // scales.shape[1])
    # Columns become rows, so that each step of the loop reads and writes contiguous memory.
    Wt = W.T[order].contiguous()  # (K, N)
    Wt[dead] = 0
    St = scales.T[group[order]]
    Zt = torch.full_like(St, spec.zero) if zeros is None else zeros.T[group[order]].to(St.dtype)
    Q = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    top = 2**spec.bits - 1
    for i in range(0, K, block):
        j = min(i + block, K)
        w, u, errors = Wt[i:j], U[i:j, i:j], torch.empty(j - i, N, device=W.device)
        for c in range(j - i):
            s, z = St[i + c], Zt[i + c]
            q = (w[c] / s).round_().add_(z).clamp_(0, top)
            Q[i + c] = q
            torch.sub(w[c], q.sub_(z).mul_(s), out=errors[c]).div_(u[c, c])
            if c + 1 < j - i:
                w[c + 1 :].addr_(u[c, c + 1 :], errors[c], alpha=-1)
        if j < K:
            Wt[j:].addmm_(U[i:j, j:].T, errors, alpha=-1)
    ints = torch.empty_like(Q)
    ints[order] = Q
    return QuantTensor.from_ints(ints.T.contiguous(), scales, zeros, spec)


def propagate_error(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, damping: float = 0.01) -> Tensor:
    """QEP's W* [N, K] from weight [N, K], hessian X̂X̂ᵀ and cross XX̂ᵀ [K, K] (both over the same positions)."""
    H = hessian.double().clone()
    H.diagonal().add_((damping * H.diagonal().mean()).clamp_min(1e-12))
    correction = torch.linalg.solve(H, ((cross - hessian).double().T @ weight.double().T)).T
    return (weight.double() + alpha * correction).to(weight.dtype)


def inverse_factor(H: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor U of (H + λI)⁻¹ = UᵀU, float64; λ = damping · mean(diag H), ×10 until it succeeds.

    Dead channels (H_jj = 0) get H_jj = 1: nothing is known of them and nothing depends on them.
    """
    H = H.clone()
    diagonal = H.diagonal()
    diagonal[diagonal <= 0] = 1
    mean = diagonal.mean()
    for attempt in range(DAMPING_TRIES):
        damped = H.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            U, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if info == 0:
                return U
    raise InputError(
        f"Hessian of {name}",
        f"not positive definite, even damped by {damping * 10 ** (DAMPING_TRIES - 1):g} of its diagonal",
        "more, or more varied, calibration text",
    )
