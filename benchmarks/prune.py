"""Structured pruning of SmolLM2-135M without retraining: criterion × sparsity, with and without refit, and speed.

    python benchmarks/prune.py --calibration wiki_passages.txt --evaluation wikitext2_raw_test.txt
        [--shares 0.8 0.7 0.5 0.9] [--recipes wanda_sp ours …] [--samples 64] [--windows 16] [--work FOLDER]
        [--no-speed] [--no-times] [--quick] [--table]

Each row is a process of its own, so that its time and peak memory are its own, and is written to results/prune.json as
soon as it is measured; rows that are there already are not run again. Shares are of the non-embedding parameters.

  magnitude … taylor, obs   the criterion alone: the same share of every layer's FFN channels and heads, no compensation
  flap                      its own recipe: one standardized threshold, and the bias that keeps the mean
  … + refit                 the same cut with o_proj and down_proj refitted in closed form
  layers                    block influence (ShortGPT): whole layers
  slice, hidden             hidden width by one PCA rotation, and by Minitron's selection
  wanda_sp, layer by layer  as its authors' code does it: each layer scored on what the pruned layers before it give
  … FFNs only               the same, taking it all from the FFNs
  ours                      `Prune` as it comes, which cuts FFNs, on half of the calibration windows (it runs two
                            streams, at twice the price)
  ours, own target          the same refitted to each linear's own output, on all windows
  ours, heads too           the same as ours, with the query heads under the same budget

All but the last four need the whole model's statistics alone, whatever the share: they are collected once, by a process
of its own, into --work (a folder, about 1.1 GB, that may be thrown away afterwards). Such a row's seconds are the
collection's and its own, its peak memory the larger of the two.

Perplexity: non-overlapping windows of 2048 tokens, tokenized once, no BOS. Speed, after all rows and on a quiet
machine: a model of the row's shapes with random weights, exported for ONNX Runtime in float32, by turns with the
exported whole model; medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from prune_recipes import (
    COLLECT,
    RECIPES,
    Recipe,
)
from prune_report import plot, table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load
from tinycompress.evaluation.perplexity import environment, perplexity, tokens_per_second
from tinycompress.files import read_json, write_json, write_text
from tinycompress.graph.config import Layer
from tinycompress.graph.graph import Graph
from tinycompress.model.cpu_memory import keep_memory

RESULTS = Path(__file__).parent / "results" / "prune.json"
SHARES = (0.8, 0.7, 0.5, 0.9)
SPEED = ("ours", "layers", "hidden")  # one row for each way a model gets smaller: width, depth, stream
OPTIONS = ("model", "calibration", "evaluation", "samples", "windows")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def collector(args: argparse.Namespace, kind: str) -> None:
    """Writes one of COLLECT into the work folder, with its seconds and peak memory."""
    graph, calibration = opened(args)
    started = time.perf_counter()
    found = COLLECT[kind](graph, calibration)
    cost = {"seconds": time.perf_counter() - started, "peak_mb": peak_mb(), "positions": calibration.numel()}
    draft = args.work / f"{kind}.safetensors.tmp-{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, draft)
    draft.replace(args.work / f"{kind}.safetensors")
    write_json(args.work / f"{kind}.json", cost | {"protocol": protocol(args)})


def opened(args: argparse.Namespace) -> tuple[Graph, Tensor]:
    graph = load(args.model, dtype=torch.float32)
    return graph, data.tokens(args.calibration, graph.tokenizer, args.samples, min(1024, graph.config.max_position))


def worker(args: argparse.Namespace) -> None:
    """One row as a line of JSON."""
    name, share = args.worker.rsplit("@", 1)
    graph, calibration = opened(args)
    evaluation = data.tokens(
        args.evaluation, graph.tokenizer, args.windows, min(2048, graph.config.max_position), split="test"
    )
    recipe = RECIPES.get(name, Recipe(lambda graph, *_: graph))
    costs = [read_json(args.work / f"{kind}.json") for kind in recipe.reads]
    started = time.perf_counter()
    found = {n: t for kind in recipe.reads for n, t in load_file(args.work / f"{kind}.safetensors").items()}
    out = recipe.cut(graph, float(share), calibration, found)
    seconds = time.perf_counter() - started + sum(cost["seconds"] for cost in costs)
    peak = max([peak_mb(), *(cost["peak_mb"] for cost in costs)])
    del found
    result = perplexity(out.module(), evaluation)
    row: dict[str, Any] = {
        "recipe": name,
        "share": float(share),
        "kept": out.config.n_body_params / graph.config.n_body_params,
        "perplexity": result.value,
        "nll": result.nll.tolist(),
        "seconds": None if args.no_times else seconds,
        "peak_mb": peak,
        "layers": " ".join(f"{layer.n_heads}/{layer.n_kv_heads}/{layer.ffn_dim}" for layer in out.config.layers),
        "hidden": out.config.hidden_size,
        "pass": out.history[-1] if out.history else "",
        "machine": environment()["machine"],
    }
    print(json.dumps(row), flush=True)


def speeds(args: argparse.Namespace) -> None:
    """Adds the speed of every SPEED row that has none."""
    graph = load(args.model, dtype=torch.float32)
    for name, share in ((name, share) for share in args.shares for name in SPEED):
        found = measured(args)
        row = next((row for row in found["rows"] if (row["recipe"], row["share"]) == (name, share)), None)
        if row and "speed" not in row:
            layers = tuple(Layer(*map(int, layer.split("/"))) for layer in row["layers"].split())
            row["speed"] = speed(graph, Graph.random(replace(graph.config, layers=layers, hidden_size=row["hidden"])))
            tqdm.write(
                f"{name} at {share}: prefill × {row['speed']['prefill_ratio']:.2f}, decode × "
                f"{row['speed']['decode_ratio']:.2f}"
            )
            write_json(RESULTS, found)


def speed(whole: Graph, pruned: Graph, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of the pruned model in ONNX Runtime, float32, and as ratios to the whole one measured in turns.
    What the weights are makes no difference to it."""
    from tinycompress.export import OrtModel, export

    ids = torch.arange(256)[None] % whole.config.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for name, graph in (("whole", whole), ("pruned", pruned)):
            export(graph, Path(folder) / name, check=False)
            models.append(OrtModel(Path(folder) / name))
        prefill = [[tokens_per_second(m, ids, repeats=1) for m in models] for _ in range(rounds)]
        decode = [[m.tokens_per_second() for m in models] for _ in range(rounds)]
    return {
        "prefill": median(b for _, b in prefill),
        "prefill_ratio": median(b / a for a, b in prefill),
        "decode": median(b for _, b in decode),
        "decode_ratio": median(b / a for a, b in decode),
        "machine": environment()["machine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on (default: pydoc)")
    parser.add_argument("--evaluation", default="pydoc", help="text to evaluate on, its test split (default: pydoc)")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        default=SHARES,
        help="parameters kept, in this order (default: 0.8 0.7 0.5 0.9)",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=list(RECIPES),
        default=list(RECIPES),
        metavar="RECIPE",
        help="rows (default: all)",
    )
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 1024 tokens (default: 64)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 2048 tokens (default: 16)")
    parser.add_argument("--no-speed", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test: two windows of each, one share, nothing written"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the results so far, and draw the plot")
    parser.add_argument(
        "--no-times", action="store_true", help="record no seconds: for a machine that does other work as well"
    )
    parser.add_argument(
        "--work", type=Path, help="where shared statistics are kept between runs (default: a temporary folder)"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--collector", choices=list(COLLECT), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.collector:
        return collector(args, args.collector)
    if args.table:
        return report()
    if args.quick:
        args.samples = args.windows = 2
        args.shares = [0.8]
    todo = [("float", 1.0), *((name, share) for share in args.shares for name in args.recipes)]
    with tempfile.TemporaryDirectory() as temporary:
        args.work = args.work or Path(temporary)
        args.work.mkdir(parents=True, exist_ok=True)
        for name, share in tqdm(todo, desc="rows", unit="row"):
            if not args.quick and any((row["recipe"], row["share"]) == (name, share) for row in measured(args)["rows"]):
                continue
            if not all(ready(args, kind) for kind in (RECIPES[name].reads if name in RECIPES else ())):
                tqdm.write(f"{name}: its statistics failed, left out")
                continue
            ran = run(args, "--worker", f"{name}@{share}")
            if ran.returncode:
                tqdm.write(f"{name} at {share}: failed, left out")
                continue
            row = json.loads(ran.stdout.splitlines()[-1])
            tqdm.write(
                f"{name} at {share}: perplexity {row['perplexity']:.2f}, {row['kept']:.3f} kept, "
                f"{row['peak_mb']:.0f} MB"
            )
            if not args.quick:
                found = measured(args)
                write_json(RESULTS, found | {"rows": [*found["rows"], row], "environment": environment()})
    if not args.quick:
        if not args.no_speed:
            speeds(args)
        report()


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What the results file has by now: other runs may write to it as well."""
    found: dict[str, Any] = read_json(RESULTS) if RESULTS.exists() else {"protocol": protocol(args), "rows": []}
    if found["protocol"] != protocol(args):
        raise SystemExit(
            f"error: {RESULTS} was measured with {found['protocol']}, not {protocol(args)}: move it away first"
        )
    return found


def run(args: argparse.Namespace, what: str, value: str) -> subprocess.CompletedProcess[str]:
    options = [f"--{o}={getattr(args, o)}" for o in (*OPTIONS, "work")]
    command = [sys.executable, __file__, what, value, *options, *["--no-times"] * args.no_times]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True)


def ready(args: argparse.Namespace, kind: str) -> bool:
    """Whether the statistics are there, collected now if need be."""
    record = args.work / f"{kind}.json"
    if record.exists() and read_json(record)["protocol"] == protocol(args):
        return True
    return run(args, "--collector", kind).returncode == 0


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Only names are recorded of data given by path: where a text lies on somebody's disk says nothing about it."""
    return {o: Path(v).name if isinstance(v := getattr(args, o), str) else v for o in OPTIONS}


def report() -> None:
    """results/prune.md, also printed: the table, what our recipe loses against Wanda-sp, and speeds; and
    results/prune.png."""
    found = read_json(RESULTS)
    rows = {(row["recipe"], row["share"]): row for row in found["rows"]}
    text = "\n".join(table(rows, found["protocol"], RECIPES))
    print(text)
    write_text(RESULTS.with_suffix(".md"), text + "\n")
    plot(rows, rows["float", 1.0]["perplexity"], RESULTS.with_suffix(".png"), RECIPES)


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()
