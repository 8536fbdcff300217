"""Asking a training run to stop between two steps, with its state saved.

The library installs no signal handler. A run asks the predicate that it was given after every step; `stop_on_sigterm`
makes one of SIGTERM, for programs that a scheduler ends (the command line enters it):

    with stop_on_sigterm() as stop:
        student = Distill(tokens, teacher, training, work="run", stop=stop)(student)
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopped(Exception):
    """The run ended at the request of its `stop`, after `step` steps; with a work folder, its state is there."""

    def __init__(self, step: int, work: Path | None) -> None:
        self.step = step
        self.work = work
        kept = "no work folder was given, so nothing is kept"
        if work is not None:
            kept = f"the state is in {work}, and the same run goes on from there"
        super().__init__(f"stopped after step {step}: {kept}")


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Yields "was SIGTERM received?"; the signal is delivered when the block is left, to the handler that was there.

    A `Stopped` run ends there too, as another process of the run may have been the one that received the signal.
    Outside the main thread, where Python takes no signals, nothing is installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    stopped = False
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    except Stopped:
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
    if received or stopped:
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # the handler returned: the training is not finished all the same
