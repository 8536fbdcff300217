"""What every command does with a terminal: -q, -v, --debug and -V, notes on standard error, and JSON."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..progress import progress_bars

QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def show_version(asked: bool) -> None:
    """Prints the version and ends the command, if it was asked for."""
    if asked:
        from importlib.metadata import version

        print(f"tinycompress {version('tinycompress')}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("-V", "--version", help="Print the version.", callback=show_version, is_eager=True)
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Results and errors only: no progress, no notes.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Also what the libraries below have to say.")]
Debug = Annotated[bool, typer.Option("--debug", help="Where an error came from: Python's traceback.")]
COMMON = {"quiet": Quiet, "verbose": Verbose, "debug": Debug, "version": Version}


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that every command has."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool, verbose: bool, debug: bool, version: bool, **options: Any) -> None:
        if quiet and verbose:
            raise InputError("--quiet", "given together with --verbose", "one of the two")
        try:
            with terminal(quiet, verbose):
                command(*args, **options)
        except (typer.Exit, KeyboardInterrupt):
            raise
        except Exception:
            if debug:
                traceback.print_exc()
            raise

    signature = inspect.signature(command)
    known = typing.get_type_hints(command, include_extras=True)
    own = [parameter.replace(annotation=known[name]) for name, parameter in signature.parameters.items()]
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in COMMON.items()
    ]
    whole = signature.replace(parameters=[*own, *common], return_annotation=None)
    run.__signature__ = whole  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *common]}
    return run


@contextmanager
def terminal(quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """What reaches standard error in the block. Warnings and log lines of other libraries do not, unless `verbose`:
    they speak to programmers; ours stay. With `quiet` there are no progress bars and no notes either."""
    token = QUIET.set(quiet)
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), progress_bars(not quiet):
            if not verbose:
                warnings.filterwarnings("ignore", module=r"(?!tinycompress\b)")
                logging.disable(logging.WARNING)
            if quiet:
                warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        QUIET.reset(token)


def note(text: str) -> None:
    """A line on standard error about how something was understood; not with --quiet."""
    if not QUIET.get():
        print(f"note: {text}", file=sys.stderr)


def print_json(data: Any) -> None:
    """`data` as JSON on standard output; a number that is not finite becomes null."""
    from ..files import to_json

    print(to_json(data))
