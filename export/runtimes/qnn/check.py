"""An export of the `qnn` profile on Qualcomm's HTP: its emulator on x86-64 Linux, or the NPU of a Snapdragon machine.

    python check.py FOLDER … [--reference DIR] [--json FILE]

Prefill in chunks, then single steps behind the cache, on HTP with the CPU fallback off, against torch's logits; and as
a figure the distance to ONNX Runtime's CPU provider on the same graphs, which is what HTP's own arithmetic adds. The
architecture compiled for is HTP_ARCH (73, 75, 79 or 81; default 75); a process can hold one.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "static"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, judge, main
from epcontext import session
from host import StaticSession

STEPS = 8  # last ids of a window that are fed one by one: the emulator takes its time
ARCH = os.environ.get("HTP_ARCH", "75")


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Figures against torch, and the failures among them."""
    device = logits(StaticSession.from_folder(folder, lambda path: session(path, ARCH)), reference)
    cpu = logits(StaticSession.from_folder(folder), reference)
    found = figures(reference, device)
    failures = judge(reference, found)
    alone = figures(reference, cpu)  # what rounding the activations costs without HTP
    found |= {"cpu_kl": alone["kl"], "cpu_flips": alone["flips"]}
    return found | {
        "htp_to_cpu": float(np.abs(device - cpu).max()),
        "peak": float(np.abs(cpu).max()),
        "htp": int(ARCH),
    }, failures


def logits(model: StaticSession, reference: Reference) -> np.ndarray:
    """[W, T, V]"""
    return np.stack([model.logits(ids, STEPS) for ids in reference.ids])


if __name__ == "__main__":
    line = os.fdopen(os.dup(1), "w")  # the one line; what the libraries say goes to standard error
    os.dup2(2, 1)
    sys.stdout = line
    main("qnn", lambda: {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")}, check)
