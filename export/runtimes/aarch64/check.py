"""An exported folder in the onnxruntime of a Raspberry Pi: the aarch64 wheel under qemu-user, by the onnxruntime check.

    python check.py FOLDER … [--json FILE]

`python` is that of .venv, which `environment` made: an arm64 Debian's, emulated as a Cortex-A76, the core of a
Raspberry Pi 5; the kernels of a Raspberry Pi 4, which has no int8 dot products, are not run.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import Reference, main  # noqa: E402

spec = importlib.util.spec_from_file_location("onnxruntime_check", HERE.parent / "onnxruntime" / "check.py")
assert spec is not None and spec.loader is not None
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """The figures of the onnxruntime check but its speed: an emulator's says nothing of a device."""
    if platform.machine() != "aarch64":
        raise RuntimeError(f"this is {platform.machine()}: the check is for .venv/bin/python, an aarch64 interpreter")
    found, failures = plain.check(folder, reference)
    return {k: v for k, v in found.items() if k != "tok_s"}, failures


if __name__ == "__main__":
    main(
        "aarch64",
        lambda: {"onnxruntime": ort.__version__, "aarch64 core": os.environ.get("QEMU_CPU", "unknown")},
        check,
    )
