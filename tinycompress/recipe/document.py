"""A recipe as text: TOML into a document and back, the line of every key, and `--set` upon it.

A document is what tomllib gives: tables as dictionaries, arrays as lists. Nothing here knows what a pass is, and
nothing here needs torch.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .mistakes import Mistake, Place, RecipeError, nearest, shown

LARGEST = 1 << 20  # characters of a recipe: what is longer is none
HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]")
KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class Source:
    """Where a document comes from, so that a mistake can say where it stands.

    Fields:
        name: the file, or "" for the options of a command.
        lines: the line of each key, counted from 1.
        settings: the text of each `--set`, by the place that it set.
        mistakes: of settings that name no place.
    """

    name: str = ""
    lines: Mapping[Place, int] = field(default_factory=dict)
    settings: Mapping[Place, str] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()

    def where(self, place: Place) -> str:
        """How a message names a place; "" where only options were given, which name themselves."""
        for length in range(len(place), 0, -1):
            if place[:length] in self.settings:
                return f"--set {self.settings[place[:length]]}"
            if place[:length] in self.lines:
                return f"{self.name}, line {self.lines[place[:length]]}"
        return self.name

    def refuse(self, mistakes: Sequence[Mistake]) -> None:
        """A `RecipeError` for mistakes, if there are any. An error of a pass that options made stays what it is."""
        if not mistakes:
            return
        for mistake in mistakes:
            if mistake.error is not None and not self.where(mistake.place):
                raise mistake.error
        ordered = sorted(mistakes, key=lambda mistake: self._line(mistake.place))
        told = [(self.where(m.place) or "options", m.found, m.accepted) for m in ordered]
        raise RecipeError(self.name or "options", list(dict.fromkeys(told)))

    def _line(self, place: Place) -> int:
        known = [self.lines[place[:length]] for length in range(len(place), 0, -1) if place[:length] in self.lines]
        return known[0] if known else 0


def read_document(path: str | Path) -> tuple[dict[str, Any], Source]:
    """The document in a file, and where its keys stand; an `InputError` for what is no TOML, with its line."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a recipe: a TOML file") from None
    except IsADirectoryError:
        raise InputError(str(path), "a folder", "a recipe: a TOML file") from None
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"no UTF-8 text ({error.reason})", "a recipe: a TOML file") from None
    return parse_document(text, str(path))


def parse_document(text: str, name: str) -> tuple[dict[str, Any], Source]:
    """As `read_document`, of a text; `name` is what messages call it."""
    if len(text) > LARGEST:
        raise InputError(name, f"more than {LARGEST:,} characters", "a recipe: a TOML file of some lines")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r"\(at line (\d+), column \d+\)|\(at end of document\)", message)
        line = f", line {at[1]}" if at and at[1] else ""
        raise InputError(f"{name}{line}", message.split(" (at ")[0], 'TOML, such as: spec = "w4g64"') from None
    except RecursionError:
        raise InputError(name, "tables within tables without end", "a recipe") from None
    return document, Source(name, lines_of(text))


def lines_of(text: str) -> dict[Place, int]:
    """The line of every header and key that begins a line. Keys inside an inline table stand where it begins."""
    lines: dict[Place, int] = {}
    counts: dict[Place, int] = {}
    here: Place = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.match(line):
            here = ()
            parts = _parts(header[2])
            for i, part in enumerate(parts):
                here = (*here, part)
                if i == len(parts) - 1 and header[1] == "[[":
                    counts[here] = counts.get(here, -1) + 1
                if here in counts:
                    here = (*here, counts[here])
            lines.setdefault(here, number)
        elif key := KEY.match(line):
            place = here
            for part in _parts(key[1]):
                place = (*place, part)
                lines.setdefault(place, number)
    return lines


def _parts(key: str) -> list[str]:
    return [part.strip("\"'") for part in PART.findall(key)]


def to_toml(document: Mapping[str, Any]) -> str:
    """A document as TOML that reads back as itself: plain values first, then tables, then arrays of tables."""
    blocks = ["".join(_lines(item for item in document.items() if not _is_table(item[1])))]
    for key, value in document.items():
        if isinstance(value, Mapping):
            blocks.append(f"[{_key(key)}]\n" + "".join(_lines(value.items())))
        elif _is_table(value):
            blocks += [f"[[{_key(key)}]]\n" + "".join(_lines(table.items())) for table in value]
    return "\n".join(block for block in blocks if block)


def _is_table(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping)


def _lines(items: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}\n" for key, value in items]


def _key(key: str) -> str:
    return key if BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)  # numbers as Python writes them: 0.5, 1e-05, inf; dates are in no recipe


def override(document: dict[str, Any], settings: Sequence[str], source: Source) -> tuple[dict[str, Any], Source]:
    """The document with every `--set place=value` of `settings` put into it.

    A place begins with the name of a pass, or its number counted from 1, or a table such as data; the second of two
    passes of one name is GPTQ.2. A value is TOML, or else text. What names no
    place is kept as a mistake of the source, which `Recipe.of` tells with all others.
    """
    out = copy.deepcopy(document)
    mistakes: list[Mistake] = []
    settings_by_place: dict[Place, str] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        place = _place(out, parts) if equals and all(parts) else None
        if place is None:
            example = "pass.key=value, such as GPTQ.damping=0.05"
            mistakes.append(Mistake(("set", text), shown(text), example))
            settings_by_place["set", text] = text
            continue
        if isinstance(place, Mistake):
            mistakes.append(place)
            settings_by_place[place.place] = text
            continue
        settings_by_place[place] = text
        if not _put(out, place, _parsed(value.strip())):
            mistakes.append(Mistake(place, "a place inside a value that is no table", "a key of a table"))
    return out, Source(source.name, source.lines, settings_by_place, tuple(mistakes))


def _place(document: Mapping[str, Any], parts: list[str]) -> Place | Mistake | None:
    """The place that `--set` names."""
    head, *rest = parts
    passes = document.get("pass", [])
    names = [str(step.get("name", "")) if isinstance(step, Mapping) else "" for step in passes]
    if not rest:
        return (head,) if head in ("model", "format", "measure") else None
    if head in ("data", "measure", "export"):
        return (head, *rest)
    if head.isdecimal():
        if 1 <= int(head) <= len(names):
            return ("pass", int(head) - 1, *rest)
        return Mistake(("set", *parts), f"pass {head} of {len(names)}", "a number of a pass, from 1")
    found = [i for i, name in enumerate(names) if name.lower() == head.lower()]
    if not found:
        return Mistake(("set", *parts), shown(head), nearest(head, [*dict.fromkeys(names), "data", "export"]))
    if rest[0].isdecimal() and len(rest) > 1:
        number = int(rest.pop(0))
        if not 1 <= number <= len(found):
            return Mistake(("set", *parts), f"{head}.{number} of {len(found)}", "a number from 1")
        return ("pass", found[number - 1], *rest)
    if len(found) > 1:
        ways = " | ".join(f"{head}.{i}.{rest[0]}" for i in range(1, len(found) + 1))
        return Mistake(("set", *parts), f"{head}, which is there {len(found)} times", ways)
    return ("pass", found[0], *rest)


def _parsed(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _put(document: Any, place: Place, value: Any) -> bool:
    for part in place[:-1]:
        document = document[part] if isinstance(part, int) else document.setdefault(part, {})
        if not isinstance(document, dict | list):
            return False
    if not isinstance(document, dict):
        return False
    document[place[-1]] = value
    return True
