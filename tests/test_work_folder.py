"""What a work folder holds, how it is described, and what `clean` takes away: only what tinycompress wrote there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import random_graph
from typer.testing import CliRunner

import tinycompress as tc
from tinycompress import pipeline
from tinycompress.cli.main import app
from tinycompress.errors import InputError
from tinycompress.work_folder import clean, described, parts, to_clean

CONFIG = tc.Config(vocab_size=64, hidden_size=32, head_dim=8, layers=(tc.Layer(4, 2, 48),), max_position=32)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two runs, of which the last shares its first step with the other; one that was killed; what others left."""
    folder = tmp_path / "work"
    graph = random_graph(CONFIG)
    for spec in ("w4g16", "w8g16"):
        pipeline.run(graph, [tc.ScaleRope(64), tc.RTN(spec, progress=False)], folder, progress=False)
    state = folder / f"02-GPTQ-{'0' * 16}.unfinished"
    state.mkdir()
    (state / "unfinished.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / f"measured-{'0' * 16}.json").write_text("{}")
    (folder / "training" / "step-00000004").mkdir(parents=True)
    (folder / "training" / "step-00000004" / "state.json").write_text(json.dumps({"step": 4, "key": ""}))
    return folder


def names(work: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in work.iterdir())


def test_parts_and_the_line_that_says_what_is_there(work: Path) -> None:
    kinds = [(part.kind, part.current) for part in parts(work)]
    assert sorted(kinds) == [
        ("list of steps", True),
        ("measurement", True),
        ("step", False),
        ("step", True),
        ("step", True),
        ("training state", True),
        ("unfinished step", False),
    ]
    line = described(work)
    assert "3 steps, 1 unfinished step, 1 training state" in line and "of earlier runs" in line


def test_by_default_what_the_last_run_would_not_read(work: Path) -> None:
    clean(work, to_clean(work))
    assert names(work) == ["01-ScaleRope", "02-RTN", "measured", "notes.txt", "training", "work.json"]
    assert to_clean(work) == []
    ran = pipeline.run(random_graph(CONFIG), [tc.ScaleRope(64), tc.RTN("w8g16")], work, progress=False)
    assert len(ran.history) == 2


def test_all_steps(work: Path) -> None:
    clean(work, to_clean(work, steps=True))
    assert names(work) == ["measured", "notes.txt", "training", "work.json"]


def test_everything_that_is_ours(work: Path) -> None:
    (work / "notes.txt").unlink()
    step = next(path for path in work.iterdir() if path.name.startswith("01-"))
    (step / "mine.txt").write_text("mine")
    clean(work, to_clean(work, everything=True))
    assert names(work) == ["01-ScaleRope"]
    (step / "mine.txt").unlink()
    clean(work, to_clean(work, everything=True))
    assert not work.exists()


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        to_clean(tmp_path / "none")
    (tmp_path / "02-RTN-0123456789abcdef").mkdir()
    (tmp_path / "02-RTN-0123456789abcdef" / "photo.png").touch()
    with pytest.raises(InputError, match="nothing of a pipeline"):
        to_clean(tmp_path, everything=True)
    (tmp_path / "link").symlink_to(tmp_path)
    assert parts(tmp_path) == []


def test_steps_of_an_older_version_are_not_taken_for_old_ones(work: Path) -> None:
    (work / "work.json").unlink()
    assert to_clean(work) == []
    assert len(to_clean(work, steps=True)) == 4


def test_the_command(work: Path) -> None:
    before = names(work)
    shown = CliRunner().invoke(app, ["clean", str(work), "--dry-run"])
    assert shown.exit_code == 0 and "would free" in shown.stdout and "02-RTN-" in shown.stdout
    assert names(work) == before
    assert CliRunner().invoke(app, ["clean", str(work), "--steps", "--all"]).exit_code == 2
    assert CliRunner().invoke(app, ["clean", str(work)]).exit_code == 0
    assert len(names(work)) == len(before) - 2
