"""Forward speed and peak memory of SmolLM2-135M against transformers, side by side.

    python benchmarks/forward.py [--model smollm2-135m] [--batch 4] [--seq-len 1024] [--rounds 3] [--json]

Each engine runs in its own process (so that its peak memory is its own), the two by turns, on the same weights, ids,
dtype (float32) and threads; the figure is the best round of each. "with head" is the whole forward to logits, "without"
stops at the last hidden states. transformers runs as it comes (SDPA attention, its default cache).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

ENGINES = ("ours", "transformers")


def worker(engine: str, args: argparse.Namespace) -> None:
    """One round: tokens a second with and without the head, and the peak resident set in MB."""
    import torch

    from tinycompress.checkpoint import load

    torch.manual_seed(0)
    graph = load(args.model)
    ids = torch.randint(graph.config.vocab_size, (args.batch, args.seq_len))
    model = graph.module() if engine == "ours" else graph.to_hf().eval()
    runs = {"without": model.hidden, "with": model} if engine == "ours" else {"without": model.model, "with": model}
    out = {}
    with torch.inference_mode():
        model(ids[:1, :64])
        for name, run in runs.items():
            start = time.perf_counter()
            run(ids)
            out[name] = ids.numel() / (time.perf_counter() - start)
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    for _ in range(args.rounds):
        for engine in ENGINES:
            command = [sys.executable, __file__, "--worker", engine, "--model", args.model, "--batch", str(args.batch), "--seq-len", str(args.seq_len)]
            rounds[engine].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
    best = {e: {"with": max(r["with"] for r in rs), "without": max(r["without"] for r in rs), "peak_mb": min(r["peak_mb"] for r in rs)} for e, rs in rounds.items()}
    ratio = {key: best["ours"][key] / best["transformers"][key] for key in best["ours"]}
    if args.json:
        from tinycompress.evaluate import environment

        print(json.dumps({"protocol": vars(args), "best": best, "rounds": rounds, "ratio": ratio, "environment": environment()}, indent=2))
        return
    print(f"{args.model}, batch {args.batch} × {args.seq_len}, float32, best of {args.rounds}")
    for engine, b in best.items():
        print(f"{engine:14s} {b['without']:7.1f} tok/s without head  {b['with']:7.1f} with  {b['peak_mb']:7.0f} MB peak")
    print(f"{'ratio':14s} {ratio['without']:7.2f}                     {ratio['with']:7.2f}       {ratio['peak_mb']:7.2f}")


if __name__ == "__main__":
    main()
