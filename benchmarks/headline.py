"""A pruned and quantized SmolLM2-135M against what the usual tools make of it: bytes, perplexity and decode speed
together.

    python benchmarks/headline.py --work DIR --builder-python PYTHON --llama-python PYTHON --calibration
        wiki_passages.txt
        --evaluation wikitext2_raw_test.txt [--rounds 9] [--windows 8] [--quick]

  w4                ours: `compress --quantize w4g64 --quantize-embedding w8g64`, profile ort
  w4, 90%, w4, 80%  ours: the same behind `--prune params=0.9` and 0.8, no retraining
  …, tuned          ours: the same with `--tune`, in which scales and norms learn from the float model on the
                    calibration text
  builder           onnxruntime-genai's model builder, int4 in blocks of 32, accuracy level 4, as it comes
  llama.cpp Q4_0    llama.cpp's own quantization of the float32 GGUF

Interpreters as for benchmarks/export.py. Calibration: 32 windows of 1024 tokens. Perplexity: each runtime's own logits,
at the level it ships, over non-overlapping windows of 2048 tokens, no BOS. Speed: tokens/s of --tokens single steps
behind 32 positions, two threads, one shared cache buffer, the engines by turns; medians, and of the ratio to the faster
peer in the same round. What is in DIR is not made again; results go to results/headline.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from export import LLAMA, PROMPT, by_turns, decode, head_size, run
from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.files import write_json, write_text
from tinycompress.graph.graph import Graph
from tinycompress.recipe import Options

RESULTS = Path(__file__).parent / "results" / "headline.json"
PRUNED = {"w4": None, "w4, 90%": "params=0.9", "w4, 80%": "params=0.8"}
OURS = [f"{name}{tuned}" for name in PRUNED for tuned in ("", ", tuned")]
PEERS = ("builder", "llama.cpp Q4_0")
GGUF = {"float": "f32.gguf", "llama.cpp Q4_0": "q4_0.gguf"}

LLAMA_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)) == 0
"""

LLAMA_NLL = """
import json, sys, numpy as np
from llama_cpp import Llama
windows = json.load(open(sys.argv[2]))
options = dict(n_batch=512, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
model = Llama(sys.argv[1], n_ctx=len(windows[0]), **options)
out = []
for ids in windows:
    model.reset()
    model.eval(ids)
    logits = model.scores[: len(ids) - 1].astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    out.append(float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
print(json.dumps(out))
"""


def make(args: argparse.Namespace, graph: Graph) -> None:
    """Everything that is measured, into the work folder."""
    from tinycompress.export import export

    tokens = data.tokens(args.calibration, graph.tokenizer, args.samples, 1024)
    for name, prune in tqdm(PRUNED.items(), desc="compress and export"):
        folders = [args.work / "out" / f"{name}{tuned}" for tuned in ("", ", tuned")]
        if all(folder.is_dir() for folder in folders):
            continue
        options = Options(prune, quantize="w4g64", quantize_embedding="w8g64", tune=True)
        *steps, tune = options.recipe(graph.config).passes(graph, tokens=tokens)
        out = graph
        for folder, passes in zip(folders, (steps, [tune])):
            for step in passes:
                out = step(out)
            if not folder.is_dir():
                export(out, folder, check=False, progress=False)
    if args.builder_python and not (args.work / "out" / "builder").is_dir():
        if not (args.work / "dense").is_dir():
            save(graph, args.work / "dense")
        made = run("builder", args)
        if "failed" in made:
            raise SystemExit(f"the builder: {made['failed']}")
    if args.llama_python and not (args.work / GGUF["llama.cpp Q4_0"]).is_file():
        save(graph, args.work / GGUF["float"], format="gguf")
        files = [str(args.work / name) for name in GGUF.values()]
        subprocess.run(
            [args.llama_python, "-c", LLAMA_QUANTIZE, *files],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def nll(folder: Path, windows: list[list[int]]) -> list[float]:
    """Mean next-token NLL of each window by ONNX Runtime, whoever made the model."""
    import numpy as np

    from tinycompress.export.quiet import onnxruntime

    ort = onnxruntime()

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    out = []
    for ids in windows:
        feeds = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
        }
        for node in session.get_inputs():
            if node.name.startswith("past_key_values."):
                feeds[node.name] = np.zeros((1, node.shape[1], 0, head_size(folder)), np.float32)
        logits = torch.from_numpy(
            session.run(["logits"], {node.name: feeds[node.name] for node in session.get_inputs()})[0][0, :-1]
        )
        losses = [
            torch.nn.functional.cross_entropy(x.double(), y)
            for x, y in zip(logits.split(256), torch.tensor(ids[1:]).split(256))
        ]
        counts = [len(x) for x in logits.split(256)]
        out.append(sum(float(x) * n for x, n in zip(losses, counts)) / sum(counts))
    return out


