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
        """Turns x [B, H, T, d], which stands at the last T positions."""
        T = x.shape[2]
        return rotate(x, self.cos[-T:], self.sin[-T:])

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns x [B, H, T, d] to `positions` [T], where the tables begin at 0."""
        return rotate(x, self.cos[positions], self.sin[positions])


class Attention(nn.Module):
    """Causal grouped-query attention; `heads` is everything before o_proj.

    Args:
        linears: the four projections by name.
        head_dim: channels of a head.
        window: how many positions a query sees, its own included; None: all that came before.
        rope: whether queries and keys are turned by their positions.
        norms: of the queries and of the keys, head by head before they are turned; None where there are none.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        head_dim: int,
        window: int | None = None,
        rope: bool = True,
        norms: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.rope = rope
        self.q_norm = norms[0] if norms else None
        self.k_norm = norms[1] if norms else None
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            linears[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def heads(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x [B, T, D] (normalised) to the heads' outputs [B, T, H·d]."""
        q, k, v = (
            rearrange(p(x), "b t (h d) -> b h t d", d=self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope and tables.extend:
            k, v = cache.append(layer, k, v) if cache else (k, v)
            return rearrange(tables.extend.attend(q, k, v, tables.turn), "b h t d -> b t (h d)")
        turn_later = tables.all_keys and cache is not None
        if self.rope:
            q = tables.new(q)
            k = k if turn_later else tables.new(k)
        if cache:
            k, v = cache.append(layer, k, v)  # (B, K, S, d)
            if self.rope and turn_later:
                k = tables.new(k)
        return rearrange(attend(q, k, v, self.window), "b h t d -> b t (h d)")

    def forward(self, x: Tensor, tables: RotaryTables, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        return self.o_proj(self.heads(x, tables, cache, layer))


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention of q [B, H, T, d] on k, v [B, K, S, d], query t at position S - T + t; never [T, S] at once.

    With a window, query i sees key j where i - window < j <= i.
    """
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    window = min(window or S, S)
    if T == 1:
        return F.scaled_dot_product_attention(q, k[:, :, -window:], v[:, :, -window:], enable_gqa=grouped)
    if T == S == window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    out = []  # the kernels' own causal mask knows no window and, behind a cache, is not aligned to the end
    for first in range(0, T, MASK_ROWS):
        rows = q[:, :, first : first + MASK_ROWS]
        n = rows.shape[2]
        start = max(0, S - T + first - window + 1)
        stop = S - T + first + n
        own = stop - n - start  # the column of the first row's own position
        mask = torch.ones(n, stop - start, dtype=torch.bool, device=q.device).tril(own).triu(own - window + 1)
        seen = slice(start, stop)
        out.append(
            F.scaled_dot_product_attention(rows, k[:, :, seen], v[:, :, seen], attn_mask=mask, enable_gqa=grouped)
        )
    return torch.cat(out, 2)
