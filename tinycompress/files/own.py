"""Folders that this library wrote: their marks, the list of their files, and whether these are still as written.

tinycompress.json     a saved model; "files" lists what lies beside it, with bytes and SHA-256
manifest.json         an exported one, likewise
config.json           of a saved model in another tool's layout: the key "tinycompress_version"
state.json            the state of a training run
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import InputError
from .json_files import inside, read_json, to_json

VERSION = "tinycompress_version"
MARKS = {  # the file, and the keys that tell it from another program's file of that name
    "tinycompress.json": ("format", "config"),
    "manifest.json": ("format", "profile", "files"),
    "config.json": (VERSION,),
    "state.json": ("step", "key"),
}
KINDS = (".json", ".safetensors", ".jinja", ".model", ".onnx", ".data", ".ort", ".bin", ".config")
CARD = "README.md"  # the model card: the manifest of an export does not list it
TEXTS = ("merges.txt", "vocab.txt", CARD)
BY_THE_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")


def record(folder: Path, without: str = "") -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every file in `folder` but the one called `without`, by its name relative to it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths
    }


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(folder: Path, files: Iterable[tuple[str, Any]]) -> list[str]:
    """The names in `files` (the items of what `record` gave) that are missing in `folder` or have other bytes."""
    return [name for name, known in files if not _as_written(inside(folder, name), known)]


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with the SHA-256 of itself, so that a file of it can be checked too."""
    return data | {"sha256": _digest(data)}


def damage(folder: Path, mark: str) -> str | None:
    """The name of a file in a folder that is missing or is not as it was written; None if all are.

    mark: the file that was sealed and that lists the others under "files". What was written without a seal passes.
    """
    try:
        data = read_json(folder / mark)
    except InputError:
        return mark
    if "sha256" not in data:
        return None
    if data.pop("sha256") != _digest(data) or not isinstance(data.get("files"), dict):
        return mark
    try:
        return next(iter(changed_files(folder, data["files"].items())), None)
    except InputError:  # a name that leaves the folder
        return mark


def _digest(data: dict[str, Any]) -> str:
    text = to_json(data, indent=None)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _as_written(path: Path, known: Any) -> bool:
    return path.is_file() and isinstance(known, dict) and sha256(path) == known.get("sha256")


def not_ours(folder: Path) -> str | None:
    """What speaks against replacing `folder`: None if it is empty, or holds only what this library wrote."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    names = [name for name in names if Path(name).name not in BY_THE_SYSTEM]
    folders = any(path.is_dir() for path in folder.iterdir())
    if not names and not folders:
        return None
    marks = [name for name in MARKS if name in names and _marked(folder / name, MARKS[name])]
    if not marks:
        return "which was not written by tinycompress"
    foreign = sorted(name for name in names if name not in MARKS and not _known(folder, name, marks))
    return f"which holds {foreign[0]}, not written by tinycompress" if foreign else None


def _marked(path: Path, keys: tuple[str, ...]) -> bool:
    try:
        data = read_json(path)
    except (InputError, OSError):
        return False
    return all(key in data for key in keys)


def _known(folder: Path, name: str, marks: list[str]) -> bool:
    """Whether a mark lists the file; where none has a list, whether it is of a kind that is written there."""
    lists = [read_json(folder / mark).get("files") for mark in marks]
    listed = [names for names in lists if isinstance(names, dict) and names]
    if listed:
        return name == CARD or any(name in names for names in listed)
    return name.endswith(KINDS) or Path(name).name in TEXTS
