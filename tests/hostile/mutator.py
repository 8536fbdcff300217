"""Damage of every kind, drawn from a seed: bytes, JSON and TOML that somebody hostile, or a bad disk, would hand in."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Mapping
from typing import Any

OUTSIDE = "../outside/secret"  # beside the folder that is opened; followed by an ending of a file's name
COUNTS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
NAMES = (f"{OUTSIDE}.safetensors", f"{OUTSIDE}.json", "/etc/passwd", "/dev/zero", "/proc/self/mem", "..", ".", "\0")
TEXTS = (
    "",
    " ",
    "x",
    "auto",
    "true",
    "-1",
    "1e999",
    "é漢👩‍🚀",
    "\ud800",
    "\x1b[2J\n",
    "a" * 300,
    "{{ 1 }}",
    "__class__",
)
NUMBERS = (*COUNTS, -1, -(2**63), 10**30, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"), 10**400)
ATOMS: tuple[Any, ...] = (None, True, False, *NUMBERS, *NAMES, *TEXTS)


def deep(levels: int) -> list[Any]:
    """Lists in lists."""
    out: list[Any] = []
    for _ in range(levels):
        out = [out]
    return out


def value(draw: random.Random) -> Any:
    """Anything that JSON can say."""
    kind = draw.randrange(12)
    if kind == 0:
        return [draw.choice(ATOMS) for _ in range(draw.choice((0, 1, 3, 40)))]
    if kind == 1:
        return {str(draw.choice(TEXTS)): draw.choice(ATOMS) for _ in range(draw.choice((0, 1, 2)))}
    if kind == 2:
        return deep(draw.choice((2, 60, 400)))
    return draw.choice(ATOMS)


def places(tree: Any, limit: int = 2000) -> list[tuple[Any, Any]]:
    """Containers of a JSON value with a key or an index of each; of long lists only the first ones."""
    out: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting and len(out) < limit:
        inside = waiting.pop(0)
        if isinstance(inside, dict | list):
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            for key in keys[:200]:
                out.append((inside, key))
                waiting.append(inside[key])
    return out


def json_value(tree: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one to three changes: replaced, dropped, renamed, wrapped, repeated, swapped."""
    out = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        every = places(out)
        if not every:
            return value(draw)
        inside, key = draw.choice(every)
        kind = draw.randrange(10)
        if kind < 5:
            inside[key] = value(draw)
        elif kind == 5:
            del inside[key]
        elif kind == 6:
            inside[key] = [inside[key]] if draw.random() < 0.5 else {"x": inside[key]}
        elif kind == 7 and isinstance(inside, dict):
            inside[str(draw.choice((*TEXTS, *NAMES, *inside)))] = inside.pop(key)
        elif kind == 8 and isinstance(inside, list):
            inside.extend(inside[: draw.choice((1, 3, 1000))])
        else:
            other, where = draw.choice(every)
            if where in other if isinstance(other, dict) else where < len(other):
                inside[key] = copy.deepcopy(other[where])
    return out


def json_text(tree: Any, draw: random.Random) -> bytes:
    """The text of a JSON value with changes of the value or, one in eight, of the bytes."""
    if draw.random() < 0.125:
        return some_bytes(json.dumps(tree).encode(), draw)
    return json.dumps(json_value(tree, draw)).encode()


