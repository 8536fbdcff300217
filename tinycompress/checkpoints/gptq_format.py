"""The checkpoint format of GPTQ's tools (AutoGPTQ, GPTQModel; read by transformers, vLLM, SGLang).

For each linear [N, K], with bits b and groups of g:

  qweight  int32 [K·b/32, N]      column by column: word i of output n holds the bits of inputs 32i/b … of its row
  qzeros   int32 [G, N·b/32]      zero points along the outputs; "gptq" (v1) stores z - 1, "gptq_v2" stores z
  scales   float16 [G, N]
  g_idx    int32 [K]              the group of each input

w = (q - z) · s. Three-bit streams run across words. v1 cannot hold z = 0 (its z - 1 borrows from the neighbour), and
with three bits its readers disagree: AutoGPTQ adds 1 to every field, GPTQModel 5 adds THREE_BIT to the words, as it had
subtracted it. So graphs with such a zero point, or with three bits, are written as v2. The layout is described at
github.com/ModelCloud/GPTQModel/wiki/Packing-Formats-and-Compatibility.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import BITS, QuantTensor
from .bit_words import (
    expect,
    from_words,
    half_scales,
    quant_tensor,
    regular_groups,
    row_words,
    stored_zeros,
    take,
    take_words,
    to_words,
)
from .json_fields import integer

MARKER = ".qweight"
THREE_BIT = (0x24924924, 0x92492492, 0x49249249)  # GPTQModel, convert_gptq_v1_to_v2_format_module


def parts(name: str, weight: QuantTensor, v2: bool = False) -> dict[str, Callable[[QuantTensor], Tensor]]:
    """How each tensor of a linear is made of a packed weight, by suffix."""
    return {
        ".qweight": lambda w: row_words(w).T.contiguous(),
        ".qzeros": partial(_qzeros, v2=v2),
        ".scales": lambda w: half_scales(name, w.scales).T.contiguous(),
        ".g_idx": _group_index,
    }


def settings(weights: Mapping[str, QuantTensor], head: bool) -> dict[str, Any]:
    """config.json's quantization_config for weights that share one grid."""
    grid = next(iter(weights.values())).grid
    for name, weight in weights.items():
        N, K = weight.shape
        if N * grid.bits % 32 or K * grid.bits % 32:
            accepted = "both a whole number of 32-bit words, for GPTQ's format"
            raise InputError(name, f"{N} × {K} of {grid.bits} bits", accepted)
    v2 = grid.bits == 3 or any(_has_zero_at_zero(weight) for weight in weights.values())
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "desc_act": False,
        "sym": grid.symmetric,
        "lm_head": head,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
    }


def read(
    base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], quantization_config: Mapping[str, Any], where: str
) -> QuantTensor:
    """The linear `base` of a GPTQ checkpoint, its tensors taken out of `stored`; their shapes say bits and groups."""
    kind = quantization_config.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format in {where}", repr(kind), "gptq | gptq_v2")
    N, K = shape
    words, zero_words, scales = take_words(stored, base, where)
    bits = 32 * words.shape[0] // K
    G = scales.shape[0]
    if bits not in BITS or words.shape[0] * 32 != K * bits:
        accepted = f"{' | '.join(map(str, BITS))} bits each"
        raise InputError(f"{base}.qweight in {where}", f"{words.shape[0]} words for {K} inputs", accepted)
    if f"{base}.g_idx" not in stored and K % max(G, 1):
        raise InputError(f"{base}.scales in {where}", f"{G} groups", f"a divisor of its {K} inputs")
    tensors = {f"{base}.qweight": words, f"{base}.qzeros": zero_words, f"{base}.scales": scales}
    zero_shape = (G, -(-N * bits // 32))
    expected = {f"{base}.qweight": (words.shape[0], N), f"{base}.qzeros": zero_shape, f"{base}.scales": (G, N)}
    expect(tensors, expected, where)
    by_gptqmodel = kind == "gptq" and bits == 3 and "gptqmodel" in str(quantization_config.get("meta")).lower()
    zeros = from_words(_add_three_bit(zero_words) if by_gptqmodel else zero_words, bits, N)
    if kind == "gptq" and not by_gptqmodel:
        zeros = (zeros + 1) & (2**bits - 1)
    row_scales = scales.T
    row_zeros = zeros.T
    if f"{base}.g_idx" in stored:
        index = take(stored, f"{base}.g_idx", where, 1, (torch.int32, torch.int64))
        expect({"g_idx": index}, {"g_idx": (K,)}, f"{base} of {where}")
        row_scales, row_zeros = regular_groups(base, index, row_scales, row_zeros)
    return quant_tensor(base, words.T, row_scales, row_zeros, bits, shape)


def check(quantization_config: Mapping[str, Any], where: str) -> None:
    """An `InputError` for settings that another layout belongs to."""
    integer(quantization_config, "bits", where, 4, low=2, high=8)


def _qzeros(weight: QuantTensor, v2: bool) -> Tensor:
    """The words of the zero points: int32 [G, N·b/32]."""
    zeros = stored_zeros(weight)
    return to_words((zeros if v2 else zeros - 1).T, weight.grid.bits)


def _group_index(weight: QuantTensor) -> Tensor:
    """The group of each input, int32 [K]."""
    group_size = weight.shape[1] // weight.scales.shape[1]
    return (torch.arange(weight.shape[1], device=weight.device) // group_size).to(torch.int32)


def _has_zero_at_zero(weight: QuantTensor) -> bool:
    """Whether a zero point is 0, which version 1 cannot hold; of a weight without data: no."""
    return weight.zeros is not None and not weight.zeros.is_meta and bool((weight.zeros == 0).any())


def _add_three_bit(words: Tensor) -> Tensor:
    """What GPTQModel adds to the zero points' words [G, n] of three bits, modulo 2³²."""
    offsets = torch.tensor(THREE_BIT).repeat(-(-words.shape[1] // 3))[: words.shape[1]]
    total = (words.to(torch.int64) + offsets) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
