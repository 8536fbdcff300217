"""The errors of the library: `InputError` for bad input, `OutputError` for a result that cannot be put where it was
asked, `MissingExtra` for an optional package that is not installed.

Anything else that escapes is a bug of ours; the command line shows all three as one clean line.
"""

from __future__ import annotations

import importlib
from typing import Any

LONGEST = 600  # characters of a value that a message quotes


class InputError(ValueError):
    """`field`: found `found`; accepted: `accepted`."""

    def __init__(self, field: object, found: object, accepted: object) -> None:
        self.field, self.found = shortened(plain(field)), shortened(plain(found))
        self.accepted = plain(accepted)
        super().__init__(f"{self.field}: found {self.found}; accepted: {self.accepted}")


def plain(value: object) -> str:
    """A value as text in which every character can be shown: those that a terminal would act on are written as escapes,
    for parts of a message come from files."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shortened(text: str) -> str:
    """The text without its middle where it is long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class OutputError(OSError):
    """A result cannot be put where it was asked: the disk is full, the place is taken, in use, or may not be written.
    The message says what was kept, and where."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message is one line with the command that installs it.

    Fields:
        package: name of the module that could not be imported.
        extra: the extra of tinycompress that brings it, or None where the package is installed by its own name.
    """

    def __init__(self, package: str, extra: str | None) -> None:
        self.package = package
        self.extra = extra
        source = package if extra is None else f"tinycompress[{extra}]"
        super().__init__(f"{package} is not installed; install it with: pip install '{source}'", name=package)


def need(package: str, extra: str | None) -> Any:
    """Imports an optional package and returns the module; `MissingExtra` where it is not installed.

    Arguments are those of `MissingExtra`. A package that is installed but fails to import keeps its own error.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise
        raise MissingExtra(package, extra) from None
