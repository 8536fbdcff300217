"""Attention in standard ONNX operators, for shapes and positions that GroupQueryAttention does not take.

  used when    head_dim is no multiple of the profile's, or frequencies change with the length in use
               (`Rope.varies_with_length`)
  x ─ q,k,v ─ heads ─ rotate(q, k) ─ past ‖ new ─ q·kᵀ·scale ─ where(allowed) ─ softmax ─ ·v ─ heads together
  allowed      by window w (None: no bound): key j of query i is unmasked, j ≤ i, and position(i) - position(j) < w

Softmax attention (arXiv:1706.03762) with grouped queries (arXiv:2305.13245): query head h reads KV head h // G. The
G queries of a KV head are laid along T, so that no key is copied. Keys are cached rotated; if frequencies change with
the length they are cached as they are and all of them are turned at every step, by the row of `rope.frequencies` that
belongs to that length (the very numbers torch uses).

A position is the count of unmasked tokens before it, so batches may be padded on either side. Past and present are
separate buffers (present = past ‖ new), and the scores [B, H, T, S] exist whole: a fallback, not the fast path.

Letters: B batch, T new positions, P past, S = P + T, H heads, K KV heads, G = H / K, d head_dim, n lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tinycompress.graph.config import Config, Layer

from ..profiles import Profile

if TYPE_CHECKING:
    import onnx_ir as ir

MASKED = -1e30  # finite: a row without any allowed key stays a number


class Drawing(Protocol):
    """What the functions here need of an emitter."""

    config: Config

    def op(self, at: str, kind: str, inputs: list[ir.Value], domain: str = "", **attributes: Any) -> ir.Value: ...
    def ops(
        self, at: str, kind: str, inputs: list[ir.Value], n: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]: ...
    def constant(self, name: str, tensor: Tensor) -> ir.Value: ...
    def rope(self) -> list[ir.Value]: ...


@dataclass(frozen=True)
class Positions:
    """What every layer shares.

    Fields:
        cos, sin: float [B, 1, T, d/2], turn the new positions.
        allowed: for each window of a layer, bool [B, 1, T, S]: which keys a query sees.
        key_cos, key_sin: float [B, 1, S, d/2], turn all keys; None for keys cached rotated.
    """

    cos: ir.Value
    sin: ir.Value
    allowed: Mapping[int | None, ir.Value]
    key_cos: ir.Value | None = None
    key_sin: ir.Value | None = None


@dataclass(frozen=True)
class Places:
    """What every layer shares, for operators that rotate by themselves.

    Fields:
        index: int64 [B, T], the positions of the new tokens.
        allowed: as in `Positions`.
    """

    index: ir.Value
    allowed: Mapping[int | None, ir.Value]


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention, before it is drawn.

    Fields:
        at: names the nodes.
        qkv: float queries [B, T, H·d], keys and values [B, T, K·d]; or one value, these side by side.
        past: keys and values [B, K, P, d] of the cache.
        shared: what every layer reads, from the form's `prelude`.
        heads: H.
        kv_heads: K.
        window: how many positions a query sees, its own included; None: all (see `window_of`).
        rope: whether queries and keys are turned.
    """

    at: str
    qkv: list[ir.Value]
    past: list[ir.Value]
    shared: list[ir.Value] | Places | Positions
    heads: int
    kv_heads: int
    window: int | None
    rope: bool


def unrotated_keys(config: Config) -> bool:
    """Whether keys are cached un-rotated: frequencies change somewhere within the context."""
    return config.rope.varies_with_length and config.max_position > config.rope.trained


def fused(config: Config, profile: Profile) -> bool:
    """Whether GroupQueryAttention takes this config: past and present then share one buffer."""
    return profile.shares_cache and config.head_dim % profile.head_dim_multiple == 0 and not unrotated_keys(config)


def window_of(config: Config, layer: Layer) -> int | None:
    """A layer's window; None where it holds the whole context."""
    return layer.window if layer.window and layer.window < config.max_position else None


