"""What a quantized weight is, and how it is packed.

A weight [N, K] is cut along K into groups of g; each group has a scale s and (asymmetric) an integer zero point z:

    w ≈ (q - z) · s,   q in 0 … 2^bits - 1,   z = 2^(bits-1) when symmetric

Symmetric scales may be negative: the grid reaches one step further on one side, and the sign chooses which. With
`float_zero` z is a float: at 2 bits, where a step is a third of the range, rounding z costs more than the four bytes it
takes (NeUQI, arXiv:2505.17595). Letters: N out_features, K in_features, g group_size, G = K / g groups.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

BITS = (2, 3, 4, 8)
SEARCHES = ("auto", "minmax", "mse", "weighted", "lpbq")
SUFFIXES = ("-asym", "-floatzero")  # of a grid's name: integer zero points, float ones


@dataclass(frozen=True)
class Grid:
    """What is stored of a quantized weight.

    Fields:
        bits: of an integer, one of `BITS`.
        group_size: inputs that share a scale, a multiple of 8; None is one group per row ("per-channel").
        symmetric: whether the zero point is 2^(bits - 1) and not stored.
        float_zero: whether stored zero points are floats; for asymmetric grids of 2 to 4 bits.
    """

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    float_zero: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.bits not in BITS:
            raise InputError(f"{owner}.bits", self.bits, BITS)
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise InputError(f"{owner}.group_size", self.group_size, "a multiple of 8, or None for per-channel")
        if self.float_zero and (self.symmetric or self.bits > 4):
            found = f"True, {self.bits} bits, symmetric={self.symmetric}"
            raise InputError(f"{owner}.float_zero", found, "2, 3 or 4 bits, symmetric=False")

    def __str__(self) -> str:
        size = f"g{self.group_size}" if self.group_size else ""
        return f"w{self.bits}{size}{self.suffix}"

    @property
    def suffix(self) -> str:
        """What a name says behind bits and group: the kind of zero points."""
        if self.float_zero:
            return "-floatzero"
        return "" if self.symmetric else "-asym"

    @property
    def zero(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def grid(self) -> Grid:
        """The grid alone, without how it was searched: equal for weights that are stored alike."""
        return Grid(self.bits, self.group_size, self.symmetric, float_zero=self.float_zero)

    def group(self, name: str, in_features: int) -> int:
        """The group length for a linear; an `InputError` when it does not divide."""
        g = self.group_size or in_features
        if in_features % g:
            fits = [str(n) for n in (128, 64, 32, 16, 8) if in_features % n == 0]
            per_channel = replace(self, group_size=None)
            accepted = (
                f"{', '.join(fits)}, or per-channel" if fits else f"per-channel ({per_channel}): no multiple of 8 fits"
            )
            raise InputError(f"group_size for {name}", f"{g}, which does not divide its {in_features} inputs", accepted)
        return g

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Grid:
        """The inverse of dataclasses.asdict. Files before 0.1.0 also name the search (`scale`), which is not stored any
        more."""
        fields = dict(data)
        fields.pop("scale", None)
        return Grid(**fields)


@dataclass(frozen=True)
class QuantSpec(Grid):
    """A grid, and how its scales are searched; its other fields are those of `Grid`.

    Fields:
        search: "minmax" covers the range of each group. "mse" minimises the squared error. "weighted" minimises the
            squared error weighted by E[x²] of each input channel. "auto" is "weighted" where activation statistics are
            at hand and "minmax" otherwise. "lpbq" searches positive scales in the form of Qualcomm's HTP (lpbq.py).
    """

    search: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in SEARCHES:
            raise InputError("QuantSpec.search", repr(self.search), " | ".join(SEARCHES))
        if self.search == "lpbq" and not self.symmetric:
            raise InputError("QuantSpec.search", "'lpbq' with zero points", "symmetric=True")

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """`w4g64` (symmetric, groups of 64), `w4` (per-channel), `w4g64-asym` (integer zero points), `w2g64-floatzero`,
        `w4g64-lpbq` (scales for Qualcomm's HTP)."""
        match = re.fullmatch(r"w(\d)(?:g(\d+))?(-asym|-floatzero|-lpbq)?", text)
        if not match:
            accepted = "w<bits>[g<group>][-asym|-floatzero|-lpbq], such as w4g64, w3g64, w8 or w4g32-asym"
            raise InputError("quantization", repr(text), accepted)
        kind = match[3]
        return QuantSpec(
            bits=int(match[1]),
            group_size=int(match[2]) if match[2] else None,
            symmetric=kind in (None, "-lpbq"),
            float_zero=kind == "-floatzero",
            search="lpbq" if kind == "-lpbq" else "auto",
        )

    @staticmethod
    def of(spec: str | Grid) -> QuantSpec:
        """A spec as passes take them: text is parsed, a bare grid gets the search "auto"."""
        if isinstance(spec, str):
            return QuantSpec.parse(spec)
        if isinstance(spec, QuantSpec):
            return spec
        if isinstance(spec, Grid):
            return QuantSpec(**dataclasses.asdict(spec))
        raise InputError("spec", repr(spec)[:80], "text such as w4g64, or a QuantSpec")

    @property
    def suffix(self) -> str:
        return "-lpbq" if self.search == "lpbq" else super().suffix


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A packed weight [N, K] in G groups of g inputs.

    Fields:
        packed: the integers, uint8 [N, G, ⌈g·bits/8⌉], low bits first along K; for 2, 4 and 8 bits this is MatMulNBits'
            layout.
        scales: float [N, G].
        zeros: zero points [N, G], uint8, or of the scales' dtype where the grid's are floats; None if symmetric.
        grid: bits, group size and kind of zero points.
        shape: [N, K].
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", self.grid.grid)  # of a spec, without its search

    @staticmethod
    def from_ints(q: Tensor, scales: Tensor, zeros: Tensor | None, grid: Grid) -> QuantTensor:
        """`q` integers [N, K] in 0 … 2^bits - 1, `scales` and `zeros` [N, G]."""
        N, K = q.shape
        packed = pack(q.reshape(N, scales.shape[1], -1), grid.bits)
        kind = scales.dtype if grid.float_zero else torch.uint8
        return QuantTensor(packed, scales.contiguous(), None if zeros is None else zeros.to(kind), grid, (N, K))

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the suffix they are saved under."""
        parts = {".packed": self.packed, ".scales": self.scales}
        return parts if self.zeros is None else parts | {".zeros": self.zeros}

    @staticmethod
    def from_tensors(parts: Mapping[str, Tensor], grid: Grid, shape: tuple[int, int]) -> QuantTensor:
        """The inverse of `tensors`, with shapes checked against `shape` [N, K]."""
        packed, scales, zeros = parts[".packed"], parts[".scales"], parts.get(".zeros")
        g = grid.group("a packed weight", shape[1])
        G, width = shape[1] // g, -(-g // 8) * grid.bits
        if (
            tuple(packed.shape) != (shape[0], G, width)
            or tuple(scales.shape) != (shape[0], G)
            or (zeros is None) != grid.symmetric
        ):
            raise InputError(
                "packed weight",
                f"packed {tuple(packed.shape)}, scales {tuple(scales.shape)}",
                f"{(shape[0], G, width)} and {(shape[0], G)}",
            )
        if packed.dtype != torch.uint8 or not scales.is_floating_point():
            raise InputError("packed weight", f"packed {packed.dtype}, scales {scales.dtype}", "uint8 and floats")
        if zeros is not None and (zeros.shape != scales.shape or zeros.is_floating_point() != grid.float_zero):
            kind = "floats" if grid.float_zero else "uint8"
            raise InputError(
                "zero points of a packed weight",
                f"{zeros.dtype} {tuple(zeros.shape)}",
                f"{kind} {tuple(scales.shape)} for {grid}",
            )
        return QuantTensor(packed, scales, zeros, grid, shape)

    def ints(self) -> Tensor:
        """uint8 [N, K] in 0 … 2^bits - 1."""
        g = self.shape[1] // self.scales.shape[1]
        return unpack(self.packed, self.grid.bits, g).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """float [N, K], in the scales' dtype unless another is given."""
        dtype = dtype or self.scales.dtype
        q = self.ints().reshape(*self.scales.shape, -1).to(dtype)
        zero = self.grid.zero if self.zeros is None else self.zeros.to(dtype)[..., None]
        return q.sub_(zero).mul_(self.scales.to(dtype)[..., None]).reshape(self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantTensor:
        zeros = None if self.zeros is None else self.zeros.to(device, dtype if self.grid.float_zero else None)
        return QuantTensor(self.packed.to(device), self.scales.to(device, dtype), zeros, self.grid, self.shape)

    def rows(self, start: int, stop: int) -> QuantTensor:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantTensor(
            self.packed[start:stop],
            self.scales[start:stop],
            zeros,
            self.grid,
            (len(self.packed[start:stop]), self.shape[1]),
        )

    def divide_rows(self, by: Tensor) -> QuantTensor:
        """The weight with row n divided by by[n]: only the scales change, so this is exact."""
        scales = (self.scales.double() / by[:, None]).to(self.scales.dtype)
        return QuantTensor(self.packed, scales, self.zeros, self.grid, self.shape)

    def select(self, name: str, dim: int, index: Tensor) -> QuantTensor:
        """Rows can be cut; columns would break groups, so those are cut before quantization."""
        if dim != 0:
            raise InputError(
                name, "a cut across quantized groups", "pruning before quantization (or a graph loaded dense)"
            )
        index = index.to(self.device)
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantTensor(self.packed[index], self.scales[index], zeros, self.grid, (len(index), self.shape[1]))


def stacked(parts: list[QuantTensor]) -> QuantTensor:
    """Packed weights on one grid, one below the other."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    joined = {suffix: torch.cat([part[suffix] for part in tensors]) for suffix in tensors[0]}
    return QuantTensor.from_tensors(joined, parts[0].grid, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


def pack(q: Tensor, bits: int) -> Tensor:
    """Integers [..., n] in 0 … 2^bits - 1 to uint8 [..., ⌈n/8⌉·bits], low bits first."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[-1] % 8))
    if bits == 8:
        return q
    if 8 % bits == 0:
        q = q.unflatten(-1, (-1, 8 // bits))
        return sum(q[..., j] << (bits * j) for j in range(8 // bits)).to(torch.uint8)  # type: ignore[union-attr]
    eight = q.unflatten(-1, (-1, 8)).to(torch.int32)  # 8 values fill `bits` bytes
    word = sum(eight[..., j] << (bits * j) for j in range(8))
    # type: ignore[operator]
    return torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], -1).flatten(-2).to(torch.uint8)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., n]."""
    mask = 2**bits - 1
    if bits == 8:
        out = packed
    elif 8 % bits == 0:
        out = torch.stack([(packed >> (bits * j)) & mask for j in range(8 // bits)], -1).flatten(-2)
    else:
        parts = packed.unflatten(-1, (-1, bits)).to(torch.int32)
        word = sum(parts[..., j] << (8 * j) for j in range(bits))
        # type: ignore[operator]
        out = torch.stack([(word >> (bits * j)) & mask for j in range(8)], -1).flatten(-2).to(torch.uint8)
    return out[..., :n]


def packed_bytes(shape: tuple[int, int], grid: Grid) -> int:
    """What a QuantTensor [N, K] takes: integers, float32 scales and, where there are any, zero points."""
    N, K = shape
    g = grid.group("a packed weight", K)
    integers = -(-g // 8) * grid.bits
    scale = 4
    if grid.symmetric:
        zero = 0
    else:
        zero = 4 if grid.float_zero else 1
    return N * (K // g) * (integers + scale + zero)
