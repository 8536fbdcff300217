"""Progress bars. On a terminal they are tqdm's; in a log they become plain lines with the time left.

A file that collects standard error would otherwise fill with carriage returns: there a bar writes one line when it has
run for `LOG_SECONDS`, another after as long again, and nothing for work that is done before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm as terminal_bar

LOG_SECONDS = 15.0
SHOWN: ContextVar[bool] = ContextVar("shown", default=True)


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Whether passes show their progress in the block, whatever they were asked for."""
    token = SHOWN.set(shown)
    try:
        yield
    finally:
        SHOWN.reset(token)


class tqdm(terminal_bar):  # type: ignore[type-arg]
    """tqdm's bar, with its arguments; where standard error is no terminal, its lines."""

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        stream = options.get("file") or sys.stderr
        self.in_log = not stream.isatty()
        self.told = time.monotonic()
        if self.in_log:
            options |= {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "miniters": 1}
        if not SHOWN.get():
            options["disable"] = True
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draws the bar, or writes a line of a log if the last one is old enough."""
        if not self.in_log:
            return super().display(msg, pos)
        now = time.monotonic()
        if now - self.told >= LOG_SECONDS:
            self.told = now
            self.fp.write(f"{log_line(self.format_dict)}\n")
            self.fp.flush()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar from the screen; a log has none."""
        if not self.in_log:
            super().clear(nolock)

    def close(self) -> None:
        """Ends the bar; in a log nothing is left to draw."""
        if not getattr(self, "in_log", False):
            super().close()
        elif not self.disable:
            self.disable = True
            self._decr_instances(self)


def log_line(state: dict[str, Any]) -> str:
    """One line of a log, from what tqdm knows of a bar: what, how far, how long, how long still."""
    done, total, elapsed = state["n"], state["total"], state["elapsed"]
    name = state["prefix"].removesuffix(": ") or "progress"
    taken = terminal_bar.format_interval(elapsed)
    if not total:
        return f"{name}: {done:g} {state['unit']} in {taken}"
    rate = state["rate"] or (done / elapsed if elapsed else 0)
    left = f", {terminal_bar.format_interval((total - done) / rate)} left" if rate else ""
    return f"{name}: {100 * done / total:.0f}% ({done:g} of {total:g} {state['unit']}), {taken}{left}"
