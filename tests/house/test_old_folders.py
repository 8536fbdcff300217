"""Folders that commit c4c25f6 wrote (tests/fixtures/make_old_folders.py) open unchanged.

Fingerprints are of all stored bytes. Logits are held to 1e-5, not to the bit, since they were computed on another
machine; benchmarks/compare_checkouts.py compares the two commits to the bit on one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tinycompress import load
from tinycompress.distillation.teacher_cache import open_cache
from tinycompress.export import read

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))

import make_old_folders as made  # noqa: E402

OLD = FIXTURES / "old_folders"
ABOUT: dict[str, dict[str, Any]] = json.loads((OLD / "about.json").read_text())["folders"]
LOGITS: dict[str, Tensor] = load_file(OLD / "logits.safetensors")


def folders(*kinds: str) -> list[str]:
    return [name for name, about in ABOUT.items() if about["kind"] in kinds]


@pytest.mark.parametrize("name", folders("graph"))
def test_a_saved_graph_opens_with_the_same_bytes(name: str) -> None:
    assert load(OLD / name).fingerprint() == ABOUT[name]["fingerprint"]


@pytest.mark.parametrize("name", folders("export", "static export"))
def test_an_export_is_read_back_with_the_same_bytes(name: str) -> None:
    assert read(OLD / name).fingerprint() == ABOUT[name]["fingerprint"]


@pytest.mark.parametrize("name", folders("graph", "export", "static export"))
def test_a_folder_gives_the_same_logits(name: str) -> None:
    assert LOGITS[name].abs().max() > 0.5
    # an int8 product rounds its activations: elsewhere one may fall on the other side of a step
    atol = 0.02 if name.startswith("export-ort") else 1e-5
    torch.testing.assert_close(made.logits(OLD / name, ABOUT[name]["kind"]), LOGITS[name], atol=atol, rtol=0)


@pytest.mark.parametrize("name", folders("graph"))
def test_a_history_is_kept_as_it_was_written(name: str) -> None:
    path = OLD / name / "tinycompress.json"
    expected = json.loads(path.read_text())["history"] if path.exists() else []
    assert list(load(OLD / name).history) == expected


@pytest.mark.parametrize("name", folders("teacher cache"))
def test_a_teacher_cache_opens(name: str) -> None:
    cache = open_cache(OLD / name, tokens=made.windows(4), teacher=load(OLD / "one-layer"))
    assert cache.fingerprint == ABOUT[name]["fingerprint"]
    target = cache.target(range(4))  # reads every shard, and checks its SHA-256
    assert len(target.rows(slice(0, 128)).ids) == 4 * 32


@pytest.mark.parametrize("name", folders("training state"))
def test_a_training_state_is_taken_up(name: str, tmp_path: Path) -> None:
    """The state is that of the last step, so the run ends at once with the weights that the old one ended with."""
    shutil.copytree(OLD / name, tmp_path / "work")
    distill = dataclasses.replace(made.training_passes()[name], work=tmp_path / "work")
    student = load(OLD / "training-student")
    trained = distill(student)
    assert torch.allclose(trained.module()(made.IDS), LOGITS[f"{name}-result"], atol=1e-5)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step-00000004"]
