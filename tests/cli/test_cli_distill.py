"""`tinycompress distill` and `cache-teacher` on small random models, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from typer.testing import CliRunner

from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.cli.main import app
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.hidden_losses import HiddenLoss
from tinycompress.distillation.schedule import Ramp
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.recipe.losses import parse_hidden, parse_losses


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student of other shapes, a model of another vocabulary, and a text of 40 windows of 16 words."""
    folder = tmp_path_factory.mktemp("distil")
    words = {f"w{i}": i for i in range(32)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "text.txt").write_text(" ".join(f"w{(i * i + i // 7) % 32}" for i in range(640)))
    for name, vocab, layers in (
        ("teacher", 32, (Layer(2, 1, 48),) * 2),
        ("student", 32, (Layer(2, 1, 32),)),
        ("other", 48, (Layer(2, 1, 32),)),
    ):
        config = Config(vocab_size=vocab, hidden_size=32, head_dim=16, layers=layers, max_position=32)
        checkpoint.save(Graph(config, Graph.random(config, 1, std=0.2).weights, (), Tokenizer(backend)), folder / name)
    return folder


def common(made: Path) -> list[object]:
    return [
        "--data",
        made / "text.txt",
        "--held-out",
        made / "text.txt",
        "--seq-len",
        16,
        "--batch",
        4,
        "--steps",
        4,
        "--lr",
        0.01,
    ]


def test_distill_writes_a_model_and_says_what_it_did(made, tmp_path):
    out = tmp_path / "out"
    code, text = run(
        "distill",
        made / "student",
        "--teacher",
        made / "teacher",
        *common(made),
        "--work",
        tmp_path / "work",
        "-o",
        out,
        "--loss",
        "kl+0.5*ce",
    )
    assert code == 0 and "perplexity on text" in text
    graph = checkpoint.load(out)
    assert (
        graph.history[-1].startswith("Distill(training=Training(steps=4")
        and "kind='ce', weight=0.5" in graph.history[-1]
    )
    lines = [json.loads(line) for line in (tmp_path / "work/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and (tmp_path / "work/step-00000004/state.json").exists()


def test_a_cache_stands_in_for_the_teacher_and_a_grid_is_packed(made, tmp_path):
    code, text = run(
        "cache-teacher",
        made / "teacher",
        "--data",
        made / "text.txt",
        "--windows",
        12,
        "--seq-len",
        16,
        "-o",
        tmp_path / "cache",
    )
    assert code == 0 and "for 12 windows of 16 tokens" in text
    options = common(made)
    del options[4:6]  # the window length is the cache's
    code, text = run(
        "distill",
        made / "student",
        "--cache",
        tmp_path / "cache",
        *options,
        "--fake-quant",
        "w4g16",
        "-o",
        tmp_path / "packed",
    )
    assert code == 0, text
    assert isinstance(checkpoint.load(tmp_path / "packed").weights["model.layers.0.mlp.up_proj.weight"], QuantTensor)
    code, text = run(
        "distill", made / "student", "--cache", tmp_path / "cache", *options, "--seq-len", 8, "-o", tmp_path / "no"
    )
    assert code == 2 and "a cache of other tokens" in text
    cached = ["distill", made / "student", "--cache", tmp_path / "cache", *options, "-o", tmp_path / "same"]
    assert run(*cached, "--teacher", made / "teacher")[0] == 0
    code, text = run(*cached[:-1], tmp_path / "no", "--teacher", made / "student")
    assert code == 2 and "one made by another teacher" in text and not (tmp_path / "no").exists()


def test_inner_losses_that_fade_under_a_budget_of_tokens(made, tmp_path):
    options = common(made)
    options[options.index("--steps") : options.index("--steps") + 2] = ["--tokens", 5 * 4 * 16]
    extra = ["--loss", "kl+1:0*ce", "--hidden", "0.5*mse+1:0:cosine*relation+attention", "--relation-heads", 1]
    code, text = run(
        "distill",
        made / "student",
        "--teacher",
        made / "teacher",
        *options,
        *extra,
        "--log",
        tmp_path / "log",
        "-o",
        tmp_path / "out",
    )
    assert code == 0, text
    history = checkpoint.load(tmp_path / "out").history[-1]
    assert (
        "Ramp(start=1.0, end=0.0, shape='cosine'" in history and "kind='attention'" in history and "heads=1" in history
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "log/train.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5]


def test_a_teacher_reads_in_pieces(made, tmp_path):
    command = ["distill", made / "student", "--teacher", made / "teacher", *common(made), "--teacher-context"]
    assert run(*command, 8, "-o", tmp_path / "out")[0] == 0
    assert "teacher_context=8" in checkpoint.load(tmp_path / "out").history[-1]
    code, text = run(*command, 7, "-o", tmp_path / "no")
    assert code == 2 and "a divisor of the windows' 16 tokens" in text


def test_an_early_stop_tells_of_what_it_saved(made, tmp_path):
    options = [*common(made)[:-4], "--steps", 9, "--lr", 1.0, "--warmup", 0, "--eval-every", 1, "--patience", 2]
    code, text = run(
        "distill", made / "student", "--loss", "ce", *options, "--log", tmp_path / "log", "-o", tmp_path / "out"
    )
    values = [
        json.loads(line)["perplexity"]["text"] for line in (tmp_path / "log/train.jsonl").read_text().splitlines()
    ]
    assert code == 0 and values[-1] > min(values) and f"perplexity on text: {values[0]:.3f} → {min(values):.3f}" in text


def test_what_is_refused(made, tmp_path):
    base = ["distill", made / "student", *common(made), "-o", tmp_path / "no"]
    for extra, words in (
        ([], "--teacher and --cache: found neither"),
        (["--teacher", made / "teacher", "--tokens", 100], "exactly one of the three"),
        (["--teacher", made / "teacher", "--hidden", "kl"], "cosine | mse | relation | attention"),
        (["--teacher", made / "teacher", "--hidden", "relation", "--relation-heads", 5], "--relation-heads: found 5"),
        (["--teacher", made / "other"], "a vocabulary of 48 tokens"),
        (["--teacher", made / "teacher", "--seq-len", "99"], "--seq-len: found 99"),
        (["--teacher", made / "teacher", "--loss", "mse"], "kl | reverse_kl"),
        (["--teacher", made / "teacher", "--loss", "x*kl"], "kinds joined by +"),
        (["--teacher", made / "teacher", "--fake-quant", "w9"], "QuantSpec.bits"),
    ):
        code, text = run(*base, *extra)
        assert code == 2 and words in text and not (tmp_path / "no").exists(), text
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    code, text = run(
        "distill",
        made / "student",
        "--teacher",
        made / "teacher",
        "--data",
        tmp_path / "short.txt",
        "--seq-len",
        16,
        "-o",
        tmp_path / "no",
    )
    assert code == 2 and "at least one window of 16" in text


def test_losses_by_name():
    assert parse_losses("kl") == (Loss(),)
    assert parse_losses("0.8*kl+0.2*ce", 2.0) == (Loss("kl", 0.8, 2.0), Loss("ce", 0.2))
    assert parse_losses("1:0.5*kl + 0:1:cosine*ce") == (Loss("kl", Ramp(1, 0.5)), Loss("ce", Ramp(0, 1, "cosine")))
    assert parse_hidden(None) == () and parse_hidden("0.5*cosine+relation", 4) == (
        HiddenLoss("cosine", 0.5),
        HiddenLoss("relation", heads=4),
    )
    for bad in ("", "1:2:linear:3*kl", "1:2:steps*kl", ":*kl"):
        with pytest.raises(InputError):
            parse_losses(bad)
