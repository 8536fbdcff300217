"""A static export → the Graph that was exported, bit for bit: the inverse of `static_weights` and of the host's
file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.config import EMBEDDING, Config, shapes
from tinycompress.graph.graph import Weight
from tinycompress.graph.quant_tensor import Grid, QuantTensor, unpack

from .host import HOST
from .weights import from_blocks, from_channel


def host_file(folder: str | Path) -> dict[str, Tensor]:
    """What the host reads, by name; empty for an export that has no such file."""
    from safetensors.torch import load_file

    path = Path(folder) / HOST
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(str(path), f"not a safetensors file ({error})", "the file as it was exported") from error


def static_weights(stored: Mapping[str, Tensor], specs: Mapping[str, Grid], config: Config) -> dict[str, Weight]:
    """Every parameter from the initializers and the host's tensors."""
    return {name: _weight(name, shape, stored, specs.get(name)) for name, shape in shapes(config).items()}


def _weight(name: str, shape: tuple[int, ...], stored: Mapping[str, Tensor], spec: Grid | None) -> Weight:
    if name == EMBEDDING:
        return _table(stored, spec, (shape[0], shape[1]))
    if spec is None:
        transposed = len(shape) == 2
        tensor = _get(stored, name, shape[::-1] if transposed else shape, torch.float32)
        return tensor.T if transposed else tensor
    (N, K) = shape
    if spec.group(name, K) != K:
        packed = _get(stored, f"{name}.packed", None, torch.uint8)
        scales = _get(stored, f"{name}.scales", None, torch.float32)
        if packed.numel() != N * K // 2 or scales.shape[0] != N or scales.shape[1] % (K // spec.group(name, K)):
            raise InputError(
                name, f"packed {tuple(packed.shape)}, scales {tuple(scales.shape)}", f"blocks of a {(N, K)} weight"
            )
        return from_blocks(packed, scales, spec, (N, K))
    if spec.bits == 8:
        ints = _get(stored, f"{name}.ints", (K, N), torch.int8)
    else:  # two values in a byte, two's complement
        ints = _get(stored, f"{name}.ints", None, torch.uint8)
        if ints.numel() != -(-K * N // 2):
            raise InputError(f"{name}.ints", f"{ints.numel()} bytes", -(-K * N // 2))
        ints = (((unpack(ints.reshape(-1), 4, K * N) + 8) & 15).to(torch.int8) - 8).view(K, N)
    return from_channel(ints, _get(stored, f"{name}.scales", (N,), torch.float32), spec)


def _table(stored: Mapping[str, Tensor], spec: Grid | None, shape: tuple[int, int]) -> Weight:
    if spec is None:
        return _get(stored, EMBEDDING, shape, torch.float32)
    parts = {
        suffix: stored[EMBEDDING + suffix]
        for suffix in (".packed", ".scales", ".zeros")
        if EMBEDDING + suffix in stored
    }
    if not {".packed", ".scales"} <= set(parts):
        raise InputError(HOST, f"no packed {EMBEDDING}", "the table of the manifest's config")
    return QuantTensor.from_tensors(parts, spec, shape)


def _get(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> Tensor:
    tensor = stored.get(name)
    if tensor is None:
        raise InputError("prefill.onnx", f"no initializer {name}", "every parameter of the manifest's config")
    if tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != tuple(shape)):
        raise InputError(name, f"{tensor.dtype} {tuple(tensor.shape)}", f"{dtype} {shape or ''}")
    return tensor
