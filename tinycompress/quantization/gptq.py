"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv:2210.17323).

Rounds the columns of W one after the other and lets the columns not yet rounded absorb each error, so as to minimise
‖WX - QX‖². With H = Σ x xᵀ + λI and U the upper Cholesky factor of H⁻¹, for column j:

    q_j = Q(w_j),   e = (w_j - q_j) / U_jj,   W[:, j:] -= e ⊗ U[j, j:]

applied lazily by blocks of columns. Grids are fixed first, for whole groups of the original order ("static groups"),
so that columns can be visited in any order (`ORDERS`) and the result still loads anywhere, without a g_idx. Scales are
searched with the error weighted by E[x²] = diag(H), and refined with the integers afterwards (refinement.py).

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
from typing import Any

import torch
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.gram import cross_gram, gram, output_gap
from ..calibration.walk import Inputs, check_calibration, walk
from ..errors import InputError
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import Grid, QuantSpec, QuantTensor
from ..graph.topology import Feed
from ..model.transformer import RotaryTables
from .block_tuning import BlockTuning
from .grid_search import find_grid, nearest_ints
from .hessian_factor import ORDERS, damped_factor, lower_times, upper_times
from .linear_specs import Spec, Specs, named_specs, targets
from .refinement import refine as refine_rounding

CORRECTIONS = ("qep", "qronos", "gptaq")


@dataclass(frozen=True)
class GPTQ:
    """Quantizes linears on calibration text, true-sequentially: each sees the inputs that the linears before it,
    already quantized, produce.

    Fields:
        tokens: ids [windows, seq_len], or an iterable of them such as a DataLoader. At least as many positions as the
            widest linear has inputs; ten times as many are better. Their device does the work.
        spec: the grid of every linear, as text ("w4g64") or a QuantSpec; or a mapping from names of linears to such,
            where linears that are not named stay float. Default w4g64.
        order: in which columns are rounded: "act" by falling E[x²], "gar" by it within groups and then by groups,
            "natural" as they stand. Default "act".
        damping: λ as a fraction of the mean of diag(H), between 0 and 1; ten times as much is tried where the Hessian
            is not positive definite. Default 0.01.
        propagate: the share, from 0 (none) to 1 (all), of what the linears before it have lost that a linear is to make
            good. Above 0 a second, float stream is walked along. Default 0.
        correction: how it does so: "qep", "qronos" or "gptaq", as above. Default "qep".
        stream: whether linears that write the residual stream also make good what the stream itself has lost; with
            `propagate` and "qep" or "qronos" only. Default False.
        refine: rounds of refining scales and integers after rounding, at least 0. Default 0.
        balance: whether the positions of linears that write the residual stream are weighed by 1 / the stream's root
            mean square (`Inputs.balanced`). Default False.
        tuning: a BlockTuning that moves scales and norms of each block by gradients once it is quantized, before the
            next block is; its `rate` should be 0 here (block_tuning.py). Default None.
        head: whether one spec for all is also for the head; an untied one only. Default False.
        device: where the work is done, such as "cuda". Default None: the device of `tokens`.
        progress: whether a bar over the layers is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for values out of these ranges, for tokens that are too few or not of the model, for groups
    that do not divide a linear's inputs, for weights that are packed already, and for weights or activations that are
    not finite.
    """

    tokens: Tensor | Iterable[Any] = field(repr=False, compare=False)
    spec: Specs = field(default_factory=QuantSpec)
    order: str = "act"
    damping: float = 0.01
    propagate: float = 0.0
    correction: str = "qep"
    stream: bool = False
    refine: int = 0
    balance: bool = False
    tuning: BlockTuning | None = None
    head: bool = False
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
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
            remedy = "propagate above 0 with correction qep or qronos"
            raise InputError("GPTQ.stream", "True without a target to correct", remedy)
        if self.refine < 0:
            raise InputError("GPTQ.refine", self.refine, "a number of rounds, 0 or more")

    def __call__(self, graph: Graph) -> Graph:
        tokens = as_tokens(self.tokens).to(self.device)
        specs = targets(graph, self.spec, self.head)
        check_length(graph, tokens, specs)

        def visit(feed: Feed, inputs: Inputs) -> Mapping[str, Weight] | None:
            weights = {
                name: graph.tensor(graph.config.weight_name(name)).to(tokens.device)
                for name in feed.readers
                if name in specs
            }
            if not weights:
                return None
            packed = self._quantized(feed, inputs, weights, specs)
            return {graph.config.weight_name(name): weight for name, weight in packed.items()}

        def finish(
            changed: Graph, layer: int, inputs: list[Tensor], targets: list[Tensor], tables: RotaryTables
        ) -> Mapping[str, Weight]:
            return self.tuning.tuned(changed, graph, layer, inputs, targets, tables) if self.tuning else {}

        return walk(
            graph,
            tokens,
            visit,
            reference=self.propagate > 0 or self.tuning is not None,
            finish=finish if self.tuning else None,
            kept={},
            progress=f"GPTQ {self.spec}" if self.progress else None,
        ).replace(by=self)

    def _quantized(
        self, feed: Feed, inputs: Inputs, weights: Mapping[str, Tensor], specs: Mapping[str, QuantSpec]
    ) -> dict[str, QuantTensor]:
        """The readers of one feed, weights [N, K] by name. Those on one grid are rounded as one matrix: they share the
        Hessian, hence U and every step but the rounding of their own rows."""
        writer = next(iter(weights.values()))  # the only reader of a feed whose output is added to the stream
        if self.balance and feed.writes_stream:
            inputs = inputs.balanced(writer)
        hessian = gram(feed, inputs)
        cross = None
        gap = None
        if self.propagate and feed.writes_stream and self.correction != "gptaq":
            gap = output_gap(inputs, writer, self.stream)  # its rows are fewer than the inputs: less than `cross` takes
        elif self.propagate:
            cross = cross_gram(inputs)
        packed: dict[str, QuantTensor] = {}
        for spec in dict.fromkeys(specs[name] for name in weights):
            names = [name for name in weights if specs[name] == spec]
            together = gptq_quantize(
                torch.cat([weights[name] for name in names]),
                hessian,
                spec,
                order=self.order,
                damping=self.damping,
                cross=cross,
                gap=gap,
                propagate=self.propagate,
                correction=self.correction,
                refine=self.refine,
                name=", ".join(names),
            )
            start = 0
            for name in names:
                stop = start + len(weights[name])
                packed[name] = together.rows(start, stop)
                start = stop
        return packed


