"""Memory and time of a distillation loss with its gradients: fused with the head, against dense torch and peers.

    python benchmarks/distill_loss.py [--tokens 8192] [--vocab 49152] [--loss kl] [--rounds 1] [--peer-python PYTHON]
        [--json]

From the last hidden states and head weights of student and teacher (float32, random, logits of about unit size) to the
loss and its gradients for the student's hidden states and head. Each engine lives in its own process on the same
inputs; they take turns, round by round, and ratios are medians over rounds.

  ours     fused_loss, 1024 tokens a chunk
  dense    the textbook: two products with the heads, log_softmax, kl_div (or cross_entropy, or for jsd and skew_kl the
           same with logaddexp), backward by autograd
  liger    LigerFusedLinearJSDLoss of liger-kernel, as it comes (torch.compile, 1024 a chunk; compiling is not timed)
  trl      ChunkedDivergenceFunction of TRL, the loss of its DistillationTrainer: tiles of tokens × vocabulary, made
           again
           in backward (of both peers' jsd, β = 0 and 1 are kl and reverse_kl)

Peak memory is the process's highest resident size (ru_maxrss) after all rounds, less its resident size when the inputs
are there and 1024 tokens have run through: what the loss needs beside inputs, libraries and code, the returned
gradients included. Seconds are wall-clock; CPU seconds, of all threads together, hold on a busy machine too. liger and
trl are looked for in PYTHON's environment (theirs may pin other versions) and are n/a without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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

ENGINES = ("ours", "dense", "liger", "trl")
PEERS = ("liger", "trl")
LOSSES = ("kl", "reverse_kl", "jsd", "skew_kl", "ce")
SHARE = {"jsd": 0.5, "skew_kl": 0.1}  # β of GKD's default, α of DistiLLM's
WARM = 1024

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, head, teacher's hidden, its head, labels


def ours(loss: str) -> Run:
    from tinycompress.distillation.fused_loss import HiddenTarget, Loss, fused_loss

    def run(h: Tensor, W: Tensor, ht: Tensor, Wt: Tensor, labels: Tensor) -> Tensor:
        return fused_loss(h, W, [Loss(loss)], labels=labels, teacher=None if loss == "ce" else HiddenTarget(ht, Wt))

    return run


def dense(loss: str) -> Run:
    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    def run(h: Tensor, W: Tensor, ht: Tensor, Wt: Tensor, labels: Tensor) -> Tensor:
        if loss == "ce":
            return F.cross_entropy(h @ W.T, labels)
        p, q = (ht @ Wt.T).log_softmax(-1), (h @ W.T).log_softmax(-1)
        if loss in SHARE:
            share = SHARE[loss]
            m = torch.logaddexp(p + math.log(share), q + math.log(1 - share))
            return kl(p, m) if loss == "skew_kl" else share * kl(p, m) + (1 - share) * kl(q, m)
        return kl(p, q) if loss == "kl" else kl(q, p)

    return run


def liger(loss: str) -> Run:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    beta = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[loss]
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    return lambda h, W, ht, Wt, labels: module(h, W, ht, Wt, labels)


def trl(loss: str) -> Run:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[loss]

    return lambda h, W, ht, Wt, labels: ChunkedDivergenceFunction.apply(h, W, None, ht, Wt, None, beta)[0].mean()


def worker(engine: str, args: argparse.Namespace) -> None:
    """Answers each line of standard input with the loss and the seconds it took; at the end the peak, in bytes."""
    try:
        run = {"ours": ours, "dense": dense, "liger": liger, "trl": trl}[engine](args.loss)
    except (ImportError, KeyError) as error:
        print(json.dumps({"missing": f"no {error}" if isinstance(error, KeyError) else str(error)}), flush=True)
        return
    g = torch.Generator().manual_seed(0)
    n, V, D = args.tokens, args.vocab, args.hidden
    h, ht = (torch.randn(n, D, generator=g) for _ in range(2))
    W, Wt = (torch.randn(V, D, generator=g).div_(D**0.5) for _ in range(2))
    labels = torch.randint(V, (n,), generator=g)
    student = h.requires_grad_(), W.requires_grad_()

    def once(rows: slice) -> float:
        value = run(student[0][rows], W, ht[rows], Wt, labels[rows])
        value.backward()
        result = value.item()
        for x in student:
            x.grad = None
        return result

    once(slice(min(n, WARM)))
    before = resident()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        value = once(slice(None))
        print(
            json.dumps(
                {"loss": value, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
            ),
            flush=True,
        )
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}), flush=True)


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def start(engine: str, args: argparse.Namespace) -> subprocess.Popen[str]:
    python = args.peer_python if engine in PEERS and args.peer_python else sys.executable
    options = [f"--{name}={getattr(args, name)}" for name in ("tokens", "vocab", "hidden", "loss")]
    log = None if engine in ("ours", "dense") else subprocess.DEVNULL  # peers warn of a missing GPU
    command = [python, __file__, "--worker", engine, *options]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1"},
    )


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):  # some libraries print
            return json.loads(line)
    return {"missing": f"it ended with status {process.wait()}"}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Figures by engine, and ours relative to each."""
    workers, found, missing = {}, {}, {}
    for engine in ENGINES:
        if engine in PEERS and args.loss not in ("kl", "reverse_kl", "jsd"):
            missing[engine] = f"it has no {args.loss} with a teacher"
            continue
        process = start(engine, args)
        first = answer(process)
        if "missing" in first:
            missing[engine] = first["missing"]
        else:
            workers[engine], found[engine] = process, []
    for _ in range(args.rounds):
        for engine, process in workers.items():
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
            result = answer(process)
            if "missing" in result:
                raise RuntimeError(f"{engine}: {result['missing']} (out of memory?)")
            found[engine].append(result)
    out: dict[str, Any] = {"missing": missing, "engines": {}}
    for engine, process in workers.items():
        assert process.stdin
        process.stdin.close()
        peak = answer(process)["peak"]
        process.wait()
        rounds = found[engine]
        times = {kind: median(r[kind] for r in rounds) for kind in ("seconds", "cpu_seconds")}
        out["engines"][engine] = {"loss": rounds[-1]["loss"], **times, "peak_mb": peak / 1e6, "rounds": rounds}
    mine = out["engines"]["ours"]
    for theirs in out["engines"].values():
        theirs["peak_memory_ratio"] = mine["peak_mb"] / theirs["peak_mb"]
        for name, kind in (("time_ratio", "seconds"), ("cpu_time_ratio", "cpu_seconds")):
            theirs[name] = median(a[kind] / b[kind] for a, b in zip(mine["rounds"], theirs["rounds"]))
    out |= {name: out["engines"]["dense"][name] for name in ("peak_memory_ratio", "time_ratio", "cpu_time_ratio")}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--loss", choices=LOSSES, default="kl")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer-python", help="the python of an environment with liger-kernel and trl")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args)
    result = measure(args)
    if args.json:
        from tinycompress.evaluation.perplexity import environment

        protocol = {name: getattr(args, name) for name in ("tokens", "vocab", "hidden", "loss", "rounds")}
        print(json.dumps({"protocol": protocol, **result, "environment": environment()}, indent=2))
        return
    print(f"{args.loss}: {args.tokens} tokens × {args.vocab}, hidden {args.hidden}, float32, loss and gradients")
    for engine, e in result["engines"].items():
        ratios = f"   ours / it: memory {e['peak_memory_ratio']:.3f}, time {e['time_ratio']:.2f}"
        ratios += f", CPU time {e['cpu_time_ratio']:.2f}"
        ratios = "" if engine == "ours" else ratios
        print(
            f"{engine:6s} {e['seconds']:7.2f} s  {e['cpu_seconds']:7.2f} CPU s  {e['peak_mb']:8.0f} MB peak   loss "
            f"{e['loss']:.6f}{ratios}"
        )
    for engine, reason in result["missing"].items():
        print(f"{engine:6s}     n/a   {reason}")


if __name__ == "__main__":
    main()
