"""A longer context in figures: memory, speed and cache bytes against length, perplexity against length, passkey retrieval.

    python benchmarks/context.py [--model smollm2-135m] [--lengths 1024 2048 4096 8192] [--method yarn] [--context 16384]
    python benchmarks/context.py --model stories260K --passkey --perplexity wikitext2 --out results

Every length runs in a process of its own, with the cache in the model's dtype and in int8, so that its peak memory is its
own ("load" is the peak before the first token). Prompts are read in chunks of 512, then tokens are decoded up to the
length. `--perplexity TEXT` adds the perplexity of full windows, and through an int8 cache; `--passkey` the share of keys
read back by depth and length, as figures and as a heat map. Results are rewritten after each row: context.json in --out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinycompress import data
from tinycompress.checkpoint import load
from tinycompress.evaluate import environment
from tinycompress.files import write_json
from tinycompress.graph import Graph
from tinycompress.long_context import cached_nll, footprint, full_windows, perplexity_interval
from tinycompress.passes.rope import METHODS, ScaleRope
from tinycompress.passkey import heat_map, passkey


def stretched(args: argparse.Namespace) -> Graph:
    graph = load(args.model, dtype=torch.float32)
    longest = args.context or max(args.lengths)
    return ScaleRope(longest, args.method)(graph) if longest > graph.config.max_position else graph


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(args: argparse.Namespace) -> None:
    """One length: its footprint and peak memory as a line of JSON."""
    model = stretched(args).module()
    loaded = peak_mb()
    print(json.dumps(asdict(footprint(model, args.worker, int8=args.int8)) | {"load_mb": loaded, "peak_mb": peak_mb()}))


def footprints(args: argparse.Namespace, save: Any) -> None:
    options = ["--model", args.model, "--method", args.method, "--lengths", *map(str, args.lengths)]
    options += ["--context", str(args.context)] if args.context else []
    jobs = [(length, int8) for length in args.lengths for int8 in (False, True)]
    for length, int8 in tqdm(jobs, desc="lengths", delay=2):
        command = [sys.executable, __file__, "--worker", str(length), *options, *(["--int8"] if int8 else [])]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        save("footprint", row)
        print(
            f"{length:6d} {'int8' if int8 else 'float32':8} {row['prefill_tokens_per_second']:8.1f} tok/s prefill "
            f"{row['decode_tokens_per_second']:7.1f} decode {row['kv_bytes'] / 1e6:8.1f} MB cache {row['peak_mb']:7.0f} MB peak",
            flush=True,
        )


def perplexities(args: argparse.Namespace, graph: Graph, save: Any) -> None:
    """Full windows of the same text at each length, all tokens counted; then through an int8 cache, paired by window."""
    model = graph.module()
    stream = data.tokens(args.perplexity, graph.tokenizer, 1, args.tokens, split="test")[0]
    for length in args.lengths:
        windows = args.tokens // length
        plain = full_windows(model, stream, length, windows)
        int8 = torch.stack([cached_nll(model, ids, int8=True).mean() for ids in stream[: windows * length].view(windows, length)]).double()
        row = {"length": length, "windows": windows} | {k: asdict(perplexity_interval(v)) for k, v in (("perplexity", plain), ("int8_cache", int8))}
        save("perplexity", row)
        print(f"{length:6d} perplexity {perplexity_interval(plain)}, through an int8 cache {perplexity_interval(int8)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--context", type=int, help="stretch the model to this many positions (default: the longest length, if it needs it)")
    parser.add_argument("--method", choices=METHODS, default="yarn")
    parser.add_argument("--perplexity", metavar="TEXT", help="a text's path or name: adds perplexity against length")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a length for --perplexity (default: 16,384)")
    parser.add_argument("--passkey", action="store_true", help="adds passkey retrieval and its heat map")
    parser.add_argument("--trials", type=int, default=10, help="keys a cell of --passkey (default: 10)")
    parser.add_argument("--no-footprint", action="store_true", help="leave memory and speed out")
    parser.add_argument("--out", type=Path, default=Path("build/context"), help="folder of context.json and passkey.png (default: build/context)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--int8", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    protocol = {k: v for k, v in vars(args).items() if k not in ("worker", "int8", "out")}
    protocol |= {"model": Path(args.model).name, "perplexity": args.perplexity and Path(args.perplexity).name}
    result: dict[str, Any] = {"protocol": protocol, "environment": environment(), "footprint": [], "perplexity": [], "passkey": []}

    def save(kind: str, row: dict[str, Any]) -> None:
        result[kind].append(row)
        write_json(args.out / "context.json", result)

    if not args.no_footprint:
        footprints(args, save)
    if args.perplexity or args.passkey:
        graph = stretched(args)
        if args.perplexity:
            perplexities(args, graph, save)
        if args.passkey:
            found = passkey(graph.module(), graph.tokenizer, args.lengths, trials=args.trials)
            save("passkey", found.to_dict())
            scaled = graph.config.rope.original_max_position is not None
            heat_map({Path(args.model).name + (f", {args.method}" if scaled else ""): found}, args.out / "passkey.png")
            print(f"passkey: {found.share:.0%} read back; {args.out / 'passkey.png'}")


if __name__ == "__main__":
    main()
