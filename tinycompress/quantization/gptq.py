"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv:2210.17323).

Rounds the columns of W one after the other and lets the columns not yet rounded absorb each error, so as to minimise
‖WX - QX‖². With H = Σ x xᵀ + λI and U the upper Cholesky factor of H⁻¹, for column j:

    q_j = Q(w_j),   e = (w_j - q_j) / U_jj,   W[:, j:] -= e ⊗ U[j, j:]

applied lazily by blocks of columns. Grids are fixed first, for whole groups of the original order ("static groups"),
so that columns can be visited in any order (`ORDERS`) and the result still loads anywhere, without a g_idx. Scales are
searched with the error weighted by E[x²] = diag(H), and refined with the integers afterwards (`refine`).

Error propagation: the inputs X̂ of a linear already differ from the float model's X, so the target is WX, not WX̂. It
takes a second, float stream through the walk. `CORRECTIONS`, each scaled by `propagate` = α:

    qep     arXiv:2504.09629   W* = W + α·W·(X - X̂)X̂ᵀ(X̂X̂ᵀ + λI)⁻¹, then GPTQ on W*; for α = 1, λ = 0 exact:
                               ‖QX̂ - WX‖² = ‖(Q - W*)X̂‖² + a constant
    qronos  arXiv:2505.11695   as QEP, but the first column is rounded given the others' float weights
    gptaq   arXiv:2504.02692   in the loop: W[:, j:] += w_j ⊗ P[j, j:], P = α·triu((X - X̂)X̂ᵀUᵀ, 1)·U

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibration.gram import cross_gram, gram, stream_gram
from ..calibration.walk import Inputs, check_calibration, walk
from ..errors import InputError
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import Feed
from ..model.transformer import RotaryTables
from .block_tuning import BlockTuning
from .grid_search import find_grid, nearest_ints
from .linear_specs import named_specs, targets
from .refinement import refine as refine_rounding

DAMPING_TRIES = 6
ORDERS = ("act", "gar", "natural")  # by falling H_jj; within groups, then groups (arXiv:2505.14638); as they stand
CORRECTIONS = ("qep", "qronos", "gptaq")


