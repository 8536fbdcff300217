"""A check of export/runtimes, run in its own environment: the runtimes' versions of numpy and protobuf do not go
together."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph
from tinycompress.progress import tqdm

from ..quiet import quiet_environment
from .reference import POSITIONS, WINDOWS, reference_text, write_reference

RUNTIMES = Path(__file__).parents[1] / "runtimes"
TIMEOUT = 3600.0  # seconds
SLOW = {
    "qnn": (1, 512),
    "rknn": (1, 512),
    "chromium": (1, 512),
    "aarch64": (1, 64),
}  # emulators, and the reduced text for them


def text_of(name: str) -> tuple[int, int]:
    """Windows and positions that a runtime is judged by: the gate's, or fewer where a step takes long."""
    return SLOW.get(name, (WINDOWS, POSITIONS))


def names() -> list[str]:
    """The runtimes there are checks for."""
    return sorted(path.parent.name for path in RUNTIMES.glob("*/check.py"))


def python_of(name: str) -> Path:
    """The interpreter of a runtime's environment; an `InputError` where it was not made."""
    if name not in names():
        raise InputError("runtime", repr(name), " | ".join(names()))
    python = RUNTIMES / name / ".venv" / "bin" / "python"
    if not python.is_file():
        raise InputError(
            f"runtime {name}",
            "not installed",
            f"`make runtime NAME={name}` in a checkout, or `{RUNTIMES / 'install'} {name}`, first; "
            "or no verification (--no-verify)",
        )
    return python


def installed(name: str) -> bool:
    """Whether `export/runtimes/install` ran to its end."""
    return (RUNTIMES / name / ".venv" / ".installed").is_file()


def run_check(
    name: str,
    folder: str | Path,
    graph: Graph,
    profile: str,
    ids: Tensor | None = None,
    options: tuple[str, ...] = (),
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """What the check of `name` found out about an exported folder: {"passed", "figures", "failures", "versions",
    "seconds"}. `graph` is the prepared graph that torch runs, `ids` [W, T] or [T] the text. Only what the runtime
    itself wrote is returned."""
    python = python_of(name)
    with tempfile.TemporaryDirectory(prefix="tinycompress-") as work:
        write_reference(
            graph, work, profile, ids=reference_text(graph, *text_of(name)) if ids is None else ids, progress=progress
        )
        out = Path(work) / "result.json"
        command = [
            str(python),
            str(RUNTIMES / name / "check.py"),
            str(folder),
            "--reference",
            work,
            "--json",
            str(out),
            *options,
        ]
        code, said = _wait(command, name, progress)
        if not out.is_file():
            found = f"exit code {code}: {said.strip()[-400:]}"
            raise InputError(f"runtime {name}", found, f"a check that ends (make runtime NAME={name})")
        return json.loads(out.read_text(encoding="utf-8").splitlines()[-1])


def _wait(command: list[str], name: str, progress: bool) -> tuple[int, str]:
    """Exit code and error output of a process; how far it is it cannot say, so a clock runs. Ended after TIMEOUT, and
    with us."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=quiet_environment())
        try:
            with tqdm(desc=f"in {name}", bar_format="{desc}: {elapsed}", delay=2, disable=not progress) as clock:
                for _ in range(int(TIMEOUT)):
                    try:
                        process.wait(1)
                        break
                    except subprocess.TimeoutExpired:
                        clock.update()
                else:
                    raise subprocess.TimeoutExpired(command, TIMEOUT)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return process.returncode, said.read()
