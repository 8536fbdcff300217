"""A command killed right before each call that changes a file: the old or the new folder is there, whole, always, and
the next run cleans up and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_cases import Commands, contents

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.files import damage, read_json
from tinycompress.graph.graph import Graph

EVERY = 17  # kill points of the short part are so many calls apart


def options(model: Path, out: Path) -> dict[str, list[object]]:
    quantize = ["compress", model, "--quantize", "w4", "--quantize-method", "rtn"]
    return {
        "save": [*quantize, "-o", out, "--overwrite"],
        "export": ["export", model, "-o", out, "--overwrite", "--no-verify"],
        "work": [*quantize, "--quantize-embedding", "w8", "-o", out, "--overwrite", "--work", out.parent / "work"],
    }


def made(folder: Path) -> dict[str, str] | None:
    """The contents of a folder, but for how long making it took and how much memory."""
    found = contents(folder)
    if found is None or "provenance.json" not in found:
        return found
    assert damage(folder, "tinycompress.json") is None
    about = read_json(folder / "tinycompress.json")
    del about["sha256"]
    for name in ("provenance.json", "README.md"):
        del about["files"][name], found[name]
    return found | {"tinycompress.json": json.dumps(about)}


def check(name: str, tiny: Graph, folder: Path, commands: Commands, every: int, exchange: bool) -> None:
    """Kills at every so manyth call; the old folder is a saved model, the new one what the command makes."""
    model = folder / "model"
    save(tiny, model)
    save(tiny, folder / "old")
    place = folder / "place"
    out = place / "out"
    command = options(model, out)[name]

    def prepare() -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "old", out)

    prepare()
    code, error = commands.run(*command, exchange=exchange)
    assert code == 0, error
    new = made(out)
    old = made(folder / "old")
    killed = 0
    for point in range(1, 400, every):
        prepare()
        code, error = commands.run(*command, die_at=point, exchange=exchange)
        if code != -signal.SIGKILL:
            break
        killed += 1
        now = made(out)
        assert now in (old, new) or (not exchange and now is None), f"killed at {point}: {sorted(now or [])}"
        code, error = commands.run(*command, exchange=exchange)
        assert code == 0, f"killed at {point}, then: {error}"
        assert made(out) == new, f"killed at {point}"
        assert not list(place.rglob(".*")), f"killed at {point}"
    assert code == 0 and killed > 20 // every, error


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("name", ["save", "export", "work"])
def test_every_call(name: str, exchange: bool, tiny: Graph, tmp_path: Path, commands: Commands) -> None:
    if name == "export":
        pytest.importorskip("onnxruntime")
    check(name, tiny, tmp_path, commands, 1, exchange)


def test_some_calls(tiny: Graph, tmp_path: Path, commands: Commands) -> None:
    check("work", tiny, tmp_path, commands, EVERY, True)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="the system has no such signals")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_nothing(number: str, tiny: Graph, tmp_path: Path) -> None:
    save(tiny, tmp_path / "model")
    code = (
        "import signal, sys, time\n"
        f"signal.signal(signal.{number}, signal.SIG_DFL)\n"  # under nohup it is ignored, and stays so
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
