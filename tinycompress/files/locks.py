"""One run at a time in a folder that is written step by step: a work folder, a training run's, a teacher's cache."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError
from .temporary import LOCK, fcntl, is_open_as

HELD: set[str] = set()  # by this process: a run may hold the folder that a pass of it writes into


@contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Holds `folder`, which is made if need be, for the time of the block; None holds nothing.

    If another process holds it, an `OutputError` says which. The lock ends with the process, however it ends. Where the
    file system has no locks, or the folder may only be read, nothing is held.
    """
    if folder is None or fcntl is None:
        yield
        return
    name = os.path.realpath(folder)
    if name in HELD:
        yield
        return
    Path(name).mkdir(parents=True, exist_ok=True)
    handle = _take(Path(name) / LOCK, folder)
    HELD.add(name)
    try:
        yield
    finally:
        HELD.discard(name)
        if handle is not None:
            (Path(name) / LOCK).unlink(missing_ok=True)
            os.close(handle)


def _take(path: Path, folder: str | Path) -> int | None:
    """The handle that holds the lock; None where there can be none."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path)
            os.close(handle)
            raise OutputError(f"folder {folder}: {holder}; wait until it ends, or name another folder") from None
        except OSError:
            os.close(handle)
            return None
        if is_open_as(path, handle):
            about = {"pid": os.getpid(), "host": socket.gethostname(), "command": sys.argv, "since": time.ctime()}
            with suppress(OSError):  # a full disk: the lock is held, and does not say by whom
                os.truncate(handle, 0)
                os.write(handle, json.dumps(about).encode())
            return handle
        os.close(handle)  # it was released and removed in between


def _holder(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        command = " ".join([Path(about["command"][0]).name, *about["command"][1:]])
        return f"process {about['pid']} on {about['host']} works there since {about['since']} ({command[:80]})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process works there"
