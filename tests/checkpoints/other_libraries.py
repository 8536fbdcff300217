"""Scripts that run in the venvs of tests/checkpoints/runtimes/README.md."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "runtimes"


def folder_of(name: str) -> Path:
    """The venv of that name; where there is none, the test is skipped."""
    folder = os.environ.get("TINYCOMPRESS_RUNTIMES")
    path = Path(folder).expanduser() / name if folder else None
    if path is None or not (path / "bin" / "python").exists():
        pytest.skip(f"no venv {name!r} (tests/checkpoints/runtimes/README.md)")
    return path


def run(name: str, script: str, *arguments, cwd: Path) -> str:
    """What a script of tests/checkpoints/runtimes prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [str(folder_of(name) / "bin" / "python"), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
