"""Reads the house's docstrings for the API reference.

Docstrings are written for the source: fields of a pass stand under `Fields:`, equations and legends are indented by two
or more columns. For the site, `Fields:` becomes the section `Attributes:` and indented lines become literal blocks. The
folder `export/` joins the package as `tinycompress.export`, which is where its users import it from.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(
    r"^(Fields|Attributes|Args|Arguments|Returns|Raises|Yields|Examples?|Notes?|Keyword Args|Other Parameters):$"
)


def readable(text: str) -> str:
    """The docstring with its sections named as the parser knows them and indented lines as literal blocks."""
    out: list[str] = []
    literal: list[str] = []
    in_section = False
    in_fence = False

    def close() -> None:
        while literal and not literal[-1].strip():
            literal.pop()
        if literal:
            margin = min(len(line) - len(line.lstrip()) for line in literal if line.strip())
            out.extend(["", "```text", *(line[margin:] for line in literal), "```", ""])
            literal.clear()

    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            in_fence = not in_fence
        indented = line.startswith("  ")
        if line.strip() and not indented:
            in_section = bool(SECTION.match(line)) or (in_section and in_fence)
        list_item = bool(out) and re.match(r"\s*([-*]|\d+\.) ", out[-1]) is not None and not literal
        if in_section or in_fence or list_item or not (indented or (literal and not line.strip())):
            close()
            if line == "Fields:":
                line = "Attributes:"
            out.append(line if in_fence else without_references(line))
        else:
            literal.append(line)
    close()
    return "\n".join(out)


def without_references(line: str) -> str:
    """`E[x] [K]` is a shape and not a link to K: the second bracket is escaped, outside of code."""
    pieces = line.split("`")
    return "`".join(re.sub(r"\](\s?)\[", r"]\1\\[", piece) if i % 2 == 0 else piece for i, piece in enumerate(pieces))


class Docstrings(griffe.Extension):
    """Rewrites docstrings as they are collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value.replace("\b\n", ""))

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.name == "tinycompress" and "export" not in pkg.members:
            pkg.set_member("export", loader.load("export"))
