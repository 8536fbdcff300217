"""The commands and programs of docs/deploy.md, word for word and in order, as far as a Linux machine goes.

`smollm2-135m` is a small random model of shapes that every profile takes. What needs a device, or another system's
tools, is left out by name.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinycompress.checkpoints import checkpoint
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"
RUNTIMES = ROOT / "export" / "runtimes"
ELSEWHERE = ("scp", "ssh", "pip", "./build.sh")  # the Pi, the device, and a build of ONNX Runtime
spec = importlib.util.spec_from_file_location("docs_blocks", ROOT / "tests" / "house" / "test_docs.py")
docs = importlib.util.module_from_spec(spec)
sys.modules["docs_blocks"] = docs
spec.loader.exec_module(docs)


def model() -> Graph:
    config = Config(
        vocab_size=320,
        hidden_size=128,
        head_dim=64,
        layers=(Layer(4, 2, 256),) * 2,
        max_position=1024,
        tie_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    norms = {name: torch.ones(shape) for name, shape in shapes(config).items() if "norm" in name}
    return Graph.random(config, 0, std=0.1).replace(weights=norms, tokenizer=docs.byte_tokenizer())


def lines() -> list[str]:
    shown = [block.code.replace("\\\n", " ") for block in docs.blocks(PAGE) if block.language == "sh" and block.runs]
    return [line for code in shown for line in code.splitlines() if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder in which every command of the page has run."""
    from typer.testing import CliRunner

    from tinycompress.cli.main import app

    folder = tmp_path_factory.mktemp("deploy")
    load = checkpoint.load
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = model()
        for name, module in list(sys.modules.items()):
            if name.startswith("tinycompress") and getattr(module, "load", None) is load:
                patch.setattr(
                    module, "load", lambda source, *a, **k: small if source == "smollm2-135m" else load(source, *a, **k)
                )
        for line in lines():
            words = shlex.split(line)
            assert words[0] == "tinycompress", line
            if "openvino-npu" in words and not (RUNTIMES / "openvino" / ".venv" / ".installed").is_file():
                words.append("--no-verify")
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}: {result.output}"
    return folder


@pytest.mark.slow
def test_every_command_makes_what_it_names(made):
    outputs = [shlex.split(line)[-1] for line in lines()]
    assert {"small", "small-onnx", "small-mobile", "small-web", "small-lpbq", "small-qnn", "small-npu"} <= set(outputs)
    assert all((made / output).is_dir() for output in outputs)
    assert (made / "small-mobile" / "model.required_operators.config").is_file()


@pytest.mark.slow
def test_the_program_for_the_pi(made, monkeypatch, capsys):
    og = pytest.importorskip("onnxruntime_genai")
    monkeypatch.chdir(made)
    [block] = [block for block in docs.blocks(PAGE) if block.language == "python"]
    space: dict = {}
    exec(compile(block.code, str(PAGE), "exec"), space)
    assert capsys.readouterr().out.strip()
    sequence = space["generator"].get_sequence(0).tolist()
    prompt = docs.byte_tokenizer().encode("Once upon a time", add_special_tokens=True)
    assert sequence[: len(prompt)] == prompt and len(sequence) > len(prompt) and og.__version__


@pytest.mark.slow
@pytest.mark.runtime
def test_the_lines_for_the_browser(made):
    """In Node, which reads the same folder with the same library."""
    modules = RUNTIMES / "transformers-js" / "node_modules"
    if not modules.is_dir() or shutil.which("node") is None:
        pytest.skip("transformers.js is not installed (make runtime NAME=transformers-js)")
    [block] = [block for block in docs.blocks(PAGE) if block.language == "js"]
    (made / "page.mjs").write_text(block.code)
    (made / "node_modules").symlink_to(modules)
    done = subprocess.run(["node", "page.mjs"], cwd=made, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
