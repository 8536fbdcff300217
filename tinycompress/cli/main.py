"""The `tinycompress` command: one file per command. Heavy imports wait for their command."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import InputError, MissingExtra
from .cache_teacher import cache_teacher
from .clean import clean
from .compress import compress
from .distill import distill
from .evaluate import evaluate
from .export import export
from .generate import generate
from .inspect import inspect
from .option_names import in_options
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
    """Turns the errors that are not bugs into one line and an exit code, and keeps what was typed."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.obj = list(args)
        return super().parse_args(ctx, args)

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
        except OSError as error:  # OutputError: a full disk, a folder that may not be written
            _fail(error, 1)
        except RuntimeError as error:
            from tinycompress.export import GateError

            if not isinstance(error, GateError):
                raise
            _fail(error, 1)


def _fail(error: object, code: int) -> None:
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Prune, quantize, distil, stretch, export and verify Llama-family models on one shared graph."""
    if version:
        from importlib.metadata import version as installed

        print(f"tinycompress {installed('tinycompress')}")
        raise typer.Exit()


app.command()(inspect)
app.command()(compress)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(export)
app.command()(verify)
app.command()(distill)
app.command("cache-teacher")(cache_teacher)
app.command()(clean)


def main() -> None:
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    app()
