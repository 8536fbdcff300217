"""Subgraphs in standard ONNX operators of opset 24, none of any vendor's own (profiles `std` and `openvino-npu`).

  attention_mask ─ CumSum ─ Sub 1 ─ Max 0 ─ the last T ─ position of every new token ─ RotaryEmbedding of q and k
  position, attention_mask ─ causal, unmasked, within the window, bool [B, 1, T, S] ─ every Attention
  q, k, v, mask, past key, past value ─ Attention ─ heads, present key, present value
  weight int4|int8 [K, N], scales [G, N] ─ DequantizeLinear (blocks of K/G along K) ─ MatMul   (may be fused)
  weight int4|int8 [N, G, g] ─ Cast ─ Mul scales [N, G, 1] ─ Reshape ─ Transpose ─ MatMul   (for NPUs)
  table uint8 [V, bytes] ─ Gather ids ─ Cast ─ bytes apart (Floor of a 16th, the rest) ─ Sub zero ─ Mul scale
      ─ rows [B, T, D]

The embedding is unpacked after the look-up: DequantizeLinear would unpack all V rows for a handful. Where it is tied,
the head has integers of its own, [D, V]: no standard operator gathers from them, nor multiplies by uint8 rows.

Operators: docs/Operators.md of ONNX (Attention and RotaryEmbedding since 23). Letters as in forms_contrib; S all
positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycompress.graph.config import EMBEDDING
from tinycompress.graph.quant_tensor import QuantTensor, pack

from . import attention as plain
from .draw import Draw

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT = 1  # TensorProto.FLOAT


def prelude(draw: Draw, ids: ir.Value, mask: ir.Value) -> plain.Places | plain.Positions:
    """What every layer's attention reads: positions, and which keys a query sees."""
    if plain.unrotated_keys(draw.config):
        return plain.positions(draw, ids, mask)
    given = (
        draw.input("position_ids", "INT64", ["batch_size", "sequence_length"]) if draw.profile.position_ids else None
    )
    return plain.places(draw, ids, mask, given)


