"""The checkpoint format of AWQ's tools, version "gemm" (AutoAWQ, GPTQModel; read by transformers, vLLM).

For each linear [N, K], 4 bits, groups of g:

  qweight  int32 [K, N/8]     eight outputs a word, nibble j of a word holds output ORDER[j] of its eight
  qzeros   int32 [G, N/8]     zero points, in the same order
  scales   float16 [G, N]

w = (q - z) · s. The order lets a kernel unpack even and odd outputs with one mask each. Described by
github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import QuantTensor, pack
from .bit_words import expect, from_words, half_scales, quant_tensor, stored_zeros, take_words, to_words
from .quantization_config import Foreign, StatedGrid, check_known, check_values, matching, stated_grid

MARKER = ".qweight"
BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
READ = ("quant_method", "bits", "group_size", "modules_to_not_convert")
VALUES: Mapping[str, tuple[Any, ...]] = {
    "bits": (BITS, float(BITS)),
    "version": ("gemm",),  # gemv, gemv_fast and marlin are other layouts
    "format": ("gemm",),
    "checkpoint_format": ("gemm",),
    "zero_point": (True,),  # without, readers take the stored zero points for nothing, or for something
    "backend": ("autoawq",),
    "pack_dtype": ("int32",),
    "desc_act": (False,),
}
# of how it was quantized, or of how a framework runs it; GPTQModel writes `sym` of every model, also of these
_HARMLESS = """
do_fuse exllama_config fuse_max_seq_len meta modules_to_fuse sym lm_head damp_percent damp_auto_increment mse
true_sequential static_groups act_group_aware pack_impl gptaq gptaq_alpha gptaq_memory_device
"""
HARMLESS = frozenset(VALUES) | frozenset(_HARMLESS.split())


def parts(name: str, weight: QuantTensor) -> dict[str, Callable[[QuantTensor], Tensor]]:
    """How each tensor of a linear is made of a packed weight, by suffix."""
    return {
        ".qweight": lambda w: _interleave(w.ints().T),
        ".qzeros": lambda w: _interleave(stored_zeros(w).T),
        ".scales": lambda w: half_scales(name, w.scales).T.contiguous(),
    }


def settings(weights: Mapping[str, QuantTensor], skipped: list[str]) -> dict[str, Any]:
    """config.json's quantization_config for weights that share one grid; `skipped` names the dense linears."""
    grid = next(iter(weights.values())).grid
    if grid.bits != BITS:
        raise InputError("format awq", f"weights of {grid.bits} bits", "4 bits (gptq takes 2, 3, 4 and 8)")
    for name, weight in weights.items():
        if weight.shape[0] % 8:
            raise InputError(name, f"{weight.shape[0]} outputs", "a multiple of 8, for AWQ's format")
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": BITS,
        "group_size": grid.group_size or -1,
        "zero_point": True,  # readers take it as a promise that there are qzeros, which there always are
        "modules_to_not_convert": skipped or None,
    }


def stated(settings: Mapping[str, Any], file: str) -> list[StatedGrid]:
    """The grids that a quantization_config in `file` speaks of; an `InputError` for a field that nothing here knows."""
    check_known(settings, READ, HARMLESS, file)
    check_values(settings, VALUES, file)
    listed = settings.get("modules_to_not_convert") or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise InputError(f"modules_to_not_convert in {file}", repr(listed)[:80], "a list of names")
    grid = stated_grid({"bits": BITS, **settings}, file)
    return [dataclasses.replace(grid, symmetric=None, reordered=None)]


def read(base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], foreign: Foreign) -> QuantTensor:
    """The linear `base` of an AWQ checkpoint, its tensors taken out of `stored`; groups follow from their shapes."""
    where = foreign.folder
    N, K = shape
    if listed := [name for name in foreign.settings.get("modules_to_not_convert") or () if f".{name}." in f".{base}."]:
        found = f"{listed[0]!r}, and a packed {base} in {where}"
        raise InputError(f"modules_to_not_convert in {foreign.file}", found, "names of dense linears")
    words, zero_words, scales = take_words(stored, base, where)
    G = scales.shape[0]
    if not G or K % G or N % 8:
        accepted = f"a divisor of its {K} inputs, outputs in eights"
        raise InputError(f"{base} in {where}", f"{G} groups, shape {shape}", accepted)
    matching(foreign, base, BITS, G, K)
    tensors = {f"{base}.qweight": words, f"{base}.qzeros": zero_words, f"{base}.scales": scales}
    expected = {f"{base}.qweight": (K, N // 8), f"{base}.qzeros": (G, N // 8), f"{base}.scales": (G, N)}
    expect(tensors, expected, where)
    q = _deinterleave(words, N).T.contiguous()
    return quant_tensor(base, pack(q, BITS), scales.T, _deinterleave(zero_words, N).T, BITS, shape)


def _interleave(q: Tensor) -> Tensor:
    """uint8 [R, N] to int32 [R, N/8]."""
    eights = q.unflatten(1, (-1, 8))[:, :, list(ORDER)]
    return to_words(eights.flatten(1), BITS)


def _deinterleave(words: Tensor, n: int) -> Tensor:
    """The inverse of `_interleave`."""
    back = [ORDER.index(j) for j in range(8)]
    return from_words(words, BITS, n).unflatten(1, (-1, 8))[:, :, back].flatten(1)
