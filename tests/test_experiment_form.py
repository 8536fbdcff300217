"""The form of experiments: a killed run keeps what it found, and a rerun under the same protocol takes up from
there."""

import contextlib
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import form
from conftest import random_graph

from tinycompress.checkpoints.checkpoint import load
from tinycompress.evaluation.statistics import Interval
from tinycompress.graph.config import Config, Layer

QUANTIZATION = ("gptq_closure", "weighted_grid", "error_propagation", "awq_gqa_fold", "rotation_w4a8", "two_bit")
DISTILLATION = ("kl_or_ce", "forward_or_reverse_kl", "sampled_logits", "order_of_passes", "stable_embedding")
SETTINGS = ("at 4 bits", "at 3 bits", "at 2 bits")


class Killed(Exception):
    pass


@pytest.fixture
def measure(shared, tmp_path, monkeypatch):
    """Runs an experiment of three settings, that dies before the one at index `dies`; returns the settings it
    measured."""
    monkeypatch.setattr(form, "HERE", tmp_path)
    (tmp_path / "results").mkdir()

    def run(*argv, dies=9):
        measured = []

        def experiment(bench):
            for i, setting in enumerate(SETTINGS):
                if kept := bench.kept(setting):
                    yield kept
                    continue
                if i == dies:
                    raise Killed
                measured.append(setting)
                yield form.Finding(
                    f"{setting} (perplexity {len(measured)})", "–", Interval(i, i - 1, i + 1), "> 0", i > 1
                )

        options = [
            "--model",
            str(shared / "models/stories260K"),
            "--windows",
            "1",
            "--samples",
            "1",
            "--seeds",
            "1",
            *argv,
        ]
        with contextlib.suppress(Killed):
            form.run(experiment, "A claim.", options)
        return measured

    return run


def results(folder):
    file = folder / "results" / "test_experiment_form.json"
    return json.loads(file.read_text()) if file.exists() else None


def test_a_killed_run_takes_up_where_it_ended(measure, tmp_path):
    assert measure(dies=1) == ["at 4 bits"]
    assert [f["claim"] for f in results(tmp_path)["findings"]] == ["at 4 bits (perplexity 1)"]
    assert measure() == ["at 3 bits", "at 2 bits"]
    claims = [f["claim"] for f in results(tmp_path)["findings"]]
    assert claims == ["at 4 bits (perplexity 1)", "at 3 bits (perplexity 1)", "at 2 bits (perplexity 2)"]
    assert [f["holds"] for f in results(tmp_path)["findings"]] == [False, False, True]
    assert measure() == []
    assert (tmp_path / "README.md").read_text().count("test_experiment_form.py") >= 3


def test_another_protocol_or_again_measures_everything(measure, tmp_path):
    assert len(measure()) == 3
    assert len(measure("--again")) == 3
    assert measure() == [] and len(measure("--samples", "2")) == 3
    assert results(tmp_path)["protocol"]["samples"] == 2 and "again" not in results(tmp_path)["protocol"]


def test_again_that_dies_leaves_only_what_it_measured(measure, tmp_path):
    measure()
    measure("--again", dies=1)
    assert len(results(tmp_path)["findings"]) == 1


def test_quick_neither_reads_nor_writes(measure, tmp_path):
    assert len(measure("--quick")) == 3 and results(tmp_path) is None
    measure()
    before = results(tmp_path)
    assert len(measure("--quick")) == 3 and results(tmp_path) == before


def test_rows_that_are_no_longer_asked_for_go(measure, tmp_path, monkeypatch):
    measure()
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", SETTINGS[:2])
    assert measure() == [] and len(results(tmp_path)["findings"]) == 2


def test_what_was_trained_is_read_back(shared, tmp_path, monkeypatch):
    """With a work folder the same student is not trained twice; another rate, order or teacher is another one."""
    import distill_form

    tokenizer = load(shared / "models/stories260K").tokenizer
    config = Config(vocab_size=512, hidden_size=32, head_dim=16, layers=(Layer(2, 1, 32),), max_position=256)
    teacher, student = random_graph(config).replace(tokenizer=tokenizer), random_graph(config, 1)
    plain = form.Bench(teacher, "pydoc", None, (0,), 2, True)
    kept = dataclasses.replace(plain, work=tmp_path)
    expected, first = (distill_form.heal(bench, student, 0, teacher=teacher) for bench in (plain, kept))
    assert all(torch.equal(first.weights[n], w) for n, w in expected.weights.items())
    distill_form.heal(kept, student, 0, teacher=teacher, lr=1e-3)
    assert len(list(tmp_path.iterdir())) == 2 and not list(tmp_path.glob("*/step-*"))
    monkeypatch.setattr("tinycompress.distillation.distill.train", lambda *_, **__: pytest.fail("it trained again"))
    again = distill_form.heal(kept, student, 0, teacher=teacher)
    assert all(torch.equal(again.weights[n], w) for n, w in expected.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUANTIZATION, *DISTILLATION])
def test_the_experiments_run(name, shared, tmp_path, monkeypatch, capsys):
    tokenizer = load(shared / "models/stories260K").tokenizer
    config = Config(vocab_size=512, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 128),) * 2, max_position=512)
    graph = random_graph(config).replace(tokenizer=tokenizer)
    monkeypatch.setattr(form, "HERE", tmp_path)
    monkeypatch.setattr(form, "load", lambda *_, **__: graph)
    experiment = importlib.import_module(name)
    form.run(getattr(experiment, name), experiment.__doc__, ["--quick"])
    out = capsys.readouterr().out
    assert out.count("hold") >= 2 and "nan" not in out and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_fine_tune_to_a_longer_context_runs(shared):
    text = str(shared / "data/wikitext2_raw_test.txt")
    command = [
        "context_by_finetuning.py",
        "--model",
        str(shared / "models/stories260K"),
        "--text",
        "self",
        text,
        "--training",
        text,
        "--quick",
    ]
    before = sorted((form.HERE / "results").iterdir())
    done = subprocess.run([sys.executable, *command], cwd=form.HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.count("hold") == 7
        and "nan" not in done.stdout
        and sorted((form.HERE / "results").iterdir()) == before
    )
