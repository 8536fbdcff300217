"""Quantized checkpoints in the layouts of other tools: GPTQ, AWQ, compressed-tensors (a file each), and GGUF.

A layout says how each tensor of a packed weight is made and what config.json says of it (`layout_of`, for saving), and
takes the packed weights out of a folder's tensors (`read_packed`, for loading). What is not packed stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..graph.config import EMBEDDING, HEAD, Config, shapes
from ..graph.graph import Graph, LazyTensor
from ..graph.quant_tensor import QuantTensor
from . import awq_format, compressed_tensors, gptq_format
from .families import FAMILIES, family_of
from .quantization_config import Foreign

FOLDERS = ("gptq", "awq", "compressed-tensors")
FORMATS = ("native", *FOLDERS, "gguf")


@dataclass(frozen=True)
class Layout:
    """How another tool stores a graph's packed weights.

    Fields:
        parts: from a linear's name and its weight, the suffix of each stored tensor with what makes the tensor.
        settings: config.json's quantization_config.
        beside: a file that older readers look for the settings in, or None.
    """

    parts: Callable[[str, QuantTensor], Mapping[str, Callable[[QuantTensor], Tensor]]]
    settings: Mapping[str, Any]
    beside: str | None = None


def layout_of(graph: Graph, format: str) -> Layout:
    """The layout of `graph` in `format`; an `InputError` for what the format cannot carry."""
    if format not in FOLDERS:
        raise InputError("format", repr(format), " | ".join(FORMATS))
    if family_of(graph.config) is None:
        found = "layers of different widths, or parts that no one class of transformers has"
        raise InputError(
            f"format {format}", found, f"{' | '.join(FAMILIES)} with layers all as wide (or format native)"
        )
    weights = _packed(graph, format)
    skipped = [linear.name for linear in graph.config.linears() if linear.name not in weights]
    if format == "compressed-tensors":
        return Layout(compressed_tensors.parts, compressed_tensors.settings(weights, skipped))
    _check_one_grid(weights, format)
    if format == "awq":
        return Layout(awq_format.parts, awq_format.settings(weights, skipped))
    if dense := [name for name in skipped if name != HEAD]:
        accepted = "every linear of the layers quantized (or compressed-tensors, awq)"
        raise InputError("format gptq", f"the dense {dense[0]}", accepted)
    settings = gptq_format.settings(weights, head=HEAD in weights)
    v2 = settings["checkpoint_format"] == "gptq_v2"
    return Layout(lambda name, weight: gptq_format.parts(name, weight, v2), settings, "quantize_config.json")


def read_packed(stored: dict[str, LazyTensor], foreign: Foreign, config: Config) -> dict[str, QuantTensor]:
    """The packed weights that another tool's config describes, by parameter; their tensors leave `stored`."""
    method = foreign.settings.get("quant_method")
    layouts: dict[Any, Any] = {"gptq": gptq_format, "awq": awq_format, "compressed-tensors": compressed_tensors}
    if not isinstance(method, str) or method not in layouts:
        raise InputError(f"quant_method of {foreign.file}", repr(method), " | ".join(layouts))
    layout = layouts[method]
    foreign = dataclasses.replace(foreign, grids=layout.stated(foreign.settings, foreign.file))
    packed: dict[str, QuantTensor] = {}
    for name, shape in shapes(config).items():
        base = name.removesuffix(".weight")
        if base + layout.MARKER in stored:
            if len(shape) != 2:
                raise InputError(f"{base} in {foreign.folder}", "a quantized vector", "quantized matrices")
            packed[name] = layout.read(base, (shape[0], shape[1]), stored, foreign)
    if not packed:
        accepted = f"the quantized linears of which {foreign.file} speaks ({method})"
        raise InputError(foreign.folder, f"no tensor *{layout.MARKER}", accepted)
    if foreign.settings.get("lm_head") not in (None, f"{HEAD}.weight" in packed) and method == "gptq":
        found = (
            f"{foreign.settings['lm_head']}, and a head that is {'' if f'{HEAD}.weight' in packed else 'not '}packed"
        )
        raise InputError(f"lm_head in {foreign.file}", found, "what is stored")
    _drop_zero_biases(stored, packed, config)
    return packed


def _packed(graph: Graph, format: str) -> dict[str, QuantTensor]:
    """The packed weights by linear; a packed embedding is refused."""
    packed = {name: weight for name, weight in graph.weights.entries.items() if isinstance(weight, QuantTensor)}
    if EMBEDDING in packed:
        raise InputError(f"format {format}", "a quantized embedding", "a dense one (or format native, gguf)")
    if not packed:
        raise InputError(f"format {format}", "a graph without quantized weights", "a quantized one (or format native)")
    for name, weight in packed.items():
        if weight.grid.float_zero:
            accepted = "integer ones (-asym), or format native or gguf"
            raise InputError(f"{name} in format {format}", f"{weight.grid}: float zero points", accepted)
    return {name.removesuffix(".weight"): weight for name, weight in packed.items()}


def _check_one_grid(weights: Mapping[str, QuantTensor], format: str) -> None:
    grids = sorted({str(weight.grid) for weight in weights.values()})
    if len(grids) > 1:
        accepted = "one (or format compressed-tensors)"
        raise InputError(f"format {format}", f"several grids: {', '.join(grids)}", accepted)


def _drop_zero_biases(stored: dict[str, LazyTensor], packed: Mapping[str, QuantTensor], config: Config) -> None:
    """Some tools write a bias of zeros beside every linear that they quantize."""
    expected = shapes(config)
    for name in packed:
        bias = name.removesuffix(".weight") + ".bias"
        if bias in stored and bias not in expected and not stored[bias].read().any():
            del stored[bias]
