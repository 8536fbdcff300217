"""What the tests of the command line share: small models in folders, and runs of a command."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from tinycompress.calibration import data
from tinycompress.checkpoints import checkpoint
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.cli.main import app
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph

UNIFORM = Config(
    vocab_size=300, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 128),) * 2, max_position=64, eos_token_id=0
)


MIXED = Config(
    vocab_size=300,
    hidden_size=64,
    head_dim=16,
    layers=(Layer(4, 2, 128), Layer(4, 2, 128), Layer(2, 1, 64)),
    max_position=64,
)


CALIBRATE = ("--samples", "4", "--seq-len", "32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens, trained on the text that the tests evaluate."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([data.text("pydoc")[:20000]], trainer)
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder with the models `uniform` and `mixed`, and `onnx`, the first one quantized and exported."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in {"uniform": UNIFORM, "mixed": MIXED}.items():
        checkpoint.save(Graph(config, Graph.random(config, seed=1, std=0.1).weights, (), tokenizer), folder / name)
    run("compress", folder / "uniform", "--quantize", "w4g32", "--quantize-method", "rtn", "-o", folder / "small")
    run("export", folder / "small", "--profile", "ort", "-o", folder / "onnx")
    return folder


def invoke(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def run(*args: object) -> str:
    code, out, err = invoke(*args)
    assert code == 0, err
    return out


def refused(*args: object, output: Path | None = None, code: int = 2) -> str:
    """The one error line (progress bars may stand before it); nothing of the output folder may be there."""
    before = sorted(output.parent.iterdir()) if output else []
    got, out, err = invoke(*args, *(("-o", output) if output else ()))
    assert got == code, (out, err)
    assert err.count("error: ") == 1 and err.splitlines()[-1].startswith("error: ")
    if output:
        assert sorted(output.parent.iterdir()) == before
    return err
