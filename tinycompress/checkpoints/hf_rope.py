"""What a config.json of Hugging Face says of positions, to and from a Rope.

Traps, by RoPE type (transformers 4.57; 5.x agrees, with other spellings):

  "linear"    max_position_embeddings is the stretched length
  "dynamic"   max_position_embeddings is the ORIGINAL length: frequencies start to change beyond it
  "yarn", "llama3", "longrope"   max_position_embeddings is the stretched length, the original one has its own key
  "longrope"  4.x reads the original length beside rope_scaling, 5.x inside; 4.x then derives the factor from the two

4.x writes `rope_theta` and `rope_scaling`, 5.x one `rope_parameters`; both are read, the 4.x spelling is written
(5.x still reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..graph.config import Config
from ..graph.rope import TYPES, Rope
from .config_keys import check_rope_keys
from .json_fields import flag, integer, number

ORIGINAL = "original_max_position_embeddings"


def rope_from_hf(
    data: Mapping[str, Any], head_dim: int, where: str, default_theta: float = 10000.0, default_length: int = 2048
) -> tuple[Rope, int]:
    """The Rope and the length it is good for, from either spelling; the defaults are those of the model's family."""
    values = _values(data, where)
    theta = _theta(data, where, default_theta)
    length = integer(data, "max_position_embeddings", where, default_length)
    kind = values.get("rope_type", "default")
    at = f"rope_scaling of {where}"
    if kind == "default":
        return Rope(theta), length
    if kind not in TYPES:
        raise InputError(f"rope_type in {at}", repr(kind), " | ".join(TYPES))
    beside_original = integer(data, ORIGINAL, where, 0)  # longrope in 4.x
    original = _original(values, kind, length, beside_original, at)
    if original > length and kind != "linear":
        given = f"{original} with max_position_embeddings {length}"
        raise InputError(f"{ORIGINAL} in {where}", given, "at most max_position_embeddings, the stretched length")
    ratio = max(1.0, length / original)
    factor = number(values, "factor", at, ratio if kind == "longrope" else None)
    scale = number(values, "attention_factor", at, 0.0) or None
    if kind == "linear":
        return Rope(theta, kind, factor), length
    if kind == "dynamic":
        return Rope(theta, kind, factor, original), round(original * factor)
    if kind == "yarn":
        keys = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        optional: dict[str, Any] = {key: number(values, key, at) for key in keys if values.get(key)}
        truncate = flag(values, "truncate", at, True)
        # with no original length given, transformers takes max_position_embeddings for it
        stretched = length if original < length else round(length * factor)
        return Rope(theta, kind, factor, original, scale, truncate=truncate, **optional), stretched
    if kind == "llama3":
        low = number(values, "low_freq_factor", at)
        high = number(values, "high_freq_factor", at)
        return Rope(theta, kind, factor, original, low_freq_factor=low, high_freq_factor=high), length
    lists: dict[str, Any] = {key: _factors(values, key, head_dim, at) for key in ("short_factor", "long_factor")}
    # 4.x, as Phi-3 does: the ratio of lengths, whatever the factor says
    derived = bool(beside_original) and scale is None
    return Rope(theta, kind, ratio if derived else factor, original, scale, **lists), length


def _values(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rope's own fields, from whichever dictionary has them."""
    scaling = _rope_dictionary(data, "rope_scaling", where)
    parameters = _rope_dictionary(data, "rope_parameters", where)
    if scaling and parameters and scaling != {k: v for k, v in parameters.items() if k != "rope_theta"}:
        given = f"{scaling}, and rope_parameters {parameters}"
        raise InputError(f"rope_scaling in {where}", given, "one of them, or both alike")
    values = scaling | parameters
    for source in (values, data):
        share = source.get("partial_rotary_factor", 1)
        if share not in (1, None):
            raise InputError(f"partial_rotary_factor in {where}", repr(share), "1: every channel turns")
    return values


def _theta(data: Mapping[str, Any], where: str, default: float) -> float:
    inside = _rope_dictionary(data, "rope_parameters", where).get("rope_theta")
    beside = data.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        raise InputError(f"rope_theta in {where}", f"{beside}, and {inside} in rope_parameters", "one value")
    return number({"rope_theta": beside if inside is None else inside}, "rope_theta", where, default)


def _original(values: Mapping[str, Any], kind: str, length: int, beside: int, at: str) -> int:
    """The length that the model was trained at; `beside`: what the config says outside the rope's dictionary, or 0."""
    if kind == "dynamic":
        if values.get(ORIGINAL) not in (None, length):
            given = f"{values[ORIGINAL]} with max_position_embeddings {length}"
            accepted = "for dynamic, max_position_embeddings is the original length: leave the other out"
            raise InputError(f"{ORIGINAL} in {at}", given, accepted)
        return length
    default = beside or length
    if kind == "llama3" and not beside:
        return integer(values, ORIGINAL, at)  # has to be there
    return integer(values, ORIGINAL, at, default)


def rope_to_hf(config: Config) -> dict[str, Any]:
    """The config.json fields that say what positions mean, in the 4.x spelling."""
    rope = config.rope
    length = config.max_position
    out: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None, "max_position_embeddings": length}
    if rope.type == "default":
        return out
    scaling: dict[str, Any] = {"rope_type": rope.type, "factor": float(rope.factor)}
    if rope.type == "dynamic":
        out["max_position_embeddings"] = rope.original_max_position
    elif rope.type != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_position
    if rope.type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        scaling |= {
            k: v for k in ("attention_factor", "mscale", "mscale_all_dim") if (v := getattr(rope, k)) is not None
        }
    elif rope.type == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    elif rope.type == "longrope":
        # 4.x derives the factor from the lengths, 5.x reads it: only its effect, written out, is the same in both
        scaling |= {
            "attention_factor": rope.attention_scale(),
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
        out["original_max_position_embeddings"] = rope.original_max_position
    return out | {"rope_scaling": scaling}


def _rope_dictionary(data: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A rope dictionary without nulls, its old key `type` renamed to `rope_type`."""
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{key} in {where}", repr(value), "an object or null")
    out = {k: v for k, v in value.items() if v is not None}
    check_rope_keys(out, f"{key} in {where}")
    old = out.pop("type", None)
    if old is not None and out.setdefault("rope_type", old) != old:
        raise InputError(
            f"{key} in {where}", f"type {old!r} and rope_type {out['rope_type']!r}", "one of them, or both alike"
        )
    return out


def _factors(values: Mapping[str, Any], key: str, head_dim: int, where: str) -> tuple[float, ...]:
    """The factors of every pair of channels, [head_dim / 2]."""
    factors = values.get(key)
    if not isinstance(factors, list) or len(factors) != head_dim // 2:
        given = f"{len(factors)} numbers" if isinstance(factors, list) else repr(factors)
        raise InputError(f"{key} in {where}", given, f"a list of head_dim / 2 = {head_dim // 2} numbers")
    return tuple(number({key: factor}, key, where) for factor in factors)
