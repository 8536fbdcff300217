"""The comparison with other libraries in benchmarks/quantize.py, each in a venv of its own (tests/runtimes/README.md)."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinycompress.checkpoint import load, save
from tinycompress.graph import cut

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quantize.py"


def benchmark(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCHMARK), "--quick", *map(str, arguments)], capture_output=True, text=True, timeout=3000)


def test_a_peer_needs_its_python():
    done = benchmark("--peer", "gptqmodel")
    assert done.returncode == 2 and "--peer-python" in done.stderr


@pytest.mark.runtime
@pytest.mark.parametrize("peer, venv", [("gptqmodel", "transformers"), ("llm-compressor", "llm-compressor"), ("auto-round", "auto-round")])
def test_a_peer_is_measured_on_the_same_weights_and_tokens(peer, venv, shared, tmp_path):
    """stories260K with FFNs of whole groups and a context for the benchmark's windows: 4 bits cost it little."""
    python = Path(os.environ.get("TINYCOMPRESS_RUNTIMES", "")).expanduser() / venv / "bin" / "python"
    if not python.is_absolute() or not python.exists():
        pytest.skip(f"no venv {venv!r} (tests/runtimes/README.md, benchmarks/peers)")
    graph = load(shared / "models" / "stories260K")
    for i in range(graph.config.n_layers):
        graph = cut(graph, f"layers.{i}.ffn", range(160))
    model = save(graph.replace(config=dataclasses.replace(graph.config, max_position=2048)), tmp_path / "m")
    texts = ["--calibration", shared / "data" / "wiki_passages.txt", "--evaluation", shared / "data" / "wikitext2_raw_test.txt"]
    common = ["--model", model, *texts, "--spec", "w4g32"]
    whole, theirs = benchmark(*common, "--rows", "float"), benchmark(*common, "--peer", peer, "--peer-python", python)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    before, after = (float(done.stdout.split(name)[1].split()[0]) for done, name in ((whole, "float"), (theirs, peer)))
    assert before * 0.98 < after < before * 1.2 and after != before
