"""The cache of keys and values: in the model's dtype, or as int8 with a scale a head and position.

int8: x ≈ scale · q with scale = max|x| / 127 over the d channels of one head at one position, q = round(x / scale). No
entry is off by more than half a scale, so the error is at most max|x| / 254. Per position, as a decoder must: what is
written once is never touched again. A position costs d + 4 bytes a head instead of 4·d (float32).

A layer with a window keeps no more than it can see again: its buffer has room for two windows, and when that is full
the last window moves to the front.

Letters: B batch, K KV heads, S positions, T new positions, d head_dim.
"""

from __future__ import annotations

from copy import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config

Buffer: TypeAlias = "Tensor | Int8Rows"


class KVCache:
    """Keys and values of every layer, preallocated [B, K, max_length, d]; `length` positions are filled.

    Keys are kept rotated, unless the RoPE's frequencies depend on the length: then un-rotated, and turned when read.
    `int8` keeps both in a quarter of the memory (of float32's), with the error above.

    Fields:
        length: positions that are filled. `Transformer` advances it; whoever takes positions back sets it lower.
        max_length: positions there is room for.
        windows: of each layer, None where it sees all positions.
        layers: the buffers of keys and values of each layer.
        first: of each layer, the position that stands first in its buffers; 0 where there is no window.
    """

    def __init__(
        self, config: Config, batch: int, max_length: int, device: torch.device, dtype: torch.dtype, int8: bool = False
    ) -> None:
        self.length = 0
        self.max_length = max_length
        self.windows = [layer.window for layer in config.layers]
        self.first = [0] * len(config.layers)
        self.layers: list[tuple[Any, Any]] = []  # of Buffer
        for layer in config.layers:
            room = min(max_length, 2 * (layer.window or max_length))
            shape = (batch, layer.n_kv_heads, room, config.head_dim)
            self.layers.append((_buffer(shape, device, dtype, int8), _buffer(shape, device, dtype, int8)))

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes [B, K, T, d] behind `length`; returns everything up to there, from the position `first[layer]` on.
        `Transformer` advances `length`."""
        T = keys.shape[2]
        stop = self.length + T
        if stop > self.max_length:
            raise InputError("KV cache", f"{stop} positions", f"at most {self.max_length} (its max_length)")
        window = self.windows[layer]
        if window is not None:
            self._make_room(layer, window, T)
        # whoever fills a buffer from outside says so by `length` alone
        start = min(self.length - self.first[layer], _room(self.layers[layer][0]))
        buffers = self.layers[layer]
        return _written(buffers[0], start, keys), _written(buffers[1], start, values)

    def _make_room(self, layer: int, window: int, T: int) -> None:
        """Buffers with room for T more positions, the last of the window in front; as they are where there is room."""
        keys, values = self.layers[layer]
        filled = min(self.length - self.first[layer], _room(keys))
        kept = min(filled, window - 1)
        if min(self.length, window - 1) > max(filled, 0):
            accepted = f"at least {self.first[layer] + window - 1}: earlier positions have left the window"
            raise InputError("KVCache.length", self.length, accepted)
        usual = min(self.max_length, 2 * window)
        if filled + T <= _room(keys) <= usual:
            return
        room = max(usual, kept + T)
        self.layers[layer] = (_moved(keys, filled - kept, filled, room), _moved(values, filled - kept, filled, room))
        self.first[layer] = self.length - kept

    def rows(self, index: Tensor) -> KVCache:
        """A cache of its own that holds the rows `index` [n] of this one, in that order; a row may come more than
        once."""
        chosen = copy(self)
        chosen.first = list(self.first)
        chosen.layers = [(keys[index], values[index]) for keys, values in self.layers]
        return chosen

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(buffer.nbytes for pair in self.layers for buffer in pair)


class Int8Rows:
    """A buffer [B, K, S, d] of int8 with a float32 scale a row; it reads as `dtype`."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows = torch.empty(shape, device=device, dtype=torch.int8)
        self.scales = torch.empty((*shape[:3], 1), device=device, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.scales.nbytes

    def __getitem__(self, index: Tensor) -> Int8Rows:
        chosen = copy(self)
        chosen.rows = self.rows[index]
        chosen.scales = self.scales[index]
        return chosen

    def write(self, start: int, x: Tensor) -> None:
        """x [B, K, T, d] to positions start … start + T - 1."""
        stop = start + x.shape[2]
        self.rows[:, :, start:stop], self.scales[:, :, start:stop] = quantize_rows(x)

    def read(self, stop: int) -> Tensor:
        """Positions 0 … stop - 1, float [B, K, stop, d]."""
        return self.rows[:, :, :stop].to(self.dtype) * self.scales[:, :, :stop].to(self.dtype)


def _buffer(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype, int8: bool) -> Buffer:
    return Int8Rows(shape, device, dtype) if int8 else torch.empty(shape, device=device, dtype=dtype)


def _room(buffer: Buffer) -> int:
    rows = buffer.rows if isinstance(buffer, Int8Rows) else buffer
    return rows.shape[2]


def _written(buffer: Buffer, start: int, x: Tensor) -> Tensor:
    """Everything in the buffer up to x [B, K, T, d], which is written from position `start` on."""
    stop = start + x.shape[2]
    if isinstance(buffer, Int8Rows):
        buffer.write(start, x)
        return buffer.read(stop)
    buffer[:, :, start:stop] = x
    return buffer[:, :, :stop]


def _moved(buffer: Buffer, start: int, stop: int, room: int) -> Buffer:
    """A new buffer of `room` positions that begins with those of `buffer` from start to stop - 1."""
    if isinstance(buffer, Int8Rows):
        B, K, _, d = buffer.rows.shape
        out = Int8Rows((B, K, room, d), buffer.rows.device, buffer.dtype)
        out.rows[:, :, : stop - start] = buffer.rows[:, :, start:stop]
        out.scales[:, :, : stop - start] = buffer.scales[:, :, start:stop]
        return out
    moved = buffer.new_empty(*buffer.shape[:2], room, buffer.shape[3])
    moved[:, :, : stop - start] = buffer[:, :, start:stop]
    return moved


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] to int8 [..., d] in -127 … 127 and scales float32 [..., 1]; a row of zeros gets scale 1."""
    peak = x.detach().float().abs().amax(-1, keepdim=True)
    scales = torch.where(peak > 0, peak / 127, 1.0)
    return (x.detach().float() / scales).round().clamp(-127, 127).to(torch.int8), scales
