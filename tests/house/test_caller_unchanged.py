"""A library call changes nothing of its caller: signals, malloc, threads, generators, defaults and the rest."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_graph
from every_pass import CONFIG, PASSES, SPEC, TOKENS

import tinycompress as tc
from tinycompress.distillation.stopping import stop_on_sigterm
from tinycompress.model import cpu_memory

BY_IMPORTS = {"warnings", "environment", "logging"}  # what other packages do to the process when they are imported


def process_state() -> dict[str, Any]:
    """Everything of the process that a library has no business with."""
    numpy_state = np.random.get_state(legacy=False)
    return {
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "torch generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": repr(numpy_state),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "mask of new files": mask_of_new_files(),
        "logging": (list(logging.root.handlers), logging.root.level),
    }


def mask_of_new_files() -> str:
    """The umask, read without setting it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((line for line in lines if line.startswith("Umask")), "")


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Compares the process before and after a call; malloc's settings and the umask may not even be touched."""

    def forbidden(*args: Any, **options: Any) -> Any:
        raise AssertionError("a library call opened the C library, to set what belongs to the process")

    def check(call: Callable[[], Any]) -> None:
        first = process_state()
        call()
        changed = [name for name, value in process_state().items() if first[name] != value]
        assert set(changed) <= BY_IMPORTS, changed
        monkeypatch.setattr(cpu_memory, "_glibc", forbidden)
        monkeypatch.setattr(ctypes, "CDLL", forbidden)
        monkeypatch.setattr(os, "umask", forbidden)
        for name in ("signal", "set_num_threads", "manual_seed", "use_deterministic_algorithms", "set_default_dtype"):
            monkeypatch.setattr(signal if name == "signal" else torch, name, forbidden)
        before = process_state()
        call()
        after = process_state()
        assert [name for name in before if before[name] != after[name]] == []

    return check


def test_every_pass_of_the_package_is_tried() -> None:
    exported = {name: getattr(tc, name) for name in tc.__all__}
    passes = {
        name
        for name, value in exported.items()
        if inspect.isclass(value) and "graph" in inspect.signature(value.__call__).parameters
    }
    assert passes == PASSES.keys()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", PASSES)
def test_a_pass(name: str, unchanged: Callable[[Callable[[], Any]], None]) -> None:
    graph = random_graph(CONFIG)
    unchanged(lambda: PASSES[name]()(graph))


def test_everything_around_a_pass(tmp_path: Path, unchanged: Callable[[Callable[[], Any]], None]) -> None:
    graph = random_graph(CONFIG)

    def work() -> None:
        tc.save(graph, tmp_path / "saved", overwrite=True)
        loaded = tc.load(tmp_path / "saved")
        small = tc.run(loaded, [tc.ScaleRope(64), tc.RTN(SPEC)], tmp_path / "work")
        tc.perplexity(small.module(), TOKENS)
        small.module().generate(TOKENS[0], 4, temperature=1.0, seed=0)

    unchanged(work)


def test_an_export(tmp_path: Path, unchanged: Callable[[Callable[[], Any]], None]) -> None:
    pytest.importorskip("onnxruntime")
    from tinycompress.export import export

    graph = tc.RTN(SPEC)(random_graph(CONFIG))
    unchanged(lambda: export(graph, tmp_path / "onnx", profile="ort", overwrite=True))


def test_what_is_asked_for_by_name_is_put_back() -> None:
    before = process_state()
    with tc.keep_memory(), stop_on_sigterm():
        pass
    assert process_state() == before
