"""What a format will refuse of a graph that is yet to be quantized: asked before hours of work, not after."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..graph.config import Config, shapes
from ..graph.graph import Graph, LazyTensor, Weight, Weights
from ..graph.quant_tensor import Grid, QuantTensor
from .layouts import layout_of


def check_plan(format: str, planned: Graph) -> None:
    """An `InputError` if `format` cannot carry the graph once passes have changed it. Reads no weight.

    planned: the shapes and grids that the graph will have, as `blank` makes them.
    """
    if format == "gguf":
        from .gguf_writer import check_graph

        check_graph(planned)
    else:
        layout_of(planned, format)


def blank(graph: Graph, config: Config, grids: Mapping[str, Grid]) -> Graph:
    """A graph of those shapes whose tensors have no data (torch's meta device): those in `grids`, by parameter, are
    packed on them, and others stay packed where they are."""
    entries: dict[str, Weight | LazyTensor] = {}
    for name, shape in shapes(config).items():
        known = graph.weights.entries.get(name)
        if name in grids:
            entries[name] = _blank_packed(name, (shape[0], shape[1]), grids[name])
        elif isinstance(known, QuantTensor) and known.shape == shape:
            entries[name] = known.to("meta")
        else:
            entries[name] = LazyTensor(shape, graph.dtype, torch.Tensor)
    return Graph(config, Weights(entries), graph.history, graph.tokenizer)


def _blank_packed(name: str, shape: tuple[int, int], grid: Grid) -> QuantTensor:
    scales = torch.empty(shape[0], shape[1] // grid.group(name, shape[1]), device="meta")
    q = torch.empty(shape, dtype=torch.uint8, device="meta")
    return QuantTensor.from_ints(q, scales, None if grid.symmetric else scales, grid)
