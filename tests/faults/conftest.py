"""A server of commands for a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cases import Commands


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    server = Commands(tmp_path / "log")
    yield server
    server.close()
