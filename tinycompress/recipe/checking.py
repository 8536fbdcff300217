"""Checks a document as a whole: what stands beside the passes, and every pass.

Names and kinds of values can be checked alone (`check_names`), which needs no torch: a mistyped word is answered at
once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .document import Source
from .fields import FIELDS
from .mistakes import nearest, shown
from .values import Reader
from .vocabulary import FORMATS, MEASURED, TABLES, Data

KEYS = ("model", "format", "data", "pass", "measure", "export")


def check_names(document: Mapping[str, Any], source: Source) -> None:
    """A `RecipeError` with every unknown name, every missing key and every value of a wrong kind. What values the
    passes themselves refuse is not asked."""
    read_tables(document, source, Reader(None, Data()))


def read_tables(document: Mapping[str, Any], source: Source, reader: Reader) -> dict[str, Any]:
    """The tables beside the passes, by name; a `RecipeError` with all mistakes that `reader` finds in the document."""
    tables = _top(document, reader)
    reader.data = tables.get("data") or Data()
    for i, step in enumerate(steps_of(document)):
        reader.step(step, ("pass", i))
    source.refuse([*source.mistakes, *reader.mistakes])
    return tables


def steps_of(document: Mapping[str, Any]) -> list[Any]:
    steps = document.get("pass", [])
    return steps if isinstance(steps, list) else []


def _top(document: Mapping[str, Any], reader: Reader) -> dict[str, Any]:
    """Checks what stands beside the passes, and reads the tables among it."""
    tables: dict[str, Any] = {}
    for key, value in document.items():
        place = (key,)
        if key not in KEYS:
            reader.wrong(place, f"{key!r}, which a recipe does not have", nearest(key, KEYS))
        elif key == "measure" and isinstance(value, bool):
            continue
        elif key in TABLES and isinstance(value, Mapping):
            before = len(reader.mistakes)
            fields = reader.fields(value, place, f"[{key}]", FIELDS[TABLES[key].__name__])
            base = dataclasses.asdict(MEASURED) if key == "measure" else {}
            if len(reader.mistakes) == before:
                tables[key] = reader.made(TABLES[key].__name__, base | fields, value, place)
        elif key in TABLES:
            reader.wrong(place, shown(value), f"a table: [{key}]")
        elif key == "pass" and not isinstance(value, list):
            reader.wrong(place, "[pass], one table", "[[pass]], in two pairs of brackets")
        elif key == "model" and not isinstance(value, str):
            reader.wrong(place, shown(value), "the name of a model in quotes")
        elif key == "format" and value not in FORMATS:
            reader.wrong(place, shown(value), nearest(str(value), FORMATS))
    if "export" in document and document.get("format", "native") != "native":
        reader.wrong(("format",), f"{document['format']} together with [export]", "one of the two")
    return tables
