"""Safetensors files, written one tensor at a time and cut into shards.

The format is eight bytes of header length, a JSON header, the tensors. The library's own writer wants all tensors of a
file in memory at once, and a 7B model should not need 28 GB to be saved.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import files
from ..errors import InputError
from ..graph.graph import LazyTensor, check_finite
from ..graph.quant_tensor import QuantTensor

if TYPE_CHECKING:
    from ..graph.graph import Weight
    from .layouts import Layout

    Entry = Weight | LazyTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I8": torch.int8}  # only in other tools' packed weights
ALIGNMENT = 64  # bytes, of the first tensor: a product of unaligned matrices may round otherwise
NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of a safetensors file to come.

    Fields:
        name: the tensor's name in the file.
        shape: its shape.
        dtype: its dtype.
        weight: the graph's entry that it is read from.
        make: what makes the tensor of a quantized weight; by default it is dequantized.
        finite: whether NaN and infinities are refused. Default True.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Entry
    make: Callable[[QuantTensor], Tensor] = QuantTensor.dequantize
    finite: bool = True

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        weight = self.weight.read() if isinstance(self.weight, LazyTensor) else self.weight
        tensor = self.make(weight) if isinstance(weight, QuantTensor) else weight
        if self.finite:
            check_finite(self.name, tensor)
        return tensor.detach().cpu().contiguous()


def cut_shards(
    entries: Mapping[str, Entry], dense: bool, max_bytes: int, layout: Layout | None = None
) -> list[list[Part]]:
    """Parts in checkpoint order, cut into files of at most `max_bytes` (or one part). Packed weights are stored as they
    are, in another tool's `layout`, or `dense`."""
    shards: list[list[Part]] = [[]]
    size = 0
    for part in (part for name, weight in entries.items() for part in _parts(name, weight, dense, layout)):
        if shards[-1] and size + part.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    return shards


def _parts(name: str, weight: Entry, dense: bool, layout: Layout | None) -> Iterator[Part]:
    if not isinstance(weight, QuantTensor) or dense:
        yield Part(name, tuple(weight.shape), weight.dtype, weight)
    elif layout is None:
        for suffix, tensor in weight.tensors().items():
            yield Part(name + suffix, tuple(tensor.shape), tensor.dtype, weight, functools.partial(_stored, suffix))
    else:
        base = name.removesuffix(".weight")
        blank = weight.to("meta")  # shapes and dtypes without the work
        for suffix, make in layout.parts(base, weight).items():
            tensor = make(blank)
            yield Part(base + suffix, tuple(tensor.shape), tensor.dtype, weight, make)


def _stored(suffix: str, weight: QuantTensor) -> Tensor:
    """The part of a packed weight whose name ends in `suffix`."""
    return weight.tensors()[suffix]


def write_shards(shards: list[list[Part]], folder: Path, total: int) -> None:
    from ..progress import tqdm

    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=2, leave=False) as bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {part.name: file for part in shard}
            _write_safetensors(folder / file, shard, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A file of tensors as they are, finite or not."""
    parts = [Part(name, tuple(t.shape), t.dtype, t, finite=False) for name, t in tensors.items()]
    _write_safetensors(path, parts, None)


def _write_safetensors(path: Path, parts: list[Part], bar: Any) -> None:
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)  # so that each tensor lies aligned; stable otherwise
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        header[part.name] = {
            "dtype": NAMES[part.dtype],
            "shape": part.shape,
            "data_offsets": (offset, offset + part.nbytes),
        }
        offset += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            tensor = part.read()
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise InputError(
                    part.name, f"{tensor.dtype} {tuple(tensor.shape)}", f"{part.dtype} {part.shape}, as announced"
                )
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            if bar is not None:
                bar.update(part.nbytes)
        if file.tell() != 8 + len(text) + offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
