"""Subgraphs in ONNX Runtime's own operators: the fast ones on its CPU provider (profiles `ort` and `web`).

  attention_mask ─┬─ ReduceSum ─ Sub 1 ─ Cast ─ seqlens_k [B] ───────┐
                  └─ Shape ─ Gather 1 ─ Cast ─ total_sequence_length ┴─ every GroupQueryAttention
  q, k, v, past key, past value, lengths, cos, sin (, scales of an int8 cache) ─ GroupQueryAttention
      ─ heads, present key, present value

Operators: docs/ContribOperators.md of ONNX Runtime (GroupQueryAttention, MatMulNBits, GatherBlockQuantized,
SkipSimplifiedLayerNormalization, FusedMatMul). Where GroupQueryAttention does not take the config, dynamic/attention.py
draws it in standard operators.

Letters: B batch, T new positions, D hidden, H heads, K KV heads, d head_dim, V vocabulary; for packed weights N
out_features, K in_features, b block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.config import EMBEDDING
from tinycompress.graph.quant_tensor import QuantTensor, pack

from . import attention as plain
from .draw import Draw

if TYPE_CHECKING:
    import onnx_ir as ir

MS = "com.microsoft"


def prelude(draw: Draw, ids: ir.Value, mask: ir.Value) -> list[ir.Value] | plain.Positions:
    """What every layer's attention reads: seqlens_k int32 [B] = positions in use - 1, and total_sequence_length int32
    []."""
    if not plain.fused(draw.config, draw.profile):
        return plain.positions(draw, ids, mask)
    one = draw.constant("lengths.one", torch.tensor([1]))
    axis = draw.constant("lengths.axis", torch.tensor(1))
    int32 = int(draw.ir.DataType.INT32)
    used = draw.op("lengths", "ReduceSum", [mask, one], keepdims=0)
    last = draw.op("lengths", "Cast", [draw.op("lengths", "Sub", [used, one])], to=int32)
    total = draw.op("lengths", "Gather", [draw.op("lengths", "Shape", [mask]), axis], axis=0)
    return [last, draw.op("lengths.total", "Cast", [total], to=int32)]


def embedding(draw: Draw, ids: ir.Value) -> ir.Value:
    """ids [B, T] to rows [B, T, D] of the table [V, D], dense or packed."""
    weight = draw.entry(EMBEDDING)
    if not isinstance(weight, QuantTensor):
        return draw.op("model.embed_tokens", "Gather", [draw.dense(EMBEDDING), ids], axis=0)
    block = draw.profile.block(EMBEDDING, *groups(weight))
    if weight.shape[1] % block:
        raise InputError(
            EMBEDDING,
            f"{weight.shape[1]} packed columns",
            f"a multiple of {draw.profile.min_block}, or a dense embedding",
        )
    table, scales, *zeros = packed(draw, EMBEDDING, [weight], flat=not draw.config.tie_embeddings)
    if draw.config.tie_embeddings:  # one table for both ends: the head reads blocks, this reads rows (folded at load)
        table = draw.op(
            "model.embed_tokens", "Reshape", [table, draw.constant("rows", torch.tensor([weight.shape[0], -1]))]
        )
    attributes = {
        "bits": draw.profile.container(weight.grid.bits),
        "block_size": block,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    return draw.op("model.embed_tokens", "GatherBlockQuantized", [table, ids, scales, *zeros], MS, **attributes)


def norm(draw: Draw, name: str, x: ir.Value, residual: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """RMSNorm of residual + x, and that sum."""
    weight = draw.dense(f"{name}.weight")
    eps = draw.config.norm_eps
    if residual is None:
        return last_axis_norm(draw, name, x, eps), x
    outs = draw.ops(name, "SkipSimplifiedLayerNormalization", [residual, x, weight], 4, MS, epsilon=eps)
    return outs[0], outs[3]


def last_axis_norm(draw: Draw, name: str, x: ir.Value, eps: float) -> ir.Value:
    """RMSNorm along the last axis of x, of any rank."""
    weight = draw.dense(f"{name}.weight")
    return draw.op(name, "SimplifiedLayerNormalization", [x, weight], axis=-1, epsilon=eps, stash_type=1)


def attention(draw: Draw, layer: plain.LayerAttention) -> tuple[ir.Value, list[ir.Value]]:
    """Grouped-query attention with the rotation, the cache and the causal mask inside one operator: the heads' outputs
    [B, T, H·d] and the present key and value [B, K, S, d]."""
    at = layer.at
    shared = layer.shared
    if isinstance(shared, plain.Positions):
        layer = replace(layer, qkv=plain.apart(draw, at, layer.qkv, layer.heads, layer.kv_heads))
        return plain.attention(draw, layer, shared)
    assert isinstance(shared, list)
    attributes: dict[str, Any] = {
        "num_heads": layer.heads,
        "kv_num_heads": layer.kv_heads,
        "do_rotary": int(layer.rope),
        "rotary_interleaved": 0,
        "scale": draw.config.head_dim**-0.5,
    }
    if layer.window:
        attributes["local_window_size"] = layer.window
    tables: list[ir.Value] | list[None] = draw.rope() if layer.rope else [None, None]
    joined: list[ir.Value | None] = [*layer.qkv, None, None]  # side by side in the place of q, or three
    inputs: list[ir.Value | None] = [*joined[:3], *layer.past, *shared, *tables]
    if draw.choices.kv_scales:
        inputs += [
            None,
            None,
            None,
            *(draw.constant(name, draw.choices.kv_scales[name]) for name in (f"{at}.key_scale", f"{at}.value_scale")),
        ]
        attributes |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, *present = draw.ops(at, "GroupQueryAttention", inputs, 3, MS, **attributes)
    return y, present


def linear(draw: Draw, name: str, x: ir.Value) -> ir.Value:
    """x [B, T, K] to [B, T, N], without its bias."""
    weight_name = draw.config.weight_name(name)
    weight = draw.entry(weight_name)
    if isinstance(weight, QuantTensor):
        return _product(draw, name, weight_name, [weight], x)
    if weight_name == EMBEDDING:  # the table is stored once, as [V, D]; as fast as a transposed copy, and no bigger
        return draw.op(name, "FusedMatMul", [x, draw.dense(EMBEDDING)], MS, transB=1)
    return draw.op(name, "MatMul", [x, draw.dense(weight_name, transposed=True)])


def product(draw: Draw, name: str, parts: list[str], x: ir.Value) -> ir.Value:
    """x [B, T, K] to [B, T, ΣN] by packed linears of one grid, without biases: their rows stand one below the other,
    byte for byte. A token is faster than apart by 5% for TinyLlama's shape and 12% for SmolLM2
    (benchmarks/README.md)."""
    return _product(draw, name, f"{name}.weight", [draw.entry(f"{part}.weight") for part in parts], x)


def _product(draw: Draw, at: str, name: str, weights: list[QuantTensor], x: ir.Value) -> ir.Value:
    first, *_ = weights
    N = sum(w.shape[0] for w in weights)
    bits = draw.profile.container(first.grid.bits)
    block = draw.profile.block(name, *groups(first))
    attributes = {
        "K": first.shape[1],
        "N": N,
        "bits": bits,
        "block_size": block,
        "accuracy_level": draw.choices.accuracy_level,
    }
    return draw.op(at, "MatMulNBits", [x, *packed(draw, name, weights)], MS, **attributes)


def packed(draw: Draw, name: str, weights: list[QuantTensor], flat: bool = False) -> list[ir.Value]:
    """Packed parameters of one grid, one below the other, as uint8 [N, blocks, bytes] (or [N, blocks · bytes]), scales
    float [N, blocks] and, when asymmetric, zero points uint8 [N, ⌈blocks · bits / 8⌉] or float [N, blocks]."""
    weight = weights[0]
    bits = draw.profile.container(weight.grid.bits)
    group, K = groups(weight)
    block = draw.profile.block(name, group, K)
    N = sum(w.shape[0] for w in weights)
    blocks = -(-K // block)
    width = block * bits // 8
    repeats = -(-group // block)
    shape = (N, blocks * width) if flat else (N, blocks, width)
    values = [
        draw.lazy(
            f"{name}.packed",
            torch.uint8,
            shape,
            lambda: _below([_blocks(w, bits, blocks * width) for w in weights]).reshape(shape),
        ),
        draw.scales(
            f"{name}.scales", (N, blocks), lambda: _below([w.scales for w in weights]).repeat_interleave(repeats, 1)
        ),
    ]
    zeros = [w.zeros for w in weights if w.zeros is not None]
    if zeros and weight.grid.float_zero:
        values.append(
            draw.lazy(f"{name}.zeros", torch.float32, (N, blocks), lambda: _below(zeros).repeat_interleave(repeats, 1))
        )
    elif zeros:
        nbytes = -(-blocks * bits // 8)
        read = lambda: pack(_below(zeros).repeat_interleave(repeats, 1), bits)[:, :nbytes]  # noqa: E731
        values.append(draw.lazy(f"{name}.zeros", torch.uint8, (N, nbytes), read))
    return values


def _below(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # one is often a large memory map


def groups(weight: QuantTensor) -> tuple[int, int]:
    """Group length and in_features."""
    return weight.shape[1] // weight.scales.shape[1], weight.shape[1]


def _blocks(weight: QuantTensor, bits: int, nbytes: int) -> Tensor:
    """uint8 [N, nbytes]: the packed integers as they are, 3-bit ones in 4-bit containers, padded to whole blocks."""
    packed = weight.packed
    if bits != weight.grid.bits:
        shift = (
            2 ** (bits - 1) - weight.grid.zero if weight.zeros is None else 0
        )  # the container's zero is implied, so it moves
        packed = pack(weight.ints().reshape(*weight.scales.shape, -1) + shift, bits)
    rows = packed.flatten(1)[:, :nbytes]
    return F.pad(rows, (0, nbytes - rows.shape[1]))
