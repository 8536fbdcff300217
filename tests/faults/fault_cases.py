"""Commands in processes of their own: killed before a call that changes a file, or on a small disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

DISK = 1_400_000  # bytes; the model has some 313 kB, and a static export wants twice as many for a while
CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "chmod", "link")
# Imports once, then forks a child for each command that it reads, a line of JSON each. The child dies right before the
# call that changes a file and has that number, renameat2 included; 0 is none.
SERVER = f"""
import json, os, shutil, signal, sys, traceback
from types import SimpleNamespace
import tinycompress.pipeline, tinycompress.checkpoints.checkpoint, tinycompress.evaluation.report
from tinycompress.cli import main
from tinycompress.files import moves
renameat2 = moves._renameat2()
def arm(number, exchange, room):
    count = 0
    if room:
        shutil.disk_usage = lambda place: SimpleNamespace(free=room)
    def wrapped(call):
        def run(*arguments, **named):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)
        return run
    moves._renameat2 = lambda: wrapped(renameat2) if renameat2 and exchange else None
    for name in {CALLS!r}:
        setattr(os, name, wrapped(getattr(os, name)))
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        handle = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        arm(asked["die_at"], asked["exchange"], asked["room"])
        sys.argv = ["tinycompress", *asked["arguments"]]
        code = 70
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    sys.stdout.write(str(os.waitstatus_to_exitcode(status)) + chr(10))
    sys.stdout.flush()
"""


class Commands:
    """Runs commands of `tinycompress`, each in a process of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not outlive a fork
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *arguments: object, die_at: int = 0, exchange: bool = True, room: int = 0) -> tuple[int, str]:
        """The exit code of a command and what it said; `die_at` kills it before that call, and `room` is how many bytes
        it finds free, whatever is."""
        how = {"die_at": die_at, "exchange": exchange, "room": room, "log": str(self.log)}
        asked = {"arguments": [*map(str, arguments)], **how}
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline()), self.log.read_text()

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


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
