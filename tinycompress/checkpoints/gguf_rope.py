"""RoPE in a GGUF file: keys under rope.*, and tensors that frequencies are divided by; from them and to them.

  linear      rope.scaling.factor
  yarn        the same, and rope.scaling.original_context_length; cos and sin times 0.1·ln s + 1, times attn_factor.
              The converter also keeps config.json's beta_fast, beta_slow and attention_factor (yarn_attn_factor): what
              the model was made with, though llama.cpp does not read it in the architectures of gguf_families.py.
  divisors    rope_freqs.weight, d/2 numbers: Llama 3's stretch, or any other that is the same at every length
  longrope    rope_factors_short.weight and rope_factors_long.weight

A stretch that has no keys here is written as divisors, which llama.cpp's llama reads.
Letters: d head_dim, s factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, tensor

from ..errors import InputError
from ..graph.config import Config
from ..graph.rope import Rope
from .gguf_families import Architecture
from .json_fields import integer, number

DIVISORS = "rope_freqs.weight"
SHORT = "rope_factors_short.weight"
LONG = "rope_factors_long.weight"
TENSORS = (DIVISORS, SHORT, LONG)
FACTOR = "rope.scaling.factor"
ORIGINAL = "rope.scaling.original_context_length"
ATTENTION = "rope.scaling.attn_factor"
LLAMA3_LENGTHS = (8192, 2048, 4096, 16384, 32768, 65536, 131072)  # 8192: every Llama 3.x, before it was stretched
KINDS = ("none", "linear", "yarn", "longrope")


def real(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """`values[key]` as `number` checks it; a float32 as the shortest decimal that it stands for: 1e-5, not
    9.9999997e-06."""
    value = number(values, key, where, default)
    return value if values.get(key) is None else float(np.format_float_positional(np.float32(value)))


def rope_from_gguf(
    values: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int, context: int, where: str
) -> Rope:
    """The Rope of a file; an `InputError` for keys that contradict one another or say what no Rope can.

    Args:
        values: the architecture's keys without its prefix.
        tensors: those of the file by name.
        context: context_length, which stands in for an original length that is not given.
    """
    theta = real(values, "rope.freq_base", where, 10000.0)
    kind = values.get("rope.scaling.type", "linear" if DIVISORS not in tensors else "none")
    if kind not in KINDS:
        raise InputError(f"rope.scaling.type in {where}", repr(kind), " | ".join(KINDS))
    given = FACTOR if values.get(FACTOR) else "rope.scale_linear"
    factor = real(values, given, where) if values.get(given) else 1.0  # 0 is "none" in files that llama.cpp wrote
    original = integer(values, ORIGINAL, where, context)
    _check_tensors(values, tensors, kind, factor, where)
    if kind == "yarn":
        return _yarn(values, theta, factor, original, where)
    scale = real(values, ATTENTION, where, 1.0)
    if kind == "longrope":
        short, long = (_divisors(tensors, name, head_dim, where) for name in (SHORT, LONG))
        return Rope(theta, "longrope", factor, original, scale, short_factor=short, long_factor=long)
    if DIVISORS in tensors:
        return _stretched(theta, _divisors(tensors, DIVISORS, head_dim, where), scale, context)
    if scale != 1:
        raise InputError(f"{ATTENTION} in {where}", scale, f"1, for RoPE of type {kind}")
    return Rope(theta, "linear", factor) if kind == "linear" and factor != 1 else Rope(theta)


def _check_tensors(values: Mapping[str, Any], tensors: Mapping[str, Any], kind: str, factor: float, where: str) -> None:
    """One way of stretching, and the tensors that belong to it."""
    present = [name for name in TENSORS if name in tensors]
    wanted = [SHORT, LONG] if kind == "longrope" else [DIVISORS]
    if kind == "longrope" and present != wanted:
        raise InputError(
            f"rope.scaling.type in {where}", f"longrope with {present or 'no tensors'}", " and ".join(wanted)
        )
    stretched = kind == "yarn" or (kind == "linear" and factor != 1)
    if kind != "longrope" and present and (stretched or present != wanted):
        raise InputError(f"tensor {present[0]} in {where}", f"beside RoPE of type {kind}", "one way of stretching")
    if kind != "yarn":
        for key, ordinary in (("yarn_ext_factor", 0.0), ("yarn_attn_factor", 1.0)):
            value = values.get(f"rope.scaling.{key}", ordinary)
            if value != ordinary and not (key == "yarn_ext_factor" and value < 0):
                raise InputError(f"rope.scaling.{key} in {where}", value, f"none, for RoPE of type {kind}")


def _yarn(values: Mapping[str, Any], theta: float, factor: float, original: int, where: str) -> Rope:
    ramp = values.get("rope.scaling.yarn_ext_factor", 1.0)
    if not isinstance(ramp, int | float) or not (ramp == 1 or ramp < 0):  # below 0: not set
        raise InputError(f"rope.scaling.yarn_ext_factor in {where}", repr(ramp), "1: the whole of YaRN's ramp")
    plain = Rope(theta, "yarn", factor, original)
    return Rope(
        theta,
        "yarn",
        factor,
        original,
        _attention_factor(values, plain.attention_scale(), where),
        beta_fast=real(values, "rope.scaling.yarn_beta_fast", where, plain.beta_fast),
        beta_slow=real(values, "rope.scaling.yarn_beta_slow", where, plain.beta_slow),
    )


def _attention_factor(values: Mapping[str, Any], formula: float, where: str) -> float | None:
    """What cos and sin are multiplied by; None: the paper's formula.

    attn_factor comes on top of the formula, yarn_attn_factor (attention_factor in config.json) in its place.
    """
    extra = real(values, ATTENTION, where, 1.0)
    key = "rope.scaling.yarn_attn_factor"
    if values.get(key) is None:
        return None if extra == 1 else formula * extra
    replacing = real(values, key, where)
    if replacing == 1 or extra != 1:
        found = "1, which may also be llama.cpp's word for the formula" if extra == 1 else f"{replacing} and {extra}"
        accepted = f"no such key: the paper's formula, or {ATTENTION}, which multiplies it"
        raise InputError(f"{key} in {where}", found, accepted)
    return replacing


def _divisors(tensors: Mapping[str, Any], name: str, head_dim: int, where: str) -> tuple[float, ...]:
    stored = tensors[name]
    if stored.tensor_type.name != "F32" or stored.data.shape != (head_dim // 2,):
        found = f"{stored.tensor_type.name} {stored.data.shape}"
        raise InputError(f"{name} in {where}", found, f"F32, head_dim / 2 = {head_dim // 2} numbers")
    numbers = np.asarray(stored.data, np.float32)
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise InputError(f"{name} in {where}", "a number that is not finite or not above 0", "divisors of frequencies")
    return tuple(numbers.tolist())


def _stretched(theta: float, divisors: tuple[float, ...], scale: float, context: int) -> Rope:
    """Llama 3's stretch where the divisors are its own; any other as LongRoPE with one list for all lengths."""
    factor = max(divisors)
    head_dim = 2 * len(divisors)
    plain = Rope(theta).inv_freq(head_dim)
    if scale == 1 and factor == 1 == min(divisors):
        return Rope(theta)
    for length in LLAMA3_LENGTHS if scale == 1 and factor > 1 else ():
        rope = Rope(theta, "llama3", factor, length)
        if np.allclose(plain / rope.inv_freq(head_dim), divisors, rtol=1e-5):
            return rope
    return Rope(theta, "longrope", 1.0, context, scale, short_factor=divisors, long_factor=divisors)


