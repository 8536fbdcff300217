"""Activations in int8, simulated: what every linear of the layers reads is rounded to a grid, and the rest stays float.

    x̂ = clamp(round(x / s), -(2^(b-1) - 1), 2^(b-1) - 1) · s

`s` is max|x| / (2^(b-1) - 1), where the largest magnitude is that of each position ("per token", taken at run time) or
of a calibration text ("static", one number per feed, which is what a fixed NPU graph has). With 4-bit weights this is
W4A8. It measures what a model loses; nothing gets faster. The head's input stays float.

Letters: b bits, T positions, K width of a feed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.data import as_tokens
from ..calibration.walk import Inputs, walk
from ..errors import InputError
from ..graph.graph import Graph
from ..graph.topology import Feed
from ..model.transformer import Transformer


def simulate(graph: Graph, bits: int = 8, ranges: Mapping[str, float] | None = None) -> Transformer:
    """`graph.module()`, with the inputs of the layers' linears rounded.

    Arguments:
        bits: of an activation, 2 … 16.
        ranges: the largest magnitude that each linear reads, by its name (`static_ranges`); None takes that of each
            position at run time.
    """
    if not 2 <= bits <= 16:
        raise InputError("bits", bits, "2 … 16")
    top = 2 ** (bits - 1) - 1
    module = graph.module()
    for name, linear in module.linears().items():
        if ranges is not None and name not in ranges:
            raise InputError("ranges", f"no range for {name}", "one for every linear of the layers (static_ranges)")
        fixed = None if ranges is None else ranges[name]

        def rounded(_: nn.Module, args: tuple[Tensor], fixed: float | None = fixed) -> Tensor:
            return round_activations(args[0], top, fixed)

        linear.register_forward_pre_hook(rounded)
    return module


def round_activations(x: Tensor, top: int, fixed: float | None = None) -> Tensor:
    """x [..., K] on the grid of integers -top … top, times max|x| / top of each position, or `fixed` / top."""
    peak = x.abs().amax(-1, keepdim=True) if fixed is None else torch.tensor(fixed, dtype=x.dtype, device=x.device)
    s = (peak / top).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / s).round_().clamp_(-top, top).mul_(s)


def static_ranges(graph: Graph, tokens: Tensor | Iterable[Any], progress: bool = True) -> dict[str, float]:
    """The largest magnitude that each linear of the layers reads over `tokens` [windows, T]."""
    ranges: dict[str, float] = {}

    def visit(feed: Feed, inputs: Inputs) -> None:
        ranges.update(dict.fromkeys(feed.readers, max(x.abs().max().item() for x in inputs)))

    walk(graph, as_tokens(tokens), visit, progress="ranges" if progress else None)
    return ranges
