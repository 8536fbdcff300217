"""ONNX Runtime is imported without its telemetry: no socket is opened and nothing is left in the home folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

WORK = """
import os, sys, time
from tinycompress.export.quiet import onnxruntime, OFF
if sys.argv[1] == "quiet":
    onnxruntime()
    assert OFF not in os.environ
else:
    import onnxruntime
time.sleep(float(sys.argv[2]))
"""


def environment(home: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    }
    return kept | {"HOME": str(home)}


def test_nothing_is_kept_to_be_sent_later(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    subprocess.run([sys.executable, "-c", WORK, "quiet", "0"], env=environment(tmp_path), check=True)
    assert not any(tmp_path.rglob("*onnxruntime*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_socket_is_opened(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    log = tmp_path / "calls"
    watch = ["strace", "-f", "-e", "trace=socket,connect", "-o", str(log)]
    subprocess.run([*watch, sys.executable, "-c", WORK, "quiet", "15"], env=environment(tmp_path), check=True)
    assert "socket(" not in log.read_text()