def some_bytes(data: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """Bytes with one to three changes within the first `head`: overwritten, cut out, put in twice, or cut off."""
    out = bytearray(data)
    head = len(data) if head is None else head
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(max(1, min(head, len(out))))
        kind = draw.randrange(10)
        if kind < 4:
            out[at : at + 1] = bytes([draw.randrange(256)])
        elif kind < 7:
            width, form = draw.choice(((2, "<H"), (4, "<I"), (8, "<Q")))
            number = draw.choice(COUNTS) % 2 ** (8 * width)
            out[at : at + width] = struct.pack(form, number)
        elif kind == 7:
            del out[at : at + draw.choice((1, 4, 8, 100))]
        elif kind == 8:
            out[at:at] = out[at : at + draw.choice((1, 8, 100, 5000))]
        else:
            del out[draw.randrange(len(out) + 1) :]
    return bytes(out)


def toml_text(text: str, draw: random.Random) -> bytes:
    """A recipe with one line changed: its value, its key, the line twice or not at all; or some of its bytes."""
    if draw.random() < 0.25:
        return some_bytes(text.encode(), draw)
    lines = text.splitlines()
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(lines))
        key, equals, _ = lines[at].partition(" = ")
        kind = draw.randrange(5)
        if kind < 3 and equals:
            lines[at] = f"{key} = {toml_value(draw)}"
        elif kind == 3:
            lines[at:at] = [lines[at]] * draw.choice((1, 1, 500))
        elif kind == 4 and draw.random() < 0.5:
            del lines[at]
        else:
            lines[at] = f"{key}{draw.choice(('x', '.x', '.x.y', ' ', '[', '__'))} = {toml_value(draw)}"
        lines = lines or [""]
    return "\n".join(lines).encode(errors="surrogatepass")


def toml_value(draw: random.Random) -> str:
    """A value as TOML has it, also such as JSON has not: dates, tables, bare words, arrays within arrays."""
    special = ("1979-05-27", "07:32:00", "inf", "nan", "-inf", "0x7fffffffffffffff", "{}", "{ a = 1 }", "x", "[", "'''")
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(special)
    if kind == 1:
        levels = draw.choice((1, 50, 5000))
        return "[" * levels + "]" * levels
    atom = draw.choice(ATOMS)
    return "false" if atom is None else json.dumps(atom)


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with its JSON header changed, or some bytes of it, or the length that it begins with."""
    length = struct.unpack("<Q", data[:8])[0]
    if draw.random() < 0.3:
        return some_bytes(data, draw, 8 + length)
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(json_value(header, draw)).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def message(proto: Any, draw: random.Random) -> bytes:
    """A protobuf message with some fields of some of its parts changed, or some bytes of it."""
    if draw.random() < 0.3:
        return some_bytes(proto.SerializeToString(), draw)
    out = copy.deepcopy(proto)
    for _ in range(draw.choice((1, 1, 2, 3))):
        part = out
        while True:
            inner = [field for field in part.DESCRIPTOR.fields if _parts(part, field)]
            if not inner or draw.random() < 0.25:
                break
            field = draw.choice(inner)
            part = draw.choice(_parts(part, field))
        _change(part, draw)
    return out.SerializeToString()


def _parts(part: Any, field: Any) -> list[Any]:
    """The messages in a field."""
    if field.message_type is None:
        return []
    stored = getattr(part, field.name)
    if isinstance(stored, Mapping):
        return []
    return list(stored) if hasattr(stored, "append") else [stored] * part.HasField(field.name)


def _change(part: Any, draw: random.Random) -> None:
    """Sets, clears or repeats one field of a message."""
    field = draw.choice(list(part.DESCRIPTOR.fields))
    stored = getattr(part, field.name)
    repeated = hasattr(stored, "append") or hasattr(stored, "add")
    if draw.random() < 0.2:
        part.ClearField(field.name)
        return
    try:
        if repeated and len(stored) and draw.random() < 0.5:
            at = draw.randrange(len(stored))
            if draw.random() < 0.5:
                del stored[at]
            else:
                stored.extend([copy.deepcopy(stored[at])] * draw.choice((1, 2, 500)))
        elif field.message_type is None:
            new = value(draw)
            if isinstance(new, str) and field.type == field.TYPE_BYTES:
                new = new.encode(errors="replace")
            if repeated:
                stored.append(new)
            else:
                setattr(part, field.name, new)
    except (TypeError, ValueError, OverflowError):
        return  # the field takes no such value