@dataclass(frozen=True)
class GPTQ:
    """Quantizes every linear (the head only if `head`) on calibration `tokens` [windows, seq_len], true-sequentially:
    each piece of each block sees the inputs that the already quantized prefix produces.

    `propagate` is the α of the `correction` for what that prefix lost (0: off), and with `stream` what writes the
    residual stream also corrects what the stream itself has lost. `refine` counts rounds of scale and integer refinement.
    `balance` weighs the positions of what writes the residual stream by the stream's size (`Inputs.balanced`). `tuning` moves
    scales and norms of every block (and its rounding, unless `rate=0`, as it should be here) by gradients once it is quantized,
    before the next one is (block_tuning.py)."""

    tokens: Tensor = field(repr=False, compare=False)
    spec: QuantSpec | Mapping[str, QuantSpec] = field(default_factory=QuantSpec)
    order: str = "act"
    damping: float = 0.01
    propagate: float = 0.0
    correction: str = "qep"
    stream: bool = False
    refine: int = 0
    balance: bool = False
    tuning: BlockTuning | None = None
    head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))
        if self.order not in ORDERS:
            raise InputError("GPTQ.order", repr(self.order), " | ".join(ORDERS))
        if not 0 < self.damping < 1:
            raise InputError("GPTQ.damping", self.damping, "a fraction of the mean of diag(H), between 0 and 1")
        if not 0 <= self.propagate <= 1:
            raise InputError("GPTQ.propagate", self.propagate, "a number between 0 (off) and 1")
        if self.correction not in CORRECTIONS:
            raise InputError("GPTQ.correction", repr(self.correction), " | ".join(CORRECTIONS))
        if self.stream and (not self.propagate or self.correction == "gptaq"):
            raise InputError(
                "GPTQ.stream", "True without a target to correct", "propagate above 0 with correction qep or qronos"
            )
        if self.refine < 0:
            raise InputError("GPTQ.refine", self.refine, "a number of rounds, 0 or more")

    def __call__(self, graph: Graph) -> Graph:
        todo = targets(graph, self.spec, self.head)
        check_length(graph, self.tokens, todo)

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            rows = {
                name: graph.tensor(graph.config.weight_name(name)).to(self.tokens.device)
                for name in feed.readers
                if name in todo
            }
            if not rows:
                return None
            writes = "norm" not in feed.source  # its reader adds to the residual stream
            if self.balance and writes:
                inputs = inputs.balanced(next(iter(rows.values())))
            hessian = gram(feed, inputs)
            cross = cross_gram(inputs) if self.propagate else None
            gap = None
            if cross is not None and self.stream and writes:
                weight = next(iter(rows.values()))
                gap = stream_gram(inputs, weight) - weight.double() @ cross
            out: dict[str, Weight] = {}
            for spec in dict.fromkeys(todo[name] for name in rows):
                together = [
                    name for name in rows if todo[name] == spec
                ]  # they share H, hence U and every step but their own rounding
                quantized = gptq_quantize(
                    torch.cat([rows[name] for name in together]),
                    hessian,
                    spec,
                    order=self.order,
                    damping=self.damping,
                    cross=cross,
                    gap=gap,
                    propagate=self.propagate,
                    correction=self.correction,
                    refine=self.refine,
                    name=", ".join(together),
                )
                start = 0
                for name in together:
                    out[graph.config.weight_name(name)] = quantized.rows(start, start + len(rows[name]))
                    start += len(rows[name])
            return out

        def finish(
            changed: Graph, layer: int, inputs: list[Tensor], targets: list[Tensor], tables: RotaryTables
        ) -> Mapping[str, Weight]:
            return self.tuning.tuned(changed, graph, layer, inputs, targets, tables) if self.tuning else {}

        reference, progress = self.propagate > 0 or self.tuning is not None, f"GPTQ {self.spec}"
        return walk(
            graph, self.tokens, visit, reference=reference, finish=finish if self.tuning else None, progress=progress
        ).replace(by=self)


def check_length(graph: Graph, tokens: Tensor, names: Iterable[str]) -> None:
    """An `InputError` for calibration with fewer positions than a linear has inputs: its Hessian would be singular, and what
    damping makes of it fits the text alone."""
    check_calibration(graph, tokens)
    for name in names:
        width = graph.weights.entries[graph.config.weight_name(name)].shape[1]
        if tokens.numel() < width:
            accepted = f"at least {width} positions, better ten times as many (more windows, or longer ones)"
            raise InputError(
                f"calibration tokens for {name}", f"{tokens.numel()} positions for its {width} inputs", accepted
            )


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    order: str = "act",
    damping: float = 0.01,
    cross: Tensor | None = None,
    gap: Tensor | None = None,
    propagate: float = 1.0,
    correction: str = "qep",
    refine: int = 0,
    block: int = 128,
    name: str = "weight",
) -> QuantTensor:
    """weight float [N, K], hessian Σ x̂ x̂ᵀ [K, K] (any positive scale) to a QuantTensor on the grid of `spec`.

    cross: Σ x x̂ᵀ [K, K] over the same positions, x the float model's inputs, at the same scale; it turns the
    `correction` on. gap: Σ d x̂ᵀ [N, K], d what else the output should gain. An InputError for weights or a Hessian that cannot be used names `name`.
    """
    K = weight.shape[1]
    H = hessian.double()
    dead = H.diagonal() <= 0
    H, U, perm = damped_factor(H, spec.group(name, K), order, damping, name)
    original = W = weight.float().masked_fill(dead, 0)
    lost = torch.zeros_like(W, dtype=torch.float64)  # what the prefix takes from the output, by inputs: (Y - WX̂)X̂ᵀ
    if cross is not None:
        lost = propagate * (W.double() @ (cross - hessian).double() + (0 if gap is None else gap))
    if cross is not None and correction != "gptaq":
        W = W + propagate_error(H, lost)
    scales, zeros = find_grid(name, W, spec, hessian.diagonal().float())
    first = skew = None
    if cross is not None and correction == "qronos":
        j = perm[0]
        first = original[:, j] + (lost[:, j] / H[j, j]).float()  # the others stay at their float weights
    if cross is not None and correction == "gptaq":
        skew = propagate * torch.triu((cross - hessian).double()[perm][:, perm] @ U.T, 1) @ U
    ints = _round_columns(W, U.float(), perm, scales, zeros, spec, block, first, None if skew is None else skew.float())
    if refine:
        ints, scales, zeros = refine_rounding(W, H, ints, scales, zeros, spec, refine)
    return QuantTensor.from_ints(ints, scales, zeros, spec)


