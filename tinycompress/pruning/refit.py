"""What the survivors of a cut can take over, in closed form: OBS removal, least-squares refit, loss curves.

A linear y = W x loses input channels R and keeps K. With H = Σ x xᵀ over calibration positions the weight on K that
comes closest to the old output (ZipLM, arXiv:2302.04089; OSSCAR, arXiv:2403.12983), and what is lost even so, are

    W'_K = W · H_:K · H_KK⁻¹,    loss(R) = tr(W_R (H⁻¹_RR)⁻¹ W_Rᵀ) = ‖W x - W'_K x_K‖² summed over positions

Removing a set S at a time (Optimal Brain Surgeon) arrives at the same weights step by step:

    W -= W_S (H⁻¹_SS)⁻¹ H⁻¹_S:,    H⁻¹ -= H⁻¹_:S (H⁻¹_SS)⁻¹ H⁻¹_S:

For any order in which channels go, one Cholesky factor L of H (last removed first) holds every loss: ‖(Lᵀ Wᵀ)_i‖² is
what channel i adds to it. If the inputs come through a compressed prefix (x̂), and the residual stream is ĥ where the
float model has h, the target can be the float model's stream behind the sublayer: W'_K x̂_K ≈ W x + h - ĥ, that is
W'_K = (Σ (W x + h - ĥ) x̂_Kᵀ) · H_KK⁻¹ with H = Σ x̂ x̂ᵀ. A share α of the way there (0.5 as in QEP,
arXiv:2504.09629) does not chase what cannot be reached.

All in float64. Letters: D outputs, K inputs, n units (a unit is one channel, or the `width` channels of a head).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

STEPS = 48  # removals that OBS makes of its own accord: more are more exact, and cost a product [K, K/steps, K] each


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + λI in float64, λ = damping · mean(diag H)."""
    H = hessian.double().clone()
    H.diagonal().add_((damping * H.diagonal().mean()).clamp_min(1e-12))
    return H


def refit_columns(
    weight: Tensor, hessian: Tensor, keep: Tensor, damping: float = 0.01, wanted: Tensor | None = None
) -> Tensor:
    """The least-squares weight [D, K'] on the kept inputs for the output of `weight` [D, K] on all; float64.

    hessian: Σ x̂ x̂ᵀ [K, K] of the inputs as they are; wanted: Σ y x̂ᵀ [D, K] for another target y. The ridge
    λ = damping · mean(diag H_KK) pulls towards the unchanged columns, not towards zero: removing nothing changes
    nothing.
    """
    W = weight.double()
    H = hessian.double()
    HKK = H[keep][:, keep]
    if wanted is None:
        removed = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        removed[keep] = False
        missing = W[:, removed] @ H[removed][:, keep]  # (D, K')
    else:
        missing = wanted.double()[:, keep] - W[:, keep] @ HKK
    return W[:, keep] + torch.linalg.solve(damped(HKK, damping), missing.T).T


def wanted_output(weight: Tensor, hessian: Tensor, reached: Tensor, share: float = 0.5) -> Tensor:
    """Σ y x̂ᵀ [D, K] for the target y = (1 - α) W x̂ + α (W x + h - ĥ): hessian Σ x̂ x̂ᵀ [K, K], reached
    Σ (W x + h - ĥ) x̂ᵀ [D, K] (calibration.gram.stream_gram), share α."""
    return (weight.double() @ hessian.double()).lerp(reached.double(), share)


