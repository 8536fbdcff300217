"""A longer context in figures: memory, speed and cache bytes against length, perplexity against length, passkey
retrieval.

    python benchmarks/context.py [--model smollm2-135m] [--lengths 1024 2048 4096 8192] [--method yarn] [--context
        16384]
    python benchmarks/context.py --model stories260K --passkey --perplexity wikitext2 --out results

Every length runs in a process of its own, with the cache in the model's dtype and in int8, so that its peak memory is
its own ("load" is the peak before the first token). Prompts are read in chunks of 512, then tokens are decoded up to
the length; "evaluate" is the perplexity of one window of random tokens, read at once. `--perplexity TEXT` adds the
perplexity of full windows, of the same last tokens behind contexts of each length (sliding windows), and of full
windows through an int8 cache; `--passkey` the share of keys read back by depth and length, as figures and as a heat
map. Results are rewritten after each row: context.json in --out, and a rerun with the same options measures only what
is not there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load
from tinycompress.context.scale_rope import METHODS, ScaleRope
from tinycompress.evaluation.long_context import (
    cached_nll,
    footprint,
    full_windows,
    perplexity_interval,
    sliding_windows,
)
from tinycompress.evaluation.passkey import heat_map, passkey
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.files import read_json, write_json
from tinycompress.graph.graph import Graph

KINDS = ("float32", "int8", "evaluate")
STRIDE = 256  # targets of a sliding window
Measure = Callable[
    [str, dict[str, Any], Callable[[], dict[str, Any]]], dict[str, Any]
]  # table, key, row: kept or measured now


def stretched(args: argparse.Namespace) -> Graph:
    graph = load(args.model, dtype=torch.float32)
    longest = args.context or max(args.lengths)
    return ScaleRope(longest, args.method)(graph) if longest > graph.config.max_position else graph


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args: argparse.Namespace) -> None:
    """One length: its footprint and peak memory as a line of JSON."""
    model, length = stretched(args).module(), args.worker
    loaded = peak_mb()
    if args.kind == "evaluate":
        ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        perplexity(model, ids, progress=False)
        row: dict[str, Any] = {"length": length}  # no speed: a first forward is not a measure of it
    else:
        row = asdict(footprint(model, length, int8=args.kind == "int8"))
    print(json.dumps(row | {"load_mb": loaded, "peak_mb": peak_mb()}))


def footprints(args: argparse.Namespace, measure: Measure) -> None:
    options = ["--model", args.model, "--method", args.method, "--lengths", *map(str, args.lengths)]
    options += ["--context", str(args.context)] if args.context else []

    def row(length: int, kind: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--worker", str(length), "--kind", kind, *options]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    for length, kind in tqdm([(length, kind) for length in args.lengths for kind in KINDS], desc="lengths", delay=2):
        found = measure(
            "evaluate" if kind == "evaluate" else "footprint",
            {"length": length, "kind": kind},
            partial(row, length, kind),
        )
        figures = ", ".join(f"{k} {v:,.1f}" for k, v in found.items() if isinstance(v, float))
        print(f"{length:6d} {kind:8} {figures}", flush=True)


def perplexities(args: argparse.Namespace, graph: Graph, measure: Measure) -> None:
    """The same text at each length: full windows, all tokens counted; the same targets behind more and more context;
    full windows through an int8 cache, paired by window."""
    model = graph.module()
    stream = data.tokens(args.perplexity, graph.tokenizer, 1, args.tokens, split="test")[0]
    longest = max(args.lengths)
    segments = (args.tokens - longest) // STRIDE

    def full(length: int) -> Tensor:
        return full_windows(model, stream, length, args.tokens // length)

    def int8(length: int) -> Tensor:
        rows = stream[: args.tokens // length * length].view(-1, length)
        return torch.stack([cached_nll(model, ids, int8=True).mean() for ids in rows]).double()

    def sliding(length: int) -> Tensor:
        return sliding_windows(model, stream, length, STRIDE, longest, min(segments, args.segments))

    for length in args.lengths:
        for kind, nll in (("full windows", full), ("int8 cache", int8), ("sliding windows", sliding)):
            if kind == "sliding windows" and segments < 1:
                continue

            def row(length: int = length, nll: Callable[[int], Tensor] = nll) -> dict[str, Any]:
                values = nll(length)
                return {"windows": len(values)} | asdict(perplexity_interval(values))

            found = measure("perplexity", {"length": length, "kind": kind}, row)
            print(
                f"{length:6d} {kind:16} {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] of "
                f"{found['windows']}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument(
        "--context",
        type=int,
        help="stretch the model to this many positions (default: the longest length, if it needs it)",
    )
    parser.add_argument("--method", choices=METHODS, default="yarn")
    parser.add_argument("--perplexity", metavar="TEXT", help="a text's path or name: adds perplexity against length")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a length for --perplexity (default: 16,384)")
    parser.add_argument(
        "--segments", type=int, default=16, help=f"sliding windows of {STRIDE} targets each (default: 16)"
    )
    parser.add_argument("--passkey", action="store_true", help="adds passkey retrieval and its heat map")
    parser.add_argument("--trials", type=int, default=10, help="keys a cell of --passkey (default: 10)")
    parser.add_argument("--no-footprint", action="store_true", help="leave memory and speed out")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/context"),
        help="folder of context.json and passkey.png (default: build/context)",
    )
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    protocol = {k: v for k, v in vars(args).items() if k not in ("worker", "kind", "out", "no_footprint", "passkey")}
    protocol |= {"model": Path(args.model).name, "perplexity": args.perplexity and Path(args.perplexity).name}
    file = args.out / "context.json"
    result: dict[str, Any] = read_json(file) if file.exists() else {}
    if result and result.get("protocol") != protocol:
        parser.error(f"{file} was measured with {result.get('protocol')}, not {protocol}: move it away first")
    if not result:
        result = {"protocol": protocol, "footprint": [], "evaluate": [], "perplexity": [], "passkey": []}

    def measure(table: str, key: dict[str, Any], row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        known = next((r for r in result[table] if key.items() <= r.items()), None)
        if known is None:
            known = key | row() | {"machine": environment()["machine"]}
            result[table].append(known)
            write_json(file, result | {"environment": environment()})
        return known

    if not args.no_footprint:
        footprints(args, measure)
    if args.perplexity or args.passkey:
        graph = stretched(args)
        if args.perplexity:
            perplexities(args, graph, measure)
        if args.passkey:
            found = passkey(graph.module(), graph.tokenizer, args.lengths, trials=args.trials)
            measure("passkey", {}, found.to_dict)
            scaled = graph.config.rope.original_max_position is not None
            heat_map({Path(args.model).name + (f", {args.method}" if scaled else ""): found}, args.out / "passkey.png")
            print(f"passkey: {found.share:.0%} read back; {args.out / 'passkey.png'}")


if __name__ == "__main__":
    main()