def frequencies(config: Config) -> Tensor:
    """float32 [n, d/2]: for keys cached un-rotated, one row a length from the trained one on, or two rows where the
    frequencies change only once."""
    rope = config.rope
    end = config.max_position
    lengths = range(rope.trained, end + 1) if rope.type == "dynamic" else (rope.trained, end)
    return torch.stack([rope.inv_freq(config.head_dim, length) for length in lengths])


def positions(draw: Drawing, ids: ir.Value, mask: ir.Value) -> Positions:
    """The values all layers share, from input_ids int64 [B, T] and attention_mask int64 [B, S]."""
    at = "positions"
    P, S = _spans(draw, ids, mask)
    index = _index(draw, mask)
    allowed = _by_window(draw, mask, index, P, S)
    one = draw.constant(f"{at}.one", torch.tensor([1]))
    new = draw.op(at, "Slice", [index, P, S, one])  # (B, T)
    if not unrotated_keys(draw.config):
        cos, sin = (
            _heads_axis(draw, draw.op(f"{at}.{n}", "Gather", [t, new], axis=0), n)
            for n, t in zip(("cos", "sin"), draw.rope())
        )
        return Positions(cos, sin, allowed)
    key_cos, key_sin = _tables(draw, index, mask)
    two = draw.constant(f"{at}.two", torch.tensor([2]))
    cos, sin = (draw.op(f"{at}.{n}", "Slice", [t, P, S, two]) for n, t in (("cos", key_cos), ("sin", key_sin)))
    return Positions(cos, sin, allowed, key_cos, key_sin)


def places(draw: Drawing, ids: ir.Value, mask: ir.Value, given: ir.Value | None = None) -> Places:
    """The values all layers share; positions are counted from the mask unless `given`."""
    P, S = _spans(draw, ids, mask)
    index = _index(draw, mask)
    if given is None:
        given = draw.op("positions", "Slice", [index, P, S, draw.constant("positions.one", torch.tensor([1]))])
    return Places(given, _by_window(draw, mask, index, P, S))


