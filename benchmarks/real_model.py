"""The main job on a real model of the mission's size, end to end: seconds, peak memory, bytes, quality and speed.

    python benchmarks/real_model.py --model qwen2.5-coder-1.5b.gguf --work DIR --llama-python PYTHON --calibration TEXT
        --evaluation TEXT [--rows load,w4g128,w4g64,prune90,prune80,export,gate,text,quality,speed] [--quick]

  load       every weight read once, one at a time; and `inspect`
  w4g128 …   `compress --quantize w4g128` (GPTQ as the recipe has it) and w4g64, 32 windows of 1,024 tokens
  prune90 …  `compress --prune params=0.9` and 0.8, the same windows
  export     profile ort of w4g128 and of w4g64, the table of the embedding in float and packed (w8); gguf of w4g64
  text       greedy text over 64 tokens, torch (float32) and onnxruntime-genai (float32 products; as shipped, int8)
  quality    perplexity and KL to the model as it was given, --windows windows of 1,024 tokens, in torch
  speed      decode behind 32 positions and prefill of 512, two threads, by turns; llama.cpp also on Q4_0 of w4g64

Every step is a process of its own; what is in DIR, or a row in the results, is not made again. A GGUF's weights of
4 and 6 bits lie on llama.cpp's grids: quality is against the dequantized model. Results: results/real_model.json, .md.
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

RESULTS = Path(__file__).parent / "results" / "real_model.json"
GRIDS = ("w4g128", "w4g64")
PRUNED = {"prune90": "params=0.9", "prune80": "params=0.8"}
ROWS = ("load", *GRIDS, *PRUNED, "export", "gate", "text", "quality", "speed")
PROMPT = 32
PREFILL = 512


# Workers: a process each ----------------------------------------------------------------------------------------------


def worker(kind: str, arguments: list[str]) -> None:
    """Prints the figures of one step as the last line, with seconds and the peak of memory."""
    start = time.perf_counter()
    found = WORKERS[kind](*arguments) or {}
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_mb": peak} | found), flush=True)


def load_worker(model: str) -> dict[str, Any]:
    import tinycompress

    start = time.perf_counter()
    graph = tinycompress.load(model)
    opened = time.perf_counter() - start
    for name in graph.weights:
        assert graph.tensor(name).isfinite().all(), name
    return {"open_seconds": opened, "parameters": graph.config.n_params, "bytes": graph.nbytes}


def command_worker(*arguments: str) -> None:
    from tinycompress.cli.main import main

    sys.argv = ["tinycompress", *arguments]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise


def text_worker(model: str, export: str, tokens: str) -> dict[str, Any]:
    import dataclasses

    import onnxruntime_genai as genai
    import torch

    import tinycompress

    graph = tinycompress.load(model)
    ids = graph.tokenizer.encode("def quicksort(values):\n")
    graph = graph.replace(config=dataclasses.replace(graph.config, eos_token_id=None))
    ours = graph.dense(torch.float32).module().generate(torch.tensor(ids), int(tokens)).tolist()
    runtime = genai.Model(export)
    options = genai.GeneratorParams(runtime)
    options.set_search_options(max_length=len(ids) + int(tokens), min_length=len(ids) + int(tokens), do_sample=False)
    generator = genai.Generator(runtime, options)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = list(map(int, generator.get_sequence(0)))[len(ids) :]
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
    return {"tokens": int(tokens), "same": same, "text": graph.tokenizer.decode(ours)}


def quality_worker(reference: str, model: str, text: str, windows: str) -> dict[str, Any]:
    import torch

    import tinycompress
    from tinycompress.calibration import data

    first = tinycompress.load(reference)
    tokens = data.tokens(text, first.tokenizer, int(windows), 1024, split="test")
    exact = first.module(dtype=torch.float32)
    approximate = tinycompress.load(model).module(dtype=torch.float32)
    kl, same, nll, reference_nll = [], [], [], []
    for window in tokens:
        with torch.inference_mode():
            p = exact(window[None])[0, :-1].double().log_softmax(-1)
            q = approximate(window[None])[0, :-1].double().log_softmax(-1)
        kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
        nll.append(float(-q.gather(1, window[1:, None]).mean()))
        reference_nll.append(float(-p.gather(1, window[1:, None]).mean()))
    return {"kl": kl, "same_top": same, "nll": nll, "reference_nll": reference_nll}


WORKERS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "load": load_worker,
    "command": command_worker,
    "text": text_worker,
    "quality": quality_worker,
}

# Engines that answer each line of standard input with "prefill decode", both tokens a second.

GENAI = f"""
import sys, time
import numpy as np
import onnxruntime_genai as genai
folder, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = genai.Config(folder)
config.overlay('{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": %d}}}}}}}}' % threads)
model = genai.Model(config)
def run(prompt, n):
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=prompt + n + 2, min_length=prompt + n + 2, do_sample=False)
    generator = genai.Generator(model, options)
    start = time.perf_counter()
    generator.append_tokens(np.ones(prompt, np.int32))
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(n):
        generator.generate_next_token()
    return first - start, time.perf_counter() - first
