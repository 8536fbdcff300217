"""Bit streams in int32 words, low bits first: what the formats of GPTQ, AWQ and compressed-tensors are made of.

A row of a QuantTensor is such a stream already, in bytes: read as little-endian words it needs no unpacking.
Letters: N out_features, K in_features, g group_size, G = K / g groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import Grid, QuantTensor, pack, unpack

HALF = torch.float16  # what these formats keep scales in
FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # what scales are read in


def to_words(q: Tensor, bits: int) -> Tensor:
    """Integers [..., n] in 0 … 2^bits - 1 to int32 [..., ⌈n·bits/32⌉]."""
    stream = pack(q, bits)[..., : -(-q.shape[-1] * bits // 8)]
    return _bytes_as(F.pad(stream, (0, -stream.shape[-1] % 4)), torch.int32)


def from_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `to_words`: uint8 [..., n]."""
    stream = _bytes_as(words, torch.uint8)
    return unpack(F.pad(stream, (0, -stream.shape[-1] % bits)), bits, n)


def row_words(weight: QuantTensor) -> Tensor:
    """int32 [N, K·bits/32]: every row's stream, the groups one behind the other. Shares the weight's memory."""
    return _bytes_as(weight.packed.reshape(weight.shape[0], -1), torch.int32)


def packed_rows(words: Tensor, groups: int) -> Tensor:
    """The inverse of `row_words`: uint8 [N, G, g·bits/8], sharing memory where the words lie row by row."""
    return _bytes_as(words, torch.uint8).reshape(len(words), groups, -1)


def _bytes_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of [..., n] as another integer type; through one dimension, where strides of length 1 do not matter."""
    return x.contiguous().view(-1).view(dtype).reshape(*x.shape[:-1], -1)


def half_scales(name: str, scales: Tensor) -> Tensor:
    """Scales in float16; one beyond its range is an `InputError`."""
    half = scales.to(HALF)
    if not half.is_meta and not torch.isfinite(half).all():
        largest = f"{scales.abs().max():.3g}, beyond float16"
        raise InputError(f"scales of {name}", largest, "scales below 65504 (is the weight sound?)")
    return half


def stored_zeros(weight: QuantTensor) -> Tensor:
    """Zero points as these formats store them, uint8 [N, G]: those of a symmetric grid are all alike."""
    if weight.zeros is not None:
        return weight.zeros
    return torch.full_like(weight.scales, weight.grid.zero, dtype=torch.uint8)


def regular_groups(name: str, index: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G'] in column order for `index` [K], the group of each column.

    Activation order without static groups scatters a group's columns. That is undone, exactly, where runs of columns
    share a group: each run, of at least 8 columns, becomes a group of its own. Otherwise a grid without an index cannot
    express it, and it is an `InputError`.
    """
    K = len(index)
    G = scales.shape[1]
    index = index.long()
    if int(index.min()) < 0 or int(index.max()) >= G:
        raise InputError(f"g_idx of {name}", f"{int(index.min())} … {int(index.max())}", f"groups 0 … {G - 1}")
    if K % G == 0 and torch.equal(index, torch.arange(G).repeat_interleave(K // G)):
        return scales, zeros
    for g in sorted((size for size in range(8, K + 1, 8) if K % size == 0), reverse=True):
        runs = index.reshape(-1, g)
        if torch.equal(runs, runs[:, :1].expand_as(runs)):
            return scales[:, runs[:, 0]], zeros[:, runs[:, 0]]
    accepted = "groups of neighbouring columns (quantized with desc_act=false, or with static groups)"
    raise InputError(f"g_idx of {name}", "columns of a group scattered in activation order", accepted)


def quant_tensor(
    name: str, packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, shape: tuple[int, int]
) -> QuantTensor:
    """The weight in a row-wise bit stream (words, or bytes) [N, …]; symmetric if all zeros lie in the middle."""
    G = scales.shape[1]
    g = shape[1] // G
    if G > 1 and g % 8:
        raise InputError(f"groups of {name}", f"{G} of {g} columns", "a multiple of 8 columns each")
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    grid = Grid(bits, None if G == 1 else g, symmetric)
    parts = {".packed": packed_rows(packed, G), ".scales": scales.contiguous()}
    if not symmetric:
        parts[".zeros"] = zeros.to(torch.uint8).contiguous()
    return QuantTensor.from_tensors(parts, grid, shape)


def take(stored: dict[str, LazyTensor], name: str, where: str, dims: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The tensor `name`, taken out of `stored`; missing, misshapen or of another kind it is an `InputError`."""
    entry = stored.pop(name, None)
    if entry is None:
        raise InputError(where, f"no tensor {name}", "every part of a quantized linear")
    if len(entry.shape) != dims or entry.dtype not in dtypes:
        kinds = " | ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputError(f"{name} in {where}", f"{entry.dtype} {entry.shape}", f"{kinds} of {dims} dimensions")
    return entry.read()


def take_words(stored: dict[str, LazyTensor], base: str, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """The words of the weight, those of the zero points, and the scales of a linear `base`, taken out of `stored`."""
    words = take(stored, f"{base}.qweight", where, 2, (torch.int32,))
    zero_words = take(stored, f"{base}.qzeros", where, 2, (torch.int32,))
    scales = take(stored, f"{base}.scales", where, 2, FLOATS)
    return words, zero_words, scales


def expect(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """An `InputError` for the first of `tensors` that has another shape than `shapes` says; `where` names the file."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name} in {where}", f"shape {tuple(tensors[name].shape)}", f"{shape}")
