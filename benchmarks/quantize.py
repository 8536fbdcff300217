"""What each step of the quantization recipe gives at equal bits, and what it costs.

    python benchmarks/quantize.py --calibration wiki_passages.txt --evaluation wikitext2_raw_test.txt [--spec w4g64
        w3g64]
        [--rows NAME …] [--again] [--quick] [--no-times] [--peer NAME --peer-python VENV/bin/python]

Protocol: every linear but the head (or the embedding alone, which is the head too), on calibration windows of 1024
tokens taken from the start of the text; perplexity over 16 non-overlapping windows of 2048, tokenized once, no BOS.
Each row runs in a process of its own, so that its peak memory is its own; `seconds` are those of the passes, for
`TIMED` rows beside those of one float forward over the calibration tokens in the same process. Rows already in
results/quantize.json (same protocol) are kept: a killed run goes on where it was. `--peer` runs another library, alone
or behind the rows named, in its own Python (peers/run_*.py say which venv), on the same weights and tokens; what it
saves is loaded and measured here. Differences are paired: mean NLL a token against the row named in the table, with a
95% bootstrap over windows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.evaluation.statistics import Interval, paired_difference
from tinycompress.files import write_json, write_text
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.model.cpu_memory import keep_memory
from tinycompress.quantization.autoround import AutoRound
from tinycompress.quantization.awq import AWQ
from tinycompress.quantization.block_tuning import BlockTuning
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.mixed_bits import MixedBits, linear_shapes, packed_bytes
from tinycompress.quantization.rotate import Rotate
from tinycompress.quantization.rtn import RTN
from tinycompress.recipe import best_gptq, tuned_scales

RESULTS = Path(__file__).parent / "results"
Make = Callable[[Graph, Tensor, QuantSpec], Graph]


def minmax(spec: QuantSpec) -> QuantSpec:
    return QuantSpec(spec.bits, spec.group_size, spec.symmetric, search="minmax")


BEST = "gptq + refine + qep"  # the default of `compress --quantize`

ROWS: dict[str, tuple[str | None, Make]] = {  # name: (the row it is compared with, what it does)
    "float": (None, lambda g, t, s: g),
    "the table alone, w8g64": ("float", lambda g, t, s: QuantizeEmbedding(QuantSpec(8, 64))(g)),
    "the table alone": ("float", lambda g, t, s: QuantizeEmbedding(s)(g)),
    "the table alone, least-squares grid": (
        "the table alone",
        lambda g, t, s: QuantizeEmbedding(replace(s, search="mse"))(g),
    ),
    "rtn": ("float", lambda g, t, s: RTN(s)(g)),
    "rtn, least-squares grid": ("rtn", lambda g, t, s: RTN(replace(s, search="mse"))(g)),
    "hqq": ("rtn", lambda g, t, s: HQQ(s)(g)),
    "awq": ("rtn", lambda g, t, s: AWQ(t, s)(g)),
    "awq, min-max grid and clip search": ("awq", lambda g, t, s: AWQ(t, s, clip=True)(g)),
    "gptq, natural order, min-max grid": ("rtn", lambda g, t, s: GPTQ(t, minmax(s), order="natural")(g)),
    "gptq, min-max grid": ("gptq, natural order, min-max grid", lambda g, t, s: GPTQ(t, minmax(s))(g)),
    "gptq": ("gptq, min-max grid", lambda g, t, s: GPTQ(t, s)(g)),
    "gptq, gar order": ("gptq", lambda g, t, s: GPTQ(t, s, order="gar")(g)),
    "gptq + refine": ("gptq", lambda g, t, s: GPTQ(t, s, refine=2)(g)),
    BEST: ("gptq + refine", lambda g, t, s: best_gptq(t, s)(g)),
    "gptq + refine + qronos": (BEST, lambda g, t, s: GPTQ(t, s, refine=2, propagate=0.5, correction="qronos")(g)),
    "gptq + gptaq": ("gptq", lambda g, t, s: GPTQ(t, s, propagate=0.25, correction="gptaq")(g)),
    "gptq + refine + balance": ("gptq + refine", lambda g, t, s: GPTQ(t, s, refine=2, balance=True)(g)),
    "gptq + refine + qep + balance": (BEST, lambda g, t, s: GPTQ(t, s, refine=2, propagate=0.5, balance=True)(g)),
    "gptq + refine + qep + stream": (BEST, lambda g, t, s: GPTQ(t, s, refine=2, propagate=0.5, stream=True)(g)),
    "awq fold, gptq + refine + qep": (BEST, lambda g, t, s: best_gptq(t, s)(AWQ(t, s, quantize=False)(g))),
    "rotation, gptq + refine + qep": (BEST, lambda g, t, s: best_gptq(t, s)(Rotate()(g))),
    "rotation of the heads, gptq + refine + qep": (BEST, lambda g, t, s: best_gptq(t, s)(Rotate(residual=False)(g))),
    "mixed bits at as many bytes, gptq + refine + qep": (BEST, lambda g, t, s: mixed(g, t, s)),
    "rtn on least-squares grids, block tuning": (
        "rtn",
        lambda g, t, s: AutoRound(t, g, BlockTuning(steps=100, propagate=1.0))(RTN(replace(s, search="mse"))(g)),
    ),
    "gptq + refine + qep, scales of each block tuned in the walk": (BEST, lambda g, t, s: tuned(g, t, s)),
    "gptq + refine + qep, scales tuned": (BEST, lambda g, t, s: tuned_scales(t, g)(best_gptq(t, s)(g))),
    "rotation, gptq + refine + qep, scales tuned": (
        "rotation, gptq + refine + qep",
        lambda g, t, s: tuned_scales(t, g)(best_gptq(t, s)(Rotate()(g))),
    ),
    "rotation, gptq + refine + qep, scales of each block tuned in the walk, then of all": (
        "rotation, gptq + refine + qep, scales tuned",
        lambda g, t, s: tuned_scales(t, g)(tuned(Rotate()(g), t, s)),
    ),
}


def mixed(graph: Graph, tokens: Tensor, spec: QuantSpec) -> Graph:
    """Grids of 2 to 8 bits by measured sensitivity, in as many bytes as `spec` everywhere takes."""
    limit = sum(packed_bytes(shape, spec) for shape in linear_shapes(graph, [spec]).values())
    choices = tuple(str(replace(spec, bits=bits)) for bits in (2, 3, 4, 8))
    return MixedBits(tokens[:8, :512], lambda specs: best_gptq(tokens, specs), bytes=limit, choices=choices)(graph)


def tuned(graph: Graph, tokens: Tensor, spec: QuantSpec) -> Graph:
    return replace(best_gptq(tokens, spec), tuning=BlockTuning(steps=60, rate=0))(graph)


TIMED = ("gptq",)
PEERS = {  # name: (script, what it is told besides model, tokens, folder, bits and group)
    "gptqmodel": ("run_gptqmodel.py",),
    "llm-compressor": ("run_llmcompressor.py",),
    "auto-round": ("run_auto_round.py", "default"),
    "auto-round-light": ("run_auto_round.py", "light"),
}
COMPARED = {name: other for name, (other, _) in ROWS.items()} | {
    "gptqmodel": "gptq",
    "llm-compressor": "gptq",
    "auto-round": "gptq + refine + qep, scales tuned",
    "auto-round-light": "gptq + refine + qep, scales tuned",
}


def seconds_of_forward(graph: Graph, tokens: Tensor) -> float:
    """One float forward over the calibration tokens, without the head."""
    module = graph.module()
    start = time.perf_counter()
    with torch.inference_mode():
        for window in tqdm(tokens, desc="forward", delay=2):
            module.hidden(window[None])
    return round(time.perf_counter() - start, 1)


def peer(args: argparse.Namespace, graph: Graph, tokens: Tensor) -> tuple[Graph, dict[str, object]]:
    """What another library makes of the same weights and tokens in its own process, and what it says of its cost."""
    from safetensors.torch import save_file

    spec = QuantSpec.parse(args.spec[0])
    with tempfile.TemporaryDirectory() as temporary:
        folder, ids, out = (Path(temporary) / name for name in ("model", "tokens.safetensors", "out"))
        save(graph, folder)
        save_file({"tokens": tokens}, ids)
        script, *told = PEERS[args.worker]
        told = ["quick" for _ in told] if args.quick else told
        command = [Path(args.peer_python).absolute(), Path(__file__).parent / "peers" / script, folder, ids, out]
        command += [spec.bits, spec.group_size or -1, *told]
        # in that folder: GPTQModel leaves a log wherever it is run
        done = subprocess.run(
            [str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True, cwd=temporary
        )
        said = json.loads(done.stdout.splitlines()[-1])
        quantized = load(next(out.rglob("config.json")).parent).dense(torch.float32)
        return graph.replace(weights={name: quantized.tensor(name).clone() for name in quantized.weights}), said


def one(args: argparse.Namespace) -> dict[str, object]:
    """One row, measured in this process."""
    graph = load(args.model, dtype=torch.float32)
    tokens = data.tokens(args.calibration, graph.tokenizer, args.samples, 1024)
    evaluation = data.tokens(args.evaluation, graph.tokenizer, args.windows, 2048, split="test")
    if args.worker in PEERS:
        out, said = peer(args, graph, tokens)
        p = perplexity(out.module(), evaluation)
        return {
            "perplexity": p.value,
            "nll": p.nll.tolist(),
            "forward_seconds": None,
            "machine": environment()["machine"],
        } | said
    forward = seconds_of_forward(graph, tokens) if args.worker in TIMED else None
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    out = ROWS[args.worker][1](graph, tokens, QuantSpec.parse(args.spec[0]))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    p = perplexity(out.dense().module(), evaluation)
    return {
        "perplexity": p.value,
        "nll": p.nll.tolist(),
        "seconds": round(seconds, 1),
        "forward_seconds": forward,
        "peak_mb": round(peak),
        "peak_before_mb": round(base),
        "machine": environment()["machine"],
        "history": list(out.history[len(graph.history) :]),
    }


def table(found: dict[str, dict[str, dict[str, object]]], protocol: dict[str, object]) -> str:
    """Markdown of the rows found, for each spec."""
    lines = ["# Quantization, step by step", "", f"{protocol}; made by `benchmarks/quantize.py`.", ""]
    for spec, rows in found.items():
        lines += [
            f"## {spec}",
            "",
            "| | perplexity | ΔNLL a token | against | seconds (one forward) | peak MB | machine |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in COMPARED:
            row = rows.get(name)
            if row is None:
                continue
            other = COMPARED[name]
            delta = "" if other is None or other not in rows else str(_difference(row, rows[other]))
            cost = (
                "shared machine"
                if row["seconds"] is None
                else f"{row['seconds']:.0f}" + (f" ({row['forward_seconds']:.0f})" if row["forward_seconds"] else "")
                if name != "float"
                else ""
            )
            what, against = row.get("peer", name), other if delta else ""
            lines.append(
                f"| {what} | {row['perplexity']:.2f} | {delta} | {against} | {cost} | {row['peak_mb']} | "
                f"{row['machine']} |"
            )
        lines.append("")
    return "\n".join(lines)


def _difference(a: dict[str, object], b: dict[str, object]) -> Interval:
    return paired_difference(torch.tensor(a["nll"]).double(), torch.tensor(b["nll"]).double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--spec", nargs="+", default=["w4g64", "w3g64"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="NAME", help=" | ".join(ROWS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 1024 tokens")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 2048 tokens")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--no-times", action="store_true", help="the machine is not quiet: no seconds in the rows")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, nothing written")
    parser.add_argument("--peer", choices=list(PEERS), help="measure this library, alone or behind --rows")
    parser.add_argument("--peer-python", help="the Python of the venv that --peer is installed in")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.samples, args.windows = 2, 1
    if args.worker:
        print(json.dumps(one(args)))
        return
    if bool(args.peer) != bool(args.peer_python):
        parser.error("--peer and --peer-python go together (benchmarks/peers/*.py say how to make the venv)")
    protocol = {
        k: Path(str(getattr(args, k))).name for k in ("model", "calibration", "evaluation", "samples", "windows")
    }
    path = RESULTS / "quantize.json"

    def rows() -> dict[str, dict[str, dict[str, object]]]:
        """Those measured so far, by whichever process."""
        known = json.loads(path.read_text()) if path.exists() and not args.quick else {}
        return known.get("rows", {}) if known.get("protocol") == protocol else {}

    for spec in args.spec:
        for name in [*(args.rows or []), args.peer] if args.peer else args.rows or ROWS:
            if name in rows().get(spec, {}) and not args.again:
                continue
            options = [
                "--model",
                args.model,
                "--calibration",
                args.calibration,
                "--evaluation",
                args.evaluation,
                "--spec",
                spec,
            ]
            options += [
                *(["--quick"] if args.quick else []),
                *(["--peer-python", args.peer_python] if args.peer else []),
            ]
            options += ["--samples", str(args.samples), "--windows", str(args.windows)]
            out = subprocess.run(
                [sys.executable, __file__, "--worker", name, *options], stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads(out.stdout.splitlines()[-1])
            print(
                f"{spec:8s} {name:40s} {row['perplexity']:8.2f}  {row['seconds'] or 0:6.0f} s  {row['peak_mb']} MB",
                flush=True,
            )
            if args.no_times:
                row |= {"seconds": None, "forward_seconds": None}
            if not args.quick:
                found = rows()
                found.setdefault(spec, {})[name] = row
                write_json(path, {"protocol": protocol, "rows": found, "environment": environment()})
                write_text(RESULTS / "quantize.md", table(found, protocol))


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()
