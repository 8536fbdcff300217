"""The checkpoint format of GPTQ's tools (AutoGPTQ, GPTQModel; read by transformers, vLLM, SGLang).

For each linear [N, K], with bits b and groups of g:

  qweight  int32 [K·b/32, N]      column by column: word i of output n holds the bits of inputs 32i/b … of its row
  qzeros   int32 [G, N·b/32]      zero points along the outputs; "gptq" (v1) stores z - 1, "gptq_v2" stores z
  scales   float16 [G, N]
  g_idx    int32 [K]              the group of each input

w = (q - z) · s. Three-bit streams run across words. v1 cannot hold z = 0 (its z - 1 borrows from the neighbour), and
with three bits its readers disagree: AutoGPTQ adds 1 to every field, GPTQModel 5 adds ONES to the words, as it had
subtracted it. So graphs with such a zero point, or with three bits, are written as v2. The layout is described at
github.com/ModelCloud/GPTQModel/wiki/Packing-Formats-and-Compatibility.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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
from .json_fields import flag
from .quantization_config import (
    Foreign,
    StatedGrid,
    check_known,
    check_order,
    check_symmetry,
    check_values,
    matching,
    stated_grid,
)

MARKER = ".qweight"
KINDS = ("gptq", "gptq_v2")
GRID = ("bits", "group_size", "sym", "desc_act")
READ = (*GRID, "quant_method", "checkpoint_format", "format", "lm_head", "dynamic", "meta")
VALUES: Mapping[str, tuple[Any, ...]] = {  # what fields of other layouts, or of activations, may say
    "pack_dtype": ("int32",),
    "is_marlin_format": (False,),
    "awq_gemm_checkpoint": (False,),
    "data_type": ("int",),
    "act_bits": (16, 32),
}
# of how it was quantized, or of how a framework runs it
_HARMLESS = """
act_bits act_data_type act_dynamic act_group_aware act_group_size act_sym amp autoround_version awq_gemm_checkpoint
backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent data_type dataset
device disable_exllama dynamic_max_gap enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input
exllama_config fail_safe failsafe gptaq gptaq_alpha gptaq_memory_device gradient_accumulate_steps hessian_chunk_bytes
hessian_chunk_size hessian_use_bfloat16_staging hyb_act is_marlin_format iters lm_head_low_gpu_mem_usage
low_gpu_mem_usage lr max_input_length minmax_lr mock_quantization model_file_base_name model_name_or_path model_seqlen
module_name_preceding_first_block modules_in_block_to_quantize mse not_use_best_mse nsamples offload_to_disk
offload_to_disk_path pack_dtype pack_impl packing_format pad_token_id parallel_packing provider quantizer scale_dtype
seqlen static_groups supported_types to_quant_block_names tokenizer true_sequential use_cuda_fp16 use_exllama
use_quant_input v2 v2_alpha v2_memory_device vram_strategy
"""
HARMLESS = frozenset(_HARMLESS.split())
# what GPTQModel adds to words of zero points of version 1: 1 in every field, but with three bits in other places
ONES = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}


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


def stated(settings: Mapping[str, Any], file: str) -> list[StatedGrid]:
    """The grids that a quantization_config in `file` speaks of; an `InputError` for a field that nothing here knows."""
    check_known(settings, READ, HARMLESS, file)
    check_values(settings, VALUES, file)
    for key in ("checkpoint_format", "format"):
        check_values(settings, {key: KINDS}, file)
    if settings.get("format") not in (None, settings["checkpoint_format"]):
        found = f"{settings['format']} and {settings['checkpoint_format']} (checkpoint_format)"
        raise InputError(f"format in {file}", found, "one of the two")
    flag(settings, "lm_head", file)
    rules = settings.get("dynamic") or {}  # grids of some linears, by expressions of their names
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise InputError(f"dynamic in {file}", repr(rules)[:80], "an object of objects")
    changes = [{key: value for key, value in rule.items() if key in GRID} for rule in rules.values()]
    return [stated_grid({**settings, **change}, file) for change in ({}, *changes)]


def read(base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], foreign: Foreign) -> QuantTensor:
    """The linear `base` of a GPTQ checkpoint, its tensors taken out of `stored`; their shapes say bits and groups."""
    where = foreign.folder
    N, K = shape
    words, zero_words, scales = take_words(stored, base, where)
    bits = 32 * words.shape[0] // K
    G = scales.shape[0]
    if bits not in BITS or words.shape[0] * 32 != K * bits:
        accepted = f"{' | '.join(map(str, BITS))} bits each"
        raise InputError(f"{base}.qweight in {where}", f"{words.shape[0]} words for {K} inputs", accepted)
    fits = matching(foreign, base, bits, G, K)
    tensors = {f"{base}.qweight": words, f"{base}.qzeros": zero_words, f"{base}.scales": scales}
    zero_shape = (G, -(-N * bits // 32))
    expected = {f"{base}.qweight": (words.shape[0], N), f"{base}.qzeros": zero_shape, f"{base}.scales": (G, N)}
    expect(tensors, expected, where)
    index = _order(base, K, G, stored, foreign, fits)
    row_scales = scales.T
    row_zeros = _zeros(base, zero_words, bits, N, foreign).T
    if index is not None:
        row_scales, row_zeros = regular_groups(base, index, row_scales, row_zeros)
    weight = quant_tensor(base, words.T, row_scales, row_zeros, bits, shape)
    check_symmetry(fits, base, weight.grid.symmetric, foreign)
    return weight


def _zeros(base: str, words: Tensor, bits: int, n: int, foreign: Foreign) -> Tensor:
    """The zero points uint8 [G, N] in the words int32 of either version.

    Version 1 holds z - 1. GPTQModel subtracts words from words, so that of z = 0 a borrow goes to its neighbour, and
    adds them so. Other tools add 1 to each field, and of the largest one some make 0 and some 2^bits.
    """
    if foreign.settings["checkpoint_format"] == "gptq_v2":
        return from_words(words, bits, n)
    if "gptqmodel" in str(foreign.settings.get("meta")).lower():
        return from_words(_add_ones(words, bits), bits, n)
    fields = from_words(words, bits, n)
    if bool((fields == 2**bits - 1).any()):
        accepted = "smaller ones, or version 2 (checkpoint_format gptq_v2): readers of version 1 differ in what this is"
        raise InputError(f"{base}.qzeros in {foreign.folder}", f"a stored zero point of {2**bits - 1}", accepted)
    return fields + 1


def _order(
    base: str, K: int, G: int, stored: dict[str, LazyTensor], foreign: Foreign, fits: Collection[StatedGrid]
) -> Tensor | None:
    """The group of each column, int32 [K], or None without g_idx."""
    name = f"{base}.g_idx"
    if name not in stored:
        if G > 1 and all(grid.reordered for grid in fits):
            accepted = f"the order of columns that desc_act in {foreign.file} speaks of"
            raise InputError(foreign.folder, f"no tensor {name}", accepted)
        return None
    index = take(stored, name, foreign.folder, 1, (torch.int32, torch.int64))
    expect({"g_idx": index}, {"g_idx": (K,)}, f"{base} of {foreign.folder}")
    in_order = K % G == 0 and torch.equal(index.long(), torch.arange(K) // (K // G))
    check_order(fits, base, not in_order, foreign)
    return index


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


def _add_ones(words: Tensor, bits: int) -> Tensor:
    """What GPTQModel adds to the words [G, n] of zero points, modulo 2³²."""
    offsets = torch.tensor(ONES[bits]).repeat(-(-words.shape[1] // len(ONES[bits])))[: words.shape[1]]
    total = (words.to(torch.int64) + offsets) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