def measure(args: argparse.Namespace, graph: Graph) -> dict[str, Any]:
    evaluation = data.tokens(args.evaluation, graph.tokenizer, args.windows, 2048, split="test")
    rows: dict[str, Any] = {
        "float (torch)": {"nll": perplexity(graph.module(), evaluation).nll.tolist(), "bytes": graph.nbytes}
    }
    counts = ["2", str(args.tokens)]
    speeds: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        ids = Path(temporary) / "ids.json"
        ids.write_text(json.dumps(evaluation.tolist()))
        for name in tqdm((*OURS, *PEERS), desc="perplexity"):
            path = args.work / GGUF[name] if name in GGUF else args.work / "out" / name
            if not path.exists():
                continue
            if name in GGUF:
                command = [args.llama_python, "-c", LLAMA_NLL, str(path), str(ids)]
                speeds[name] = [args.llama_python, "-c", LLAMA, str(path), *counts, str(PROMPT)]
            else:
                command = [sys.executable, __file__, "--worker", "nll", str(path), str(ids)]
                speeds[name] = [sys.executable, __file__, "--worker", "decode", str(path), *counts]
            found = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            )
            size = (
                path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("model.onnx*"))
            )
            rows[name] = {"nll": found, "bytes": size}
    for name, found in by_turns(speeds, args.rounds).items():
        rows[name]["decode"] = found
    return rows


def table(rows: dict[str, Any], protocol: dict[str, Any], machine: str) -> str:
    lines = [
        "# A pruned and quantized model against its peers",
        "",
        f"{protocol}; {machine}; made by `benchmarks/headline.py`, which says what the rows are.",
        "",
    ]
    lines += ["| | MB | perplexity | decode, tokens/s (rounds) | of the faster peer |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        speed = row.get("decode", {})
        said = f"{speed['median']:.1f} ({min(speed['rounds']):.1f} … {max(speed['rounds']):.1f})" if speed else ""
        ratio = f"× {speed['of_best_peer']:.2f}" if "of_best_peer" in speed and name not in PEERS else ""
        ppl = math.exp(sum(row["nll"]) / len(row["nll"]))
        lines.append(f"| {name} | {row['bytes'] / 1e6:.0f} | {ppl:.2f} | {said} | {ratio} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder for what is measured (3 GB)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 1024 tokens")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of 2048 tokens")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64, help="of a turn")
    parser.add_argument("--builder-python", help="an interpreter with onnxruntime-genai, torch and transformers >= 5")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument(
        "--make-only",
        action="store_true",
        help="compress and export, measure nothing: for a machine that does other work",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, nothing written")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, folder, *rest = args.worker
        if kind == "decode":
            return decode(Path(folder), int(rest[0]), int(rest[1]))
        print(json.dumps(nll(Path(folder), json.loads(Path(rest[0]).read_text()))))
        return
    if args.work is None:
        parser.error("--work is needed")
    if args.quick:
        args.samples, args.windows, args.rounds, args.tokens = 4, 1, 1, 8
    args.work.mkdir(parents=True, exist_ok=True)
    graph = load(args.model, dtype=torch.float32)
    make(args, graph)
    if args.make_only:
        return
    rows = measure(args, graph)
    protocol = {
        key: Path(str(getattr(args, key))).name
        for key in ("model", "calibration", "evaluation", "samples", "windows", "rounds", "tokens")
    }
    text = table(rows, protocol, environment()["machine"])
    print(text)
    if not args.quick:
        write_json(RESULTS, {"protocol": protocol, "rows": rows, "environment": environment()})
        write_text(RESULTS.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
