"""Packed weights in the forms NPU compilers read, and back: the integers and scales travel as they are.

  one scale a channel   DequantizeLinear of int4 or int8 [K, N] along axis 1, then MatMul; q - 2^(bits-1), transposed
  blocks of 4 bits      MatMulNBits with our own bytes [N, blocks, b/2]; a group longer than a block repeats its scale

Widths below 4 bits travel in 4-bit containers. Letters: N out_features, K in_features, b block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinycompress.graph.quant_tensor import Grid, QuantTensor, pack, unpack

from ..dynamic.draw import Draw

if TYPE_CHECKING:
    import onnx_ir as ir


def channel_weight(draw: Draw, name: str, weight: QuantTensor) -> ir.Value:
    """A weight with one scale a channel as the float [K, N] that it stands for."""
    N, K = weight.shape
    eight_bits = weight.grid.bits == 8
    if eight_bits:
        ints = draw.lazy(f"{name}.ints", torch.int8, (K, N), lambda: centred(weight).T)
    else:
        ints = draw.lazy_nibbles(
            f"{name}.ints", True, (K, N), lambda: pack((centred(weight).T & 15).reshape(-1), 4)[: -(-K * N // 2)]
        )
    scales = draw.lazy(f"{name}.scales", torch.float32, (N,), lambda: weight.scales[:, 0])
    zeros = _zeros(draw, f"{name}.zeros", N, eight_bits)
    return draw.op(name, "DequantizeLinear", [ints, scales, zeros], axis=1)


def _zeros(draw: Draw, name: str, n: int, eight_bits: bool) -> ir.Value:
    """Zero points that are all 0: HTP's compiler wants them written out."""
    if eight_bits:
        return draw.lazy(name, torch.int8, (n,), lambda: torch.zeros(n, dtype=torch.int8))
    return draw.lazy_nibbles(name, True, (n,), lambda: torch.zeros(-(-n // 2), dtype=torch.uint8))


def block_weight(draw: Draw, name: str, weight: QuantTensor) -> tuple[list[ir.Value], dict[str, Any]]:
    """MatMulNBits' weight inputs and attributes."""
    N, K = weight.shape
    group = K // weight.scales.shape[1]
    block = draw.profile.block(name, group, K)
    shape = (N, K // block, block // 2)
    repeats = group // block
    packed = draw.lazy(f"{name}.packed", torch.uint8, shape, lambda: four_bit_bytes(weight).reshape(shape))
    scales = draw.lazy(f"{name}.scales", torch.float32, shape[:2], lambda: weight.scales.repeat_interleave(repeats, 1))
    return [packed, scales], {"K": K, "N": N, "bits": 4, "block_size": block}


def centred(weight: QuantTensor) -> Tensor:
    """int8 [N, K]: the integers with their zero point taken off."""
    return (weight.ints().to(torch.int16) - weight.grid.zero).to(torch.int8)


def four_bit_bytes(weight: QuantTensor) -> Tensor:
    """uint8 [N, K/2]: the packed bytes, those of 2 and 3 bits widened to 4."""
    if weight.grid.bits == 4:
        return weight.packed.flatten(1)
    return pack(weight.ints() + (8 - weight.grid.zero), 4)


def from_channel(ints: Tensor, scales: Tensor, spec: Grid) -> QuantTensor:
    """The inverse of `channel_weight`: int8 [K, N] and scales [N]."""
    q = (ints.T.to(torch.int16) + spec.zero).to(torch.uint8)
    return QuantTensor.from_ints(q, scales[:, None], None, spec)


def from_blocks(packed: Tensor, scales: Tensor, spec: Grid, shape: tuple[int, int]) -> QuantTensor:
    """The inverse of `block_weight`: uint8 [N, blocks, b/2] and scales [N, blocks]."""
    group = spec.group("a packed weight", shape[1])
    G = shape[1] // group
    scales = scales[:, :: scales.shape[1] // G].contiguous()
    if spec.bits == 4:
        return QuantTensor(packed.reshape(shape[0], G, -1), scales, None, spec, shape)
    q = unpack(packed.reshape(shape[0], -1), 4, shape[1]) - (8 - spec.zero)
    return QuantTensor.from_ints(q, scales, None, spec)
