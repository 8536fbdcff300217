"""Rotation: QuaRot (arXiv:2404.00456) and SpinQuant's R1 and R2 (arXiv:2405.16406), folded into the weights.

RMSNorm commutes with an orthogonal matrix once its weight is folded into its readers: norm(xR) = norm(x)R. So with
the norms folded, the residual stream can be turned by R1 (embedding and writers ·R1, readers R1ᵀ·) and each head's
values by R2 (rows of the value projection R2ᵀ·, columns of the output projection ·R2; the same matrix for all heads),
and outliers spread over all channels. Nothing is left to do at run time, and nothing changes in float.

The head reads the rotated stream through the folded last norm and the embedding does not, so a tied head is untied.
Hadamard matrices exist for many orders that are not powers of two: H_{mn} = H_m ⊗ H_n, and Paley's constructions
(J. Math. Phys. 12, 1933) give q + 1 for primes q ≡ 3 (mod 4) and 2(q + 1) for primes q ≡ 1 (mod 4):
576 = 36·16, 1536 = 12·128, 5632 = 44·128. For other orders, or on request, a random orthogonal matrix serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import EMBEDDING, FINAL_NORM, HEAD, Config
from ..graph.edit import fold_norms, turn
from ..graph.graph import Graph, LazyTensor, Weight
from ..graph.mapped_memory import dense_keeper
from ..progress import tqdm

MATRICES = ("hadamard", "random")


@dataclass(frozen=True)
class Rotate:
    """Turns the residual stream and the heads' values by orthogonal matrices, so that outliers spread over all
    channels.

    Fields:
        kind: of the matrices: "hadamard" (with random signs; random where none of that order is known) or "random"
            (Haar). Default "hadamard".
        residual: whether the residual stream is turned. Norms end as ones, and a tied head gets a table of its own;
            without it norms stay and a tied head stays tied, which costs nothing at all. Default True.
        heads: whether the values of each head are turned. Default True.
        seed: of the signs or the random matrices. Default 0.
        device: where weights are turned, such as "cuda", which then holds the whole model; the results return to where
            the weights were. Default None: where they are.
        progress: whether a bar over the weights is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for another kind, for weights that are packed already, and for weights that are not finite.
    """

    kind: str = "hadamard"
    residual: bool = True
    heads: bool = True
    seed: int = 0
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in MATRICES:
            raise InputError("Rotate.kind", repr(self.kind), " | ".join(MATRICES))

    def plan(self, config: Config) -> Config:
        """The config that a graph of that config will have."""
        return replace(config, tie_embeddings=False) if self.residual else config

    def __call__(self, graph: Graph) -> Graph:
        config = graph.config
        for name in tqdm(graph.weights, desc="Rotate", unit="weight", delay=2, disable=not self.progress):
            if not torch.isfinite(graph.tensor(name)).all():
                remedy = "finite weights: a rotation would spread them over all channels"
                raise InputError(name, "NaN or infinite weights", remedy)
        keep = dense_keeper(graph)
        turned = graph if self.device is None else moved(graph, dict.fromkeys(graph.weights, self.device))
        if self.residual:
            R = orthogonal(config.hidden_size, self.kind, self.seed)
            turned = turn(fold_norms(turned), R.to(turned.weights[f"{FINAL_NORM}.weight"].device), keep)
        if self.heads:
            R = orthogonal(config.head_dim, self.kind, self.seed + 1)
            turned = turned.replace(weights=turned_values(turned, R, keep))
        if self.device is not None:
            places = {name: weight.device for name, weight in graph.weights.items()}
            places.setdefault(turned.config.weight_name(HEAD), places[EMBEDDING])  # a head that was untied
            turned = moved(turned, places)
        return turned.replace(by=self)


def moved(graph: Graph, places: Mapping[str, torch.device | str]) -> Graph:
    """The graph with each of its parameters on the device that `places` has for its name."""
    return graph.replace(weights={name: weight.to(places[name]) for name, weight in graph.weights.items()})


def turned_values(
    graph: Graph, R: Tensor, keep: Callable[[Tensor], Weight | LazyTensor] = lambda weight: weight
) -> dict[str, Weight | LazyTensor]:
    """The parameters with which every head's values are turned by R [d, d], d the head_dim, and turned back where they
    are read: the function stays what it was."""
    changed: dict[str, Weight | LazyTensor] = {}
    for linear in graph.config.linears():
        if linear.kind == "value":
            for name in (linear.weight, linear.bias):
                if name in graph.weights:
                    weight = graph.tensor(name)
                    rows = weight.double().reshape(-1, len(R), *weight.shape[1:])  # (KV heads, d, ...)
                    turned = torch.einsum("de,hd...->he...", R.to(weight.device), rows)
                    changed[name] = keep(turned.reshape(weight.shape).to(weight.dtype))
        elif linear.kind == "output":
            weight = graph.tensor(linear.weight)
            columns = weight.double().reshape(len(weight), -1, len(R))  # (D, heads, d)
            changed[linear.weight] = keep((columns @ R.to(weight.device)).reshape(weight.shape).to(weight.dtype))
    return changed


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
    """Paley's Hadamard matrix of order n, or that of order 1 or 2; None where there is none."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    if _prime(q := n - 1) and q % 4 == 3:  # type I: I + S, S skew
        S = torch.zeros(n, n, dtype=torch.float64)
        S[0, 1:] = 1
        S[1:, 0] = -1
        S[1:, 1:] = _residues(q)
        return S + torch.eye(n, dtype=torch.float64)
    if _prime(q := n // 2 - 1) and q % 4 == 1:  # type II: C symmetric, C ⊗ [[1,1],[1,-1]] + I ⊗ [[1,-1],[-1,-1]]
        C = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        C[0, 1:] = 1
        C[1:, 0] = 1
        C[1:, 1:] = _residues(q)
        off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
        diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(C, off_diagonal) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
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
