"""What a format will refuse of a graph that is yet to be quantized: asked before hours of work, not after."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..graph.config import Config, shapes
from ..graph.graph import Graph, LazyTensor, Weight, Weights
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import feeds
from .layouts import layout_of


def check_plan(format: str, graph: Graph, config: Config, spec: QuantSpec | None, tables: QuantSpec | None) -> None:
    """An `InputError` if `format` cannot carry `graph` once it has the shapes of `config`, the layers' linears on `spec`
    and the embedding and head on `tables` (None: as they are). Reads no weight."""
    grids: dict[str, QuantSpec] = {}
    if spec:
        grids |= {f"{name}.weight": spec for feed in feeds(config) if feed.layer is not None for name in feed.readers}
    if tables:
        grids |= {name: tables for name in ("model.embed_tokens.weight", "lm_head.weight") if name in shapes(config)}
    if format == "gguf":
        from .gguf_writer import check_graph

        check_graph(_blank(graph, config, grids))
    else:
        layout_of(_blank(graph, config, grids), format)


def _blank(graph: Graph, config: Config, grids: Mapping[str, QuantSpec]) -> Graph:
    """A graph of those shapes and grids whose tensors have no data (torch's meta device)."""
    entries: dict[str, Weight | LazyTensor] = {}
    for name, shape in shapes(config).items():
        known = graph.weights.entries.get(name)
        if name in grids:
            entries[name] = _blank_packed(name, (shape[0], shape[1]), grids[name])
        elif isinstance(known, QuantTensor) and known.shape == shape:
            entries[name] = known.to("meta")
        else:
            entries[name] = LazyTensor(shape, graph.dtype, torch.Tensor)
    return Graph(config, Weights(entries))


def _blank_packed(name: str, shape: tuple[int, int], spec: QuantSpec) -> QuantTensor:
    scales = torch.empty(shape[0], shape[1] // spec.group(name, shape[1]), device="meta")
    q = torch.empty(shape, dtype=torch.uint8, device="meta")
    return QuantTensor.from_ints(q, scales, None if spec.symmetric else scales, spec)
