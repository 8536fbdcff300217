"""Export of TinyLlama's shape (random weights), 4 bits with a quantized head and embedding, against its peers.

    python benchmarks/export.py --work DIR --builder-python PYTHON --llama-python PYTHON [--rows export,speed]
        [--rounds 5]
        [--quick] [--json benchmarks/results/export.json]

  export   file size, time and peak memory of tinycompress' export (groups of 32, 64 and 128, scales in float32 and
           float16)
           and of onnxruntime-genai's builder on the same shape, a process of its own each
  speed    decode tokens/s at --threads threads: our folders and the builder's model, both by ONNX Runtime with one
           shared
           cache buffer, and llama.cpp on our groups of 32 as Q4_0, by turns

--builder-python is an interpreter with onnxruntime-genai, torch and transformers >= 5, --llama-python one with a native
build of llama-cpp-python; without them their rows are missing. The row `speed` wants the folders of `export` in DIR. A
row that is in --json is not measured again, so an interrupted run goes on. `--quick` takes four layers and one round of
eight tokens. Peak memory is VmHWM of the process that exports (Linux); the checkpoints are written once and not part of
any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from export_graphs import GGUF, OURS, make_graphs
from tqdm import tqdm

from tinycompress.files import write_json
from tinycompress.graph.presets import TINYLLAMA_1_1B

PROMPT = 32
AIMS = {  # of the whole shape: what, of which rows, at most
    "g32, MB": (lambda row: row["g32"]["bytes"] / 1e6, 700.0),
    "g128, MB": (lambda row: row["g128"]["bytes"] / 1e6, 590.0),
    "time, g32 / builder": (lambda row: row["g32"]["seconds"] / row["builder"]["seconds"], 0.5),
    "peak memory, g32 / builder": (lambda row: row["g32"]["peak_mb"] / row["builder"]["peak_mb"], 1 / 3),
}


# Workers: a process each ----------------------------------------------------------------------------------------------


def export_ours(work: Path, name: str) -> None:
    from tinycompress.checkpoints.checkpoint import load
    from tinycompress.export import export

    group, scales = OURS[name]
    start = time.perf_counter()
    export(
        load(work / f"packed{group}"), work / "out" / name, check=False, scales=scales, overwrite=True, progress=False
    )
    _print({"seconds": time.perf_counter() - start, "peak_mb": _peak()})


def decode(folder: Path, threads: int, tokens: int) -> None:
    """For each line of standard input: tokens a second of `tokens` steps behind PROMPT ids, in one shared cache
    buffer."""
    import numpy as np

    from tinycompress.export.quiet import onnxruntime

    ort = onnxruntime()

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    caches = {
        n.name: ort.OrtValue.ortvalue_from_numpy(
            np.zeros((1, n.shape[1], PROMPT + tokens + 4, head_size(folder)), np.float32)
        )
        for n in session.get_inputs()
        if n.name.startswith("past_key_values.")
    }

    def step(ids: Any, total: int) -> None:
        binding = session.io_binding()
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(total - ids.shape[1], total)[None],
        }
        for name in names:
            if name in caches:
                binding.bind_ortvalue_input(name, caches[name])
                binding.bind_ortvalue_output(name.replace("past_key_values", "present"), caches[name])
            else:
                binding.bind_cpu_input(name, feeds[name])
        binding.bind_output("logits")
        session.run_with_iobinding(binding)

    _turns(
        lambda: step(np.ones((1, PROMPT), np.int64), PROMPT),
        lambda i: step(np.ones((1, 1), np.int64), PROMPT + i + 1),
        tokens,
    )


def head_size(folder: Path) -> int:
    """The builder's caches name it only, in the graph."""
    return int(json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"])


def _turns(prefill: Callable[[], None], step: Callable[[int], None], tokens: int) -> None:
    for _ in sys.stdin:
        prefill()
        step(0)
        start = time.perf_counter()
        for i in range(1, tokens + 1):
            step(i)
        print(tokens / (time.perf_counter() - start), flush=True)


BUILDER = """
import json, sys, time
from onnxruntime_genai.models.builder import create_model, parse_extra_options
work, start = sys.argv[1], time.perf_counter()
places = (None, work + "/dense", work + "/out/builder", "int4", "cpu", work + "/cache")
create_model(*places, **parse_extra_options(*places, ["int4_accuracy_level=4", "int4_block_size=32"]))
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak_mb": peak}))
"""

LLAMA = """
import sys, time
from llama_cpp import Llama
path, threads, tokens, prompt = sys.argv[1], *map(int, sys.argv[2:])
model = Llama(path, n_ctx=256, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False)
for _ in sys.stdin:
    model.reset()
    model.eval([1] * prompt)
    model.eval([1])
    start = time.perf_counter()
    for _ in range(tokens):
        model.eval([1])
    print(tokens / (time.perf_counter() - start), flush=True)
"""


def _print(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def _peak() -> float:
    """MB. Not ru_maxrss, which a child takes over from the process that started it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("model.onnx*"))


# The measurement ------------------------------------------------------------------------------------------------------


def run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One export in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, str(args.work)]
    if name == "builder":
        if not args.builder_python:
            return {"failed": "not run: no --builder-python"}
        command = [args.builder_python, "-c", BUILDER, str(args.work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"bytes": _bytes(args.work / "out" / name)}


def speeds(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, each round a turn of every engine."""
    folders = {**{f"ours {n}": args.work / "out" / n for n in OURS}, "builder": args.work / "out" / "builder"}
    counts = [str(args.threads), str(args.tokens)]
    commands = {
        n: [sys.executable, __file__, "--worker", "decode", str(f), *counts]
        for n, f in folders.items()
        if (f / "model.onnx").is_file()
    }
    if args.llama_python:
        commands["llama.cpp Q4_0"] = [args.llama_python, "-c", LLAMA, str(args.work / GGUF), *counts, str(PROMPT)]
    return by_turns(commands, args.rounds)


def by_turns(commands: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Tokens a second of engines that answer each line with them; "builder" and "llama.cpp Q4_0" are the peers."""
    out: dict[str, list[float]] = {name: [] for name in commands}
    engines = {
        n: subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for n, c in commands.items()
    }
    try:
        for _ in tqdm(range(rounds), desc="rounds"):
            for name, engine in engines.items():
                assert engine.stdin is not None and engine.stdout is not None
                engine.stdin.write("\n")
                engine.stdin.flush()
                out[name].append(float(engine.stdout.readline() or "nan"))
    finally:
        for engine in engines.values():
            engine.terminate()
    peers = [out[name] for name in ("builder", "llama.cpp Q4_0") if name in out]
    rows: dict[str, Any] = {name: {"median": median(values), "rounds": values} for name, values in out.items()}
    for name, row in rows.items() if peers else ():
        row["of_best_peer"] = median(v / max(best) for v, *best in zip(out[name], *peers))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for checkpoints and exports (9 GB; 2 GB with --quick)")
    parser.add_argument("--rows", default="export,speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--builder-python", help="an interpreter with onnxruntime-genai, torch and transformers >= 5")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--json", type=Path, help="results; rows found there are kept")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, *rest = args.worker
        if kind == "decode":
            return decode(Path(rest[0]), int(rest[1]), int(rest[2]))
        return export_ours(Path(rest[0]), kind)
    if args.work is None:
        parser.error("--work is needed")
    if args.quick:
        args.rounds, args.tokens = 1, 8
    layers = 4 if args.quick else TINYLLAMA_1_1B.n_layers
    results: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    protocol = {
        "layers": layers,
        "threads": args.threads,
        "rounds": args.rounds,
        "prompt": PROMPT,
        "tokens": args.tokens,
    }
    if results and results["protocol"] != protocol:
        parser.error(f"--json {args.json} holds rows of another protocol: {results['protocol']}, not {protocol}")
    results["protocol"] = protocol
    args.work.mkdir(parents=True, exist_ok=True)
    make_graphs(args.work, layers)
    if "export" in args.rows:
        for name in tqdm((*OURS, "builder"), desc="export"):
            if name not in results.setdefault("export", {}) or "failed" in results["export"][name]:
                results["export"][name] = run(name, args)
                _keep(results, args.json)
    if "speed" in args.rows and "speed" not in results:
        results["speed"] = speeds(args)
        _keep(results, args.json)
    show(results)


def _keep(results: dict[str, Any], path: Path | None) -> None:
    from tinycompress.evaluation.perplexity import environment

    if path:
        write_json(path, results | {"environment": environment()})


def show(results: dict[str, Any]) -> None:
    for name, row in results.get("export", {}).items():
        words = (
            row.get("failed") or f"{row['bytes'] / 1e6:7.0f} MB  {row['seconds']:6.1f} s  {row['peak_mb']:6.0f} MB peak"
        )
        print(f"export {name:12s} {words}")
    if results["protocol"]["layers"] == TINYLLAMA_1_1B.n_layers:
        for what, (figure, most) in AIMS.items():
            try:
                found = figure(results["export"])
            except KeyError:
                continue  # a row that did not run
            print(
                f"aim    {what:27s} {found:7.2f}, at most {most:.2f}: {'holds' if found <= most else 'does not hold'}"
            )
    for name, row in results.get("speed", {}).items():
        ratio = f"  {row['of_best_peer']:.2f} of the faster peer" if "of_best_peer" in row else ""
        print(f"decode {name:16s} {row['median']:6.1f} tok/s  ({', '.join(f'{v:.1f}' for v in row['rounds'])}){ratio}")


if __name__ == "__main__":
    main()
