"""Temporary names beside an output: `.<name>.tmp-<8 hex digits>`, locked for as long as their run lives.

The lock (flock) is on the temporary file or folder itself, so the system releases it however the run ends. What nobody
holds is of a dead run, and the next run that writes the same name removes it. Where the system has no such locks,
nothing is removed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{8}(?P<old>-old)?", re.DOTALL)
OLD = "-old"  # a folder that was moved away so that another could take its name, where the two cannot be swapped
LOCK = ".tinycompress.lock"  # in a folder that is written step by step (locks.py)
MOVING = ".moving"  # in a temporary folder whose files are being moved up into the folder around it: their names


@contextmanager
def temporary(target: Path, in_folder: Path, folder: bool) -> Iterator[Path]:
    """Yields a new, empty file or folder in `in_folder`, named after `target`; what is still there afterwards goes."""
    path, handle = _make(target, in_folder, folder)
    try:
        yield path
    finally:
        remove(path)
        if handle is not None:
            os.close(handle)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what dead runs left in `folder`: temporary files and folders of outputs called `name`, or of any name."""
    try:
        entries = list(os.scandir(folder))
    except OSError:  # no such folder, or one that may not be read
        return
    for entry in entries:
        match = TEMPORARY.fullmatch(entry.name)
        if match and name in (None, match["name"]):
            with suppress(OSError):  # another user's, or already gone
                _remove_if_dead(Path(entry.path), match)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder with what is in it; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_temporary(path: Path, name: str) -> bool:
    """Whether a path is a temporary file or folder of an output called `name`."""
    match = TEMPORARY.fullmatch(path.name)
    return match is not None and match["name"] == name


def _make(target: Path, in_folder: Path, folder: bool) -> tuple[Path, int | None]:
    """A new name that is there, and the handle that holds its lock (None: the system has no such lock)."""
    while True:
        path = in_folder / f".{target.name}.tmp-{secrets.token_hex(4)}"
        if folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        if fcntl is None:
            return path, None
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another run takes it for a dead one's, and removes it
            os.close(handle)
            continue
        except OSError:  # a file system without locks
            os.close(handle)
            return path, None
        if is_open_as(path, handle):
            return path, handle
        os.close(handle)


def _remove_if_dead(path: Path, match: re.Match[str]) -> None:
    if fcntl is None:
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_open_as(path, handle):
            return
        target = path.with_name(match["name"])
        if match["old"] and not os.path.lexists(target):  # the run died before the new folder took the name
            os.rename(path, target)
            return
        _undo_moves(path)
        remove(path)
    finally:
        os.close(handle)


def _undo_moves(path: Path) -> None:
    """Removes the files that a dead run had moved up out of its folder, unless all of them were."""
    try:
        names = json.loads((path / MOVING).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    moved = [name for name in names if Path(name).name == name and not os.path.lexists(path / name)]
    if len(moved) == len(names):
        return
    for name in moved:
        remove(path.parent / name)


def is_open_as(path: Path, handle: int) -> bool:
    """Whether `path` still is the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
