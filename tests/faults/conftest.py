"""A server of commands and a small disk for a test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cases import DISK, Commands, small_disk


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    server = Commands(tmp_path / "log")
    yield server
    server.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small, empty disk."""
    folder = tmp_path / "disk"
    if not small_disk(folder, DISK):
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
