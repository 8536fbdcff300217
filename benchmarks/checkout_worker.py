"""The worker of compare_checkouts.py: computes values (checkout_checks.py) and times tasks in one checkout.

It runs under that checkout's interpreter. Lines of standard input are "check NAME" and "time NAME"; every answer is one
JSON value on a line of standard output: values by name, or seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from checkout_checks import CHECKS, windows

if TYPE_CHECKING:
    from tinycompress import Graph


@cache
def timed_graph(layers: int) -> Graph:
    """The first layers of SmolLM2-135M's shape, with random weights and a small vocabulary."""
    from tinycompress import SMOLLM2_135M, Graph

    config = dataclasses.replace(SMOLLM2_135M, layers=SMOLLM2_135M.layers[:layers], vocab_size=4096)
    return Graph.random(config, 0)


def gptq() -> None:
    from tinycompress import GPTQ, QuantSpec

    GPTQ(windows(8, 512, 4096), QuantSpec.parse("w4g64"))(timed_graph(3))


def prune() -> None:
    from tinycompress import Prune

    Prune(windows(8, 512, 4096), "params=0.8")(timed_graph(4))


def distill() -> None:
    from tinycompress import Distill, Training

    Distill(windows(8, 256, 4096), timed_graph(4), Training(steps=6, batch=4))(timed_graph(4))


def forward() -> None:
    import torch

    model = timed_graph(8).module()
    with torch.inference_mode():
        for _ in range(4):
            model(windows(4, 512, 4096))


def decode() -> None:
    timed_graph(8).module().generate(windows(1, 16, 4096), 128)


TIMES: dict[str, Callable[[], None]] = {
    "GPTQ, 3 layers": gptq,
    "Prune, 4 layers": prune,
    "Distill, 6 steps, 4 layers": distill,
    "forward, 8 layers": forward,
    "decode, 8 layers": decode,
}


def seconds(task: Callable[[], None]) -> float:
    """How long a task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def main() -> None:
    import torch

    import tinycompress
    import tinycompress.export

    checkout = Path(sys.argv[1])
    threads = int(sys.argv[2])
    for module in (tinycompress, tinycompress.export):
        if not Path(str(module.__file__)).resolve().is_relative_to(checkout):
            sys.exit(
                f"{module.__name__} is {module.__file__}, not the one of {checkout}: install it there (pip install -e)"
            )
    torch.set_num_threads(threads)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what a pass prints is no answer
    commit = subprocess.check_output(["git", "-C", str(checkout), "rev-parse", "HEAD"], text=True).strip()
    about = {
        "commit": commit,
        "torch": torch.__version__,
        "threads": threads,
        "machine": f"{platform.machine()}, {platform.system()}",
    }
    print(json.dumps(about), file=answers, flush=True)
    kept = contextlib.nullcontext()
    if sys.argv[3] == "kept" and hasattr(tinycompress, "keep_memory"):  # older checkouts keep it unasked
        kept = tinycompress.keep_memory()
    with kept:
        for line in sys.stdin:
            kind, name = line.strip().split(" ", 1)
            answer = CHECKS[name]() if kind == "check" else seconds(TIMES[name])
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
