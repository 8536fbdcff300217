"""Rows of a table as texts or as conversations: which shapes are known, and what is said of others.

  messages                      [{"role": "user", "content": "…"}, …]
  conversations                 ShareGPT: [{"from": "human", "value": "…"}, …]
  prompt, completion            texts, or lists of messages
  instruction, input, output    Alpaca; `input` may be left out
  text                          plain text; or a single column of strings beside numbers

The first of them whose columns a row has is its shape, and all rows of a source have one shape.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError

Content = str | list[dict[str, Any]]  # a text, or a conversation as messages with `role` and `content`
Row = tuple[str, Any]  # where it stands, for errors; what it is

BETWEEN = re.compile(r"[\s,]*")
SHAPES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
ACCEPTED = (
    "messages, conversations (from and value), prompt and completion, instruction and output, or text; or one column "
    "of strings beside numbers"
)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def read_json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file of JSON lines, or of one with a list of objects."""
    try:
        with path.open(encoding="utf-8") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            yield from _listed(file.read(), path) if first.lstrip().startswith("[") else _lines(file, path)
    except (UnicodeDecodeError, RecursionError, OSError) as error:
        raise InputError(str(path), f"{type(error).__name__}: {error}", "a readable file of JSON, UTF-8") from error


def _lines(file: Iterable[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(place, str(error), "an object in JSON") from error


def _listed(text: str, path: Path) -> Iterator[Row]:
    """The elements of a list, each with the line that it begins in."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno} of {path}", str(error), "a list of objects in JSON") from error
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    line = 1 + text.count("\n", 0, at)
    for row in rows:
        between = BETWEEN.match(text, at)
        begin = between.end() if between else at
        line += text.count("\n", at, begin)
        yield f"line {line} of {path}", row
        _, end = decoder.raw_decode(text, begin)
        line += text.count("\n", begin, end)
        at = end


def contents(rows: Iterable[Row]) -> Iterator[tuple[str, Content]]:
    """What rows hold, each with its place; newlines of texts as "\\n".

    Errors: an `InputError` with the place and the columns of a row whose shape is not known, or not the first one's.
    """
    first_place = ""
    first: tuple[str, ...] | None = None
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(place, repr(row)[:80], "an object")
        if first is None:
            first = shape_of(row, place)
            first_place = place
        known = [shape for shape in (*SHAPES, first) if set(shape) <= set(row)]
        if not known or known[0] != first:
            raise InputError(place, _columns(row), f"the columns of {first_place}: {', '.join(first)}")
        yield place, _content(row, first, place)


def shape_of(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The columns of a row that hold its text or conversation."""
    for shape in SHAPES:
        if set(shape) <= set(row):
            return shape
    strings = [key for key, value in row.items() if isinstance(value, str)]
    numbers = [key for key, value in row.items() if isinstance(value, int | float)]
    if len(strings) != 1 or len(strings) + len(numbers) != len(row):
        raise InputError(place, _columns(row), ACCEPTED)
    return (strings[0],)


def _content(row: Mapping[str, Any], shape: tuple[str, ...], place: str) -> Content:
    if shape in (("messages",), ("conversations",)):
        return _with_system(row, _messages(row[shape[0]], f"{shape[0]} in {place}"), place)
    if shape == ("prompt", "completion"):
        turns = [_turn(row[key], role, f"{key} in {place}") for key, role in zip(shape, ("user", "assistant"))]
        return _with_system(row, [*turns[0], *turns[1]], place)
    if shape == ("instruction", "output"):
        if row.get("history"):
            raise InputError(f"history in {place}", repr(row["history"])[:80], "earlier turns as messages")
        asked = _string(row, "instruction", place)
        given = _string(row, "input", place) if row.get("input") else ""
        question = f"{asked}\n\n{given}" if given else asked
        answer = _string(row, "output", place)
        return _with_system(row, [_message("user", question), _message("assistant", answer)], place)
    if row[shape[0]] is None:
        return ""
    return _string(row, shape[0], place).replace("\r\n", "\n").replace("\r", "\n")


def _messages(found: Any, where: str) -> list[dict[str, Any]]:
    """Turns with `role` and `content`, or with `from` and `value`, as the former."""
    accepted = "a list of role and content, or of from and value: texts"
    if not isinstance(found, list) or not found:
        raise InputError(where, repr(found)[:80], accepted)
    out = []
    for turn in found:
        if not isinstance(turn, Mapping):
            raise InputError(where, repr(turn)[:80], accepted)
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(where, repr(dict(turn))[:120], accepted)
        if "from" in turn and "role" not in turn:
            if role not in ROLES:
                raise InputError(where, f"from {role!r}", " | ".join(ROLES))
            role = ROLES[role]
        out.append(_message(role, content))
    return out


def _turn(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [_message(role, value)]
    return _messages(value, where)


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The conversation behind the row's column `system`, where it has one that says something."""
    if not row.get("system") or messages[0]["role"] == "system":
        return messages
    return [_message("system", _string(row, "system", place)), *messages]


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _string(row: Mapping[str, Any], key: str, place: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise InputError(f"{key} in {place}", f"a {type(value).__name__}", "a string")
    return value


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items()) or "no columns"
