"""The form of experiments: a killed run keeps what it found, and a rerun under the same protocol takes up from there."""

import contextlib
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import form
from conftest import random_graph

from tinycompress.checkpoint import load
from tinycompress.evaluate import Interval
from tinycompress.graph import Config, Layer

SETTINGS = ("at 4 bits", "at 3 bits", "at 2 bits")


class Killed(Exception):
    pass


@pytest.fixture
def measure(shared, tmp_path, monkeypatch):
    """Runs an experiment of three settings, that dies before the one at index `dies`; returns the settings it measured."""
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
                yield form.Finding(f"{setting} (perplexity {len(measured)})", "–", Interval(i, i - 1, i + 1), "> 0", i > 1)

        options = ["--model", str(shared / "models/stories260K"), "--windows", "1", "--samples", "1", "--seeds", "1", *argv]
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq_closure", "weighted_grid", "error_propagation", "awq_gqa_fold", "rotation_w4a8", "two_bit"])
def test_the_quantization_experiments_run(name, shared, tmp_path, monkeypatch, capsys):
    tokenizer = load(shared / "models/stories260K").tokenizer
    config = Config(vocab_size=512, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 128),) * 2, max_position=512)
    graph = random_graph(config).replace(tokenizer=tokenizer)
    monkeypatch.setattr(form, "HERE", tmp_path)
    monkeypatch.setattr(form, "load", lambda *_, **__: graph)
    experiment = importlib.import_module(name)
    form.run(getattr(experiment, name), experiment.__doc__, ["--quick"])
    out = capsys.readouterr().out
    assert out.count("hold") >= 2 and "nan" not in out and not list(tmp_path.iterdir())
