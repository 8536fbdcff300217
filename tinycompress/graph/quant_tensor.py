"""The grid language: what a quantized weight is, how it is packed, and the linear that runs it; grid_search.py finds its grid.

A weight [N, K] is cut along K into groups of g; each group has a scale s and (asymmetric) an integer zero point z:

    w ≈ (q - z) · s,   q in 0 … 2^bits - 1,   z = 2^(bits-1) when symmetric

Symmetric scales may be negative: the grid reaches one step further on one side, and the sign chooses which. With `float_zero`
z is a float: at 2 bits, where a step is a third of the range, rounding z costs more than the four bytes it takes (NeUQI,
arXiv:2505.17595).
Letters: N out_features, K in_features, g group_size, G = K / g groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

BITS = (2, 3, 4, 8)
SCALES = ("auto", "minmax", "mse", "weighted", "lpbq")


@dataclass(frozen=True)
class QuantSpec:
    """A weight grid. `group_size` None is one group a row (per-channel). `scale` says how scales are searched:
    "minmax" covers the range, "mse" minimises the squared error, "weighted" the squared error weighted by E[x²] of
    each input channel, "auto" is weighted where activation statistics are at hand and minmax otherwise; "lpbq" searches
    positive scales of the form that Qualcomm's HTP stores (lpbq.py). `float_zero` is for asymmetric grids of 2 to 4 bits,
    where a runtime takes it (ONNX Runtime does)."""

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = True
    scale: str = "auto"
    float_zero: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError("QuantSpec.bits", self.bits, BITS)
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise InputError("QuantSpec.group_size", self.group_size, "a multiple of 8, or None for per-channel")
        if self.scale not in SCALES:
            raise InputError("QuantSpec.scale", repr(self.scale), " | ".join(SCALES))
        if self.scale == "lpbq" and not self.symmetric:
            raise InputError("QuantSpec.scale", "'lpbq' with zero points", "symmetric=True")
        if self.float_zero and (self.symmetric or self.bits > 4):
            raise InputError(
                "QuantSpec.float_zero",
                f"True, {self.bits} bits, symmetric={self.symmetric}",
                "2, 3 or 4 bits, symmetric=False",
            )

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """`w4g64` (symmetric, groups of 64), `w4` (per-channel), `w4g64-asym` (integer zero points), `w2g64-floatzero`, `w4g64-lpbq` (scales for
        Qualcomm's HTP)."""
        match = re.fullmatch(r"w(\d)(?:g(\d+))?(-asym|-floatzero|-lpbq)?", text)
        if not match:
            raise InputError(
                "quantization",
                repr(text),
                "w<bits>[g<group>][-asym|-floatzero|-lpbq], such as w4g64, w3g64, w8 or w4g32-asym",
            )
        group, kind = int(match[2]) if match[2] else None, match[3]
        return QuantSpec(
            int(match[1]), group, kind in (None, "-lpbq"), "lpbq" if kind == "-lpbq" else "auto", kind == "-floatzero"
        )

    def __str__(self) -> str:
        suffix = (
            "-floatzero"
            if self.float_zero
            else "-asym"
            if not self.symmetric
            else "-lpbq"
            if self.scale == "lpbq"
            else ""
        )
        return f"w{self.bits}" + (f"g{self.group_size}" if self.group_size else "") + suffix

    def group(self, name: str, in_features: int) -> int:
        """The group length for a linear; an `InputError` when it does not divide."""
        g = self.group_size or in_features
        if in_features % g:
            fits = [str(n) for n in (128, 64, 32, 16, 8) if in_features % n == 0]
            accepted = (
                f"{', '.join(fits)}, or per-channel"
                if fits
                else f"per-channel ({replace(self, group_size=None)}): no multiple of 8 fits"
            )
            raise InputError(f"group_size for {name}", f"{g}, which does not divide its {in_features} inputs", accepted)
        return g

    @property
    def zero(self) -> int:
        return 2 ** (self.bits - 1)


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A packed weight [N, K]: `packed` uint8 [N, G, ⌈g·bits/8⌉] (low bits first along K; for 2, 4 and 8 bits this is
    MatMulNBits' layout), `scales` float [N, G], `zeros` [N, G], uint8 or (float_zero) of the scales' dtype, or None (symmetric)."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec
    shape: tuple[int, int]

    @staticmethod
    def from_ints(q: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> QuantTensor:
        """`q` integers [N, K] in 0 … 2^bits - 1, `scales` and `zeros` [N, G]."""
        N, K = q.shape
        packed = pack(q.reshape(N, scales.shape[1], -1), spec.bits)
        kind = scales.dtype if spec.float_zero else torch.uint8
        return QuantTensor(packed, scales.contiguous(), None if zeros is None else zeros.to(kind), spec, (N, K))

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
    def from_tensors(parts: Mapping[str, Tensor], spec: QuantSpec, shape: tuple[int, int]) -> QuantTensor:
        """The inverse of `tensors`, with shapes checked against `shape` [N, K]."""
        packed, scales, zeros = parts[".packed"], parts[".scales"], parts.get(".zeros")
        g = spec.group("a packed weight", shape[1])
        G, width = shape[1] // g, -(-g // 8) * spec.bits
        if (
            tuple(packed.shape) != (shape[0], G, width)
            or tuple(scales.shape) != (shape[0], G)
            or (zeros is None) != spec.symmetric
        ):
            raise InputError(
                "packed weight",
                f"packed {tuple(packed.shape)}, scales {tuple(scales.shape)}",
                f"{(shape[0], G, width)} and {(shape[0], G)}",
            )
        if packed.dtype != torch.uint8 or not scales.is_floating_point():
            raise InputError("packed weight", f"packed {packed.dtype}, scales {scales.dtype}", "uint8 and floats")
        if zeros is not None and (zeros.shape != scales.shape or zeros.is_floating_point() != spec.float_zero):
            kind = "floats" if spec.float_zero else "uint8"
            raise InputError(
                "zero points of a packed weight",
                f"{zeros.dtype} {tuple(zeros.shape)}",
                f"{kind} {tuple(scales.shape)} for {spec}",
            )
        return QuantTensor(packed, scales, zeros, spec, shape)

    def ints(self) -> Tensor:
        """uint8 [N, K] in 0 … 2^bits - 1."""
        g = self.shape[1] // self.scales.shape[1]
        return unpack(self.packed, self.spec.bits, g).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """float [N, K], in the scales' dtype unless another is given."""
        dtype = dtype or self.scales.dtype
        q = self.ints().reshape(*self.scales.shape, -1).to(dtype)
        zero = self.spec.zero if self.zeros is None else self.zeros.to(dtype)[..., None]
        return q.sub_(zero).mul_(self.scales.to(dtype)[..., None]).reshape(self.shape)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> QuantTensor:
        zeros = None if self.zeros is None else self.zeros.to(device, dtype if self.spec.float_zero else None)
        return QuantTensor(self.packed.to(device), self.scales.to(device, dtype), zeros, self.spec, self.shape)

    def rows(self, start: int, stop: int) -> QuantTensor:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return QuantTensor(
            self.packed[start:stop],
            self.scales[start:stop],
            zeros,
            self.spec,
            (len(self.packed[start:stop]), self.shape[1]),
        )

    def divide_rows(self, by: Tensor) -> QuantTensor:
        """The weight with row n divided by by[n]: only the scales change, so this is exact."""
        scales = (self.scales.double() / by[:, None]).to(self.scales.dtype)
        return QuantTensor(self.packed, scales, self.zeros, self.spec, self.shape)

    def select(self, name: str, dim: int, index: Tensor) -> QuantTensor:
        """Rows can be cut; columns would break groups, so those are cut before quantization."""
        if dim != 0:
            raise InputError(
                name, "a cut across quantized groups", "pruning before quantization (or a graph loaded dense)"
            )
        index = index.to(self.device)
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantTensor(self.packed[index], self.scales[index], zeros, self.spec, (len(index), self.shape[1]))


def stacked(parts: list[QuantTensor]) -> QuantTensor:
    """Packed weights on one grid, one below the other."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    joined = {suffix: torch.cat([part[suffix] for part in tensors]) for suffix in tensors[0]}
    return QuantTensor.from_tensors(joined, parts[0].spec, (sum(part.shape[0] for part in parts), parts[0].shape[1]))


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
    return torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], -1).flatten(-2).to(torch.uint8)  # type: ignore[operator]


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
        out = torch.stack([(word >> (bits * j)) & mask for j in range(8)], -1).flatten(-2).to(torch.uint8)  # type: ignore[operator]
    return out[..., :n]
