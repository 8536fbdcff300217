"""Rotation: QuaRot (arXiv:2404.00456) and SpinQuant's R1 and R2 (arXiv:2405.16406), folded into the weights.

RMSNorm commutes with an orthogonal matrix once its weight is folded into its readers: norm(xR) = norm(x)R. So with
the norms folded, the residual stream can be turned by R1 (embedding and writers ·R1, readers R1ᵀ·) and each head's values
by R2 (v_proj rows R2ᵀ·, o_proj columns ·R2; the same matrix for all heads), and outliers spread over all channels.
Nothing is left to do at run time, and nothing changes in float.

The head reads the rotated stream through the folded last norm and the embedding does not, so a tied head is untied.
Hadamard matrices exist for many orders that are not powers of two: H_{mn} = H_m ⊗ H_n, and Paley's constructions
(J. Math. Phys. 12, 1933) give q + 1 for primes q ≡ 3 (mod 4) and 2(q + 1) for primes q ≡ 1 (mod 4):
576 = 36·16, 1536 = 12·128, 5632 = 44·128. Where none is found, or on request, a random orthogonal matrix serves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.edit import fold_norms, turn
from ..graph.graph import Graph, Weight

KINDS = ("hadamard", "random")


@dataclass(frozen=True)
class Rotate:
    """Turns the residual stream (`residual`; norms end as ones) and the heads' values (`heads`). Without the first, norms stay
    and a tied head stays tied: that costs nothing at all."""

    kind: str = "hadamard"
    residual: bool = True
    heads: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError("Rotate.kind", repr(self.kind), " | ".join(KINDS))

    def __call__(self, graph: Graph) -> Graph:
        config = graph.config
        for name in graph.weights:
            if not torch.isfinite(graph.tensor(name)).all():
                raise InputError(
                    name, "NaN or infinite weights", "finite weights: a rotation would spread them over all channels"
                )
        if self.residual:
            graph = turn(fold_norms(graph), orthogonal(config.hidden_size, self.kind, self.seed))
        if self.heads:
            R, d = orthogonal(config.head_dim, self.kind, self.seed + 1), config.head_dim
            changed: dict[str, Weight] = {}
            for name in graph.weights:
                weight = graph.tensor(name)
                if name.endswith("v_proj.weight") or name.endswith("v_proj.bias"):
                    rows = weight.double().reshape(-1, d, *weight.shape[1:])
                    changed[name] = torch.einsum("de,hd...->he...", R, rows).reshape(weight.shape).to(weight.dtype)
                elif name.endswith("o_proj.weight"):
                    columns = weight.double().reshape(len(weight), -1, d)
                    changed[name] = (columns @ R).reshape(weight.shape).to(weight.dtype)
            graph = graph.replace(weights=changed)
        return graph.replace(by=self)


def orthogonal(n: int, kind: str = "hadamard", seed: int = 0) -> Tensor:
    """An orthogonal float64 [n, n]: Hadamard with random signs, or Haar-random; Hadamard falls back to random."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "hadamard" and (H := hadamard(n)) is not None:
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        return signs[:, None] * H / n**0.5
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def hadamard(n: int) -> Tensor | None:
    """A matrix of ±1 with H Hᵀ = n·I, float64 [n, n]; None where Sylvester's and Paley's constructions give none."""
    power = n & -n  # the largest power of two in n
    for base_power in range(power.bit_length()):
        base = n // power << base_power
        core = _paley(base)
        if core is not None:
            for _ in range(power.bit_length() - 1 - base_power):
                core = torch.cat((torch.cat((core, core), 1), torch.cat((core, -core), 1)))
            return core
    return None


def _paley(n: int) -> Tensor | None:
    if n in (1, 2):
        return (
            torch.ones(1, 1, dtype=torch.float64)
            if n == 1
            else torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        )
    if n % 4:
        return None
    if _prime(q := n - 1) and q % 4 == 3:  # type I: I + S, S skew
        S = torch.zeros(n, n, dtype=torch.float64)
        S[0, 1:], S[1:, 0] = 1, -1
        S[1:, 1:] = _residues(q)
        return S + torch.eye(n, dtype=torch.float64)
    if _prime(q := n // 2 - 1) and q % 4 == 1:  # type II: C symmetric, C ⊗ [[1,1],[1,-1]] + I ⊗ [[1,-1],[-1,-1]]
        C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        C[0, 1:] = C[1:, 0] = 1
        C[1:, 1:] = _residues(q)
        a, b = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(C, a) + torch.kron(torch.eye(q + 1, dtype=torch.float64), b)
    return None


def _residues(q: int) -> Tensor:
    """Jacobsthal's matrix: the quadratic character of i - j modulo a prime q, [q, q]."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1
    character[0] = 0
    i = torch.arange(q)
    return character[(i[:, None] - i[None, :]) % q]


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))
