"""Activations in int8, simulated: what every linear of the layers reads is rounded to a grid, and the rest stays float.

    x̂ = clamp(round(x / s), -(2^(b-1) - 1), 2^(b-1) - 1) · s

`s` is max|x| / (2^(b-1) - 1) of each position ("per token", taken at run time) or of a calibration text ("static", one
number a feed, which is what a fixed NPU graph has). With 4-bit weights this is W4A8. It measures what a model loses;
nothing gets faster. The head's input stays float. Letters: B batch, T positions, K width of a feed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..calibration.walk import walk
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.topology import feeds
from ..model.transformer import Transformer


def simulate(graph: Graph, bits: int = 8, ranges: Mapping[str, float] | None = None) -> Transformer:
    """`graph.module()`, with the inputs of the layers' linears rounded to `bits`: by position, or with `ranges`, the
    largest magnitude by linear (`static_ranges`), to that fixed range."""
    if not 2 <= bits <= 16:
        raise InputError("bits", bits, "2 … 16")
    top = 2 ** (bits - 1) - 1
    module = graph.module()
    for name in (name for feed in feeds(graph.config) if feed.layer is not None for name in feed.readers):
        if ranges is not None and name not in ranges:
            raise InputError("ranges", f"no range for {name}", "one for every linear of the layers (static_ranges)")
        fixed = None if ranges is None else ranges[name]

        def rounded(_: nn.Module, args: tuple[Tensor], fixed: float | None = fixed) -> Tensor:
            return round_activations(args[0], top, fixed)

        module.get_submodule(name).register_forward_pre_hook(rounded)
    return module


def round_activations(x: Tensor, top: int, fixed: float | None = None) -> Tensor:
    """x [..., K] on the grid of integers -top … top, times max|x| / top of each position, or `fixed` / top."""
    peak = x.abs().amax(-1, keepdim=True) if fixed is None else torch.tensor(fixed, dtype=x.dtype, device=x.device)
    s = (peak / top).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / s).round_().clamp_(-top, top).mul_(s)


def static_ranges(graph: Graph, tokens: Tensor) -> dict[str, float]:
    """The largest magnitude that each linear of the layers reads over `tokens` [windows, T]."""
    out: dict[str, float] = {}
    walk(
        graph,
        tokens,
        lambda feed, inputs: out.update(dict.fromkeys(feed.readers, max(x.abs().max().item() for x in inputs))),
        progress="ranges",
    )
    return out
