"""20,000 damaged files of every kind: read, or refused by an error of this library; nothing else happens.

What is watched: no foreign exception, nothing unpickled, no code of the folder run, no process, no connection, nothing
read outside the folder and nothing written, memory and time within bounds, and a message that a terminal can show.
A case is drawn from the name of its kind and its number alone, so a failure says how to see it again:
`read_damaged(kind, number, …)`.
"""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hostile_cases import KINDS, SECRET
from safetensors.torch import save_file
from watch import watching

from tinycompress.errors import InputError, MissingExtra, OutputError

ERRORS = (InputError, OutputError, MissingExtra)
MOST_MEMORY = 32 * 2**20  # bytes beside those of the files: what a file of a few kB may cost
MOST_SECONDS = 5.0  # of CPU time; a good one takes a hundredth
LONGEST_MESSAGE = 3000  # characters of a line
SHORT = 12  # damaged files of each kind in the short test


class Sample:
    """A folder of one kind, with something beside it that nobody may read."""

    def __init__(self, kind: str, home: Path) -> None:
        self.kind = KINDS[kind]
        self.name = kind
        self.folder = home / "folder"
        self.out = home / "out"
        self.kind.make(self.folder)
        (home / "outside").mkdir()
        save_file({"model.norm.weight": torch.full((32,), SECRET)}, home / "outside/secret.safetensors")
        (home / "outside/secret.json").write_text("{}")
        (self.folder / "evil.py").write_text("raise SystemExit('code of the folder ran')")
        (self.folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch evil'\ntR.")
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        self.files = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}
        self.size = sum(map(len, self.files.values()))
        self.kind.read(self.folder, home / "good")
        assert self.read_damaged(-1, {}) == "read"

    def read_damaged(self, number: int, changed: dict[str, bytes] | None = None) -> str:
        """Reads the folder with the damage of that number, and puts it right again; returns what came of it."""
        if changed is None:
            changed = dict(self.kind.damage(self.files, random.Random(f"{self.name} {number}")))
        self.out.mkdir()
        for name, data in changed.items():
            self.write(name, data)
        try:
            with watching(self.folder, self.out) as watch:
                outcome = self.outcome()
        finally:
            for name in changed:
                self.write(name, self.files.get(name))
            shutil.rmtree(self.out)
        assert not watch.faults, watch.faults[:3]
        assert watch.seconds < MOST_SECONDS, f"{watch.seconds:.1f} s"
        assert watch.peak < MOST_MEMORY + 8 * self.size, f"{watch.peak / 2**20:.0f} MB"
        return outcome

    def write(self, name: str, data: bytes | None) -> None:
        """A new file: the memory map of what was loaded keeps the old one."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        if data is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

    def outcome(self) -> str:
        try:
            self.kind.read(self.folder, self.out)
        except ERRORS as error:
            text = str(error)
            assert max(map(len, text.splitlines())) < LONGEST_MESSAGE and text.count("\n") < 60, (
                f"a message of {len(text)} characters: {text[:200]}"
            )
            assert all(character.isprintable() or character == "\n" for character in text), repr(text)
            return "refused"
        return "read"


def read_many(kind: str, numbers: range, home: Path) -> dict[str, int]:
    """How many were read and how many refused."""
    sample = Sample(kind, home)
    counts = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            try:
                counts[sample.read_damaged(number)] += 1
            except BaseException as error:
                error.add_note(f"{kind}, number {number}")
                raise
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(kind, tmp_path):
    read_many(kind, range(SHORT), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_twenty_thousand_damaged_files(kind, tmp_path):
    counts = read_many(kind, range(KINDS[kind].count), tmp_path)
    print(kind, counts)
    assert counts["refused"] > 0


def test_there_are_twenty_thousand():
    assert sum(kind.count for kind in KINDS.values()) == 20_000
