"""Which channels, heads and layers matter: published criteria as functions of the statistics of one axis.

  magnitude   √Σ w² over everything that is cut together
  wanda_sp    Σ_i |W_ij| · ‖x_j‖ / D                              (Wanda, arXiv:2306.11695; Wanda-sp in FLAP's paper)
  minitron    √Σ_windows (mean_t |x_j|)²                          (Minitron, arXiv:2407.14679)
  flap        Var(x_j) · ‖W_:j‖²                                  (FLAP, arXiv:2312.11983)
  taylor      Σ |w · ∂L/∂w| over everything that is cut together  (LLM-Pruner, arXiv:2305.11627)
  obs         the loss of greedy removal with everything left refitted
              (ZipLM, arXiv:2302.04089; OSSCAR, arXiv:2403.12983)

A criterion is any function from `Statistics` to scores [n], one for each unit of the axis: what scores lowest goes
first. W is the linear that reads the axis (an output projection or a down projection), x its input.
Letters: D hidden, K inputs of W, n units, N windows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.topology import Feed
from .axis_statistics import Statistics
from .refit import obs_losses

Criterion = Callable[[Statistics], Tensor]


def magnitude(s: Statistics) -> Tensor:
    return s.coupled_units({name: w.double().square() for name, w in s.coupled.items()}).sqrt()


def wanda_sp(s: Statistics) -> Tensor:
    return s.units(s.weight.double().abs().mean(0) * s.gram.diagonal().sqrt())


def minitron(s: Statistics) -> Tensor:
    return s.units(s.absolute.double().square().sum(0)).sqrt()  # heads: the L2 norm over head_dim


def flap(s: Statistics) -> Tensor:
    variance = (s.gram.diagonal() / s.positions - s.mean.double().square()).clamp_min(0)
    return s.units(variance * s.weight.double().square().sum(0))


def taylor(s: Statistics) -> Tensor:
    if s.gradients is None:
        accepted = "statistics collected with gradients=True, which the taylor criterion reads"
        raise InputError("statistics", "no gradients", accepted)
    return s.coupled_units({name: (w.double() * s.gradients[name].double()).abs() for name, w in s.coupled.items()})


def obs(s: Statistics) -> Tensor:
    return obs_losses(s.weight_in_nats, s.gram / s.positions, s.width, s.axis.groups)


CRITERIA: Mapping[str, Criterion] = {
    "magnitude": magnitude,
    "wanda_sp": wanda_sp,
    "minitron": minitron,
    "flap": flap,
    "taylor": taylor,
    "obs": obs,
}


def block_influence(graph: Graph, tokens: Tensor, progress: bool = True) -> Tensor:
    """1 - cos(hidden state before, after) of every layer, averaged over positions (ShortGPT, arXiv:2403.03853).

    tokens: [N, T]. Returns float64 [layers]. Hidden states are seen at the norms, which scale each position and each
    channel; the channels' scale is divided out, and the cosine does not see the positions'.
    """
    # influence [layers], and the hidden states in front of the last layer that was seen
    kept = {"influence": torch.zeros(graph.config.n_layers, dtype=torch.float64), "layer": torch.tensor(-1)}

    def visit(feed: Feed, inputs: Inputs) -> None:
        layer = graph.config.n_layers if feed.layer is None else feed.layer
        owner = int(kept["layer"])
        if layer == owner or feed.norm is None:
            return
        weight = graph.tensor(feed.norm)
        scale = torch.where(weight == 0, 0.0, 1 / weight.double()).to(tokens.device)
        after = [x * scale.to(x.dtype) for x in inputs]
        before = [kept[f"before {i}"] for i in range(len(after) if owner >= 0 else 0)]
        influence = kept["influence"].clone()
        if before:  # layers between the two that have no sublayer change nothing
            cosines = [F.cosine_similarity(a, b, dim=-1).double().sum() for a, b in zip(before, after)]
            influence[owner] = 1 - float(sum(cosines)) / tokens.numel()
        kept.update({"influence": influence, "layer": torch.tensor(layer)})
        kept.update({f"before {i}": h for i, h in enumerate(after)})

    walk(graph, tokens, visit, kept=kept, progress="block influence" if progress else None)
    return kept["influence"]


def hidden_importance(graph: Graph, tokens: Tensor, progress: bool = True) -> Tensor:
    """Minitron's for hidden channels: √Σ_windows (mean_t |x_j|)² summed over the outputs of every norm, float64 [D]."""
    kept = {"importance": torch.zeros(graph.config.hidden_size, dtype=torch.float64, device=tokens.device)}

    def visit(feed: Feed, inputs: Inputs) -> None:
        if feed.behind_norm:
            added = torch.stack([x.abs().mean(1).double().square().sum(0) for x in inputs]).sum(0).sqrt()
            kept["importance"] = kept["importance"] + added

    walk(graph, tokens, visit, kept=kept, progress="hidden importance" if progress else None)
    return kept["importance"]