for _ in sys.stdin:
    prefill, _ = run({PREFILL}, 0)
    _, decode = run({PROMPT}, tokens)
    print({PREFILL} / prefill, tokens / decode, flush=True)
"""

LLAMA = f"""
import sys, time
from llama_cpp import Llama
path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = dict(n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False)
model = Llama(path, n_ctx={PREFILL} + 64, n_batch={PREFILL}, **options)
for _ in sys.stdin:
    model.reset()
    start = time.perf_counter()
    model.eval([1] * {PREFILL})
    prefill = time.perf_counter() - start
    model.reset()
    model.eval([1] * {PROMPT})
    start = time.perf_counter()
    for _ in range(tokens):
        model.eval([1])
    print({PREFILL} / prefill, tokens / (time.perf_counter() - start), flush=True)
"""


# The measurement ------------------------------------------------------------------------------------------------------


def step(kind: str, *arguments: str | Path) -> dict[str, Any]:
    """The figures of one step, in a process of its own; its progress goes to the terminal."""
    command = [sys.executable, __file__, "--worker", kind, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"exit code {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def exports(args: argparse.Namespace) -> dict[str, Path]:
    return {
        f"{grid}, {table}": args.work / f"ort-{grid}-{table.split()[-1]}"
        for grid in GRIDS
        for table in ("table float", "table packed")
    }


def make(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of results."""
    text = ["--calibration", args.calibration, "--samples", args.samples, "--seq-len", args.seq_len]
    if name == "load":
        return step("load", args.model) | {"inspect": step("command", "inspect", args.model)}
    if name in GRIDS:
        return step("command", "compress", args.model, "-o", args.work / name, "--quantize", name, *text)
    if name in PRUNED:
        return step("command", "compress", args.model, "-o", args.work / name, "--prune", PRUNED[name], *text)
    if name == "export":
        return make_exports(args)
    if name == "gate":
        manifests = {key: folder / "manifest.json" for key, folder in exports(args).items()}
        return {key: json.loads(path.read_text()).get("checks") for key, path in manifests.items() if path.is_file()}
    if name == "text":
        return texts(args)
    if name == "quality":
        models = [name for name in (*GRIDS, *PRUNED) if (args.work / name).is_dir()]
        return {n: step("quality", args.model, args.work / n, args.evaluation, args.windows) for n in models}
    return speeds(args)


