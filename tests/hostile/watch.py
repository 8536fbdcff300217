"""What a process does while it reads something hostile: files it opens, code it loads, memory and time it takes."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen")
FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "socket.bind")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
OF_PYTHON = tuple({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib")})
CODE = (".py", ".pyc", ".so", "pytorch_model.bin", ".pt", ".pth", ".pkl", ".ckpt")
HANG = 60  # seconds, after which a reader is told to end
_watching: list[Watch] = []


@dataclass
class Watch:
    """What was seen.

    Fields:
        folder: the only place that may be read.
        out: the only place that may be written.
        faults: what happened that may not.
        seconds: CPU time.
        peak: bytes by which the process grew at its largest.
    """

    folder: Path
    out: Path | None = None
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name in FORBIDDEN:
            self.faults.append(f"{name} {arguments[:2]!r:.200}")
        elif name == "open" and isinstance(arguments[0], str | bytes | Path):
            self.opened(os.fsdecode(arguments[0]), arguments[1], arguments[2])
        elif name in CHANGES and not _within(os.fsdecode(arguments[0]), self.out):
            self.faults.append(f"{name} {arguments!r:.200}")

    def opened(self, path: str, mode: str | None, flags: int) -> None:
        """Notes a file that may not be opened, or not so."""
        real = os.path.realpath(path)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) or bool(
            set(mode or "") & set("wax+")
        )
        if _within(real, self.out):
            return
        if _within(real, self.folder):
            if writes or real.endswith(CODE):
                self.faults.append(f"opened {real} ({mode or flags})")
        elif writes or not real.startswith((*OF_PYTHON, *sys.path[1:], "/proc/self/status", "/sys/devices/")):
            self.faults.append(f"opened {real} ({mode or flags})")


def _within(path: str, folder: Path | None) -> bool:
    return folder is not None and os.path.realpath(path).startswith(os.path.realpath(folder))


def _hook(name: str, arguments: tuple[Any, ...]) -> None:
    if _watching:
        _watching[-1].event(name, arguments)


sys.addaudithook(_hook)  # cannot be taken away again: it does nothing where nobody watches


@contextmanager
def watching(folder: Path, out: Path | None = None) -> Iterator[Watch]:
    """Watches this process in a `with`; a reader that does not end is ended."""
    watch = Watch(folder, out)
    handler = signal.signal(signal.SIGALRM, _ended)
    signal.alarm(HANG)
    before = _reset_peak()
    start = time.process_time()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        watch.seconds = time.process_time() - start
        watch.peak = max(0, _memory("VmHWM") - before)


def _ended(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no end after {HANG} seconds")


def _reset_peak() -> int:
    """Makes the system count the largest memory anew, and returns the memory now; 0 where it does not count."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return sys.maxsize
    return _memory("VmRSS")


def _memory(name: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
