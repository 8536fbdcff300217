"""Structured pruning of SmolLM2-135M without retraining: criterion × sparsity, with and without refit, and speed.

    python benchmarks/prune.py --calibration wiki_passages.txt --evaluation wikitext2_raw_test.txt
        [--shares 0.9 0.8 0.7 0.5] [--recipes wanda_sp ours …] [--samples 64] [--windows 16] [--no-speed] [--quick] [--table]

Each row is a process of its own, so that its time and peak memory are its own, and is written to results/prune.json as
soon as it is measured; rows that are there already are not run again. Shares are of the non-embedding parameters.

  magnitude … taylor     the published criterion alone: the same share of every layer's FFN channels and heads, no compensation
  flap                   its own recipe: one standardized threshold, and the bias that keeps the mean
  … + refit              the same cut with o_proj and down_proj refitted in closed form
  layers                 block influence (ShortGPT): whole layers
  slice, hidden          hidden width by one PCA rotation, and by Minitron's selection
  obs                    OBS order, the same share of every layer, without compensation
  ours                   `Prune` as it comes, on half of the calibration windows (it runs two streams, at twice the price)
  ours, own target       the same refitted to each linear's own output, on all windows

Perplexity: non-overlapping windows of 2048 tokens, tokenized once, no BOS. Speed: exported for ONNX Runtime in float32,
by turns with the exported whole model, medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress import data
from tinycompress.checkpoint import load
from tinycompress.evaluate import environment, perplexity, tokens_per_second
from tinycompress.files import read_json, write_json
from tinycompress.graph import Graph, Pass
from tinycompress.passes.prune import Prune
from tinycompress.passes.slice import Slice

RESULTS = Path(__file__).parent / "results" / "prune.json"
SHARES = (0.9, 0.8, 0.7, 0.5)
CRITERIA = ("magnitude", "wanda_sp", "minitron", "flap", "taylor", "obs")
SPEED = ("ours", "layers", "hidden")  # one row for each way a model gets smaller: width, depth, stream
Recipe = Callable[[Tensor, float, Graph], Pass]


def alone(criterion: str, refit: bool) -> Recipe:
    def recipe(tokens: Tensor, share: float, graph: Graph) -> Pass:
        allocation = "global" if criterion == "flap" else "uniform"
        own = "bias" if criterion == "flap" else False
        return Prune(tokens, f"params={share}", criterion=criterion, allocation=allocation, refit=refit or own, probe=len(tokens))

    return recipe


def layers(tokens: Tensor, share: float, graph: Graph) -> Pass:
    return Prune(tokens, keep={"layers": round(share * graph.config.n_layers)})


def hidden_size(share: float, graph: Graph) -> int:
    """Every linear of a layer has one side on the stream: parameters go with its width."""
    return math.floor(share * graph.config.hidden_size / 32) * 32


RECIPES: dict[str, Recipe] = {
    **{name: alone(name, False) for name in CRITERIA},
    **{f"{name} + refit": alone(name, True) for name in CRITERIA},
    "layers": layers,
    "hidden": lambda tokens, share, graph: Prune(tokens, keep={"hidden": hidden_size(share, graph)}),
    "slice": lambda tokens, share, graph: Slice(tokens, hidden_size(share, graph)),
    "ours": lambda tokens, share, graph: Prune(tokens[: max(1, len(tokens) // 2)], f"params={share}"),
    "ours, own target": lambda tokens, share, graph: Prune(tokens, f"params={share}", refit=True),
}


def worker(args: argparse.Namespace) -> None:
    """One row as a line of JSON."""
    name, share = args.worker.rsplit("@", 1)
    graph = load(args.model, dtype=torch.float32)
    context = graph.config.max_position
    calibration = data.tokens(args.calibration, graph.tokenizer, args.samples, min(1024, context))
    evaluation = data.tokens(args.evaluation, graph.tokenizer, args.windows, min(2048, context), split="test")
    started = time.perf_counter()
    step = None if name == "float" else RECIPES[name](calibration, float(share), graph)
    out = graph if step is None else step(graph)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = perplexity(out.module(), evaluation)
    row: dict[str, Any] = {
        "recipe": name,
        "share": float(share),
        "kept": out.config.n_body_params / graph.config.n_body_params,
        "perplexity": result.value,
        "nll": result.nll.tolist(),
        "seconds": seconds,
        "peak_mb": peak,
        "layers": [[layer.n_heads, layer.n_kv_heads, layer.ffn_dim] for layer in out.config.layers],
        "hidden": out.config.hidden_size,
        "pass": repr(step),
    }
    if name in SPEED and not args.no_speed:
        row["speed"] = speed(graph, out)
    print(json.dumps(row), flush=True)


def speed(whole: Graph, pruned: Graph, rounds: int = 5) -> dict[str, float]:
    """Tokens a second of the pruned model in ONNX Runtime, float32, and as ratios to the whole one measured in turns."""
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on (default: pydoc)")
    parser.add_argument("--evaluation", default="pydoc", help="text to evaluate on, its test split (default: pydoc)")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="parameters kept (default: 0.9 0.8 0.7 0.5)")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE", help="rows (default: all)")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 1024 tokens (default: 64)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 2048 tokens (default: 16)")
    parser.add_argument("--no-speed", action="store_true", help="leave ONNX Runtime out")
    parser.add_argument("--quick", action="store_true", help="a smoke test: two windows of each, one share, nothing written")
    parser.add_argument("--table", action="store_true", help="print the table of the results so far, and draw the plot")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if args.table:
        return report()
    if args.quick:
        args.samples = args.windows = 2
        args.shares = [0.8]
    # Only names are recorded of data given by path: where a text lies on somebody's disk says nothing about it.
    options = ("model", "calibration", "evaluation", "samples", "windows")
    protocol = {o: Path(v).name if isinstance(v := getattr(args, o), str) else v for o in options}
    found = read_json(RESULTS) if RESULTS.exists() and not args.quick else {"protocol": protocol, "rows": []}
    if found["protocol"] != protocol:
        parser.error(f"{RESULTS} was measured with {found['protocol']}, not {protocol}: move it away first")
    done = {(row["recipe"], row["share"]) for row in found["rows"]}
    todo = [("float", 1.0), *((name, share) for share in args.shares for name in args.recipes)]
    for name, share in tqdm([row for row in todo if row not in done], desc="rows", unit="row"):
        command = [sys.executable, __file__, "--worker", f"{name}@{share}", *(f"--{o}={getattr(args, o)}" for o in options)]
        ran = subprocess.run(command + ["--no-speed"] * args.no_speed, stdout=subprocess.PIPE, text=True)
        if ran.returncode:
            tqdm.write(f"{name} at {share}: failed, left out")
            continue
        row = json.loads(ran.stdout.splitlines()[-1])
        found["rows"].append(row)
        tqdm.write(f"{name} at {share}: perplexity {row['perplexity']:.2f}, {row['kept']:.3f} kept, {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB")
        if not args.quick:
            write_json(RESULTS, found | {"environment": environment()})
    if not args.quick:
        report()


def report() -> None:
    """The table as Markdown, what our recipe loses against Wanda-sp, and results/prune.png."""
    rows = {(row["recipe"], row["share"]): row for row in read_json(RESULTS)["rows"]}
    shares = sorted({share for name, share in rows if name != "float"}, reverse=True)
    whole = rows["float", 1.0]["perplexity"]
    print(f"| perplexity (whole: {whole:.2f}) | " + " | ".join(f"{share:.0%}" for share in shares) + " | seconds, MB at the first |")
    print("|---" * (len(shares) + 2) + "|")
    for name in (name for name in RECIPES if any((name, share) in rows for share in shares)):
        cells = [rows.get((name, share)) for share in shares]
        first = next(cell for cell in cells if cell)
        figures = [
            f"{cell['perplexity']:.2f}" + (f" ({cell['kept']:.1%})" if abs(cell["kept"] - cell["share"]) > 0.01 else "") if cell else ""
            for cell in cells
        ]
        print(f"| {name} | " + " | ".join(figures) + f" | {first['seconds']:.0f} s, {first['peak_mb']:.0f} MB |")
    for share in shares:
        if ("ours", share) in rows and ("wanda_sp", share) in rows:
            ours, theirs = (math.log(rows[name, share]["perplexity"] / whole) for name in ("ours", "wanda_sp"))
            print(f"\nat {share:.0%}: ours loses {ours:.3f} nats a token, Wanda-sp {theirs:.3f}: {ours / theirs:.2f} of it")
    for (name, share), row in rows.items():
        if s := row.get("speed"):
            print(f"\n{name} at {share:.0%} ({row['kept']:.1%} kept): prefill × {s['prefill_ratio']:.2f}, decode × {s['decode_ratio']:.2f}")
    plot(rows, whole)


def plot(rows: dict[tuple[str, float], dict[str, Any]], whole: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in RECIPES:
        points = sorted((row["kept"], row["perplexity"]) for (recipe, _), row in rows.items() if recipe == name)
        if points:
            style = {"linewidth": 2.5, "color": "black"} if name == "ours" else {"linestyle": "--" if "refit" in name else "-", "alpha": 0.7}
            axes.plot(*zip(*points), marker="o", label=name, **style)
    axes.axhline(whole, color="grey", linewidth=0.8)
    axes.set(xlabel="share of the non-embedding parameters kept", ylabel="perplexity", yscale="log")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
