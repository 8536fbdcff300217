"""The checkpoint format of GPTQ's tools (AutoGPTQ, GPTQModel; read by transformers, vLLM, SGLang).

For each linear [N, K], with bits b and groups of g:

  qweight  int32 [K·b/32, N]      column by column: word i of output n holds the bits of inputs 32i/b … of its row
  qzeros   int32 [G, N·b/32]      zero points along the outputs; "gptq" (v1) stores z - 1, "gptq_v2" stores z
  scales   float16 [G, N]
  g_idx    int32 [K]              the group of each input

w = (q - z) · s. Three-bit streams run across words. v1 cannot hold z = 0 (its z - 1 borrows from the neighbour), and with
three bits its readers disagree: AutoGPTQ adds 1 to every field, GPTQModel 5 adds THREE_BIT to the words, as it had
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
from .bit_words import expect, from_words, grid, half_scales, regular_groups, row_words, take, to_words
from .hf import integer

MARKER = ".qweight"
THREE_BIT = (0x24924924, 0x92492492, 0x49249249)  # GPTQModel, convert_gptq_v1_to_v2_format_module
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def parts(name: str, weight: QuantTensor, v2: bool = False) -> dict[str, Callable[[QuantTensor], Tensor]]:
    """How each tensor of a linear is made of a packed weight, by suffix."""
    return {
        ".qweight": lambda w: row_words(w).T.contiguous(),
        ".qzeros": partial(_qzeros, v2=v2),
        ".scales": lambda w: half_scales(name, w.scales).T.contiguous(),
        ".g_idx": lambda w: (torch.arange(w.shape[1], device=w.device) // (w.shape[1] // w.scales.shape[1])).to(
            torch.int32
        ),
    }


def settings(weights: Mapping[str, QuantTensor], head: bool) -> dict[str, Any]:
    """config.json's quantization_config for weights that share one grid."""
    spec = next(iter(weights.values())).grid
    for name, weight in weights.items():
        N, K = weight.shape
        if N * spec.bits % 32 or K * spec.bits % 32:
            raise InputError(
                name, f"{N} × {K} of {spec.bits} bits", "both a whole number of 32-bit words, for GPTQ's format"
            )
    v2 = spec.bits == 3 or any(
        weight.zeros is not None and not weight.zeros.is_meta and bool((weight.zeros == 0).any())
        for weight in weights.values()
    )
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "desc_act": False,
        "sym": spec.symmetric,
        "lm_head": head,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
    }


def read(
    base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], about: Mapping[str, Any], where: str
) -> QuantTensor:
    """The linear `base` of a GPTQ checkpoint, its tensors taken out of `stored`; bits and groups follow from their shapes."""
    kind = about.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise InputError(f"checkpoint_format in {where}", repr(kind), "gptq | gptq_v2")
    N, K = shape
    words = take(stored, f"{base}.qweight", where, 2, (torch.int32,))
    qzeros = take(stored, f"{base}.qzeros", where, 2, (torch.int32,))
    scales = take(stored, f"{base}.scales", where, 2, FLOATS)
    bits, G = 32 * words.shape[0] // K, scales.shape[0]
    if bits not in BITS or words.shape[0] * 32 != K * bits:
        raise InputError(
            f"{base}.qweight in {where}",
            f"{words.shape[0]} words for {K} inputs",
            f"{' | '.join(map(str, BITS))} bits each",
        )
    if f"{base}.g_idx" not in stored and K % max(G, 1):
        raise InputError(f"{base}.scales in {where}", f"{G} groups", f"a divisor of its {K} inputs")
    wanted = {".qweight": (words.shape[0], N), ".qzeros": (G, -(-N * bits // 32)), ".scales": (G, N)}
    expect(
        {base + k: v for k, v in ((".qweight", words), (".qzeros", qzeros), (".scales", scales))},
        {base + k: v for k, v in wanted.items()},
        where,
    )
    theirs = kind == "gptq" and bits == 3 and "gptqmodel" in str(about.get("meta")).lower()
    zeros = from_words(_add_three_bit(qzeros) if theirs else qzeros, bits, N)
    if kind == "gptq" and not theirs:
        zeros = (zeros + 1) & (2**bits - 1)
    per_row, zeros = scales.T, zeros.T
    if f"{base}.g_idx" in stored:
        index = take(stored, f"{base}.g_idx", where, 1, (torch.int32, torch.int64))
        expect({"g_idx": index}, {"g_idx": (K,)}, f"{base} of {where}")
        per_row, zeros = regular_groups(base, index, per_row, zeros)
    return grid(base, words.T, per_row, zeros, bits, shape)


def check(about: Mapping[str, Any], where: str) -> None:
    """An `InputError` for settings that another layout belongs to."""
    integer(about, "bits", where, 4, low=2, high=8)


def _qzeros(weight: QuantTensor, v2: bool) -> Tensor:
    zeros = (
        torch.full_like(weight.scales, weight.grid.zero, dtype=torch.uint8) if weight.zeros is None else weight.zeros
    )
    return to_words((zeros if v2 else zeros - 1).T, weight.grid.bits)


def _add_three_bit(words: Tensor) -> Tensor:
    """What GPTQModel adds to the zero points' words [G, n] of three bits, modulo 2³²."""
    offsets = torch.tensor(THREE_BIT).repeat(-(-words.shape[1] // 3))[: words.shape[1]]
    total = (words.to(torch.int64) + offsets) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
