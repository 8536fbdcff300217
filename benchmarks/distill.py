"""Speed and peak memory of distillation steps: ours against a plain transformers loop, side by side.

    python benchmarks/distill.py [--batch 2] [--seq-len 512] [--rounds 9] [--quick] [--json]
    python benchmarks/distill.py --gpu [--batch 16] [--micro-batch 4] [--seq-len 2048] [--json]

CPU: SmolLM2-135M's shapes with random weights, the teacher another model of the same shapes, float32, AdamW. Each
engine lives in its own process; after three steps that do not count the two take turns, step by step (a whole step:
teacher, student, backward, clipping, update), on the same ids, and the ratio is the median of the rounds' ratios. The
plain loop is what one writes by hand: two transformers models as they come, torch's AdamW as it comes, and KL over
whole logits.

GPU: a teacher of Llama 2 7B's shapes (bfloat16, random weights) and a student of TinyLlama 1.1B's (bfloat16 autocast
over float32 weights): tokens a second, and the share of the card's matrix rate, which is measured in the same run
(bfloat16, 8192³). A token costs 2 operations a parameter for the teacher, 6 for the student, and the attention's T ·
width · 2 (causal) a layer, three times that in training; embeddings do not count, heads do. What checkpointing computes
again does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tinycompress.distillation.distill import Distill
from tinycompress.distillation.objective import Objective
from tinycompress.distillation.student import Network
from tinycompress.distillation.training import Training
from tinycompress.distillation.training_loop import Run
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph, Weights
from tinycompress.graph.presets import LLAMA_2_7B, SMOLLM2_135M, TINYLLAMA_1_1B
from tinycompress.model.cpu_memory import keep_memory

ENGINES = ("ours", "transformers")
WARM = 3  # steps before the first that counts: in those the process grows
QUICK = Config(
    vocab_size=4096,
    hidden_size=128,
    head_dim=32,
    layers=(Layer(4, 2, 384),) * 4,
    max_position=2048,
    tie_embeddings=True,
)


def ours(
    student: Graph, teacher: Graph, tokens: Tensor, batch: int, micro_batch: int | None, checkpointing: bool = False
) -> Callable[[int], Any]:
    """One update of ours: what `Distill` runs, without its logs."""
    training = Training(steps=1000, batch=batch, micro_batch=micro_batch, checkpointing=checkpointing)
    network = Network(student, dtype=torch.float32, trainable=True, checkpointing=checkpointing)
    objective = Objective(Distill(tokens, teacher, training), student, tokens.device)
    objective.network = network
    return Run(network, tokens, objective, training, {}, None, "").step


def plain(student: Graph, teacher: Graph, tokens: Tensor, batch: int) -> Callable[[int], Any]:
    """One update of the loop one writes by hand."""
    model, other = student.to_hf().train().requires_grad_(True), teacher.to_hf().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)

    def step(number: int) -> float:
        ids = tokens[torch.arange(number * batch, (number + 1) * batch) % len(tokens)]
        with torch.no_grad():
            target = F.log_softmax(other(ids).logits[:, :-1].flatten(0, 1), -1)
        loss = F.kl_div(
            F.log_softmax(model(ids).logits[:, :-1].flatten(0, 1), -1), target, log_target=True, reduction="batchmean"
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def worker(engine: str, args: argparse.Namespace) -> None:
    """For each line of standard input: tokens a second of one step; at the end the peak in MB."""
    config = QUICK if args.quick else SMOLLM2_135M
    student, teacher = Graph.random(config, 0), Graph.random(config, 1)
    tokens = torch.randint(
        config.vocab_size, (4 * args.batch, args.seq_len), generator=torch.Generator().manual_seed(0)
    )
    make = (
        ours(student, teacher, tokens, args.batch, args.micro_batch)
        if engine == "ours"
        else plain(student, teacher, tokens, args.batch)
    )
    with keep_memory() if engine == "ours" else contextlib.nullcontext():  # as the command line does
        for number in range(WARM):
            make(number)
        print("ready", flush=True)
        for number, _ in enumerate(sys.stdin):
            start = time.perf_counter()
            make(number + WARM)
            print(args.batch * args.seq_len / (time.perf_counter() - start), flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def ask(process: subprocess.Popen[str]) -> float:
    assert process.stdin and process.stdout
    process.stdin.write("step\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def side_by_side(args: argparse.Namespace) -> dict[str, Any]:
    options = ["--batch", str(args.batch), "--seq-len", str(args.seq_len), *(["--quick"] if args.quick else [])]
    options += ["--micro-batch", str(args.micro_batch)] if args.micro_batch else []
    workers = {
        e: subprocess.Popen(
            [sys.executable, __file__, "--worker", e, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for e in ENGINES
    }
    for process in workers.values():
        assert process.stdout and process.stdout.readline() == "ready\n", "a worker ended before its first step"
    rounds = [{e: ask(p) for e, p in workers.items()} for _ in tqdm(range(args.rounds), desc="rounds")]
    out: dict[str, Any] = {e: {"tokens_per_second": median(r[e] for r in rounds)} for e in ENGINES}
    for e, p in workers.items():
        out[e]["peak_mb"] = float(p.communicate()[0])
    ratio = {"tokens_per_second": median(r["ours"] / r["transformers"] for r in rounds)}
    ratio["peak_mb"] = out["ours"]["peak_mb"] / out["transformers"]["peak_mb"]
    return {"median": out, "rounds": rounds, "ratio": ratio}


def operations(config: Config, seq_len: int) -> float:
    """Of one token's forward: two a weight of every matrix but the embedding, and the causal attention."""
    weights = sum(
        shape[0] * shape[1]
        for name, shape in shapes(config).items()
        if len(shape) == 2 and name != "model.embed_tokens.weight"
    )
    weights += config.vocab_size * config.hidden_size if config.tie_embeddings else 0
    return 2 * weights + sum(2 * seq_len * layer.n_heads * config.head_dim for layer in config.layers)


