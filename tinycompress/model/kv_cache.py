"""The cache of keys and values: in the model's dtype, or as int8 with a scale a head and position.

int8: x ≈ scale · q with scale = max|x| / 127 over the d channels of one head at one position, q = round(x / scale). No
entry is off by more than half a scale, so the error is at most max|x| / 254. Per position, as a decoder must: what is
written once is never touched again. A position costs d + 4 bytes a head instead of 4·d (float32).

Letters: B batch, K KV heads, S positions, T new positions, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config


class KVCache:
    """Keys and values of every layer, preallocated [B, K, max_length, d]; `length` positions are filled.

    Keys are kept rotated, unless the RoPE's frequencies depend on the length: then un-rotated, and turned when read.
    `int8` keeps both in a quarter of the memory (of float32's), with the error above.
    """

    def __init__(
        self, config: Config, batch: int, max_length: int, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> None:
        self.length, self.max_length = 0, max_length
        shapes = [(batch, layer.n_kv_heads, max_length, config.head_dim) for layer in config.layers]
        self.layers = (
            [] if int8 else [tuple(torch.empty(shape, device=device, dtype=dtype) for _ in "kv") for shape in shapes]
        )
        self.packed = [tuple(Int8Rows(shape, device, dtype) for _ in "kv") for shape in shapes] if int8 else []

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [B, K, T, d] behind `length`; returns everything up to there. `Transformer` advances `length`."""
        stop = self.length + keys.shape[2]
        if stop > self.max_length:
            raise InputError("KV cache", f"{stop} positions", f"at most {self.max_length} (its max_length)")
        if self.packed:
            packed_k, packed_v = self.packed[layer]
            packed_k.write(self.length, keys)
            packed_v.write(self.length, values)
            return packed_k.read(stop), packed_v.read(stop)
        k, v = self.layers[layer]
        k[:, :, self.length : stop], v[:, :, self.length : stop] = keys, values
        return k[:, :, :stop], v[:, :, :stop]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(part.nbytes for pair in self.layers for part in pair) + sum(
            part.nbytes for pair in self.packed for part in pair
        )


class Int8Rows:
    """A buffer [B, K, S, d] of int8 with a float32 scale a row; it reads as `dtype`."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = torch.empty(shape, device=device, dtype=torch.int8)
        self.scales = torch.empty((*shape[:3], 1), device=device, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scales.nbytes

    def write(self, start: int, x: Tensor) -> None:
        """x [B, K, T, d] to positions start … start + T - 1."""
        stop = start + x.shape[2]
        self.rows[:, :, start:stop], self.scales[:, :, start:stop] = quantize_rows(x)

    def read(self, stop: int) -> Tensor:
        """Positions 0 … stop - 1, float [B, K, stop, d]."""
        return self.rows[:, :, :stop].to(self.dtype) * self.scales[:, :, :stop].to(self.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] to int8 [..., d] in -127 … 127 and scales float32 [..., 1]; a row of zeros gets scale 1."""
    peak = x.detach().float().abs().amax(-1, keepdim=True)
    scales = torch.where(peak > 0, peak / 127, 1.0)
    return (x.detach().float() / scales).round().clamp(-127, 127).to(torch.int8), scales
