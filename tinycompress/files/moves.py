"""Renames that replace nothing, and the swap of two folders in one step: renameat2 on Linux, else the next best."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .temporary import OLD

NOREPLACE = 1
EXCHANGE = 2
HERE = -100  # AT_FDCWD
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)  # by the system, or by one file system
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)


def move_new(source: Path, target: Path) -> None:
    """Renames a file or folder to a name that is free; a `FileExistsError` if it is not, and nothing has changed.

    Where the system cannot promise that, an empty folder may be replaced.
    """
    if _renamed(source, target, NOREPLACE):
        return
    try:
        if source.is_dir():
            os.rename(source, target)  # takes the place of nothing but an empty folder
        else:
            os.link(source, target)
            os.unlink(source)
    except OSError as error:
        if error.errno in OCCUPIED:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        if source.is_dir() or error.errno not in UNSUPPORTED:
            raise
        if target.exists():  # a file system without hard links: the best there is
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(source, target)


def exchange(source: Path, target: Path) -> None:
    """Swaps two folders. Where the system has no such step, `target` is away for a moment, under a name from which the
    next run brings it back."""
    if _renamed(source, target, EXCHANGE):
        return
    old = source.with_name(source.name + OLD)
    os.rename(target, old)
    try:
        os.rename(source, target)
    except BaseException:
        os.rename(old, target)
        raise
    os.rename(old, source)


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Whether renameat2 did it; False where it is not supported."""
    call = _renameat2()
    if call is None:
        return False
    if call(HERE, os.fsencode(source), HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """The C library's function; None where it has none."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
