"""The "pack-quantized" format of compressed-tensors (llm-compressor's; read by transformers, vLLM, SGLang).

For each linear [N, K], with bits b, p = ⌊32/b⌋ values a word and groups of g:

  weight_packed      int32 [N, ⌈K/p⌉]     along a row, low bits first; q from 0 (the signed value plus 2^(b-1))
  weight_scale       float [N, G]
  weight_zero_point  int32 [⌈N/p⌉, G]     asymmetric only: zero points, packed along the outputs in the same way
  weight_shape       int64 [2]            N, K
  weight_g_idx       int32 [K]            the group of each input, where activation order scattered them

w = (q - z) · s. For 2, 4 and 8 bits a row is the row of a QuantTensor, so loading copies nothing; with 3 bits each word
leaves two unused. Described by github.com/neuralmagic/compressed-tensors, compressors/quantized_compressors/pack_quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import BITS, QuantSpec, QuantTensor, pack
from .bit_words import expect, grid, regular_groups, row_words, take
from .gptq_format import FLOATS

MARKER = ".weight_packed"


def parts(name: str, weight: QuantTensor) -> dict[str, Callable[[QuantTensor], Tensor]]:
    """How each tensor of a linear is made of a packed weight, by suffix."""
    bits = weight.grid.bits
    out: dict[str, Callable[[QuantTensor], Tensor]] = {
        ".weight_packed": lambda w: (
            row_words(w) if 32 % bits == 0 and w.packed[0].numel() % 4 == 0 else to_padded_words(w.ints(), bits)
        ),
        ".weight_scale": lambda w: w.scales,
        ".weight_shape": lambda w: torch.tensor(w.shape, device=w.device),
    }
    if weight.zeros is not None:
        out[".weight_zero_point"] = lambda w: to_padded_words(w.zeros.T, bits).T.contiguous()  # type: ignore[union-attr]
    return out


def settings(weights: Mapping[str, QuantTensor], skipped: list[str]) -> dict[str, Any]:
    """config.json's quantization_config: a group of linears for each grid; `skipped` names the dense linears."""
    grids: dict[QuantSpec, list[str]] = {}
    for name, weight in weights.items():
        grids.setdefault(QuantSpec(weight.grid.bits, weight.grid.group_size, weight.grid.symmetric), []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(grids) == 1 else names,
            "weights": {
                "num_bits": spec.bits,
                "type": "int",
                "symmetric": spec.symmetric,
                "strategy": "group" if spec.group_size else "channel",
                "group_size": spec.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, (spec, names) in enumerate(grids.items())
    }
    about = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return about | {"config_groups": groups, "ignore": skipped, "kv_cache_scheme": None}


def read(
    base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], about: Mapping[str, Any], where: str
) -> QuantTensor:
    """The linear `base` of a pack-quantized checkpoint, its tensors taken out of `stored`."""
    N, K = shape
    words = take(stored, f"{base}.weight_packed", where, 2, (torch.int32,))
    scales = take(stored, f"{base}.weight_scale", where, 2, (*FLOATS, torch.float64))
    said = take(stored, f"{base}.weight_shape", where, 1, (torch.int64, torch.int32)).tolist()
    if said != [N, K]:
        raise InputError(f"{base}.weight_shape in {where}", said, [N, K])
    fits = [bits for bits in BITS if -(-K // (32 // bits)) == words.shape[1]]
    bits = _num_bits(base, about, fits, where)
    G = scales.shape[1]
    expect(
        {"weight_packed": words, "weight_scale": scales},
        {"weight_packed": (N, words.shape[1]), "weight_scale": (N, G)},
        f"{base} of {where}",
    )
    if not G or K % G:
        raise InputError(f"{base}.weight_scale in {where}", f"{G} groups", f"a divisor of its {K} inputs")
    zeros = torch.full((N, G), 2 ** (bits - 1), dtype=torch.uint8)
    if f"{base}.weight_zero_point" in stored:
        zeros = _zero_points(
            base, take(stored, f"{base}.weight_zero_point", where, 2, (torch.int32, torch.int8)), bits, (N, G), where
        )
    if f"{base}.weight_g_idx" in stored:
        index = take(stored, f"{base}.weight_g_idx", where, 1, (torch.int32, torch.int64))
        expect({"weight_g_idx": index}, {"weight_g_idx": (K,)}, f"{base} of {where}")
        if int(index.max()) >= 0:  # -1 throughout: none
            scales, zeros = regular_groups(base, index, scales, zeros)
    direct = 32 % bits == 0 and K * bits % 32 == 0
    rows = words if direct else pack(from_padded_words(words, bits, K), bits)
    return grid(base, rows, scales, zeros, bits, shape)


def check(about: Mapping[str, Any], where: str) -> None:
    """An `InputError` for a format, or activations, that the graph does not have."""
    if (kind := about.get("format")) != "pack-quantized":
        raise InputError(f"format in {where}", repr(kind), "pack-quantized")
    if about.get("kv_cache_scheme"):
        raise InputError(f"kv_cache_scheme in {where}", "a quantized KV cache", "null")
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or not all(
        isinstance(g, dict) and isinstance(g.get("weights"), dict) for g in groups.values()
    ):
        raise InputError(f"config_groups in {where}", repr(groups)[:80], "groups with a field `weights`")
    for group in groups.values():
        if group.get("input_activations") or group.get("output_activations"):
            raise InputError(f"config_groups in {where}", "quantized activations", "quantized weights only")


def to_padded_words(q: Tensor, bits: int) -> Tensor:
    """Integers [R, n] to int32 [R, ⌈n/p⌉], p = ⌊32/bits⌋ values a word."""
    per_word = 32 // bits
    fields = F.pad(q, (0, -q.shape[1] % per_word)).unflatten(1, (-1, per_word)).to(torch.int64)
    word = (fields << (bits * torch.arange(per_word, device=q.device))).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def from_padded_words(words: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `to_padded_words`: uint8 [R, n]."""
    shifts = bits * torch.arange(32 // bits, device=words.device)
    return ((words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :n].to(torch.uint8)


def _num_bits(base: str, about: Mapping[str, Any], fits: list[int], where: str) -> int:
    """The bits of a linear: what the row length says, or, where that fits two widths, what the settings say."""
    said = {group["weights"].get("num_bits") for group in about["config_groups"].values()}
    known = [bits for bits in fits if bits in said]
    if len(known) != 1:
        raise InputError(
            f"{base}.weight_packed in {where}",
            f"a row that fits {fits or 'no'} bits",
            f"one of num_bits = {sorted(map(str, said))}",
        )
    return known[0]


def _zero_points(base: str, stored: Tensor, bits: int, shape: tuple[int, int], where: str) -> Tensor:
    """uint8 [N, G]; older files keep signed bytes, unpacked."""
    name, (N, G) = "weight_zero_point", shape
    if stored.dtype == torch.int8:
        expect({name: stored}, {name: (N, G)}, f"{base} of {where}")
        return (stored.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    expect({name: stored}, {name: (-(-N // (32 // bits)), G)}, f"{base} of {where}")
    return from_padded_words(stored.T, bits, N).T