def embedding(draw: Draw, ids: ir.Value) -> ir.Value:
    """ids [B, T] to rows [B, T, D] of the table [V, D], dense or packed."""
    at = "model.embed_tokens"
    weight = draw.entry(EMBEDDING)
    if not isinstance(weight, QuantTensor):
        return draw.op(at, "Gather", [draw.dense(EMBEDDING), ids], axis=0)
    V, D = weight.shape
    G = weight.scales.shape[1]
    bits = draw.profile.container(weight.grid.bits)
    table = draw.lazy(f"{EMBEDDING}.packed", torch.uint8, (V, -(-D * bits // 8)), lambda: rows(weight, bits))
    integers = draw.op(at, "Cast", [draw.op(at, "Gather", [table, ids], axis=0)], to=FLOAT)
    if bits == 4:
        integers = _apart(draw, at, integers, D)
    in_groups = draw.op(
        f"{at}.groups", "Reshape", [integers, draw.constant("embed.groups", torch.tensor([0, 0, G, -1]))]
    )
    ends = draw.constant("embed.column", torch.tensor([3]))
    zero: ir.Value
    if weight.zeros is None:
        zero = draw.constant("embed.zero", torch.tensor(float(weight.grid.zero)))
    else:
        stored = weight.zeros
        zeros = draw.lazy(f"{EMBEDDING}.zeros", torch.uint8, (V, G), lambda: stored)
        gathered = draw.op(f"{at}.zeros", "Cast", [draw.op(f"{at}.zeros", "Gather", [zeros, ids], axis=0)], to=FLOAT)
        zero = draw.op(f"{at}.zeros", "Unsqueeze", [gathered, ends])
    scales = draw.scales(f"{EMBEDDING}.scales", (V, G), lambda: weight.scales)
    scale = draw.op(f"{at}.scales", "Unsqueeze", [draw.op(f"{at}.scales", "Gather", [scales, ids], axis=0), ends])
    values = draw.op(at, "Mul", [draw.op(at, "Sub", [in_groups, zero]), scale])
    return draw.op(f"{at}.rows", "Reshape", [values, draw.constant("embed.rows", torch.tensor([0, 0, D]))])


def norm(draw: Draw, name: str, x: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """RMSNorm of residual + x, and that sum."""
    total = x if residual is None else draw.op(name, "Add", [residual, x])
    return last_axis_norm(draw, name, total, draw.config.norm_eps), total


def last_axis_norm(draw: Draw, name: str, x: ir.Value, eps: float) -> ir.Value:
    """RMSNorm along the last axis of x, of any rank."""
    return draw.op(name, "RMSNormalization", [x, draw.dense(f"{name}.weight")], axis=-1, epsilon=eps)


def attention(draw: Draw, layer: plain.LayerAttention) -> tuple[ir.Value, list[ir.Value]]:
    """The heads' outputs [B, T, H·d] and the present key and value [B, K, S, d]."""
    if isinstance(layer.shared, plain.Positions):
        return plain.attention(draw, layer, layer.shared)
    assert isinstance(layer.shared, plain.Places)
    at = layer.at
    shared = layer.shared
    q, k, v = layer.qkv
    if layer.rope:
        q, k = (
            draw.op(f"{at}.{n}", "RotaryEmbedding", [x, *draw.rope(), shared.index], num_heads=count)
            for n, x, count in (("q", q, layer.heads), ("k", k, layer.kv_heads))
        )
    attributes = {"q_num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": draw.config.head_dim**-0.5}
    y, *present = draw.ops(at, "Attention", [q, k, v, shared.allowed[layer.window], *layer.past], 3, **attributes)
    return y, present


def linear(draw: Draw, name: str, x: ir.Value) -> ir.Value:
    """x [B, T, K] to [B, T, N], without its bias."""
    weight_name = draw.config.weight_name(name)
    if isinstance(draw.entry(weight_name), QuantTensor):
        return draw.op(
            name, "MatMul", [x, (multiplied if draw.profile.weight_rows else dequantized)(draw, name, weight_name)]
        )
    if weight_name == EMBEDDING:  # the table is stored once, as [V, D], and Gemm reads it so; it takes matrices only
        V, D = draw.entry(EMBEDDING).shape
        flat = draw.op(f"{name}.flat", "Reshape", [x, draw.constant("head.flat", torch.tensor([-1, D]))])
        shape = draw.op(
            name, "Concat", [_leading(draw, name, x), draw.constant("head.wide", torch.tensor([V]))], axis=0
        )
        return draw.op(name, "Reshape", [draw.op(name, "Gemm", [flat, draw.dense(EMBEDDING)], transB=1), shape])
    return draw.op(name, "MatMul", [x, draw.dense(weight_name, transposed=True)])


def dequantized(draw: Draw, at: str, name: str) -> ir.Value:
    """A packed parameter as integers [K, N] with scales [G, N] (per-channel: [N]) through DequantizeLinear."""
    weight: QuantTensor = draw.entry(name)
    N, K = weight.shape
    G = weight.scales.shape[1]
    bits = draw.profile.container(weight.grid.bits)
    signed = weight.zeros is None
    shape = (N,) if G == 1 else (G, N)
    integers = _integers(draw, f"{name}.ints", (K, N), bits, signed, lambda: columns(weight, signed))
    values = [integers, draw.scales(f"{name}.columns.scales", shape, lambda: weight.scales.T.reshape(shape))]
    if weight.zeros is not None:
        zeros = weight.zeros
        values.append(_integers(draw, f"{name}.columns.zeros", shape, bits, False, lambda: zeros.T.reshape(shape)))
    attributes: dict[str, Any] = {"axis": 1} if G == 1 else {"axis": 0, "block_size": K // G}
    return draw.op(at, "DequantizeLinear", values, **attributes)


def multiplied(draw: Draw, at: str, name: str) -> ir.Value:
    """A packed symmetric parameter as integers [N, G, g] times scales [N, G, 1], turned to [K, N]."""
    weight: QuantTensor = draw.entry(name)
    N, K = weight.shape
    G = weight.scales.shape[1]
    bits = draw.profile.container(weight.grid.bits)
    shape = (N, G, K // G) if G > 1 else (N, K)
    integers = _integers(draw, f"{name}.ints", shape, bits, True, lambda: columns(weight, True).T.reshape(shape))
    scales = draw.scales(f"{name}.rows.scales", (*shape[:-1], 1), lambda: weight.scales.reshape(*shape[:-1], 1))
    values = draw.op(at, "Mul", [draw.op(at, "Cast", [integers], to=FLOAT), scales])
    if G > 1:
        values = draw.op(at, "Reshape", [values, draw.constant(f"{name}.rows.shape", torch.tensor([N, K]))])
    return draw.op(at, "Transpose", [values], perm=[1, 0])


def columns(weight: QuantTensor, signed: bool) -> Tensor:
    """The integers of a weight as [K, N]: uint8, or int8 around zero."""
    q = weight.ints().T
    return (q.to(torch.int16) - weight.grid.zero).to(torch.int8) if signed else q


def rows(weight: QuantTensor, bits: int) -> Tensor:
    """The integers of a table as uint8 [V, bytes], whole rows, low bits first; a narrower grid in a wider container."""
    V, D = weight.shape
    if bits == weight.grid.bits:
        return (
            weight.packed.reshape(V, -1)
            if weight.packed.numel() * 8 == V * D * bits
            else pack(weight.ints(), bits)[:, : -(-D * bits // 8)]
        )
    return pack(weight.ints(), bits)[:, : -(-D * bits // 8)]


def _integers(draw: Draw, name: str, shape: tuple[int, ...], bits: int, signed: bool, read) -> ir.Value:
    if bits == 8:
        return draw.lazy(name, torch.int8 if signed else torch.uint8, shape, read)
    return draw.lazy_nibbles(name, signed, shape, lambda: nibbles(read()))


def nibbles(values: Tensor) -> Tensor:
    """int8 or uint8 of any shape, each value in four bits, to bytes of two, the first in the low half."""
    flat = values.contiguous().reshape(-1).view(torch.uint8) & 15
    low, high = F.pad(flat, (0, len(flat) % 2)).view(-1, 2).unbind(1)
    return low | (high << 4)


def _apart(draw: Draw, at: str, gathered: ir.Value, D: int) -> ir.Value:
    """Bytes [B, T, D / 2] as floats to their halves [B, T, D], the low one first. Arithmetic, because OpenVINO 2026.4
    gets BitShift of uint8 wrong."""
    sixteen, inverse = (
        draw.constant(f"embed.{n}", torch.tensor(v)) for n, v in (("sixteen", 16.0), ("sixteenth", 1 / 16))
    )
    high = draw.op(f"{at}.high", "Floor", [draw.op(f"{at}.high", "Mul", [gathered, inverse])])
    low = draw.op(f"{at}.low", "Sub", [gathered, draw.op(f"{at}.low", "Mul", [high, sixteen])])
    last = draw.constant("embed.last", torch.tensor([-1]))
    pair = [draw.op(f"{at}.{n}", "Unsqueeze", [half, last]) for n, half in (("low", low), ("high", high))]
    return draw.op(
        f"{at}.bytes",
        "Reshape",
        [draw.op(at, "Concat", pair, axis=-1), draw.constant("embed.rows", torch.tensor([0, 0, D]))],
    )


def _leading(draw: Draw, at: str, x: ir.Value) -> ir.Value:
    """[B, T] of x [B, T, D]."""
    return draw.op(at, "Shape", [x], start=0, end=2)