def obs_losses(
    weight: Tensor, hessian: Tensor, width: int = 1, groups: int = 1, damping: float = 0.01, steps: int = STEPS
) -> Tensor:
    """Greedy removal by OBS: for each unit the loss when it and all units removed before it are gone, float64 [n].

    weight [D, n·width], hessian [n·width, n·width]. Sorting the result gives the order of removal. The cheapest
    n / steps units go together (`steps` ≥ n: one by one). With `groups` > 1, each of as many equal runs of units loses
    one at a time.
    """
    W = weight.double().clone()
    n = weight.shape[1] // width
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
    alive = torch.ones(n, dtype=torch.bool, device=W.device)
    losses = torch.zeros(n, dtype=torch.float64, device=W.device)
    lost = 0.0  # so far, with everything that is gone
    together = max(1, n // steps)
    while alive.any():
        cost = _costs(W, inverse, width, alive)
        if groups > 1:
            units = cost.view(groups, -1).argmin(1) + torch.arange(groups, device=W.device) * (n // groups)
            units = units[cost[units].argsort()]
        else:
            units = cost.argsort()[: min(together, int(alive.sum()))]
        S = (units[:, None] * width + torch.arange(width, device=W.device)).flatten()
        gain = torch.linalg.solve(inverse[S][:, S], inverse[S])  # (S, K)
        WS = W[:, S]
        joint = float((torch.linalg.solve(inverse[S][:, S], WS.T) * WS.T).sum())
        share = torch.arange(1, len(units) + 1, dtype=torch.float64, device=W.device) / len(units)
        losses[units] = lost + max(joint, 0.0) * share
        lost += max(joint, 0.0)
        W.addmm_(WS, gain, alpha=-1)
        inverse.addmm_(inverse[:, S].clone(), gain, alpha=-1)
        alive[units] = False
    return losses


def _costs(W: Tensor, inverse: Tensor, width: int, alive: Tensor) -> Tensor:
    """tr(W_S (H⁻¹_SS)⁻¹ W_Sᵀ) for every unit S that is left, infinity for the others."""
    cost = torch.full((len(alive),), torch.inf, dtype=torch.float64, device=W.device)
    left = alive.nonzero().flatten()
    if width == 1:
        cost[left] = W[:, left].square().sum(0) / inverse.diagonal()[left].clamp_min(1e-300)
        return cost
    for unit in left.tolist():
        s = slice(unit * width, (unit + 1) * width)
        cost[unit] = (torch.linalg.solve(inverse[s, s], W[:, s].T) * W[:, s].T).sum()
    return cost


def refit_curve(weight: Tensor, hessian: Tensor, order: Tensor, width: int = 1, damping: float = 0.0) -> Tensor:
    """The loss after a refit when the first k units of `order` [n] are gone, for k = 0 … n: float64 [n + 1]."""
    channels = _channels(order.flip(0), width)  # kept longest first
    L = torch.linalg.cholesky(damped(hessian, damping)[channels][:, channels])
    added = (weight.double()[:, channels] @ L).square().sum(0)  # of each channel, last removed first
    by_unit = added.view(-1, width).sum(1).flip(0)
    return torch.cat((by_unit.new_zeros(1), by_unit.cumsum(0)))


def plain_curve(weight: Tensor, hessian: Tensor, order: Tensor, width: int = 1) -> Tensor:
    """The loss without a refit when the first k units of `order` are gone: tr(W_R H_RR W_Rᵀ), float64 [n + 1]."""
    channels = _channels(order, width)
    W = weight.double()[:, channels]
    pairs = (W.T @ W) * hessian.double()[channels][:, channels]
    n = len(order)
    by_unit = pairs.view(n, width, n, width).sum((1, 3))
    return torch.cat((by_unit.new_zeros(1), by_unit.cumsum(0).cumsum(1).diagonal()))


def _channels(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def bias_for(weight: Tensor, mean: Tensor, removed: Tensor) -> Tensor:
    """FLAP's compensation (arXiv:2312.11983): what the removed inputs added on average, W_R · E[x_R], float64 [D]."""
    return weight.double()[:, removed] @ mean.double()[removed]


def keep_best(scores: Tensor, count: int, groups: int = 1) -> Tensor:
    """Indices of the `count` highest scores, sorted; with `groups`, the same number from each of as many equal runs."""
    if count % groups:
        raise InputError("units to keep", count, f"a multiple of {groups}, the same from each KV group")
    best = scores.view(groups, -1).topk(count // groups, dim=1).indices
    starts = torch.arange(groups, device=scores.device)[:, None] * (len(scores) // groups)
    return (best + starts).flatten().sort().values


def by_turns(order: Tensor, groups: int) -> Tensor:
    """An order of removal [n] with one unit of each of as many equal runs in turn, each run's own order kept."""
    group = order // (len(order) // groups)
    earlier = torch.tril(group[:, None] == group[None, :], -1).sum(1)  # how many of its own group went before each
    return order[torch.argsort(earlier, stable=True)]
