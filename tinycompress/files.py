"""Writing so that nothing is ever half-written: a temporary name beside the target, flushed, then renamed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


@contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    An existing non-empty target is an `InputError` unless `overwrite`; then it is swapped out only at the very end, so
    a failure leaves the old one as it was (and memory maps of its files stay valid).
    """
    target = Path(target).absolute()
    check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _temporary_name(target)
    work.mkdir()
    try:
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                _flush(path)
        _flush(work)
        old = work.with_name(work.name + "-old")
        if target.exists():
            os.rename(target, old)
        os.rename(work, target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_free(target: str | Path, overwrite: bool = False) -> None:
    """An `InputError` if `target` cannot become an output folder: called before hours of work, not after."""
    target = Path(target)
    if target.is_file():
        raise InputError("output folder", f"{target}, a file", "a folder name")
    if not overwrite and target.is_dir() and any(target.iterdir()):
        raise InputError("output folder", f"{target}, which is not empty", "a new or empty folder, or overwrite=True")


def write_text(path: str | Path, text: str) -> None:
    """Replaces a file in one step."""
    write_bytes(path, [text.encode()])


def write_bytes(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """Replaces a file, by the `parts` one after the other, in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        with temporary.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, data: Any) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """A JSON object from a file; an `InputError` that names the file if it is missing or not JSON."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(str(path), "no such file", "a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(str(path), f"not JSON ({error})", "a JSON object") from None
    if not isinstance(data, dict):
        raise InputError(str(path), f"a JSON {type(data).__name__}", "a JSON object")
    return data


def inside(folder: str | Path, name: str) -> Path:
    """`folder / name`, refused if it would leave the folder: file names in configs and indexes are input."""
    base = Path(folder)
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"file name in {base}", repr(name), "a name inside the folder")
    return base / name


def _temporary_name(target: Path) -> Path:
    """A new hidden name beside `target`: what is renamed must lie on the same disk."""
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder as a file
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_file(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path that becomes the file `target` when the block ends well, and vanishes when it does
    not."""
    target = Path(target).absolute()
    check_free_file(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_free_file(target: str | Path, overwrite: bool = False) -> None:
    """An `InputError` if `target` cannot become an output file."""
    target = Path(target)
    if target.is_dir():
        raise InputError("output file", f"{target}, a folder", "a file name")
    if target.exists() and not overwrite:
        raise InputError("output file", f"{target}, which exists", "a new name, or overwrite=True")
