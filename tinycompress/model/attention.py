"""Attention: rotary tables, and causal grouped-query attention that never makes all scores at once.

Letters: B batch, T new positions, S positions in the cache and new, D hidden, H heads, K KV heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..graph.rope import Rope
from .fused_ops import rotate
from .kv_cache import KVCache
from .self_extend import SelfExtend

MASK_ROWS = 512  # queries behind a cache that are masked at a time


class RotaryTables:
    """cos and sin [S, d/2] for one forward: new positions start at `start`."""

    def __init__(
        self,
        rope: Rope,
        head_dim: int,
        start: int,
        stop: int,
        device: torch.device,
        dtype: torch.dtype,
        extend: SelfExtend | None = None,
    ) -> None:
        self.start, self.extend = start, extend
        self.all_keys = rope.varies_with_length or extend is not None
        first = 0 if self.all_keys else start
        # Self-Extend's shifted positions reach beyond those of a short text; there they are masked, but must be there
        last = max(stop, extend.window + 1) if extend else stop
        self.cos, self.sin = (t.to(dtype) for t in rope.tables(head_dim, last, first, device))

    def new(self, x: Tensor) -> Tensor:
        """Turns the new positions of x [B, H, T, d]."""
        T = x.shape[2]
        return rotate(x, self.cos[-T:], self.sin[-T:])

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns x [B, H, T, d] to `positions` [T], where the tables begin at 0."""
        return rotate(x, self.cos[positions], self.sin[positions])


class Attention(nn.Module):
    """Causal grouped-query attention; `heads` is everything before o_proj."""

    def __init__(self, linears: Mapping[str, nn.Module], head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linears[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def heads(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B, T, D] (normalised) to the heads' outputs [B, T, H·d]."""
        q, k, v = (
            rearrange(p(x), "b t (h d) -> b h t d", d=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if tables.extend:
            k, v = cache.append(layer, k, v) if cache else (k, v)
            return rearrange(tables.extend.attend(q, k, v, tables.turn), "b h t d -> b t (h d)")
        q = tables.new(q)
        if not (tables.all_keys and cache):
            k = tables.new(k)
        if cache:
            k, v = cache.append(layer, k, v)  # (B, K, S, d)
            if tables.all_keys:
                k = rotate(k, tables.cos, tables.sin)
        return rearrange(attend(q, k, v), "b h t d -> b t (h d)")

    def forward(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        return self.o_proj(self.heads(x, tables, cache, layer))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of q [B, H, T, d] on k, v [B, K, S, d], query t at position S - T + t; never [T, S] at once."""
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if T == S or T == 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=grouped)
    out = []  # a chunk behind a cache: the kernels' own causal mask is not aligned to the end
    for first in range(0, T, MASK_ROWS):
        rows = q[:, :, first : first + MASK_ROWS]
        stop = S - T + first + rows.shape[2]
        mask = torch.ones(rows.shape[2], stop, dtype=torch.bool, device=q.device).tril(stop - rows.shape[2])
        out.append(
            F.scaled_dot_product_attention(rows, k[:, :, :stop], v[:, :, :stop], attn_mask=mask, enable_gqa=grouped)
        )
    return torch.cat(out, 2)
