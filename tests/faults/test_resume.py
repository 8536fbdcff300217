"""A pass that is killed in the middle goes on from its last finished layer, to the bytes of one that was not."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tinycompress as tc
from tinycompress import pipeline
from tinycompress.calibration.walk import Inputs, walk
from tinycompress.checkpoints import unfinished
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.errors import OutputError
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.graph.topology import Feed, feeds

HERE = Path(__file__).parent

TOKENS = torch.randint(128, (8, 16), generator=torch.Generator().manual_seed(0))
SPEC = "w4g16"
MIXED = {"bits": 6, "choices": ("w3g16", "w4g16", "w8g16")}
TUNED = tc.BlockTuning(steps=2, rate=0.0)

# by name: the pass, and the functions that it calls in every layer, of which one is killed at a time
Make = Callable[[Graph], Any]
PASSES: dict[str, tuple[Make, tuple[str, ...]]] = {
    "GPTQ": (lambda graph: tc.GPTQ(TOKENS, SPEC, head=True), ("quantization.gptq.gptq_quantize",)),
    "GPTQ tuned": (
        lambda graph: tc.GPTQ(TOKENS, SPEC, propagate=0.5, tuning=TUNED),
        ("quantization.gptq.gptq_quantize", "quantization.block_tuning.tune"),
    ),
    "AWQ": (lambda graph: tc.AWQ(TOKENS, SPEC, clip=True), ("quantization.awq.awq_scale",)),
    "AWQ fold": (lambda graph: tc.AWQ(TOKENS, SPEC, quantize=False), ("quantization.awq.awq_scale",)),
    "SmoothQuant": (lambda graph: tc.SmoothQuant(TOKENS), ("quantization.smoothquant.peaks",)),
    "AutoRound": (
        lambda graph: tc.AutoRound(TOKENS, graph, tc.BlockTuning(steps=3)),
        ("quantization.block_tuning.tune",),
    ),
    "HQQ": (lambda graph: tc.HQQ("w4g16-asym"), ("quantization.hqq.hqq_quantize",)),
    "RTN": (lambda graph: tc.RTN(SPEC), ("quantization.rtn.rtn_quantize",)),
    "MixedBits": (
        lambda graph: tc.MixedBits(TOKENS, tc.RTN, **MIXED),
        ("model.transformer.Block.ffn", "quantization.mixed_bits._backward", "quantization.rtn.rtn_quantize"),
    ),
    "Prune": (
        lambda graph: tc.Prune(TOKENS, "params=0.8", axes=("ffn", "heads"), multiple_of=16),
        ("pruning.sensitivity._add_fisher", "pruning.axis_statistics.axis_statistics", "pruning.cutting.gram"),
    ),
    "Prune in one shot": (
        lambda graph: tc.Prune(
            TOKENS, "params=0.8", criterion="taylor", multiple_of=16, one_shot=True, refit="bias", allocation="global"
        ),
        ("pruning.sensitivity._gradients", "pruning.axis_statistics.axis_statistics"),
    ),
    "Prune layers": (
        lambda graph: tc.Prune(TOKENS, keep={"layers": 4, "hidden": 48}, multiple_of=16),
        ("pruning.importance.F.cosine_similarity",),
    ),
    "PruneFFN": (lambda graph: tc.PruneFFN(TOKENS, multiple_of=16), ("pruning.prune_ffn.gram",)),
    "Drop": (lambda graph: tc.Drop(TOKENS, 2, "sublayers"), ("pruning.drop._loss",)),
    "Slice": (lambda graph: tc.Slice(TOKENS, 48), ("pruning.slice.gram",)),
}
CALLS = 4  # of such a function in one layer, at most
CASES = [(name, place) for name, (_, places) in PASSES.items() for place in places]


class Killed(Exception):
    pass


class Counted:
    """Stands in for a function, counts its calls, and raises at one of them."""

    def __init__(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        *path, self.name = place.split(".")
        self.owner: Any = importlib.import_module(f"tinycompress.{path[0]}.{path[1]}")
        for part in path[2:]:
            self.owner = getattr(self.owner, part)
        self.call = getattr(self.owner, self.name)
        self.calls = 0
        self.kill_at = 0
        counted = self

        def stand_in(*arguments: Any, **named: Any) -> Any:
            counted.calls += 1
            if counted.calls == counted.kill_at:
                raise Killed
            return counted.call(*arguments, **named)

        monkeypatch.setattr(self.owner, self.name, stand_in)

    def during(self, work: Callable[[], Graph], kill_at: int = 0) -> tuple[Graph | None, int]:
        """What `work` gives, None where it was killed, and how many calls it made."""
        self.calls = 0
        self.kill_at = kill_at
        try:
            return work(), self.calls
        except Killed:
            return None, self.calls - 1


@pytest.fixture(autouse=True)
def at_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0.0)


@pytest.fixture
def graph(nonuniform: Graph) -> Graph:
    return nonuniform


def before(name: str, graph: Graph) -> Graph:
    """What the pass is given."""
    return tc.RTN(SPEC, progress=False)(graph) if name == "AutoRound" else graph


def run(step: Any, graph: Graph, work: Path, **options: Any) -> Graph:
    return pipeline.run(graph, [step], work, progress=False, **options)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_killed_in_a_layer(
    name: str, place: str, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PASSES[name][0](graph)
    given = before(name, graph)
    in_memory = step(given)
    counted = Counted(place, monkeypatch)
    unbroken, total = counted.during(lambda: run(step, given, tmp_path / "unbroken"))
    assert unbroken is not None and unbroken.fingerprint() == in_memory.fingerprint()
    assert total >= 2
    for kill_at in sorted({total // 2, total * 3 // 4, total}):
        work = tmp_path / f"killed at {kill_at}"
        nothing, first = counted.during(lambda: run(step, given, work), kill_at)  # noqa: B023
        assert nothing is None and first == kill_at - 1
        assert kill_at == 1 or [path.suffix for path in work.iterdir() if path.is_dir()] == [".unfinished"]
        resumed, second = counted.during(lambda: run(step, given, work))  # noqa: B023
        assert resumed is not None
        assert resumed.fingerprint() == unbroken.fingerprint() and resumed.history == unbroken.history
        assert first + second <= total + CALLS, f"{first} + {second} calls for {total}"
        assert not list(work.glob("*.unfinished"))


def killed_gptq(
    graph: Graph, work: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int = 11
) -> tuple[Any, Counted, Path]:
    """A GPTQ that was killed, the function that counts its layers' calls, and where it keeps what it had done."""
    step = tc.GPTQ(TOKENS, SPEC, progress=False)
    counted = Counted("quantization.gptq.gptq_quantize", monkeypatch)
    assert counted.during(lambda: run(step, graph, work), kill_at)[0] is None
    (folder,) = work.glob("*.unfinished")
    return step, counted, folder