def matrix_rate() -> float:
    """Operations a second of bfloat16 products of 8192³, the best of five."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 10 * 2 * 8192**3 / min(times[1:])


def on_gpu(args: argparse.Namespace) -> dict[str, Any]:
    """The 7B teacher and the 1.1B student on one card."""

    def random(config: Config) -> Graph:
        made = {
            n: torch.empty(s, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02) for n, s in shapes(config).items()
        }
        return Graph(config, Weights({n: torch.ones_like(w) if w.dim() == 1 else w for n, w in made.items()}))

    torch.manual_seed(0)
    rate = matrix_rate()
    teacher, student = random(LLAMA_2_7B), random(TINYLLAMA_1_1B)
    tokens = torch.randint(32000, (4 * args.batch, args.seq_len), device="cuda")
    step = ours(student, teacher, tokens, args.batch, args.micro_batch or 4, args.checkpointing)
    times = []
    for number in tqdm(range(args.rounds + 2), desc="steps"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    speed = args.batch * args.seq_len / median(times[2:])
    each = operations(LLAMA_2_7B, args.seq_len) + 3 * operations(TINYLLAMA_1_1B, args.seq_len)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "tokens_per_second": speed,
        "matrix_rate": rate,
        "share_of_matrix_rate": speed * each / rate,
        "peak_gb": peak,
        "seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="windows a step (default: 2, on the GPU 16)")
    parser.add_argument("--micro-batch", type=int, help="of ours (default: the batch, on the GPU 4)")
    parser.add_argument("--seq-len", type=int, help="tokens a window (default: 512, on the GPU 2048)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--checkpointing", action="store_true", help="with --gpu: compute activations again")
    parser.add_argument("--quick", action="store_true", help="a smoke test on a tiny model: its figures mean nothing")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: found no CUDA device")
    args.batch = args.batch or (16 if args.gpu else 2)
    args.seq_len = args.seq_len or (2048 if args.gpu else 512)
    if args.worker:
        return worker(args.worker, args)
    result = on_gpu(args) if args.gpu else side_by_side(args)
    if args.json:
        from tinycompress.evaluation.perplexity import environment

        print(json.dumps({"protocol": vars(args), **result, "environment": environment()}, indent=2))
    elif args.gpu:
        rate, share = result["matrix_rate"] / 1e12, result["share_of_matrix_rate"]
        print(
            f"{result['tokens_per_second']:,.0f} tokens/s, {share:.1%} of the card's {rate:.0f} TFLOP/s, "
            f"{result['peak_gb']:.1f} GB"
        )
    else:
        for engine, values in result["median"].items():
            print(f"{engine:14s} {values['tokens_per_second']:8.1f} tokens/s {values['peak_mb']:8.0f} MB peak")
        print(
            f"ours / transformers {result['ratio']['tokens_per_second']:5.2f} in speed, "
            f"{result['ratio']['peak_mb']:.2f} in memory"
        )


if __name__ == "__main__":
    main()
