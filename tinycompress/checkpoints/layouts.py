"""Quantized checkpoints in the layouts of other tools: GPTQ, AWQ, compressed-tensors (a file each), and GGUF.

A layout says how each tensor of a packed weight is made and what config.json says of it (`layout_of`, for saving), and
takes the packed weights out of a folder's tensors (`read_packed`, for loading). What is not packed stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..graph.config import Config, shapes
from ..graph.graph import Graph, LazyTensor
from ..graph.quant_tensor import QuantTensor
from ..graph.topology import feeds
from . import awq_format, compressed_tensors, gptq_format

FOLDERS = ("gptq", "awq", "compressed-tensors")
FORMATS = ("native", *FOLDERS, "gguf")


@dataclass(frozen=True)
class Layout:
    """`parts(linear, weight)` maps the suffix of each stored tensor to what makes it; `settings` is config.json's
    quantization_config; `beside` names a file that older readers look for them in."""

    parts: Callable[[str, QuantTensor], Mapping[str, Callable[[QuantTensor], Tensor]]]
    settings: Mapping[str, Any]
    beside: str | None = None


def layout_of(graph: Graph, format: str) -> Layout:
    """The layout of `graph` in `format`; an `InputError` for what the format cannot carry."""
    if format not in FOLDERS:
        raise InputError("format", repr(format), " | ".join(FORMATS))
    if not graph.config.uniform:
        raise InputError(f"format {format}", "layers of different widths", "layers all alike (or format native)")
    weights = _packed(graph, format)
    linears = [name for feed in feeds(graph.config) for name in feed.readers]
    skipped = [name for name in linears if name not in weights]
    if format == "compressed-tensors":
        return Layout(compressed_tensors.parts, compressed_tensors.settings(weights, skipped))
    _check_one_grid(weights, format)
    if format == "awq":
        return Layout(awq_format.parts, awq_format.settings(weights, skipped))
    if dense := [name for name in skipped if name != "lm_head"]:
        raise InputError(
            "format gptq", f"the dense {dense[0]}", "every linear of the layers quantized (or compressed-tensors, awq)"
        )
    settings = gptq_format.settings(weights, head="lm_head" in weights)
    v2 = settings["checkpoint_format"] == "gptq_v2"
    return Layout(lambda name, weight: gptq_format.parts(name, weight, v2), settings, "quantize_config.json")


def read_packed(
    stored: dict[str, LazyTensor], about: Mapping[str, Any], config: Config, where: str
) -> dict[str, QuantTensor]:
    """The packed weights that quantization_config `about` describes, by parameter; their tensors leave `stored`."""
    method = about.get("quant_method")
    layouts: dict[Any, Any] = {"gptq": gptq_format, "awq": awq_format, "compressed-tensors": compressed_tensors}
    if not isinstance(method, str) or method not in layouts:
        raise InputError(f"quant_method of quantization_config in {where}", repr(method), " | ".join(layouts))
    layout = layouts[method]
    layout.check(about, where)
    out: dict[str, QuantTensor] = {}
    for name, shape in shapes(config).items():
        base = name.removesuffix(".weight")
        if base + layout.MARKER in stored:
            if len(shape) != 2:
                raise InputError(f"{base} in {where}", "a quantized vector", "quantized matrices")
            out[name] = layout.read(base, (shape[0], shape[1]), stored, about, where)
    if not out:
        raise InputError(where, f"no tensor *{layout.MARKER}", f"the quantized linears of a {method} checkpoint")
    _drop_zero_biases(stored, out, config)
    return out


def _packed(graph: Graph, format: str) -> dict[str, QuantTensor]:
    """The packed weights by linear; a packed embedding is refused."""
    found = {name: weight for name, weight in graph.weights.entries.items() if isinstance(weight, QuantTensor)}
    if "model.embed_tokens.weight" in found:
        raise InputError(f"format {format}", "a quantized embedding", "a dense one (or format native, gguf)")
    if not found:
        raise InputError(f"format {format}", "a graph without quantized weights", "a quantized one (or format native)")
    for name, weight in found.items():
        if weight.grid.float_zero:
            raise InputError(
                f"{name} in format {format}",
                f"{weight.grid}: float zero points",
                "integer ones (-asym), or format native or gguf",
            )
    return {name.removesuffix(".weight"): weight for name, weight in found.items()}


def _check_one_grid(weights: Mapping[str, QuantTensor], format: str) -> None:
    grids = {
        (weight.grid.bits, weight.grid.group_size, weight.grid.symmetric): str(weight.grid)
        for weight in weights.values()
    }
    if len(grids) > 1:
        raise InputError(
            f"format {format}",
            f"several grids: {', '.join(sorted(grids.values()))}",
            "one (or format compressed-tensors)",
        )


def _drop_zero_biases(stored: dict[str, LazyTensor], packed: Mapping[str, QuantTensor], config: Config) -> None:
    """Some tools write a bias of zeros beside every linear that they quantize."""
    expected = shapes(config)
    for name in packed:
        bias = name.removesuffix(".weight") + ".bias"
        if bias in stored and bias not in expected and not stored[bias].read().any():
            del stored[bias]
