"""The loop: schedule, order, logs, early stop, NaN, and a run that is killed and goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints import checkpoint
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.lora import LoRA
from tinycompress.distillation.training import Training
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import perplexity
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec

LAYERS = (Layer(2, 1, 48), Layer(0, 0, 32), Layer(2, 2, 0))
CONFIG = Config(vocab_size=64, hidden_size=32, head_dim=16, layers=LAYERS, max_position=32, tie_embeddings=True)


def pair():
    return Graph.random(CONFIG, 1, std=0.2), Graph.random(CONFIG, 2, std=0.2)


def windows(n=10, seed=0):
    return torch.randint(64, (n, 16), generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


# schedule and order


def test_the_rate_rises_and_follows_a_cosine():
    t = Training(steps=100, lr=1.0, warmup=10, floor=0.1)
    rates = [t.rate(s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-9) and 0.1 < rates[99] < 0.101
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert Training(steps=100, lr=1.0, warmup=0.1, floor=0.1).rate(4, 100) == pytest.approx(0.5)
    assert Training(steps=2, lr=1.0, warmup=0).rate(0, 2) == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.integers(1, 9), st.integers(0, 3))
def test_every_epoch_shows_every_window_once(n, batch, seed):
    t = Training(steps=1, batch=batch, seed=seed)
    seen = torch.cat([t.windows_of(s, n) for s in range(2 * n)])  # 2 · batch epochs
    for epoch in seen.split(n):
        assert sorted(epoch.tolist()) == list(range(n))


def test_budgets():
    assert Training(steps=7).total_steps(100, 16) == 7
    assert Training(epochs=2, batch=8).total_steps(10, 16) == 3
    assert Training(tokens=1000, batch=8).total_steps(10, 16) == 8
    for bad, words in (
        ({}, "exactly one of the three"),
        ({"steps": 1, "epochs": 1}, "exactly one of the three"),
        ({"steps": 0}, "Training.steps"),
        ({"steps": 1, "precision": "half"}, "auto | float32 | bfloat16"),
        ({"steps": 1, "patience": 2}, "eval_every"),
        ({"steps": 1, "lr": float("nan")}, "Training.lr"),
        ({"steps": 1, "floor": 2}, "Training.floor"),
    ):
        with pytest.raises(InputError, match=words.replace("|", r"\|")):
            Training(**bad)


# logs and early stop


def test_the_log_has_a_line_a_step(tmp_path):
    teacher, student = pair()
    training = Training(steps=4, batch=2, eval_every=2)
    Distill(windows(), teacher, training, held_out={"a": windows(3, 1), "b": windows(2, 2)}, log=tmp_path)(student)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [set(line.get("perplexity", {})) for line in lines] == [{"a", "b"}, set(), {"a", "b"}, set(), {"a", "b"}]
    assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "peak_memory_mb"} <= set(lines[1])
    assert lines[4]["tokens"] == 4 * 2 * 16 and lines[2]["lr"] == training.rate(1, 4)


def test_tensorboard_shows_what_the_lines_say(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher, student = pair()
    Distill(windows(), teacher, Training(steps=3, batch=2), held_out={"a": windows(3, 1)}, log=tmp_path)(student)
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_mb"):
        assert [(e.step, e.value) for e in board.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines[1:]
        ]
    assert [e.value for e in board.Scalars("perplexity/a")] == pytest.approx(
        [lines[i]["perplexity"]["a"] for i in (0, 3)], rel=1e-6
    )


def test_early_stop_gives_the_best_weights_back(tmp_path):
    """Trained on labels of one text with far too high a rate, the held-out loss of another only rises."""
    _, student = pair()
    training = Training(steps=40, lr=0.3, batch=2, eval_every=1, patience=3)
    pass_ = Distill(windows(), None, training, losses=(Loss("ce"),), held_out=windows(4, 7), log=tmp_path)
    out = pass_(student)
    values = [
        json.loads(line)["perplexity"]["held_out"] for line in (tmp_path / "train.jsonl").read_text().splitlines()
    ]
    assert len(values) == values.index(min(values)) + 1 + 3 < 40
    assert perplexity(out.module(), windows(4, 7)).value == pytest.approx(min(values), rel=1e-4)


# trouble


def test_a_nan_stops_and_keeps_the_state_before_it(tmp_path, monkeypatch):
    import tinycompress.distillation.objective as where

    teacher, student = pair()
    pass_ = Distill(windows(), teacher, Training(steps=5, lr=1e-2, batch=2), work=tmp_path / "work")
    plain, calls = where.fused_loss, []

    def bad(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(where, "fused_loss", bad)
    index = pass_.training.windows_of(3, 10).tolist()
    with pytest.raises(InputError) as error:
        pass_(student)
    assert f"step 4, windows {index}" in str(error.value) and "state after step 3" in str(error.value)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["step-00000003"]
    monkeypatch.setattr(where, "fused_loss", plain)
    assert same(pass_(student), dataclasses.replace(pass_, work=None)(student))


def test_the_state_of_another_run_is_refused(tmp_path):
    teacher, student = pair()
    Distill(windows(), teacher, Training(steps=1, batch=2), work=tmp_path)(student)
    with pytest.raises(InputError, match="another model, data or settings"):
        Distill(windows(), teacher, Training(steps=1, batch=2, lr=1.0), work=tmp_path)(student)
    with pytest.raises(InputError, match="another model, data or settings"):
        Distill(windows(seed=1), teacher, Training(steps=1, batch=2), work=tmp_path)(student)


# killed and resumed

RUN = """
import sys, torch
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.distill import Distill, HiddenLoss
from tinycompress.distillation.schedule import Ramp
from tinycompress.distillation.training import Training
from tinycompress.distillation.stopping import stop_on_sigterm
from tinycompress.distillation.lora import LoRA
from tinycompress.quantization.rtn import RTN
from tinycompress.graph.quant_tensor import QuantSpec
torch.set_num_threads(1)
folder, work, out, how = sys.argv[1:]
tokens = torch.randint(64, (10, 16), generator=torch.Generator().manual_seed(0))
ramps = {"losses": (Loss("kl", Ramp(0.2, 1, "cosine")), Loss("ce", Ramp(0.5, 0))),
         "hidden": (HiddenLoss("mse", Ramp(0, 1)), HiddenLoss("relation", Ramp(1, 0), last=1))}
