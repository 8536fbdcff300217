"""Quantization without data: linear after linear, no forward, so that one weight in float is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ..graph.graph import Graph
from ..graph.mapped_memory import keeper
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..progress import tqdm

Quantize = Callable[[Tensor, QuantSpec, str], QuantTensor]  # weight [N, K], its grid, its name for errors


def quantize_linears(
    graph: Graph,
    specs: Mapping[str, QuantSpec],
    quantize: Quantize,
    device: str | None = None,
    progress: str | None = None,
) -> dict[str, QuantTensor]:
    """The packed weights, by parameter, of the linears that `specs` names. Large ones are kept on disk
    (mapped_memory.py).

    device: where a weight is quantized before the result returns to where the weight was; None: where it is.
    progress: the name of a bar over the linears; None shows none.
    """
    linears = {linear.name: linear for linear in graph.config.linears()}
    keep = keeper((math.prod(linears[name].shape), spec.bits) for name, spec in specs.items())
    packed: dict[str, QuantTensor] = {}
    for name, spec in tqdm(specs.items(), desc=progress, unit="linear", delay=2, disable=progress is None):
        parameter = linears[name].weight
        weight = graph.tensor(parameter)
        packed[parameter] = keep(quantize(weight.to(device), spec, name).to(weight.device))
    return packed
