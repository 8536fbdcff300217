"""The script of the support table starts from a checkout, as the Makefile starts it."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_starts():
    command = [sys.executable, "export/support.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "--runtime" in done.stdout
