"""Quantization without data: linear after linear, no forward, so that one weight in float is in memory at a time.

In a pipeline with a work folder a killed run goes on behind the last linear that it saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ..checkpoints.unfinished import open_stage
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
    stage = open_stage("linears", packed=packed)
    numbered = list(enumerate(specs.items(), 1))[stage.done :]
    shown = progress is not None
    for number, (name, spec) in tqdm(
        numbered, desc=progress, unit="linear", initial=stage.done, total=len(specs), delay=2, disable=not shown
    ):
        parameter = linears[name].weight
        weight = graph.tensor(parameter)
        packed[parameter] = keep(quantize(weight.to(device), spec, name).to(weight.device))
        stage.save(number)
    stage.finish()
    return packed