extra = {"plain": {}, "ramps": ramps, "lora": {"lora": LoRA(2)}, "scales": {"scales": True},
         "learn": {"fake_quant": QuantSpec(4, 16), "grid": "learn"}}[how]
training = Training(steps=25, lr=1e-2, batch=4, micro_batch=3, save_every=4, eval_every=7, patience=50)
student = load(folder + "/student")
if how == "scales":
    student = RTN(QuantSpec(3, 16))(student)
with stop_on_sigterm() as stop:
    pass_ = Distill(tokens, load(folder + "/teacher"), training, held_out=tokens[:2], work=work, log=work,
                    stop=stop, **extra)
    student = pass_(student)
save(student, out)
"""


def start(folder, work, how):
    """A run in a process of its own; its errors go to `work`.err."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with open(f"{work}.err", "w") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder), str(work), f"{work}-out", how], env=env, stderr=errors
        )


def stop_at(step, number, work, process):
    """Sends the signal as soon as the state of `step`, or a later one, is there."""
    while not any(int(p.name[5:]) >= step for p in work.glob("step-*")):
        assert process.poll() is None, Path(f"{work}.err").read_text()
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == -number, Path(f"{work}.err").read_text()


def log_of(work):
    lines = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("lr"), line.get("perplexity")) for line in lines]


@pytest.mark.parametrize(
    "how, signals",
    [
        ("ramps", [(8, signal.SIGKILL)]),
        pytest.param("plain", [(4, signal.SIGTERM), (12, signal.SIGKILL)], marks=pytest.mark.slow),
        pytest.param("learn", [(4, signal.SIGKILL), (12, signal.SIGTERM)], marks=pytest.mark.slow),
        pytest.param("scales", [(4, signal.SIGKILL), (8, signal.SIGTERM)], marks=pytest.mark.slow),
        pytest.param("lora", [(4, signal.SIGKILL), (8, signal.SIGKILL)], marks=pytest.mark.slow),
    ],
)
def test_killed_it_ends_at_the_same_bytes(tmp_path, how, signals):
    for name, graph in zip(("teacher", "student"), pair()):
        checkpoint.save(graph, tmp_path / name)
    one, two = tmp_path / "one", tmp_path / "two"
    unbroken = start(tmp_path, one, how)
    for step, number in signals:
        stop_at(step, number, two, start(tmp_path, two, how))
        assert not Path(f"{two}-out").exists()
    resumed = start(tmp_path, two, how)
    for process, work in ((unbroken, one), (resumed, two)):
        assert process.wait() == 0, Path(f"{work}.err").read_text()
    for file in ("model.safetensors", "config.json"):
        assert Path(f"{two}-out", file).read_bytes() == Path(f"{one}-out", file).read_bytes()
    assert log_of(one) == log_of(two)


def test_a_finished_run_is_not_run_again(tmp_path):
    teacher, student = pair()
    for extra in ({}, {"lora": LoRA(2)}, {"fake_quant": QuantSpec(4, 16), "grid": "learn"}):
        pass_ = Distill(
            windows(), teacher, Training(steps=3, lr=1e-2, batch=2), work=tmp_path / str(len(str(extra))), **extra
        )
        first = pass_(student)
        before = time.perf_counter()
        again = pass_(student)
        assert time.perf_counter() - before < 5
        for name in first.weights:
            a, b = first.dense().weights[name], again.dense().weights[name]
            assert torch.equal(a, b)
