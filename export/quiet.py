"""ONNX Runtime without its telemetry: nothing is sent, and nothing is kept in the home folder to be sent later.

Newer versions start it when they are imported, and `disable_telemetry_events` comes too late for that. What switches it
off is a variable of the environment, which is set for the import alone; a program that has imported the runtime before
us has decided for itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tinycompress.errors import need

OFF = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> Any:
    """The module, imported without telemetry; a `MissingExtra` where it is not installed."""
    with _switched_off():
        module = need("onnxruntime", "export")
    module.disable_telemetry_events()
    return module


def quiet_environment() -> dict[str, str]:
    """The environment of a process that will import the runtime."""
    return os.environ | {OFF: "1"}


@contextmanager
def _switched_off() -> Iterator[None]:
    before = os.environ.get(OFF)
    os.environ[OFF] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[OFF]
        else:
            os.environ[OFF] = before
