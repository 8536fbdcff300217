"""One place decides what may be written where.

An output is claimed before the work begins, so that what is wrong is said before hours of it. The claim remembers what
lay there; whatever has appeared in the meantime is kept, and the result goes beside it (new.py).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..errors import InputError, OutputError
from .own import not_ours
from .temporary import LOCK, is_temporary, sweep

Target: TypeAlias = "str | os.PathLike[str]"
OTHER_KINDS = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


@dataclass(frozen=True)
class Claim(os.PathLike[str]):
    """An output that may be written; it stands wherever its path does.

    Fields:
        path: the place, absolute, with links followed.
        overwrite: whether what lies there may be replaced.
        seen: device and inode of what lay there when it was claimed; None if nothing did.
        in_place: whether the folder, which is empty, must stay and be filled: the current folder, the root of a mounted
            disk, or one whose parent may not be written.
    """

    path: Path
    overwrite: bool
    seen: tuple[int, int] | None
    in_place: bool = False

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


def claim(target: Target, overwrite: bool = False, apart_from: Mapping[str, Target | None] | None = None) -> Claim:
    """The claim on a folder to write.

    Args:
        target: the folder, which may be there if it is empty.
        overwrite: whether a folder that this library wrote may be replaced too.
        apart_from: by the name of an option, the files and folders that are read or written meanwhile: the folder may
            neither be one of them, nor hold one, nor lie in one. A string with no file of that name is passed over: it
            may name something else.

    Raises:
        InputError: if it may not be written; the message says why.
        OutputError: for a place without permission to write.
    """
    if isinstance(target, Claim):
        return target
    path, status = _look(target, "output folder")
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise InputError("output folder", f"{target}, a file", "a folder name")
    _check_apart(path, "output folder", apart_from or {})
    if status is None:
        return Claim(path, overwrite, None)
    sweep(path, path.name)
    empty = not occupied(path)
    if not empty:
        _check_replaceable(path, target, overwrite)
    in_place = path == _current() or _is_mounted(path) or not os.access(path.parent, os.W_OK | os.X_OK)
    if in_place and not os.access(path, os.W_OK | os.X_OK):
        raise OutputError(f"output folder {target}: no permission to write there")
    if in_place and not empty:
        accepted = "a folder that can be moved (or this one, empty)"
        raise InputError("output folder", f"{target}, which is a disk of its own or has a read-only parent", accepted)
    return Claim(path, overwrite, _identity(status), in_place)


def claim_file(target: Target, overwrite: bool = False, apart_from: Mapping[str, Target | None] | None = None) -> Claim:
    """The claim on a file to write; arguments and errors are those of `claim`."""
    if isinstance(target, Claim):
        return target
    path, status = _look(target, "output file")
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise InputError("output file", f"{target}, a folder", "a file name")
    _check_apart(path, "output file", apart_from or {})
    if status is None:
        return Claim(path, overwrite, None)
    if not overwrite:
        raise InputError("output file", f"{target}, which exists", "a new name, or overwrite=True")
    return Claim(path, overwrite, _identity(status))


def check_space(place: Target, needed: int) -> None:
    """An `OutputError` if the disk of `place`, which need not be there yet, has less than `needed` bytes free."""
    folder = Path(place).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(f"output {place}: the disk has {free:,} bytes free, and at least {needed:,} bytes are needed")


def still_there(claimed: Claim) -> bool:
    """Whether the claimed name still has what was seen there."""
    try:
        return _identity(os.lstat(claimed.path)) == claimed.seen
    except FileNotFoundError:
        return claimed.seen is None


def occupied(folder: Path) -> bool:
    """Whether a folder holds anything but temporary names of its own and a lock."""
    return any(not is_temporary(path, folder.name) and path.name != LOCK for path in folder.iterdir())


def _look(target: Target, what: str) -> tuple[Path, os.stat_result | None]:
    """The place that is meant, with links followed, and what lies there; checks what holds for files and folders."""
    if not os.fspath(target):
        raise InputError(what, "an empty name", "a name")
    try:
        path = Path(os.path.realpath(target))
        sweep(path.parent, path.name)  # which may bring back what a dead run had moved away
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    except (ValueError, NotADirectoryError) as error:
        raise InputError(what, f"{os.fspath(target)!r} ({error})", "a name that a file system takes") from None
    for is_kind, kind in OTHER_KINDS:
        if status is not None and is_kind(status.st_mode):
            raise InputError(what, f"{target}, {kind}", "a name for a file or folder")
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(what, f"{target}, where {parent} is a file", "a name in a folder")
    is_folder = status is not None and stat.S_ISDIR(status.st_mode)
    if not is_folder and not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{what} {target}: no permission to write in {parent}")
    return path, status


def _check_replaceable(path: Path, target: Target, overwrite: bool) -> None:
    """An `InputError` for a folder with something in it that must stay."""
    if not overwrite:
        accepted = "a new or empty folder, or overwrite=True"
        raise InputError("output folder", f"{target}, which is not empty", accepted)
    kept = {"the current folder": _current(), "your home folder": Path.home().resolve()}
    for name, folder in kept.items():
        if folder is not None and folder.is_relative_to(path):
            relation = "which is" if folder == path else "which holds"
            raise InputError("output folder", f"{target}, {relation} {name}", "a folder that may be replaced")
    if path == path.parent:
        raise InputError("output folder", f"{target}, the root of all", "a folder that may be replaced")
    reason = not_ours(path)
    if reason is not None:
        accepted = "a new or empty folder, or one that tinycompress wrote (remove it yourself if you want it gone)"
        raise InputError("output folder", f"{target}, {reason}", accepted)


def _check_apart(path: Path, what: str, others: Mapping[str, Target | None]) -> None:
    for name, other in others.items():
        if not other:
            continue
        place = Path(os.path.realpath(os.path.expanduser(other)))
        if isinstance(other, str) and not place.exists():  # the name of something else
            continue
        accepted = f"a place apart from {name}"
        if path == place:
            raise InputError(what, f"{path}, which is {name}", accepted)
        if path.is_relative_to(place):
            raise InputError(what, f"{path}, which lies in {name}, {place}", accepted)
        if any(real.is_relative_to(path) for real in (place, *_linked(place))):
            raise InputError(what, f"{path}, which holds {name}, {place}", accepted)


def _linked(folder: Path) -> list[Path]:
    """Where the links in a folder lead: the weights of a hub's cache lie elsewhere."""
    if not folder.is_dir():
        return []
    return [Path(os.path.realpath(path)) for path in folder.iterdir() if path.is_symlink()]


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_mounted(path: Path) -> bool:
    """Whether a disk, or a folder of another place (as containers have them), is mounted there."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        mounts = []
    return os.path.ismount(path) or any(line.split(" ")[4] == str(path) for line in mounts)


def _current() -> Path | None:
    """The current folder; None if it was removed."""
    try:
        return Path.cwd().resolve()
    except FileNotFoundError:
        return None