def rope_to_gguf(config: Config, architecture: Architecture) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys (without the architecture's prefix) and tensors of a config's RoPE; an `InputError` for what has neither."""
    rope = config.rope
    keys: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": config.head_dim}
    if rope.type == "default":
        return keys, {}
    if rope.type == "linear":
        return keys | {"rope.scaling.type": "linear", FACTOR: rope.factor}, {}
    if rope.type == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True):
        extra = rope.attention_scale() / Rope(rope.theta, "yarn", rope.factor, rope.trained).attention_scale()
        keys |= {"rope.scaling.type": "yarn", FACTOR: rope.factor, ORIGINAL: rope.trained}
        return keys | ({} if extra == 1 else {ATTENTION: extra}), {}
    if rope.type == "dynamic":
        accepted = "one that is the same at every length: default, linear, yarn (ScaleRope), llama3"
        raise InputError("format gguf", "RoPE of type dynamic", accepted)
    if not architecture.divisors:
        accepted = "default, linear, or yarn with beta_fast 32, beta_slow 1 and truncate true"
        raise InputError("format gguf", f"{_described(rope)} in llama.cpp's {architecture.name}", accepted)
    if rope.attention_scale() != 1:
        keys[ATTENTION] = rope.attention_scale()
    if rope.varies_with_length:
        keys |= {"rope.scaling.type": "longrope", ORIGINAL: rope.trained}
        return keys, {SHORT: tensor(rope.short_factor), LONG: tensor(rope.long_factor)}
    return keys, {DIVISORS: Rope(rope.theta).inv_freq(config.head_dim) / rope.inv_freq(config.head_dim)}


def _described(rope: Rope) -> str:
    if rope.type != "yarn":
        return f"RoPE of type {rope.type}"
    return f"yarn with beta_fast {rope.beta_fast:g}, beta_slow {rope.beta_slow:g}, truncate {rope.truncate}"
