"""Sizes of the source, and where names of parameters may be spelled."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("tinycompress", "export", "tests", "benchmarks", "experiments", "docs")
LONGEST_FILE = 350
LONGEST_LINE = 120
NAMES = re.compile(r"_proj|layernorm|model\.layers")
# rooms of the topology, of the model and of the formats; the checks that run in environments of their own
SPELL_NAMES = ("tinycompress/graph/", "tinycompress/model/", "tinycompress/checkpoints/", "export/runtimes/")


def sources(*folders: str) -> dict[str, list[str]]:
    """Lines of every Python file by its path; environments and caches aside."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").splitlines()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts)
    }


def test_no_file_is_long() -> None:
    assert {name: len(lines) for name, lines in sources(*FOLDERS).items() if len(lines) > LONGEST_FILE} == {}


def test_no_line_is_long() -> None:
    long = {
        name: [number for number, line in enumerate(lines, 1) if len(line) > LONGEST_LINE]
        for name, lines in sources(*FOLDERS).items()
    }
    assert {name: numbers for name, numbers in long.items() if numbers} == {}


def test_names_of_parameters_are_spelled_in_few_rooms() -> None:
    spelled = {
        name: [number for number, line in enumerate(lines, 1) if NAMES.search(line)]
        for name, lines in sources("tinycompress", "export").items()
        if not name.startswith(SPELL_NAMES)
    }
    assert {name: numbers for name, numbers in spelled.items() if numbers} == {}
