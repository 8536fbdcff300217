"""Commands in processes of their own: killed before a call that changes a file, or on a small disk."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod", "link")
# dies right before the k-th call that changes a file, renameat2 included; k = 0 never
RUNNER = f"""
import builtins, os, signal, sys
count = 0
def hit():
    global count
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
def wrapped(call):
    def run(*args, **named):
        hit()
        return call(*args, **named)
    return run
import tinycompress.cli.main, tinycompress.pipeline, tinycompress.checkpoints.checkpoint, tinycompress.evaluation.report
from tinycompress.files import moves
call = moves._renameat2()
moves._renameat2 = lambda: None if call is None or sys.argv[2] == "plain" else wrapped(call)
for name in {CALLS!r}:
    setattr(os, name, wrapped(getattr(os, name)))
sys.argv = ["tinycompress", *sys.argv[3:]]
tinycompress.cli.main.main()
"""


def run(*arguments: object, die_at: int = 0, exchange: bool = True, cwd: Path | None = None) -> tuple[int, str]:
    """The exit code and the standard error of a command; `die_at` kills it before that call."""
    way = "exchange" if exchange else "plain"
    command = [sys.executable, "-c", RUNNER, str(die_at), way, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return done.returncode, done.stderr


def was_killed(code: int) -> bool:
    return code == -signal.SIGKILL


def contents(folder: Path) -> dict[str, str] | None:
    """SHA-256 of every file by name; None without the folder."""
    if not folder.exists():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one_line(error: str) -> bool:
    """Whether a command ended with one line that says what is wrong, and no traceback."""
    lines = [line for line in error.strip().splitlines() if line.startswith("error: ")]
    return len(lines) == 1 and "Traceback" not in error


def small_disk(folder: Path, size: int) -> bool:
    """Mounts a disk of so many bytes; False where this may not be done."""
    folder.mkdir(exist_ok=True)
    command: Sequence[str] = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return False
    return subprocess.run(command, capture_output=True).returncode == 0
