"""Writing so that nothing is ever half-written: a temporary name, flushed, then moved into place in one step."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .json_files import to_json
from .moves import exchange, move_new
from .outputs import Claim, Target, claim, claim_file, occupied, still_there
from .own import MARKS, not_ours
from .temporary import MOVING, temporary

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = re.compile(  # of libraries that keep no number; the last are numpy's
    r"No space left on device|os error 28|Disk quota exceeded|\d+ requested and \d+ written"
)


@contextmanager
def new_folder(target: Target, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    `target` may be a `Claim`; a path is claimed here, with the errors of `claim`. What is there already is swapped out
    only at the very end, so a failure leaves it as it was (and memory maps of its files stay valid). Something that
    appeared there since the claim is kept: the result goes beside it, and an `OutputError` says where. A full disk is
    an `OutputError` too.
    """
    claimed = claim(target, overwrite)
    place = claimed.path if claimed.in_place else claimed.path.parent
    with _parents(place), _plain_errors(claimed), temporary(claimed.path, place, folder=True) as work:
        yield work
        _keep_mode(work, claimed)
        for path in work.rglob("*"):
            _flush(path)
        _flush(work)
        if claimed.in_place:
            _fill(work, claimed)
        else:
            _put(work, claimed)
        _flush(place)


@contextmanager
def new_file(target: Target, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path that becomes the file `target` when the block ends well, and vanishes when it does not;
    otherwise as `new_folder`."""
    claimed = claim_file(target, overwrite)
    place = claimed.path.parent
    with _parents(place), _plain_errors(claimed), temporary(claimed.path, place, folder=False) as work:
        yield work
        _keep_mode(work, claimed)
        _flush(work)
        if claimed.seen is not None and still_there(claimed):
            os.replace(work, claimed.path)
        else:
            _put_new(work, claimed)
        _flush(place)


def write_bytes(path: Target, parts: Iterable[bytes | memoryview]) -> None:
    """Replaces a file, by the `parts` one after the other, in one step."""
    claimed = claim_file(path, overwrite=True)
    place = claimed.path.parent
    with _parents(place), _plain_errors(claimed), temporary(claimed.path, place, folder=False) as work:
        with work.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        _keep_mode(work, claimed)
        os.replace(work, claimed.path)


def write_text(path: Target, text: str) -> None:
    """Replaces a file in one step."""
    write_bytes(path, [text.encode()])


def write_json(path: Target, data: Any) -> None:
    """Replaces a JSON file in one step; numbers that are not finite become null."""
    write_text(path, to_json(data) + "\n")


def _put(work: Path, claimed: Claim) -> None:
    """Gives a folder its name; what it replaces is left under the temporary name, for the caller to remove."""
    if claimed.seen is None or not still_there(claimed):
        _put_new(work, claimed)
        return
    exchange(work, claimed.path)
    if not_ours(work) is not None:  # somebody put something into the old folder meanwhile
        exchange(work, claimed.path)
        _put_new(work, claimed)


def _put_new(work: Path, claimed: Claim) -> None:
    """Moves to a name that is free, or beside what has taken it."""
    try:
        move_new(work, claimed.path)
    except FileExistsError:
        place = _beside(work, claimed.path)
        raise OutputError(
            f"output {claimed.path}: something has appeared there meanwhile, and was kept; the result is in {place}"
        ) from None


def _beside(work: Path, target: Path) -> Path:
    """Moves to the first free name of `target`-2, `target`-3 and so on, and returns it."""
    number = 2
    while True:
        suffix = "" if work.is_dir() else target.suffix
        place = target.with_name(f"{target.name.removesuffix(suffix)}-{number}{suffix}")
        try:
            move_new(work, place)
            return place
        except FileExistsError:
            number += 1


def _fill(work: Path, claimed: Claim) -> None:
    """Moves what is in `work` up into the folder around it. The files by which it is opened come last, and a run that
    is killed in between leaves a list of what the next one removes."""
    target = claimed.path
    names = sorted(os.listdir(work), key=lambda name: (name in MARKS, name))
    if occupied(target):
        place = _beside(work, target / target.name)
        raise OutputError(f"output {target}: no longer empty, and kept as it is; the result is in {place}")
    with (work / MOVING).open("w", encoding="utf-8") as file:
        json.dump(names, file)
        file.flush()
        os.fsync(file.fileno())
    for name in names:
        move_new(work / name, target / name)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents; those that were made are removed again if the block fails."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        raise


@contextmanager
def _plain_errors(claimed: Claim) -> Iterator[None]:
    """Turns a full disk, however a library reports it, into an `OutputError` that names the output."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        message = f"output {claimed.path}: the disk is full, nothing was written there; free some space and run again"
        raise OutputError(message) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that there is no room on the disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if FULL_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _keep_mode(work: Path, claimed: Claim) -> None:
    """Gives a replacement the permissions of what it replaces."""
    if claimed.seen is not None and still_there(claimed):
        work.chmod(stat.S_IMODE(os.stat(claimed.path).st_mode))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder as a file
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
