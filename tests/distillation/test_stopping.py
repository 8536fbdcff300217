"""A run stops when it is asked to, and only then: the library installs no signal handler of its own."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from tinycompress.distillation.distill import Distill
from tinycompress.distillation.stopping import Stopped, stop_on_sigterm
from tinycompress.distillation.training import Training
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph

CONFIG = Config(vocab_size=64, hidden_size=32, head_dim=16, layers=(Layer(2, 1, 48),), max_position=32)


def distill(**options):
    tokens = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    return Distill(tokens, Graph.random(CONFIG, 1, std=0.2), Training(steps=6, batch=2), **options)


def test_asked_after_every_step_and_resumed_to_the_same_bytes(tmp_path):
    student = Graph.random(CONFIG, 2, std=0.2)
    asked = []

    def stop():
        asked.append(signal.getsignal(signal.SIGTERM))
        return len(asked) == 3

    with pytest.raises(Stopped, match=r"after step 3.*goes on from there") as stopped:
        distill(work=tmp_path / "work", stop=stop)(student)
    assert stopped.value.step == 3 and stopped.value.work == tmp_path / "work"
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step-00000003"]
    assert set(asked) == {signal.getsignal(signal.SIGTERM)}  # the caller's handler, while it trains too
    resumed = distill(work=tmp_path / "work")(student)
    unbroken = distill()(student)
    assert resumed.fingerprint() == unbroken.fingerprint()


def test_without_a_work_folder_nothing_is_kept():
    with pytest.raises(Stopped, match="nothing is kept"):
        distill(stop=lambda: True)(Graph.random(CONFIG, 2, std=0.2))


def test_stopping_is_no_part_of_what_the_pass_is():
    plain, stopping = distill(), distill(stop=lambda: False)
    assert repr(plain) == repr(stopping) and plain == stopping
    student = Graph.random(CONFIG, 2, std=0.2)
    assert plain.key(student) == dataclasses.replace(stopping, log="somewhere").key(student)


def test_a_signal_is_delivered_when_the_block_is_left():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(SystemExit) as exit_, stop_on_sigterm() as stop:
            assert not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop() and received == []
        assert received == [signal.SIGTERM] and exit_.value.code == 128 + signal.SIGTERM
        received.clear()
        with pytest.raises(SystemExit), stop_on_sigterm():
            raise Stopped(1, None)  # another process of the run was asked
        assert received == [signal.SIGTERM]
        with stop_on_sigterm():
            pass
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