def test_only_the_last_activations_are_kept(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, folder = killed_gptq(graph, tmp_path, monkeypatch)
    names = sorted(path.name for path in folder.iterdir())
    assert names[-1] == "unfinished.json" and len(names) >= 4
    assert [name for name in names if "live" in name] == [f"{len(names) - 2:05}-live.safetensors"]


@pytest.mark.parametrize("pattern", ["*-live.safetensors", "00001-kept.safetensors", "unfinished.json"])
def test_a_damaged_state_is_named_and_the_pass_starts_again(
    pattern: str, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    step, counted, folder = killed_gptq(graph, tmp_path, monkeypatch)
    (path,) = folder.glob(pattern)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    resumed, calls = counted.during(lambda: run(step, graph, tmp_path))
    whole, all_calls = counted.during(lambda: step(graph))
    assert resumed is not None and whole is not None and resumed.fingerprint() == whole.fingerprint()
    assert calls == all_calls
    assert path.name in capfd.readouterr().err


def test_fresh_forgets_what_was_done(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, counted, _ = killed_gptq(graph, tmp_path, monkeypatch)
    _, calls = counted.during(lambda: run(step, graph, tmp_path, fresh=True))
    assert calls == counted.during(lambda: step(graph))[1]


def test_another_device_or_bar_goes_on(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, counted, _ = killed_gptq(graph, tmp_path, monkeypatch)
    other = dataclasses.replace(step, device="cpu", progress=True)
    _, calls = counted.during(lambda: run(other, graph, tmp_path))
    assert calls < counted.during(lambda: step(graph))[1]


def test_a_walk_that_remembers_by_itself_starts_again(graph: Graph, tmp_path: Path) -> None:
    """A pass of somebody else, whose visitor keeps what it sees where the walk does not know."""
    seen: list[Feed] = []

    @dataclasses.dataclass(frozen=True)
    class Own:
        kill: bool = dataclasses.field(default=False, metadata={"key": False})

        def __call__(self, graph: Graph) -> Graph:
            def visit(feed: Feed, inputs: Inputs) -> None:
                seen.append(feed)
                if self.kill and feed.layer == 3:
                    raise Killed

            walk(graph, TOKENS, visit)
            return graph

    with pytest.raises(Killed):
        run(Own(kill=True), graph, tmp_path)
    assert not list(tmp_path.glob("*.unfinished"))
    seen.clear()
    run(Own(), graph, tmp_path)
    assert seen == list(feeds(graph.config))


def test_a_full_disk_ends_the_saving_and_not_the_pass(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, tensors: Any) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(unfinished, "write_tensors", full)
    step = tc.GPTQ(TOKENS, SPEC, progress=False)
    assert run(step, graph, tmp_path).fingerprint() == step(graph).fingerprint()
    assert capfd.readouterr().err.count("the disk is full") == 1


def test_saves_are_as_rare_as_the_promise_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of 25 seconds: after two of them, for a third would end later than 60 seconds behind the last save; units
    of 100 seconds: after each."""
    now = [0.0]
    saved: list[float] = []
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 60.0)
    monkeypatch.setattr(unfinished.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(unfinished._Store, "_write", lambda self, live: saved.append(now[0]))
    with unfinished.kept_in(tmp_path / "pass"):
        stage = unfinished.open_stage("units", kept={})
        for unit, seconds in enumerate([25.0] * 6 + [100.0] * 2, 1):
            now[0] += seconds
            stage.save(unit)
    assert saved == [50.0, 100.0, 150.0, 250.0, 350.0]


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path) -> None:
    """Every dtype, packed weights, numbers that are not finite, no values at all; and what was taken out is gone."""
    packed = tc.RTN("w3g16-asym", progress=False)(Graph.random(tc.Config(64, 32, 8, (tc.Layer(4, 2, 48),)))).weights
    values: dict[str, Any] = {name: value for name, value in packed.items()}
    values |= {str(kind): torch.arange(6).view(2, 3).to(kind) for kind in (torch.bfloat16, torch.int64, torch.uint8)}
    values |= {"none": torch.zeros(0, 3), "one": torch.tensor(float("nan")), "half": torch.rand(5, 3)[:, 1]}
    gone = {"gone": torch.zeros(3), **values}
    with unfinished.kept_in(tmp_path / "pass"):
        stage = unfinished.open_stage("first", kept=gone)
        stage.save(1)
        del gone["gone"]
        stage.save(2, live=[values["half"]])
    again: dict[str, Any] = {}
    with unfinished.kept_in(tmp_path / "pass"):
        stage = unfinished.open_stage("first", kept=again)
        assert stage.done == 2 and not stage.finished and torch.equal(stage.live["live"][0], values["half"])
        assert unfinished.open_stage("second", kept={}).done == 0
    assert list(again) == list(values)
    for name, value in values.items():
        parts = value.tensors() if isinstance(value, QuantTensor) else {"": value}
        others = again[name].tensors() if isinstance(value, QuantTensor) else {"": again[name]}
        for suffix, tensor in parts.items():
            assert tensor.dtype == others[suffix].dtype
            assert torch.equal(tensor.nan_to_num(7), others[suffix].nan_to_num(7))


PROGRAM = """
import os, signal, sys
import torch
import tinycompress as tc
from tinycompress import pipeline
from tinycompress.checkpoints import unfinished
from tinycompress.quantization import gptq
from test_resume import SPEC, TOKENS
folder, kill_at = sys.argv[1], int(sys.argv[2])
unfinished.SAVE_EVERY = 0.0
quantize, fsync, calls = gptq.gptq_quantize, os.fsync, 0
def counted(call):
    def stand_in(*arguments, **named):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return stand_in
gptq.gptq_quantize, os.fsync = counted(quantize), counted(fsync)
graph = tc.load(folder + "/model")
pipeline.run(graph, [tc.GPTQ(TOKENS, SPEC)], folder + "/work", progress=False)
print(calls)
"""


@pytest.mark.slow
def test_kill_9(graph: Graph, tmp_path: Path) -> None:
    """Before the rounding of a linear, or before the flush of a file, wherever that is."""

    def process(folder: Path, kill_at: int = 0) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
        command = [sys.executable, "-c", PROGRAM, str(folder), str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def result(folder: Path) -> str:
        (step,) = (folder / "work").glob("*-GPTQ-*")
        return load(step).fingerprint()

    whole = tmp_path / "whole"
    save(graph, whole / "model")
    total = int(process(whole).stdout)
    for kill_at in (5, total // 3, total // 2, total - 20, total - 6):
        folder = tmp_path / f"killed at {kill_at}"
        save(graph, folder / "model")
        assert process(folder, kill_at).returncode == -signal.SIGKILL
        done = process(folder)
        assert done.returncode == 0, done.stderr
        assert result(folder) == result(whole), kill_at
        assert kill_at < 10 or int(done.stdout) < total
