"""What the distillation experiments share: a damaged student, and healing it under a budget that is the same for
all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from form import Bench
from torch import Tensor

from tinycompress import PruneFFN, load, save
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.teacher_cache import TeacherCache, write_cache
from tinycompress.distillation.training import Training
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph

LR = 2e-4


def width_pruned(bench: Bench, seed: int, keep: float = 0.75) -> Graph:
    """A quarter of every FFN's channels gone, the rest refitted."""
    return PruneFFN(bench.calibration(seed)[:8], keep=keep)(bench.graph)


def depth_pruned(bench: Bench) -> Graph:
    """A tenth of the layers, and at least one, gone from the middle of the upper half."""
    n = bench.graph.config.n_layers
    first, gone = n * 2 // 3, max(1, n // 10)
    return cut(bench.graph, "layers", [i for i in range(n) if not first <= i < first + gone])


def heal(
    bench: Bench, student: Graph, seed: int, epochs: float = 1.0, order: int = 0, lr: float = LR, **how: Any
) -> Graph:
    """The student after `epochs` over the calibration windows (in pieces of 256 tokens), four an update. Another
    `order` is another permutation of them. Under `bench.work` a killed run goes on, and a finished one is read back."""
    training = Training(epochs=epochs, lr=lr, batch=4, seed=seed + 1000 * order)
    pass_ = Distill(windows(bench, seed), training=training, **how)
    if bench.work is None:
        return pass_(student)
    folder = bench.work / pass_.key(student)[:16]
    done = folder / "done"
    if not done.exists():
        save(replace(pass_, work=folder)(student), done)
        for state in folder.glob("step-*"):  # three times the size of what it led to
            shutil.rmtree(state)
    return load(done)


def windows(bench: Bench, seed: int) -> Tensor:
    return bench.calibration(seed).reshape(-1, 256)


@contextmanager
def cached(bench: Bench, seed: int, kind: str, **how: Any) -> Iterator[TeacherCache]:
    """The original's answers on the training windows."""
    with TemporaryDirectory() as folder:
        yield write_cache(bench.graph, windows(bench, seed), Path(folder) / "cache", kind, seed=seed, **how)


def mean_nll(bench: Bench, graphs: Iterator[Graph]) -> Tensor:
    """Per-window NLL [windows], averaged over the seeds' graphs."""
    return torch.stack([bench.nll(graph) for graph in graphs]).mean(0)


def arrow(*nll: Tensor) -> str:
    """Perplexities, for a finding's text."""
    return " → ".join(f"{values.mean().exp():.2f}" for values in nll)
