"""A check of export/runtimes, run in its own environment: the runtimes' versions of numpy and protobuf do not go together."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from tinycompress.errors import InputError
from tinycompress.graph import Graph

from .reference import write_reference

RUNTIMES = Path(__file__).parent / "runtimes"
TIMEOUT = 3600.0  # seconds


def names() -> list[str]:
    """The runtimes there are checks for."""
    return sorted(path.parent.name for path in RUNTIMES.glob("*/check.py"))


def python_of(name: str) -> Path:
    """The interpreter of a runtime's environment; an `InputError` where it was not made."""
    if name not in names():
        raise InputError("runtime", repr(name), " | ".join(names()))
    python = RUNTIMES / name / ".venv" / "bin" / "python"
    if not python.is_file():
        raise InputError(f"runtime {name}", "not installed", f"`make runtime NAME={name}` first, or no verification (--no-verify)")
    return python


def installed(name: str) -> bool:
    """Whether `export/runtimes/install` ran to its end."""
    return (RUNTIMES / name / ".venv" / ".installed").is_file()


def run_check(name: str, folder: str | Path, graph: Graph, profile: str, ids: Tensor | None = None, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the check of `name` found out about an exported folder: {"passed", "figures", "failures", "versions", "seconds"}.
    `graph` is the prepared graph that torch runs, `ids` [T] the text. Only what the runtime itself wrote is returned."""
    python = python_of(name)
    with tempfile.TemporaryDirectory(prefix="tinycompress-") as work:
        write_reference(graph, work, profile, ids=ids)
        out = Path(work) / "result.json"
        command = [str(python), str(RUNTIMES / name / "check.py"), str(folder), "--reference", work, "--json", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if not out.is_file():
            found = f"exit code {done.returncode}: {done.stderr.strip()[-400:]}"
            raise InputError(f"runtime {name}", found, f"a check that ends (make runtime NAME={name})")
        return json.loads(out.read_text(encoding="utf-8").splitlines()[-1])
