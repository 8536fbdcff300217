"""The "pack-quantized" format of compressed-tensors (llm-compressor's; read by transformers, vLLM, SGLang).

For each linear [N, K], with bits b, p = ⌊32/b⌋ values a word and groups of g:

  weight_packed      int32 [N, ⌈K/p⌉]     along a row, low bits first; q from 0 (the signed value plus 2^(b-1))
  weight_scale       float [N, G]
  weight_zero_point  int32 [⌈N/p⌉, G]     asymmetric only: zero points, packed along the outputs in the same way
  weight_shape       int64 [2]            N, K
  weight_g_idx       int32 [K]            the group of each input, where activation order scattered them

w = (q - z) · s. For 2, 4 and 8 bits a row is the row of a QuantTensor, so loading copies nothing; with 3 bits each word
leaves two unused. Described by github.com/neuralmagic/compressed-tensors,
compressors/quantized_compressors/pack_quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..graph.graph import LazyTensor
from ..graph.quant_tensor import BITS, Grid, QuantTensor, pack
from .bit_words import FLOATS, expect, quant_tensor, regular_groups, row_words, stored_zeros, take
from .json_fields import flag, integer
from .quantization_config import (
    Foreign,
    StatedGrid,
    check_known,
    check_order,
    check_symmetry,
    check_values,
    matching,
)

MARKER = ".weight_packed"
FORMAT = "pack-quantized"
READ = (
    "quant_method",
    "format",
    "config_groups",
    "ignore",
    "kv_cache_scheme",
    "sparsity_config",
    "quantization_status",
)
HARMLESS = ("global_compression_ratio", "run_compressed", "version")  # transform_config, if any, is refused
ORDERED = ("group", "dynamic", True)  # actorder with an index of groups; "weight" and "static" leave columns in order
GROUP_READ = ("num_bits", "group_size", "strategy", "symmetric", "actorder", "type", "dynamic")
GROUP_HARMLESS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
GROUP_VALUES: Mapping[str, tuple[Any, ...]] = {
    "type": ("int",),
    "dynamic": (False,),
    "strategy": ("group", "channel"),
    "actorder": ("group", "weight", "static", "dynamic", True, False),
}


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
        out[".weight_zero_point"] = lambda w: to_padded_words(stored_zeros(w).T, bits).T.contiguous()
    return out


def settings(weights: Mapping[str, QuantTensor], skipped: list[str]) -> dict[str, Any]:
    """config.json's quantization_config: a group of linears for each grid; `skipped` names the dense linears."""
    linears_of: dict[Grid, list[str]] = {}
    for name, weight in weights.items():
        linears_of.setdefault(weight.grid, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(linears_of) == 1 else names,
            "weights": {
                "num_bits": grid.bits,
                "type": "int",
                "symmetric": grid.symmetric,
                "strategy": "group" if grid.group_size else "channel",
                "group_size": grid.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for i, (grid, names) in enumerate(linears_of.items())
    }
    kind = {"quant_method": "compressed-tensors", "format": FORMAT, "quantization_status": "compressed"}
    return kind | {"config_groups": groups, "ignore": skipped, "kv_cache_scheme": None}


def stated(settings: Mapping[str, Any], file: str) -> list[StatedGrid]:
    """The grids that a quantization_config in `file` speaks of; an `InputError` for what the graph does not have."""
    check_known(settings, READ, HARMLESS, file)
    if (kind := settings.get("format")) != FORMAT:
        raise InputError(f"format in {file}", repr(kind), FORMAT)
    check_values(settings, {"quantization_status": ("compressed", "frozen")}, file)
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise InputError(f"sparsity_config in {file}", repr(sparsity)[:80], "none, or the format dense")
    if settings.get("kv_cache_scheme"):
        raise InputError(f"kv_cache_scheme in {file}", "a quantized KV cache", "null")
    if not isinstance(settings.get("ignore") or [], list):
        raise InputError(f"ignore in {file}", repr(settings["ignore"])[:80], "a list of names")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(
        isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in groups.values()
    ):
        raise InputError(f"config_groups in {file}", repr(groups)[:80], "groups with a field `weights`")
    return [_group_grid(group, f"{name} of config_groups in {file}") for name, group in groups.items()]


def read(base: str, shape: tuple[int, int], stored: dict[str, LazyTensor], foreign: Foreign) -> QuantTensor:
    """The linear `base` of a pack-quantized checkpoint, its tensors taken out of `stored`."""
    where = foreign.folder
    if base in (foreign.settings.get("ignore") or ()):
        raise InputError(f"ignore in {foreign.file}", f"{base}, which is packed in {where}", "names of dense linears")
    N, K = shape
    words = take(stored, f"{base}.weight_packed", where, 2, (torch.int32,))
    scales = take(stored, f"{base}.weight_scale", where, 2, (*FLOATS, torch.float64))
    stored_shape = take(stored, f"{base}.weight_shape", where, 1, (torch.int64, torch.int32)).tolist()
    if stored_shape != [N, K]:
        raise InputError(f"{base}.weight_shape in {where}", stored_shape, [N, K])
    bits = _num_bits(base, foreign, K, words.shape[1])
    G = scales.shape[1]
    expect(
        {"weight_packed": words, "weight_scale": scales},
        {"weight_packed": (N, words.shape[1]), "weight_scale": (N, G)},
        f"{base} of {where}",
    )
    if not G or K % G:
        raise InputError(f"{base}.weight_scale in {where}", f"{G} groups", f"a divisor of its {K} inputs")
    fits = matching(foreign, base, bits, G, K)
    zeros = _zero_points(base, stored, bits, (N, G), foreign, fits)
    index = _order(base, K, stored, foreign, fits)
    if index is not None:
        scales, zeros = regular_groups(base, index, scales, zeros)
    direct = 32 % bits == 0 and K * bits % 32 == 0
    rows = words if direct else pack(from_padded_words(words, bits, K), bits)
    weight = quant_tensor(base, rows, scales, zeros, bits, shape)
    check_symmetry(fits, base, weight.grid.symmetric, foreign)
    return weight


def _group_grid(group: Mapping[str, Any], where: str) -> StatedGrid:
    """The grid of one of config_groups."""
    check_known(group, ("weights", "input_activations", "output_activations"), ("targets", "format"), where)
    check_values(group, {"format": (FORMAT,)}, where)
    if group.get("input_activations") or group.get("output_activations"):
        raise InputError(where, "quantized activations", "quantized weights only")
    weights = group["weights"]
    check_known(weights, GROUP_READ, GROUP_HARMLESS, where)
    check_values(weights, GROUP_VALUES, where)
    grouped = weights.get("strategy") == "group" or (weights.get("strategy") is None and weights.get("group_size"))
    group_size = integer(weights, "group_size", where, None if grouped else -1, low=-1)
    if (grouped and group_size < 1) or (not grouped and group_size not in (-1, 0)):
        raise InputError(f"group_size in {where}", group_size, f"one that strategy {weights.get('strategy')} has")
    return StatedGrid(
        integer(weights, "num_bits", where, low=2, high=8),
        group_size if grouped else None,
        flag(weights, "symmetric", where, True),
        weights.get("actorder") in ORDERED,
    )


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


def _num_bits(base: str, foreign: Foreign, K: int, row: int) -> int:
    """The bits of a linear with rows of `row` words: what fits, or, where two widths do, what the settings say."""
    fits = [bits for bits in BITS if -(-K // (32 // bits)) == row]
    settings_bits = {grid.bits for grid in foreign.grids}
    agreed = [bits for bits in fits if bits in settings_bits]
    if len(agreed) != 1:
        accepted = f"one of num_bits = {sorted(map(str, settings_bits))}"
        found = f"a row that fits {fits or 'no'} bits"
        raise InputError(f"{base}.weight_packed in {foreign.folder}", found, accepted)
    return agreed[0]


def _zero_points(
    base: str,
    stored: dict[str, LazyTensor],
    bits: int,
    shape: tuple[int, int],
    foreign: Foreign,
    fits: Collection[StatedGrid],
) -> Tensor:
    """uint8 [N, G]; older files keep signed bytes, unpacked; without any they lie in the middle."""
    N, G = shape
    name = "weight_zero_point"
    if f"{base}.{name}" not in stored:
        if not any(grid.symmetric for grid in fits):
            accepted = f"the zero points that an asymmetric grid in {foreign.file} has"
            raise InputError(foreign.folder, f"no tensor {base}.{name}", accepted)
        return torch.full((N, G), 2 ** (bits - 1), dtype=torch.uint8)
    values = take(stored, f"{base}.{name}", foreign.folder, 2, (torch.int32, torch.int8))
    where = f"{base} of {foreign.folder}"
    if values.dtype == torch.int32:
        expect({name: values}, {name: (-(-N // (32 // bits)), G)}, where)
        return from_padded_words(values.T, bits, N).T
    expect({name: values}, {name: (N, G)}, where)
    shifted = values.to(torch.int16) + 2 ** (bits - 1)
    if int(shifted.min()) < 0 or int(shifted.max()) >= 2**bits:
        found = f"{int(values.min())} … {int(values.max())}"
        raise InputError(f"{base}.{name} in {foreign.folder}", found, f"signed integers of {bits} bits")
    return shifted.to(torch.uint8)


def _order(
    base: str, K: int, stored: dict[str, LazyTensor], foreign: Foreign, fits: Collection[StatedGrid]
) -> Tensor | None:
    """The group of each column, int32 [K]; None where columns are in order."""
    name = f"{base}.weight_g_idx"
    if name not in stored:
        if all(grid.reordered for grid in fits):
            accepted = f"the order of columns that actorder in {foreign.file} speaks of"
            raise InputError(foreign.folder, f"no tensor {name}", accepted)
        return None
    index = take(stored, name, foreign.folder, 1, (torch.int32, torch.int64))
    expect({"weight_g_idx": index}, {"weight_g_idx": (K,)}, f"{base} of {foreign.folder}")
    if bool((index == -1).all()):  # what is stored where there is none
        return None
    check_order(fits, base, True, foreign)
    return index
