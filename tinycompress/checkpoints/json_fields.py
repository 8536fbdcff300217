"""Fields of a JSON object or of GGUF metadata, checked before they become shapes: every reader's input is anybody's.

`where` names the file in errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

LARGEST = 2**31 - 1  # no width or length is larger; a layer count is far smaller


def integer(
    data: Mapping[str, Any], key: str, where: str, default: int | None = None, low: int = 1, high: int = LARGEST
) -> int:
    """`data[key]` as an integer in low … high, also where it is written 4.0; `default` (if not None) when it is absent
    or null."""
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{key} in {where}", repr(value), f"an integer in {low} … {high}")
    return value


def number(data: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    """`data[key]` as a finite positive number; `default` (if not None) when it is absent or null."""
    value = data.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InputError(f"{key} in {where}", repr(value), "a finite positive number")
    return float(value)


def flag(data: Mapping[str, Any], key: str, where: str, default: bool = False) -> bool:
    """`data[key]` as a boolean; `default` when it is absent or null."""
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{key} in {where}", repr(value), "true or false")
    return default if value is None else value


def token_id(data: Mapping[str, Any], key: str, where: str, default: int | None) -> int | None:
    """A token id; null, and the -1 of old checkpoints or another negative number, are None."""
    if data.get(key, default) is None:
        return None
    value = integer(data, key, where, default, low=-LARGEST)
    return None if value < 0 else value


def token_ids(data: Mapping[str, Any], key: str, where: str, default: int | None) -> int | tuple[int, ...] | None:
    """One token id or a list of them; negative ones are none."""
    value = data.get(key)
    if isinstance(value, list):
        return tuple(integer({key: v}, key, where, low=-LARGEST) for v in value if not _negative(v)) or None
    return token_id(data, key, where, default)


def _negative(value: Any) -> bool:
    return isinstance(value, int) and value < 0
