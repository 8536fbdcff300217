"""JSON objects in files, and file names that may not leave their folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LONGEST_NAME = 255  # bytes of one part of a path: what file systems take
LONGEST_INTEGER = 300  # digits; floats end at 10 ** 308


def to_json(data: Any, indent: int | None = 2) -> str:
    """`data` as JSON that any reader takes: a number that is not finite, which JSON does not have, becomes null."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def read_json(path: str | Path) -> Any:
    """A JSON object from a file; an `InputError` that names the file if it is missing or not JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text, parse_int=_integer)
        if SURROGATE.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # it could never be saved
        accepted = "pairs of surrogates, as characters beyond U+FFFF are written"
        raise InputError(str(path), "half of a surrogate pair in a text", accepted) from None
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a JSON file") from None
    except IsADirectoryError:
        raise InputError(str(path), "a folder", "a JSON file") from None
    except RecursionError:
        raise InputError(str(path), "lists or objects nested too deep to read", "a JSON object") from None
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise InputError(str(path), f"not JSON ({error})", "a JSON object") from None
    if not isinstance(data, dict):
        raise InputError(str(path), f"a JSON {type(data).__name__}", "a JSON object")
    return data


def _integer(digits: str) -> int:
    """An integer of a JSON file; one that no float can hold is a `ValueError`, for what follows would overflow."""
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def inside(folder: str | Path, name: str) -> Path:
    """`folder / name`, refused if it would leave the folder: file names in configs and indexes are input."""
    base = Path(folder)
    if not isinstance(name, str) or not _can_name(name) or Path(name).anchor or ".." in Path(name).parts:
        raise InputError(f"file name in {base}", repr(name), "a name inside the folder")
    return base / name


def _can_name(name: str) -> bool:
    """Whether a system could have a file of that name."""
    if not Path(name).parts or "\0" in name:
        return False
    try:
        return all(len(part.encode()) <= LONGEST_NAME for part in Path(name).parts)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
