"""A command killed right before each call that changes a file: the old or the new folder is there, whole, always, and
the next run cleans up and ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_cases import contents, run, was_killed

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.graph.graph import Graph

FEW = 7  # kill points of the short part


def commands(model: Path, out: Path) -> dict[str, list[object]]:
    quantize = ["compress", model, "--quantize", "w4", "--quantize-method", "rtn"]
    return {
        "save": [*quantize, "-o", out, "--overwrite"],
        "export": ["export", model, "-o", out, "--overwrite", "--no-verify"],
        "work": [*quantize, "--quantize-embedding", "w8", "-o", out, "--overwrite", "--work", out.parent / "work"],
    }


def check(name: str, tiny: Graph, folder: Path, points: list[int] | None, exchange: bool) -> None:
    """Kills at `points` (None: all of them); the old folder is a saved model, the new one what the command makes."""
    model = folder / "model"
    save(tiny, model)
    place = folder / "place"
    out = place / "out"
    command = commands(model, out)[name]
    save(tiny, out)
    old = contents(out)
    code, error = run(*command, exchange=exchange)
    assert code == 0, error
    new = contents(out)
    point = 0
    while True:
        point = point + 1 if points is None else points.pop(0)
        subprocess.run(["rm", "-r", str(place)], check=True)
        save(tiny, out)
        code, error = run(*command, die_at=point, exchange=exchange)
        if not was_killed(code):
            break
        now = contents(out)
        assert now in (old, new) or (not exchange and now is None), f"killed at {point}: {sorted(now or [])}"
        code, error = run(*command, exchange=exchange)
        assert code == 0, f"killed at {point}, then: {error}"
        assert contents(out) == new, f"killed at {point}"
        assert not [path for path in place.rglob(".*")], f"killed at {point}"
        if points is not None and not points:
            return
    assert points is None and code == 0, error


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["save", "export", "work"])
def test_every_call(name: str, exchange: bool, tiny: Graph, tmp_path: Path) -> None:
    if name == "export":
        pytest.importorskip("onnxruntime")
    check(name, tiny, tmp_path, None, exchange)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system has no exchange of two folders")
def test_the_swap(tiny: Graph, tmp_path: Path) -> None:
    check("save", tiny, tmp_path, list(range(24, 24 + FEW)), True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no such signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing(number: str, tiny: Graph, tmp_path: Path) -> None:
    save(tiny, tmp_path / "model")
    code = (
        "import sys, time\n"
        "from tinycompress.checkpoints import checkpoint\n"
        "checkpoint.write_shards = lambda shards, folder, total: ((folder / 'half').touch(), time.sleep(60))\n"
        "from tinycompress.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "compress", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob(".out.tmp-*/half")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        os.kill(process.pid, getattr(signal, number))
        error = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + getattr(signal, number) and f"ended by {number}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert load(tmp_path / "model").fingerprint() == tiny.fingerprint()