def check_length(graph: Graph, tokens: Tensor, specs: Mapping[str, QuantSpec]) -> None:
    """An `InputError` for calibration with fewer positions than a linear of `specs` has inputs: its Hessian would be
    singular, and what damping makes of it fits the text alone."""
    check_calibration(graph, tokens)
    for linear in graph.config.linears():
        width = linear.shape[1]
        if linear.name in specs and tokens.numel() < width:
            found = f"{tokens.numel()} positions for its {width} inputs"
            accepted = f"at least {width} positions, better ten times as many (more windows, or longer ones)"
            raise InputError(f"calibration tokens for {linear.name}", found, accepted)


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    spec: Spec,
    *,
    order: str = "act",
    damping: float = 0.01,
    cross: Tensor | None = None,
    gap: Tensor | None = None,
    propagate: float = 1.0,
    correction: str = "qep",
    refine: int = 0,
    block: int = 32,
    name: str = "weight",
) -> QuantTensor:
    """weight float [N, K] rounded to the grid of `spec` against the Hessian of its inputs.

    Arguments:
        hessian: Σ x̂ x̂ᵀ [K, K], at any positive scale.
        order, damping, propagate, correction, refine: as the fields of `GPTQ`.
        cross: Σ x x̂ᵀ [K, K] over the same positions and at the same scale, x the float model's inputs.
        gap: Σ d x̂ᵀ [N, K], d what the output should gain beside that: all of it, where there is no `cross`. Either of
            them turns the `correction` on; "gptaq" knows `cross` alone.
        block: columns whose updates of later ones are gathered into one product.
        name: what an InputError for weights or a Hessian that cannot be used names.
    """
    spec = QuantSpec.of(spec)
    K = weight.shape[1]
    H = hessian.double()
    dead = H.diagonal() <= 0
    H, U, perm = damped_factor(H, spec.group(name, K), order, damping, name)
    original = weight.float().masked_fill(dead, 0)
    W = original
    corrects = cross is not None or gap is not None
    lost = torch.zeros_like(W, dtype=torch.float64)  # what the prefix takes from the output, by inputs: (Y - WX̂)X̂ᵀ
    if cross is not None:
        lost += propagate * (W.double() @ (cross - hessian).double())
    if gap is not None:
        lost += propagate * gap.masked_fill(dead, 0)
    if corrects and correction != "gptaq":
        W = W + propagate_error(U, perm, lost)
    scales, zeros = find_grid(name, W, spec, hessian.diagonal().float())
    first = None
    skew = None
    if corrects and correction == "qronos":
        j = perm[0]
        first = original[:, j] + (lost[:, j] / H[j, j]).float()  # the others stay at their float weights
    if cross is not None and correction == "gptaq":
        skew = (propagate * torch.triu((cross - hessian).double()[perm][:, perm] @ U.T, 1) @ U).float()
    ints = _round_columns(W, U.float(), perm, scales, zeros, spec, block, first, skew)
    if refine:
        ints, scales, zeros = refine_rounding(W, H, ints, scales, zeros, spec, refine)
    return QuantTensor.from_ints(ints, scales, zeros, spec)


def _round_columns(
    W: Tensor,
    U: Tensor,
    perm: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    grid: Grid,
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
    Zt = torch.full_like(St, grid.zero) if zeros is None else zeros.T[group[perm]].to(St.dtype)
    Q = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    for i in range(0, K, block):
        j = min(i + block, K)
        w = Wt[i:j]
        u = U[i:j, i:j]
        errors = torch.empty(j - i, N, device=W.device)
        for c in range(j - i):
            s = St[i + c]
            z = Zt[i + c]
            value = first if first is not None and i + c == 0 else w[c]
            q = nearest_ints(value / s, z, grid)
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


def propagate_error(U: Tensor, perm: Tensor, lost: Tensor) -> Tensor:
    """QEP's W* - W = α·W(X - X̂)X̂ᵀ (X̂X̂ᵀ + λI)⁻¹, float32 [N, K].

    U [K, K] is the upper factor of the inverse, UᵀU, with its columns in the order `perm` [K]; `lost` is
    α·W(X - X̂)X̂ᵀ, float64 [N, K].
    """
    solved = lower_times(U.T, upper_times(U, lost.T[perm]))  # (K, N)
    moved = torch.empty(lost.shape, device=lost.device)
    moved[:, perm] = solved.T.float()
    return moved
