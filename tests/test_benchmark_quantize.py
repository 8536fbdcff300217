"""The comparison with other libraries in benchmarks/quantize.py, each in a venv of its own
(tests/runtimes/README.md)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "quantize.py"


def benchmark(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", *map(str, arguments)], capture_output=True, text=True, timeout=3000
    )


def test_a_peer_needs_its_python():
    done = benchmark("--peer", "gptqmodel")
    assert done.returncode == 2 and "--peer-python" in done.stderr


@pytest.mark.runtime
@pytest.mark.parametrize(
    "peer, venv", [("gptqmodel", "transformers"), ("llm-compressor", "llm-compressor"), ("auto-round", "auto-round")]
)
def test_a_peer_is_measured_on_the_same_weights_and_tokens(peer, venv, shared):
    """8 bits cost the embedded model nearly nothing, whoever rounds. A smaller model on a text that it cannot read says
    nothing: stories260K gains as much as it loses by any rounding there."""
    python = Path(os.environ.get("TINYCOMPRESS_RUNTIMES", "")).expanduser() / venv / "bin" / "python"
    if not python.is_absolute() or not python.exists():
        pytest.skip(f"no venv {venv!r} (tests/runtimes/README.md, benchmarks/peers)")
    texts = [
        "--calibration",
        shared / "data" / "wiki_passages.txt",
        "--evaluation",
        shared / "data" / "wikitext2_raw_test.txt",
    ]
    common = [*texts, "--spec", "w8g32"]
    whole, theirs = benchmark(*common, "--rows", "float"), benchmark(*common, "--peer", peer, "--peer-python", python)
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    before, after = (float(done.stdout.split(name)[1].split()[0]) for done, name in ((whole, "float"), (theirs, peer)))
    assert before * 0.98 < after < before * 1.02 and after != before
