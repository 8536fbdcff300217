"""Forward speed and peak memory of SmolLM2-135M against transformers, side by side.

    python benchmarks/forward.py [--model smollm2-135m] [--batch 4] [--seq-len 1024] [--rounds 5] [--json]

Each engine lives in its own process (so that its peak memory is its own); the two take turns, forward by forward, on
the same weights, ids, dtype (float32) and threads, after one forward of each kind that does not count. Speeds are
medians over rounds and the ratio is the median of the rounds' ratios: a machine that is slower for a while is slower
for both. "with head" is the whole forward to logits, "without" stops at the last hidden states. transformers runs as it
comes (SDPA attention, its default cache). "floor" is the bare matrix products and attention of the same shapes as torch
computes them, with nothing between them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress.checkpoints.checkpoint import load
from tinycompress.graph.graph import Graph

ENGINES = ("ours", "transformers", "floor")


def worker(engine: str, args: argparse.Namespace) -> None:
    """For each line of standard input ("with" or "without"): tokens a second of one forward; at the end the peak in
    MB."""
    torch.manual_seed(0)
    graph = load(args.model)
    ids = torch.randint(graph.config.vocab_size, (args.batch, args.seq_len))
    runs = forwards(engine, graph)
    with torch.inference_mode():
        for run in runs.values():  # at full size: the first pages that a process touches come from the system, slowly
            run(ids)
        print("ready", flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            runs[line.strip()](ids)
            print(ids.numel() / (time.perf_counter() - start), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def forwards(engine: str, graph: Graph) -> dict[str, Callable[[Tensor], object]]:
    """What an engine runs on ids [B, T], with and without the head."""
    import torch.nn.functional as F

    if engine == "ours":
        model = graph.module()
        return {"without": model.hidden, "with": model}
    if engine == "transformers":
        theirs = graph.to_hf().eval()
        return {"without": theirs.model, "with": theirs}
    config, weights = graph.config, dict(graph.weights)
    wide = {k: torch.randn(4096, k) for k in {w.shape[1] for w in weights.values() if w.dim() == 2}}

    def body(ids: Tensor) -> None:
        B, T = ids.shape
        for name, weight in weights.items():
            if weight.dim() == 2 and name.startswith("model.layers."):
                for _ in range(B):
                    F.linear(wide[weight.shape[1]][:T], weight)
        for layer in config.layers:
            q, k, v = (
                torch.zeros(1, n, T, config.head_dim) for n in (layer.n_heads, layer.n_kv_heads, layer.n_kv_heads)
            )
            for _ in range(B):
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def whole(ids: Tensor) -> None:
        body(ids)
        for _ in ids:
            F.linear(wide[config.hidden_size][: ids.shape[1]], weights[config.weight_name("lm_head")])

    return {"without": body, "with": whole}


def ask(process: subprocess.Popen[str], run: str) -> float:
    assert process.stdin and process.stdout
    process.stdin.write(run + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    options = ["--model", args.model, "--batch", str(args.batch), "--seq-len", str(args.seq_len)]
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--worker", engine, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for engine in ENGINES
    }
    for process in workers.values():  # none measures while another still loads
        assert process.stdout and process.stdout.readline() == "ready\n"
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in tqdm(range(args.rounds), desc="rounds"):
        rounds.append({run: {engine: ask(workers[engine], run) for engine in ENGINES} for run in ("without", "with")})
    best: dict[str, dict[str, float]] = {
        e: {run: median(r[run][e] for r in rounds) for run in ("without", "with")} for e in ENGINES
    }
    for engine, process in workers.items():
        best[engine]["peak_mb"] = float(process.communicate()[0])
    ratio = {
        e: {run: median(r[run]["ours"] / r[run][e] for r in rounds) for run in ("without", "with")} for e in ENGINES[1:]
    }
    ratio["transformers"]["peak_mb"] = best["ours"]["peak_mb"] / best["transformers"]["peak_mb"]
    if args.json:
        from tinycompress.evaluation.perplexity import environment

        print(
            json.dumps(
                {
                    "protocol": vars(args),
                    "median": best,
                    "rounds": rounds,
                    "ratio": ratio,
                    "environment": environment(),
                },
                indent=2,
            )
        )
        return
    print(f"{args.model}, batch {args.batch} × {args.seq_len}, float32, {args.rounds} rounds by turns")
    for engine, b in best.items():
        print(
            f"{engine:14s} {b['without']:7.1f} tok/s without head  {b['with']:7.1f} with  {b['peak_mb']:7.0f} MB peak"
        )
    for engine, r in ratio.items():
        memory = f"{r['peak_mb']:.2f} of its peak memory" if "peak_mb" in r else ""
        print(f"ours / {engine:12s} {r['without']:6.2f} without head   {r['with']:6.2f} with   {memory}")


if __name__ == "__main__":
    main()
