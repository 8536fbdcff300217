"""A library call changes nothing of its caller's process: signals, allocator, threads, seeds, defaults, environment."""

from __future__ import annotations

import ctypes
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tinycompress import (
    AWQ,
    GPTQ,
    HQQ,
    RTN,
    AutoRound,
    BlockTuning,
    ChooseRope,
    Distill,
    Drop,
    Graph,
    LongRope,
    MixedBits,
    Prune,
    PruneFFN,
    QuantizeEmbedding,
    Rotate,
    ScaleRope,
    Slice,
    SmoothQuant,
    Training,
    load,
    perplexity,
    run,
    save,
)


def state() -> dict[str, object]:
    """All that a library could change behind its caller's back, as values that compare."""
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "torch seed": torch.random.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": list(warnings.filters),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "folder": Path.cwd(),
        "logging": (logging.root.level, list(logging.root.handlers)),
    }


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A check that nothing has changed since, and that the C library's allocator was not touched."""
    opened: list[object] = []
    real = ctypes.CDLL

    def spy(name: object, *args: object, **options: object) -> object:
        if name is None:
            opened.append(name)
        return real(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ctypes, "CDLL", spy)
    before = state()

    def check() -> None:
        after = state()
        assert {name: after[name] for name in before if after[name] != before[name]} == {}
        assert opened == []

    return check


def windows(length: int = 16) -> Tensor:
    return torch.randint(128, (8, length), generator=torch.Generator().manual_seed(0))


PASSES: dict[str, Callable[[Graph], Graph]] = {
    "RTN": lambda g: RTN("w4g16")(g),
    "GPTQ": lambda g: GPTQ(windows(), "w4g16", propagate=0.5, refine=1)(g),
    "HQQ": lambda g: HQQ("w4g16-asym")(g),
    "AWQ": lambda g: AWQ(windows(), "w4g16")(g),
    "SmoothQuant": lambda g: SmoothQuant(windows())(g),
    "AutoRound": lambda g: AutoRound(windows(), g, BlockTuning(steps=2))(RTN("w4g16")(g)),
    "MixedBits": lambda g: MixedBits(windows(), lambda specs: RTN(specs), bits=6.0, choices=("w2g16", "w4g16"))(g),
    "QuantizeEmbedding": lambda g: QuantizeEmbedding("w8g16")(g),
    "Rotate": lambda g: Rotate()(g),
    "Prune": lambda g: Prune(windows(), "params=0.8", multiple_of=1, probe=2)(g),
    "PruneFFN": lambda g: PruneFFN(windows(), keep=0.5)(g),
    "Slice": lambda g: Slice(windows(), 32)(g),
    "Drop": lambda g: Drop(windows(), 1)(g),
    "ScaleRope": lambda g: ScaleRope(128)(g),
    "ChooseRope": lambda g: ChooseRope(windows(128)[:1])(g),
    "LongRope": lambda g: LongRope(windows(128)[:1], population=4, generations=1)(g),
    "Distill": lambda g: Distill(windows(), g, Training(steps=2, batch=2))(Rotate(residual=False)(g)),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_changes_nothing_of_its_caller(name: str, tiny: Graph, watched: Callable[[], None]) -> None:
    PASSES[name](tiny)
    watched()


def test_folders_pipelines_and_measuring_change_nothing(
    tiny: Graph, watched: Callable[[], None], tmp_path: Path
) -> None:
    graph = run(tiny, [RTN("w4g16")], tmp_path / "work", progress=False)
    save(graph, tmp_path / "out")
    perplexity(load(tmp_path / "out").module(), windows(), progress=False)
    graph.module().generate(windows()[:1, :4], 4, temperature=1.0, seed=0)
    watched()


def test_an_export_changes_nothing(tiny: Graph, watched: Callable[[], None], tmp_path: Path) -> None:
    from tinycompress.export import OrtModel, export, verify

    export(RTN("w4g16")(tiny), tmp_path / "out", progress=False)
    verify(tmp_path / "out", progress=False)
    OrtModel(tmp_path / "out").generate(windows()[:1, :4], 4)
    watched()


def test_every_pass_is_watched() -> None:
    import tinycompress

    passes = {
        name
        for name in tinycompress.__all__
        if isinstance(getattr(tinycompress, name), type)
        and "__call__" in vars(getattr(tinycompress, name))
        and hasattr(getattr(tinycompress, name), "__dataclass_fields__")
    }
    assert passes == set(PASSES)
