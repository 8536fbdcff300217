"""The checkpoint format of AWQ's tools, version "gemm" (AutoAWQ, GPTQModel; read by transformers, vLLM).

For each linear [N, K], 4 bits, groups of g:

  qweight  int32 [K, N/8]     eight outputs a word, nibble j of a word holds output ORDER[j] of its eight
  qzeros   int32 [G, N/8]     zero points, in the same order
  scales   float16 [G, N]

w = (q - z) · s. The order lets a kernel unpack even and odd outputs with one mask each. Described by
github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import QuantTensor, pack
from .bit_words import expect, from_words, grid, half_scales, take, to_words
from .gptq_format import FLOATS

MARKER = ".qweight"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def parts(name: str, weight: QuantTensor) -> dict[str, Callable[[QuantTensor], Tensor]]:
    """How each tensor of a linear is made of a packed weight, by suffix."""
    return {
        ".qweight": lambda w: _interleave(w.ints().T),
        ".qzeros": lambda w: _interleave(_zeros(w).T),
        ".scales": lambda w: half_scales(name, w.scales).T.contiguous(),
    }


def settings(weights: Mapping[str, QuantTensor], skipped: list[str]) -> dict[str, Any]:
    """config.json's quantization_config for weights that share one grid; `skipped` names the dense linears."""
    spec = next(iter(weights.values())).grid
    if spec.bits != BITS:
        raise InputError("format awq", f"weights of {spec.bits} bits", "4 bits (gptq takes 2, 3, 4 and 8)")
    for name, weight in weights.items():
        if weight.shape[0] % 8:
            raise InputError(name, f"{weight.shape[0]} outputs", "a multiple of 8, for AWQ's format")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": spec.group_size or -1,
        "zero_point": True,  # readers take it as a promise that there are qzeros, which there always are
        "modules_to_not_convert": skipped or None,
    }


def read(
    base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], about: Mapping[str, Any], where: str
) -> QuantTensor:
    """The linear `base` of an AWQ checkpoint, its tensors taken out of `stored`; groups follow from their shapes."""
    N, K = shape
    words = take(stored, f"{base}.qweight", where, 2, (torch.int32,))
    qzeros = take(stored, f"{base}.qzeros", where, 2, (torch.int32,))
    scales = take(stored, f"{base}.scales", where, 2, FLOATS)
    G = scales.shape[0]
    if not G or K % G or N % 8:
        raise InputError(
            f"{base} in {where}", f"{G} groups, shape {shape}", f"a divisor of its {K} inputs, outputs in eights"
        )
    wanted = {".qweight": (K, N // 8), ".qzeros": (G, N // 8), ".scales": (G, N)}
    found = {".qweight": words, ".qzeros": qzeros, ".scales": scales}
    expect({base + k: v for k, v in found.items()}, {base + k: v for k, v in wanted.items()}, where)
    q = _deinterleave(words, N).T.contiguous()
    return grid(base, pack(q, BITS), scales.T, _deinterleave(qzeros, N).T, BITS, shape)


def check(about: Mapping[str, Any], where: str) -> None:
    """An `InputError` for settings that another layout belongs to."""
    if (bits := about.get("bits", about.get("w_bit", BITS))) != BITS:
        raise InputError(f"bits in {where}", repr(bits), "4")
    if (version := str(about.get("version", "gemm")).lower()) != "gemm":
        raise InputError(f"version in {where}", repr(version), "gemm")


def _zeros(weight: QuantTensor) -> Tensor:
    return torch.full_like(weight.scales, weight.grid.zero, dtype=torch.uint8) if weight.zeros is None else weight.zeros


def _interleave(q: Tensor) -> Tensor:
    """uint8 [R, N] to int32 [R, N/8]."""
    eights = q.unflatten(1, (-1, 8))[:, :, list(ORDER)]
    return to_words(eights.flatten(1), BITS)


def _deinterleave(words: Tensor, n: int) -> Tensor:
    """The inverse of `_interleave`."""
    back = [ORDER.index(j) for j in range(8)]
    return from_words(words, BITS, n).unflatten(1, (-1, 8))[:, :, back].flatten(1)
