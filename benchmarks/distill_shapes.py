"""The Llama 2 7B → TinyLlama command lines at their real widths, on a machine that holds a few of the layers.

    python benchmarks/distill_shapes.py [--teacher-layers 1] [--student-layers 1 2] [--seq-len 64] [--work FOLDER]
        [--json]

Writes checkpoints of both models' shapes (bfloat16, random weights, a vocabulary of 32,000 words) with so many of their
32 and 22 layers, and runs `tinycompress cache-teacher --streamed`, then `tinycompress distill --cache`, two steps of
one window with all weights, for each number of student layers: the peak resident memory of each command and the bytes
it leaves. Both are sums of a part for the embedding and the head and one for each layer, so two numbers of layers give
the figure for all of them: "extrapolated" is that straight line, not a measurement. Times are not recorded; what N
tokens cost in GPU hours is the operations (benchmarks/distill.py) over the rate that a card reaches, which only a card
can tell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from tinycompress.checkpoints.checkpoint import save
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.evaluation.perplexity import environment
from tinycompress.graph.config import Config
from tinycompress.graph.graph import Graph
from tinycompress.graph.presets import LLAMA_2_7B, TINYLLAMA_1_1B


def checkpoint(config: Config, layers: int, folder: Path) -> Path:
    """A checkpoint with the first `layers` layers of the shapes, and random weights."""
    if not folder.exists():
        words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        few = dataclasses.replace(config, layers=config.layers[:layers])
        graph = Graph.random(few, std=0.02, dtype=torch.bfloat16)
        save(Graph(few, graph.weights, (), Tokenizer(words)), folder)
    return folder


def run(*command: Any) -> dict[str, Any]:
    """The peak resident MB of a `tinycompress` command, which must succeed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tinycompress.cli", *map(str, command)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"tinycompress {command[0]} ended with {process.returncode}")
    return {"command": command[0], "peak_mb": round(usage.ru_maxrss / 1024)}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    text = work / "text.txt"
    text.write_text(" ".join(f"w{random.Random(i).randrange(32000)}" for i in range(2 * args.seq_len)))
    teacher = checkpoint(LLAMA_2_7B, args.teacher_layers, work / f"teacher-{args.teacher_layers}")
    common = ["--data", text, "--seq-len", args.seq_len]
    cache = work / "cache"
    rows = [run("cache-teacher", teacher, "--streamed", "--windows", 2, *common, "-o", cache)]
    rows[0] |= {
        "layers": args.teacher_layers,
        "checkpoint_bytes": size(teacher),
        "bytes_a_token": size(cache) / (2 * args.seq_len),
    }
    for layers in args.student_layers:
        student, state, out = (
            checkpoint(TINYLLAMA_1_1B, layers, work / f"student-{layers}"),
            work / f"state-{layers}",
            work / f"out-{layers}",
        )
        steps = ["--steps", 2, "--batch", 1, "--held-out", text, *common]
        row = run("distill", student, "--cache", cache, *steps, "--work", state, "-o", out, "--overwrite")
        rows.append(row | {"layers": layers, "checkpoint_bytes": size(student), "state_bytes": size(state)})
    return {"rows": rows, "extrapolated": extrapolate(rows[1:], TINYLLAMA_1_1B.n_layers)}


def extrapolate(rows: list[dict[str, Any]], layers: int) -> dict[str, Any] | None:
    """The straight line through the first and the last row, at all layers."""
    first, last = rows[0], rows[-1]
    if first["layers"] == last["layers"]:
        return None
    names = ("peak_mb", "checkpoint_bytes", "state_bytes")
    slopes = {name: (last[name] - first[name]) / (last["layers"] - first["layers"]) for name in names}
    return {"layers": layers} | {name: round(first[name] + slopes[name] * (layers - first["layers"])) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-layers", type=int, default=1)
    parser.add_argument("--student-layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument(
        "--work", type=Path, help="where checkpoints, cache and states go, and stay (default: a temporary folder)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = measure(args, work)
    if args.json:
        protocol = {k: v for k, v in vars(args).items() if k not in ("work", "json")}
        print(json.dumps({"protocol": protocol, **result, "environment": environment()}, indent=2))
        return
    for row in result["rows"]:
        print(
            f"{row['command']:14s} {row['layers']} layers  "
            + "  ".join(f"{k} {v:,.0f}" for k, v in row.items() if k not in ("command", "layers"))
        )
    if result["extrapolated"]:
        print("extrapolated   " + "  ".join(f"{k} {v:,}" for k, v in result["extrapolated"].items()))


if __name__ == "__main__":
    main()