def _spans(draw: Drawing, ids: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Lengths int64 [1] of the past and of everything."""
    at = "positions"
    one = draw.constant(f"{at}.one", torch.tensor([1]))
    T = draw.op(f"{at}.T", "Gather", [draw.op(f"{at}.ids", "Shape", [ids]), one], axis=0)
    S = draw.op(f"{at}.S", "Gather", [draw.op(f"{at}.mask", "Shape", [mask]), one], axis=0)
    return draw.op(f"{at}.P", "Sub", [S, T]), S


def _index(draw: Drawing, mask: ir.Value) -> ir.Value:
    """The position of every token, int64 [B, S]: the count of unmasked tokens before it."""
    at = "positions"
    one = draw.constant(f"{at}.one", torch.tensor([1]))
    counts = draw.op(at, "CumSum", [mask, draw.constant(f"{at}.axis", torch.tensor(1))])
    return draw.op(
        at, "Max", [draw.op(f"{at}.index", "Sub", [counts, one]), draw.constant(f"{at}.zero", torch.tensor([0]))]
    )


def attention(draw: Drawing, layer: LayerAttention, where: Positions) -> tuple[ir.Value, list[ir.Value]]:
    """The heads' outputs [B, T, H·d] and the present key and value [B, K, S, d]; `layer.qkv` are three values."""
    at, heads, kv_heads = layer.at, layer.heads, layer.kv_heads
    d = draw.config.head_dim
    q, k, v = (
        _split_heads(draw, f"{at}.{n}", x, count) for n, x, count in zip("qkv", layer.qkv, (heads, kv_heads, kv_heads))
    )
    turn_all_keys = layer.rope and where.key_cos is not None
    if layer.rope:
        q = _rotate(draw, f"{at}.q", q, where.cos, where.sin)
        k = k if turn_all_keys else _rotate(draw, f"{at}.k", k, where.cos, where.sin)
    present = [draw.op(f"{at}.{n}", "Concat", [old, new], axis=2) for n, old, new in zip("kv", layer.past, (k, v))]
    keys = present[0]
    if turn_all_keys and where.key_cos is not None and where.key_sin is not None:
        keys = _rotate(draw, f"{at}.keys", keys, where.key_cos, where.key_sin)
    scaled = draw.op(f"{at}.q", "Mul", [q, draw.constant("attention.scale", torch.tensor(d**-0.5))])
    rows = _reshape(draw, f"{at}.rows", scaled, [0, kv_heads, -1, d])  # (B, K, G·T, d)
    scores = draw.op(f"{at}.scores", "MatMul", [rows, draw.op(f"{at}.keys", "Transpose", [keys], perm=[0, 1, 3, 2])])
    scores = _reshape(draw, f"{at}.scores", scores, [0, heads, -1, 0])  # (B, H, T, S)
    masked = draw.constant("attention.masked", torch.tensor(MASKED))
    scores = draw.op(at, "Where", [where.allowed[layer.window], scores, masked])
    shares = draw.op(at, "Softmax", [scores], axis=-1)
    shares = _reshape(draw, f"{at}.shares", shares, [0, kv_heads, -1, 0])  # (B, K, G·T, S)
    out = _reshape(draw, f"{at}.out", draw.op(f"{at}.out", "MatMul", [shares, present[1]]), [0, heads, -1, d])
    together = draw.op(f"{at}.out", "Transpose", [out], perm=[0, 2, 1, 3])
    return _reshape(draw, f"{at}.heads", together, [0, 0, heads * d]), present


def _by_window(draw: Drawing, mask: ir.Value, index: ir.Value, P: ir.Value, S: ir.Value) -> dict[int | None, ir.Value]:
    """bool [B, 1, T, S] for each window of a layer: query P + t sees the unmasked keys up to itself that lie within the
    window, by the positions `index` [B, S]."""
    config = draw.config
    windows = {window_of(config, layer) for layer in config.layers if layer.n_heads}
    everything = _allowed(draw, mask, P, S)
    out: dict[int | None, ir.Value] = {None: everything}
    for window in sorted(window for window in windows if window):
        at = f"allowed.window_{window}"
        one, keys_axes, query_axes = (
            draw.constant(f"{at}.{n}", torch.tensor(axes)) for n, axes in (("one", [1]), ("k", [1, 2]), ("q", [1, 3]))
        )
        new = draw.op(f"{at}.new", "Slice", [index, P, S, one])  # (B, T)
        queries = draw.op(f"{at}.queries", "Unsqueeze", [new, query_axes])  # (B, 1, T, 1)
        keys = draw.op(f"{at}.keys", "Unsqueeze", [index, keys_axes])  # (B, 1, 1, S)
        distance = draw.op(f"{at}.distance", "Sub", [queries, keys])
        near = draw.op(at, "Less", [distance, draw.constant(f"{at}.size", torch.tensor(window))])
        out[window] = draw.op(at, "And", [everything, near])
    return out


def _allowed(draw: Drawing, mask: ir.Value, P: ir.Value, S: ir.Value) -> ir.Value:
    """bool [B, 1, T, S]: query P + t sees the unmasked keys up to itself."""
    at = "allowed"
    zero, one = (draw.constant(f"{at}.{n}", torch.tensor(n)) for n in (0, 1))
    first, stop = (draw.op(f"{at}.{n}", "Squeeze", [x]) for n, x in (("P", P), ("S", S)))
    keys = draw.op(f"{at}.keys", "Range", [zero, stop, one])  # (S)
    queries = draw.op(f"{at}.queries", "Range", [first, stop, one])  # (T)
    column = draw.op(at, "Unsqueeze", [queries, draw.constant(f"{at}.axis", torch.tensor([1]))])
    causal = draw.op(at, "LessOrEqual", [keys, column])  # (T, S)
    real = draw.op(f"{at}.mask", "Cast", [mask], to=9)  # bool
    real = draw.op(f"{at}.mask", "Unsqueeze", [real, draw.constant(f"{at}.axes", torch.tensor([1, 2]))])  # (B, 1, 1, S)
    return draw.op(at, "And", [causal, real])


def _tables(draw: Drawing, index: ir.Value, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    """cos and sin [B, 1, S, d/2] of the positions `index` [B, S], each row at the frequencies of its own unpadded
    length."""
    at = "rope"
    rope = draw.config.rope
    table = frequencies(draw.config)
    length = draw.op(
        f"{at}.length", "ReduceSum", [mask, draw.constant(f"{at}.one", torch.tensor([1]))], keepdims=1
    )  # (B, 1)
    beyond = draw.op(f"{at}.beyond", "Sub", [length, draw.constant(f"{at}.trained", torch.tensor([rope.trained]))])
    ends = [draw.constant(f"{at}.{name}", torch.tensor(row)) for name, row in (("first", 0), ("last", len(table) - 1))]
    row = draw.op(at, "Clip", [beyond, *ends])  # one a length, or: trained, beyond
    turns = draw.op(at, "Gather", [draw.constant(f"{at}.frequencies", table), row], axis=0)  # (B, 1, d/2)
    turns = draw.op(
        f"{at}.turns", "Unsqueeze", [turns, draw.constant(f"{at}.one", torch.tensor([1]))]
    )  # (B, 1, 1, d/2)
    place = draw.op(
        at, "Unsqueeze", [draw.op(at, "Cast", [index], to=1), draw.constant(f"{at}.axes", torch.tensor([1, 3]))]
    )  # (B, 1, S, 1)
    angles = draw.op(at, "Mul", [place, turns])
    scale = draw.constant(f"{at}.attention_factor", torch.tensor(rope.attention_scale()))
    cos, sin = (draw.op(f"{at}.{kind}", "Mul", [draw.op(at, kind, [angles]), scale]) for kind in ("Cos", "Sin"))
    return cos, sin


def _heads_axis(draw: Drawing, table: ir.Value, name: str) -> ir.Value:
    """[B, T, d/2] to [B, 1, T, d/2]."""
    return draw.op(f"positions.{name}", "Unsqueeze", [table, draw.constant("positions.heads", torch.tensor([1]))])


def apart(draw: Drawing, at: str, qkv: list[ir.Value], heads: int, kv_heads: int) -> list[ir.Value]:
    """Queries, keys and values that may be one value, side by side, as three."""
    if len(qkv) == 3:
        return qkv
    widths = torch.tensor([n * draw.config.head_dim for n in (heads, kv_heads, kv_heads)])
    sizes = draw.constant("split." + "x".join(map(str, widths.tolist())), widths)
    return draw.ops(at, "Split", [*qkv, sizes], 3, axis=-1)


def merge_heads(draw: Drawing, at: str, x: ir.Value, width: int) -> ir.Value:
    """[B, T, heads, d] to [B, T, width], width = heads·d."""
    return _reshape(draw, at, x, [0, 0, width])


def heads_apart(draw: Drawing, at: str, x: ir.Value, heads: int) -> ir.Value:
    """[B, T, heads·d] to [B, T, heads, d]."""
    return _reshape(draw, at, x, [0, 0, heads, draw.config.head_dim])


def _split_heads(draw: Drawing, at: str, x: ir.Value, heads: int) -> ir.Value:
    """[B, T, heads·d] to [B, heads, T, d]."""
    return draw.op(at, "Transpose", [heads_apart(draw, at, x, heads)], perm=[0, 2, 1, 3])


def _rotate(draw: Drawing, at: str, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """x [B, heads, T, d] by the half-split rule: pairs (i, i + d/2)."""
    a, b = draw.ops(at, "Split", [x], 2, axis=-1, num_outputs=2)
    first = draw.op(
        f"{at}.first", "Sub", [draw.op(f"{at}.a_cos", "Mul", [a, cos]), draw.op(f"{at}.b_sin", "Mul", [b, sin])]
    )
    second = draw.op(
        f"{at}.second", "Add", [draw.op(f"{at}.b_cos", "Mul", [b, cos]), draw.op(f"{at}.a_sin", "Mul", [a, sin])]
    )
    return draw.op(f"{at}.turned", "Concat", [first, second], axis=-1)


def _reshape(draw: Drawing, at: str, x: ir.Value, shape: list[int]) -> ir.Value:
    """0 keeps a dimension, -1 takes what is left."""
    return draw.op(at, "Reshape", [x, draw.constant("shape." + "x".join(map(str, shape)), torch.tensor(shape))])