def texts(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for grid in GRIDS:
        exact = args.work / f"ort-{grid}-exact"
        if (args.work / grid).is_dir() and not exact.is_dir():
            step("command", "export", args.work / grid, "-o", exact, "--accuracy-level", "0", "--no-verify")
        rows[f"{grid}, float32 products"] = step("text", args.work / grid, exact, "64")
        rows[f"{grid}, as shipped"] = step("text", args.work / grid, exports(args)[f"{grid}, table float"], "64")
    return rows


def make_exports(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, folder in exports(args).items():
        source = args.work / key.split(",")[0]
        if key.endswith("packed"):
            packed = args.work / f"{source.name}-packed"
            if not packed.is_dir():
                step("command", "compress", source, "-o", packed, "--quantize-embedding", "w8g64")
            source = packed
        row = step("command", "export", source, "-o", folder, "--overwrite")
        rows[key] = row | {"bytes": sum(path.stat().st_size for path in folder.glob("model.onnx*"))}
    gguf = args.work / "w4g64.gguf"
    row = step("command", "compress", args.work / "w4g64", "-o", gguf, "--format", "gguf", "--overwrite")
    rows["gguf"] = row | {"bytes": gguf.stat().st_size if gguf.is_file() else None}
    return rows


def speeds(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds of prefill and decode, each round a turn of every engine; ratios to llama.cpp on the file."""
    counts = ["2", str(args.tokens)]
    commands = {key: [sys.executable, "-c", GENAI, str(folder), *counts] for key, folder in exports(args).items()}
    commands = {key: command for key, command in commands.items() if Path(command[3]).is_dir()}
    if args.llama_python:
        files = {"llama.cpp, the file": Path(args.model), "llama.cpp, Q4_0 of w4g64": args.work / "w4g64.gguf"}
        commands |= {key: [args.llama_python, "-c", LLAMA, str(path), *counts] for key, path in files.items()}
    rounds: dict[str, list[list[float]]] = {key: [] for key in commands}
    for _ in range(args.rounds):
        for key, command in commands.items():  # started anew: two models of this size at once would share the memory
            done = subprocess.run(command, input="\n\n", capture_output=True, text=True, check=False)
            if done.returncode == 0:
                rounds[key].append([float(word) for word in done.stdout.strip().splitlines()[-1].split()])
    rows: dict[str, Any] = {
        key: dict(zip(("prefill", "decode"), map(list, zip(*values)))) for key, values in rounds.items() if values
    }
    base = rows.get("llama.cpp, the file")
    for row in rows.values() if base else ():
        for kind in ("prefill", "decode"):
            row[f"{kind}_of_the_file"] = median(ours / theirs for ours, theirs in zip(row[kind], base[kind]))
    return rows


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    lines = [
        "# A real model of 1.5 billion parameters",
        "",
        ", ".join(f"{key} {value}" for key, value in results["protocol"].items())
        + f"; {results['environment']['machine']}; made by `benchmarks/real_model.py`, which says "
        "what the rows are. Quality is against the dequantized model.",
        "",
        "| step | seconds | peak memory, MB | |",
        "|---|---|---|---|",
    ]
    for name in ("load", *GRIDS, *PRUNED):
        if (row := rows.get(name)) and "failed" not in row:
            lines.append(f"| {name} | {row['seconds']:,.0f} | {row['peak_mb']:,.0f} | {quality(rows, name)} |")
    for name, row in rows.get("export", {}).items():
        if "failed" not in row:
            size = f"{row['bytes'] / 1e6:,.0f} MB"
            lines.append(f"| export {name} | {row['seconds']:,.0f} | {row['peak_mb']:,.0f} | {size} |")
    for name, row in rows.get("text", {}).items():
        if "failed" not in row:
            same = f"{row['same']} of {row['tokens']} greedy tokens of onnxruntime-genai as torch's"
            lines.append(f"| text {name} | {row['seconds']:,.0f} | {row['peak_mb']:,.0f} | {same} |")
    lines += [
        "",
        "| engine | prefill, tokens/s | of the file | decode, tokens/s | of the file |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.get("speed", {}).items():
        parts = [f"{median(row[kind]):.1f} | {row.get(f'{kind}_of_the_file', 0):.2f}" for kind in ("prefill", "decode")]
        lines.append(f"| {name} | {parts[0]} | {parts[1]} |")
    return "\n".join([*lines, ""])


def quality(rows: dict[str, Any], name: str) -> str:
    row = rows.get("quality", {}).get(name, {})
    if "kl" not in row:
        return ""
    count = len(row["kl"])
    ratio = (sum(row["nll"]) - sum(row["reference_nll"])) / count
    return f"KL {sum(row['kl']) / count:.4f}, NLL {ratio:+.4f}, same top token {sum(row['same_top']) / count:.1%}"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a .gguf file or a folder")
    parser.add_argument("--work", type=Path, required=True, help="a folder for what is made (20 GB)")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--samples", default="32", help="calibration windows")
    parser.add_argument("--seq-len", default="1024", help="tokens of a calibration window")
    parser.add_argument("--windows", default="4", help="evaluation windows of 1,024 tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of a turn")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, nothing written")
    args = parser.parse_args()
    if args.quick:
        args.samples, args.seq_len, args.windows, args.rounds, args.tokens = "16", "128", "1", 1, 8
    from tinycompress.evaluation.perplexity import environment
    from tinycompress.files import write_json, write_text

    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "quick.json" if args.quick else RESULTS
    results = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
    keys = ("model", "calibration", "evaluation", "samples", "seq_len", "windows", "rounds", "tokens")
    results["protocol"] = {key: Path(str(getattr(args, key))).name for key in keys}
    results["environment"] = environment()
    for name in args.rows.split(","):
        if name not in ROWS:
            parser.error(f"--rows {name}: one of {', '.join(ROWS)}")
        if name not in results["rows"]:
            results["rows"][name] = make(name, args)
            write_json(path, results)
    print(table(results))
    if not args.quick:
        write_text(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