def _round_columns(
    W: Tensor,
    U: Tensor,
    perm: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    spec: QuantSpec,
    block: int,
    first: Tensor | None,
    skew: Tensor | None,
) -> Tensor:
    """The loop over the columns of W [N, K] in the order `perm`, which is also U's: integers [N, K]."""
    N, K = W.shape
    group = torch.arange(K, device=W.device) // (K // scales.shape[1])
    # Columns become rows, so that each step of the loop reads and writes contiguous memory.
    Wt = W.T[perm].contiguous()  # (K, N)
    St = scales.T[group[perm]]
    Zt = torch.full_like(St, spec.zero) if zeros is None else zeros.T[group[perm]].to(St.dtype)
    Q = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    for i in range(0, K, block):
        j = min(i + block, K)
        w, u, errors = Wt[i:j], U[i:j, i:j], torch.empty(j - i, N, device=W.device)
        for c in range(j - i):
            s, z = St[i + c], Zt[i + c]
            value = first if first is not None and i + c == 0 else w[c]
            q = nearest_ints(value / s, z, spec)
            Q[i + c] = q
            torch.sub(w[c], q.sub_(z).mul_(s), out=errors[c]).div_(u[c, c])
            if c + 1 < j - i:
                w[c + 1 :].addr_(u[c, c + 1 :], errors[c], alpha=-1)
                if skew is not None:
                    w[c + 1 :].addr_(skew[i + c, i + c + 1 : j], w[c])
        if j < K:
            Wt[j:].addmm_(U[i:j, j:].T, errors, alpha=-1)
            if skew is not None:
                Wt[j:].addmm_(skew[i:j, j:].T, w)
    ints = torch.empty_like(Q)
    ints[perm] = Q
    return ints.T.contiguous()


def propagate_error(hessian: Tensor, lost: Tensor) -> Tensor:
    """QEP's W* - W, float32 [N, K], from the damped hessian X̂X̂ᵀ + λI [K, K] and α·W(X - X̂)X̂ᵀ [N, K], float64."""
    return torch.linalg.solve(hessian, lost.T).T.float()


def column_order(diagonal: Tensor, group: int, order: str) -> Tensor:
    """The columns [K] in the order they are rounded, by diag(H) [K]."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    whole = torch.argsort(groups.amax(1), descending=True, stable=True)
    return (inside + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None])[whole].flatten()


def damped_factor(H: Tensor, group: int, order: str, damping: float, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """H + λI [K, K], the upper Cholesky factor U of its inverse = UᵀU in the order `perm` [K], and `perm`; float64.

    λ = damping · mean(diag H), ×10 until the factorization succeeds. Dead channels (H_jj = 0) get H_jj = 1: nothing is
    known of them and nothing depends on them.
    """
    H = H.clone()
    diagonal = H.diagonal()
    perm = column_order(diagonal, group, order)
    diagonal[diagonal <= 0] = 1
    mean = diagonal.mean()
    for attempt in range(DAMPING_TRIES):
        damped = H.clone()
        damped.diagonal().add_(damping * 10**attempt * mean)
        L, info = torch.linalg.cholesky_ex(damped[perm][:, perm])
        if info == 0:
            U, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if info == 0:
                return damped, U, perm
    raise InputError(
        f"Hessian of {name}",
        f"not positive definite, even damped by {damping * 10 ** (DAMPING_TRIES - 1):g} of its diagonal",
        "more, or more varied, calibration text",
    )
