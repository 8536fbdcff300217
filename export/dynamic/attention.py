"""Attention in standard ONNX operators, for shapes and positions that GroupQueryAttention does not take.

  used when    head_dim is no multiple of the profile's, or frequencies change with the length in use
               (`Rope.varies_with_length`)
  x ─ q,k,v ─ heads ─ rotate(q, k) ─ past ‖ new ─ q·kᵀ·scale ─ where(allowed) ─ softmax ─ ·v ─ heads together

Softmax attention (arXiv:1706.03762) with grouped queries (arXiv:2305.13245): query head h reads KV head h // G. The
G queries of a KV head are laid along T, so that no key is copied. Keys are cached rotated; if frequencies change with
the length they are cached as they are and all of them are turned at every step, by the row of `rope.frequencies` that
belongs to that length (the very numbers torch uses).

A position is the count of unmasked tokens before it, so batches may be padded on either side. Past and present are
separate buffers (present = past ‖ new), and the scores [B, H, T, S] exist whole: a fallback, not the fast path.

Letters: B batch, T new positions, P past, S = P + T, H heads, K KV heads, G = H / K, d head_dim, n lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tinycompress.graph.config import Config

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
    """What every layer shares. cos, sin float [B, 1, T, d/2] turn the new positions; `allowed` bool [B, 1, T, S] says
    which keys a query sees; key_cos, key_sin [B, 1, S, d/2] turn all keys, or are None for keys cached rotated."""

    cos: ir.Value
    sin: ir.Value
    allowed: ir.Value
    key_cos: ir.Value | None = None
    key_sin: ir.Value | None = None


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
    """

    at: str
    qkv: list[ir.Value]
    past: list[ir.Value]
    shared: list[ir.Value] | Positions
    heads: int
    kv_heads: int


def unrotated_keys(config: Config) -> bool:
    """Whether keys are cached un-rotated: frequencies change somewhere within the context."""
    return config.rope.varies_with_length and config.max_position > config.rope.trained


def fused(config: Config, profile: Profile) -> bool:
    """Whether GroupQueryAttention takes this config: past and present then share one buffer."""
    return profile.shares_cache and config.head_dim % profile.head_dim_multiple == 0 and not unrotated_keys(config)


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
    allowed = _allowed(draw, mask, P, S)
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


def places(draw: Drawing, ids: ir.Value, mask: ir.Value, given: ir.Value | None = None) -> list[ir.Value]:
    """For operators that rotate by themselves: positions int64 [B, T] of the new tokens, counted from the mask unless
    `given`, and `allowed` bool [B, 1, T, S] as in `Positions`."""
    P, S = _spans(draw, ids, mask)
    if given is None:
        given = draw.op(
            "positions", "Slice", [_index(draw, mask), P, S, draw.constant("positions.one", torch.tensor([1]))]
        )
    return [given, _allowed(draw, mask, P, S)]


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
    q = _rotate(draw, f"{at}.q", q, where.cos, where.sin)
    if where.key_cos is None or where.key_sin is None:
        k = _rotate(draw, f"{at}.k", k, where.cos, where.sin)
    present = [draw.op(f"{at}.{n}", "Concat", [old, new], axis=2) for n, old, new in zip("kv", layer.past, (k, v))]
    keys = present[0]
    if where.key_cos is not None and where.key_sin is not None:
        keys = _rotate(draw, f"{at}.keys", keys, where.key_cos, where.key_sin)
    scaled = draw.op(f"{at}.q", "Mul", [q, draw.constant("attention.scale", torch.tensor(d**-0.5))])
    rows = _reshape(draw, f"{at}.rows", scaled, [0, kv_heads, -1, d])  # (B, K, G·T, d)
    scores = draw.op(f"{at}.scores", "MatMul", [rows, draw.op(f"{at}.keys", "Transpose", [keys], perm=[0, 1, 3, 2])])
    scores = _reshape(draw, f"{at}.scores", scores, [0, heads, -1, 0])  # (B, H, T, S)
    scores = draw.op(at, "Where", [where.allowed, scores, draw.constant("attention.masked", torch.tensor(MASKED))])
    shares = draw.op(at, "Softmax", [scores], axis=-1)
    shares = _reshape(draw, f"{at}.shares", shares, [0, kv_heads, -1, 0])  # (B, K, G·T, S)
    out = _reshape(draw, f"{at}.out", draw.op(f"{at}.out", "MatMul", [shares, present[1]]), [0, heads, -1, d])
    together = draw.op(f"{at}.out", "Transpose", [out], perm=[0, 2, 1, 3])
    return _reshape(draw, f"{at}.heads", together, [0, 0, heads * d]), present


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


def _split_heads(draw: Drawing, at: str, x: ir.Value, heads: int) -> ir.Value:
    """[B, T, heads·d] to [B, heads, T, d]."""
    return draw.op(at, "Transpose", [_reshape(draw, at, x, [0, 0, heads, draw.config.head_dim])], perm=[0, 2, 1, 3])


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
