"""The `tinycompress` command: one file per command. Heavy imports wait for their command."""

from __future__ import annotations

import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import InputError, MissingExtra, OutputError
from .cache_teacher import cache_teacher
from .chat import chat
from .clean import clean
from .compare import compare
from .compress import compress
from .distill import distill
from .evaluate import evaluate
from .export import export
from .generate import generate
from .guidance import empty_option, misuse, unknown_command
from .inspect import inspect
from .option_names import in_options
from .report import report
from .terminal import Version, with_common
from .verify import verify

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an interrupt does, so that temporary files are removed on the way out.

    The exit code is 128 and the signal's number. A signal that is ignored (nohup) stays so.
    """

    def end(number: int, frame: Any) -> None:
        for other in ENDING:
            signal.signal(other, signal.SIG_IGN)  # a second one would end the cleaning up
        typer.secho(f"error: ended by {signal.Signals(number).name}", fg="red", err=True)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class Commands(TyperGroup):
    """Turns errors into one line and an exit code, and keeps what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.obj = list(args)
        if option := empty_option(args):
            _fail(InputError(option, "an empty value", "a value, or leave the option out"), 2)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if not hasattr(error, "format_message") or _is_help(error):
                raise
            _fail(misuse(error), 2)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            raise unknown_command(word, self.list_commands(ctx))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            with ended_by_signals():
                return super().invoke(ctx)
        except typer.Exit:
            raise
        except (InputError, MissingExtra) as error:
            _fail(in_options(error), 2)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:  # whoever read the output has enough
            raise
        except OSError as error:  # OutputError: a full disk, a folder that may not be written
            _fail(error, 1)
        except Exception as error:
            if hasattr(error, "format_message"):
                if _is_help(error):
                    raise
                _fail(misuse(error), 2)
            if isinstance(error, RuntimeError) and type(error).__name__ == "GateError":
                _fail(error, 1)
            _fail(_unexpected(error), 1)


def _is_help(error: Exception) -> bool:
    """Whether an error of the parser is a page of help."""
    return type(error).__name__ == "NoArgsIsHelpError"


def _unexpected(error: Exception) -> object:
    """What to say of an error that nobody foresaw: a full disk by its name, else that it is a mistake of ours."""
    text = " ".join(str(error).split())
    if "No space left on device" in text or "os error 28" in text:
        return OutputError("no space left on device")
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text} (a mistake of tinycompress; with --debug it says where)"


def _fail(error: object, code: int) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Version = False) -> None:
    """Prune, quantize, distil, stretch, export and verify Llama-family models on one shared graph."""


COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect,
    "compress": compress,
    "eval": evaluate,
    "report": report,
    "generate": generate,
    "chat": chat,
    "compare": compare,
    "export": export,
    "verify": verify,
    "distill": distill,
    "cache-teacher": cache_teacher,
    "clean": clean,
}
for name, command in COMMANDS.items():
    app.command(name)(with_common(command))


def main() -> None:
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    app(prog_name="tinycompress" if sys.argv[0].endswith(".py") else None)  # and not "python -m tinycompress"
