"""Seconds and peak memory of quantizing a model of a given shape with random weights, on this machine.

    python benchmarks/memory.py [--shape tinyllama-1.1b] [--method gptq] [--spec w4g128] [--samples 16] [--seq-len
        2048] [--layers N]

A bfloat16 folder of random weights is written to a temporary place (`--folder` says where, 13 GB for Llama-2-7B); a
process of its own then opens it, quantizes it and (rtn, hqq) saves it. `private_mb` is the most memory the process had
of its own, sampled every 50 ms: what a machine must have. `peak_mb` is the largest resident set, which counts pages of
the mapped checkpoint too, as many as the system leaves in its cache. Results go to results/memory.json, one row a
configuration, and each at once; `--layers` cuts the model to its first layers, to see in minutes what a layer more
costs. Whether a smaller machine would do shows a control group, which counts cached pages too: `systemd-run --scope -p
MemoryMax=4G python benchmarks/memory.py …`; such a row says its limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.evaluation.perplexity import environment
from tinycompress.files import write_json
from tinycompress.graph.config import shapes
from tinycompress.graph.graph import Graph, LazyTensor, Weights
from tinycompress.graph.presets import LLAMA_2_7B, TINYLLAMA_1_1B
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.rtn import RTN

SHAPES = {"tinyllama-1.1b": TINYLLAMA_1_1B, "llama-2-7b": LLAMA_2_7B}
RESULTS = Path(__file__).parent / "results" / "memory.json"


def random_folder(shape: str, layers: int | None, folder: Path) -> None:
    """The shape with N(0, 0.02) weights in bfloat16, made one at a time while it is saved."""
    config = SHAPES[shape]
    config = dataclasses.replace(config, layers=config.layers[:layers])

    def weight(name: str, size: tuple[int, ...]) -> LazyTensor:
        def read() -> torch.Tensor:
            generator = torch.Generator().manual_seed(len(name))
            return (
                torch.ones(size, dtype=torch.bfloat16)
                if len(size) == 1
                else (torch.randn(size, generator=generator) * 0.02).bfloat16()
            )

        return LazyTensor(size, torch.bfloat16, read)

    save(Graph(config, Weights({name: weight(name, size) for name, size in shapes(config).items()})), folder)


def memory_limit() -> float | None:
    """GiB that this process's control group may use (Linux), None without a limit."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in lines:
        if "memory" in controllers.split(","):
            limits.append(Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"))
        elif not controllers:
            limits.append(Path(f"/sys/fs/cgroup{path}/memory.max"))
    found = [int(text) for file in limits if file.exists() and (text := file.read_text().strip()).isdigit()]
    return min(found) / 2**30 if found and min(found) < 2**60 else None


class PrivateMemory(threading.Thread):
    """Samples the anonymous resident memory of this process (Linux) until `stop`; `peak` is in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.05):
            line = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
            )
            self.peak = max(self.peak, int(line.split()[1]) / 1024)

    def stop(self) -> float:
        self.done.set()
        self.join()
        return self.peak


def work(args: argparse.Namespace) -> dict[str, float]:
    """Quantizes the folder in this process."""
    memory, start = PrivateMemory(), time.perf_counter()
    graph = load(args.worker)
    spec = QuantSpec.parse(args.spec)
    if args.method == "gptq":
        tokens = torch.randint(
            graph.config.vocab_size, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0)
        )
        GPTQ(tokens.to(args.device), spec)(graph)
    else:
        save({"rtn": RTN, "hqq": HQQ}[args.method](spec)(graph), Path(args.worker).parent / "quantized")
    row = {"seconds": round(time.perf_counter() - start, 1), "private_mb": round(memory.stop())}
    row |= {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if args.device == "cuda":
        row["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--method", choices=["gptq", "rtn", "hqq"], default="gptq")
    parser.add_argument("--spec", default="w4g128")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", help="where the temporary folders are made (by default the system's place)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: where the calibration runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
        return
    options = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items() if v is not None and k != "worker"]
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / "model"
        random_folder(args.shape, args.layers, folder)
        out = subprocess.run(
            [sys.executable, __file__, "--worker", str(folder), *options], stdout=subprocess.PIPE, text=True, check=True
        )
    row = json.loads(out.stdout.splitlines()[-1])
    print(row)
    key = f"{args.shape} {args.method} {args.spec} {args.device}" + (
        f" {args.samples}x{args.seq_len}" if args.method == "gptq" else ""
    )
    key += "" if args.layers is None else f", first {args.layers} layers"
    limit = memory_limit()
    key += "" if limit is None else f", within {limit:g} GiB"
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write_json(RESULTS, known | {key: row | {"environment": environment()}})


if __name__ == "__main__":
    main()
