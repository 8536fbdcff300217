"""A full disk at every writer: one line, exit code 1, and what was there before is there still."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from fault_cases import DISK, Commands, contents, one_line

from tinycompress.checkpoints.checkpoint import save
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.training import Training
from tinycompress.errors import OutputError
from tinycompress.graph.graph import Graph


def fill(disk: Path, free: int) -> None:
    """Leaves about so many bytes free."""
    path = disk / "filling"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - free))


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 8_192, 50_000, 120_000, 250_000, -100_000])
@pytest.mark.parametrize("writer", ["save", "gguf", "export", "static", "work"])
def test_a_command(writer: str, free: int, tiny: Graph, tmp_path: Path, disk: Path, commands: Commands) -> None:
    model = tmp_path / "model"
    save(tiny, model)
    save(tiny, disk / "old")
    out = disk / "old"
    options: dict[str, list[object]] = {
        "save": ["compress", model, "-o", out, "--overwrite"],
        "gguf": ["compress", model, "--format", "gguf", "-o", disk / "new.gguf"],
        "export": ["export", model, "-o", out, "--overwrite", "--no-verify"],
        "static": ["export", model, "--profile", "static", "-o", out, "--overwrite", "--no-verify"],
        "work": ["compress", model, "--context", "128", "--rope-method", "yarn", "-o", tmp_path / "out"],
    }
    if writer == "work":
        options["work"] += ["--work", disk / "work"]
    fill(disk, abs(free))
    before = contents(disk)
    room = 1 << 40 if free >= 0 else 0  # else the command sees beforehand how little is free
    code, error = commands.run(*options[writer], room=room)
    assert code == 1 and one_line(error), (code, error)
    assert contents(disk) == before
    (disk / "filling").unlink()
    code, error = commands.run(*options[writer])
    assert code == 0, error


@pytest.mark.slow
def test_a_training(tiny: Graph, disk: Path) -> None:
    """There is room for one state and not for two; with more room the same pass goes on from the one."""
    tokens = torch.randint(tiny.config.vocab_size, (6, 12), generator=torch.Generator().manual_seed(0))
    training = Training(steps=3, lr=1e-2, batch=2, save_every=1)
    teacher = Graph.random(tiny.config, 1)
    distill = Distill(tokens, teacher, training, work=disk / "work")
    with pytest.raises(OutputError, match="the disk is full"):
        distill(tiny)
    assert [path.name for path in (disk / "work").iterdir()] == ["step-00000001"]
    subprocess.run(["mount", "-o", f"remount,size={4 * DISK}", str(disk)], check=True)
    resumed = distill(tiny)
    assert resumed.fingerprint() == dataclasses.replace(distill, work=None)(tiny).fingerprint()


@pytest.mark.slow
def test_a_disk_that_may_only_be_read(tiny: Graph, tmp_path: Path, disk: Path, commands: Commands) -> None:
    save(tiny, tmp_path / "model")
    save(tiny, disk / "old")
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk / "old", disk / "new", disk / "new" / "inner"):
        code, error = commands.run("compress", tmp_path / "model", "-o", out, "--overwrite")
        assert code == 1 and one_line(error), (code, error)
    assert contents(disk) == before
