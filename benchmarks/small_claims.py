"""Figures of the docs that have no other command, a row each.

    python benchmarks/small_claims.py [--only cache-memory padding-graph gptq-matrix dry-run] [--rounds 3] [--quick]

cache-memory    memory of an onnxruntime-genai generator on a context of 131,072: a cache of the whole of it, and of
                the `max_length` that genai_config.json names
padding-graph   decode tokens/s of an export as it is, beside one without the nodes that move left-padded tokens
gptq-matrix     seconds of `gptq_quantize` on one matrix [N, K], and of the factor of its Hessian in it
dry-run         what `--dry-run` estimates for a pass, beside the seconds and memory that it takes

Weights are random: none of these depends on them. Memory is of a process of its own, in MB: `private_mb` as
benchmarks/memory.py samples it. Times are the least of the rounds, taken by turns where two things are compared.
Results go to results/small_claims.json and .md, each row at once; `--quick` takes small shapes and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from memory import PrivateMemory

from tinycompress.evaluation.perplexity import environment
from tinycompress.files import write_json, write_text
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph, Pass
from tinycompress.graph.presets import SMOLLM2_135M
from tinycompress.quantization.gptq import GPTQ, gptq_quantize
from tinycompress.quantization.hessian_factor import damped_factor
from tinycompress.quantization.hqq import HQQ
from tinycompress.quantization.rtn import RTN

RESULTS = Path(__file__).parent / "results" / "small_claims.json"
LAYER = Layer(32, 8, 96)  # of Llama 3.2 1B's attention; the rest small, for the cache is what is measured
LONG_CONTEXT = Config(512, 64, 64, (LAYER,) * 16, max_position=131072, eos_token_id=2)
QUICK_CONTEXT = dataclasses.replace(LONG_CONTEXT, layers=(LAYER,) * 2, max_position=8192)
QUICK_MODEL = Config(512, 128, 32, (Layer(4, 2, 256),) * 2, max_position=512, eos_token_id=2)
MATRICES = ((1536, 8960), (17920, 1536))  # Qwen2.5-1.5B: down_proj; gate_proj and up_proj, one below the other
QUICK_MATRICES = ((64, 256), (256, 64))
SPEC = "w4g64"
DECODED = 64  # tokens of a round
PASSES = ("rtn", "hqq", "gptq")

Row = dict[str, Any]


def cache_memory(quick: bool, rounds: int) -> Row:
    """A generator with a cache of the whole context, and one that names no length; each in a process of its own."""
    from tinycompress.export import export

    config = QUICK_CONTEXT if quick else LONG_CONTEXT
    row: Row = {"context": config.max_position}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        export(Graph.random(config, 0), folder, check=False, progress=False)
        search = json.loads((folder / "genai_config.json").read_text())["search"]
        row["max_length"] = search["max_length"]
        for name, length in (("whole context", config.max_position), ("as written", 0)):
            row[f"private_mb, {name}"] = worker("generator", folder, length)["private_mb"]
    return row


def generator(folder: str, length: str) -> Row:
    """In the worker: opens the export, takes a prompt and writes a token."""
    import numpy as np
    import onnxruntime_genai as og

    memory = PrivateMemory()
    model = og.Model(folder)
    params = og.GeneratorParams(model)
    if int(length):
        params.set_search_options(max_length=int(length))
    made = og.Generator(model, params)
    made.append_tokens(np.array([5, 6, 7], np.int32))
    made.generate_next_token()
    time.sleep(0.2)  # at least one sample of the whole
    return {"private_mb": round(memory.stop())}


def padding_graph(quick: bool, rounds: int) -> Row:
    """Two exports of one graph, decoding by turns."""
    from tinycompress.export import OrtModel, export
    from tinycompress.export.dynamic import padding

    graph = RTN(SPEC)(Graph.random(QUICK_MODEL if quick else SMOLLM2_135M, 0))
    best = {"with": 0.0, "without": 0.0}
    with tempfile.TemporaryDirectory() as temporary:
        with_nodes = Path(temporary) / "with"
        without_nodes = Path(temporary) / "without"
        export(graph, with_nodes, check=False, progress=False)
        unmoved = mock.patch.object(padding, "tokens_first", lambda draw, ids, mask: padding.Moved(ids, ids))
        in_place = mock.patch.object(padding, "put_back", lambda draw, x, moved: x)
        with unmoved, in_place:
            export(graph, without_nodes, check=False, progress=False)
        models = {"with": OrtModel(with_nodes), "without": OrtModel(without_nodes)}
        for _ in range(rounds):
            for name, model in models.items():
                best[name] = max(best[name], model.tokens_per_second(n=DECODED))
    row = {f"tok_s, {name}": round(speed, 2) for name, speed in best.items()}
    return row | {"with / without": round(best["with"] / best["without"], 4)}


def gptq_matrix(quick: bool, rounds: int) -> Row:
    """Least seconds of the whole and of the factor alone, for each shape."""
    row: Row = {}
    for outputs, inputs in QUICK_MATRICES if quick else MATRICES:
        drawn = torch.Generator().manual_seed(0)
        weight = torch.randn(outputs, inputs, generator=drawn)
        x = torch.randn(2 * inputs, inputs, generator=drawn)
        hessian = (x.T @ x).double()
        name = f"{outputs}×{inputs}"
        row[f"{name} seconds"] = least(
            rounds, lambda w=weight, h=hessian: gptq_quantize(w, h, "w4g128" if not quick else SPEC)
        )
        row[f"{name} factor"] = least(rounds, lambda h=hessian: damped_factor(h, 64, "act", 0.01, "weight"))
    return row


def least(rounds: int, call: Callable[[], Any]) -> float:
    """Seconds of the fastest of so many calls."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return round(min(taken), 3)


def dry_run(quick: bool, rounds: int) -> Row:
    """Estimated and measured, pass by pass."""
    from tinycompress.recipe.estimate import costs
    from tinycompress.recipe.foretell import behind

    row: Row = {}
    graph = model_of(quick)
    for name in PASSES:
        step = pass_of(name, graph)
        cost = costs(graph, [step], [behind(step, graph)])[0]
        taken = worker("a_pass", name, int(quick))
        row[f"{name} seconds"] = {"estimated": round(cost.seconds, 1), "measured": taken["seconds"]}
        row[f"{name} MB"] = {"estimated": round(cost.memory / 2**20), "measured": taken["private_mb"]}
    return row


def model_of(quick: bool) -> Graph:
    return Graph.random(QUICK_MODEL if quick else SMOLLM2_135M, 0)


def pass_of(name: str, graph: Graph) -> Pass:
    """A pass as `compress --quantize` calls it; GPTQ's text is 16 windows of 512 random ids."""
    if name != "gptq":
        return {"rtn": RTN, "hqq": HQQ}[name](SPEC)
    drawn = torch.Generator().manual_seed(0)
    return GPTQ(torch.randint(graph.config.vocab_size, (16, 512), generator=drawn), SPEC)


def a_pass(name: str, quick: str) -> Row:
    """In the worker: one pass over a random graph."""
    memory = PrivateMemory()
    graph = model_of(bool(int(quick)))
    step = pass_of(name, graph)
    start = time.perf_counter()
    step(graph)
    seconds = time.perf_counter() - start
    time.sleep(0.1)
    return {"seconds": round(seconds, 1), "private_mb": round(memory.stop())}


WORKERS: Mapping[str, Callable[..., Row]] = {"generator": generator, "a_pass": a_pass}
CLAIMS: Mapping[str, Callable[[bool, int], Row]] = {
    "cache-memory": cache_memory,
    "padding-graph": padding_graph,
    "gptq-matrix": gptq_matrix,
    "dry-run": dry_run,
}


def worker(name: str, *arguments: object) -> Row:
    """What a function of WORKERS finds in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def table(results: Mapping[str, Row]) -> str:
    """results/small_claims.md: a line a figure."""
    lines = [
        "# Small claims",
        "",
        "Written by `benchmarks/small_claims.py`.",
        "",
        "| row | figure | value |",
        "|---|---|---|",
    ]
    for name, row in results.items():
        about = row["environment"]
        for figure, value in row.items():
            if figure != "environment":
                shown = (
                    f"{value['estimated']} estimated, {value['measured']} measured"
                    if isinstance(value, dict)
                    else value
                )
                lines.append(f"| {name} | {figure} | {shown} |")
        lines.append(f"| {name} | machine | {about['machine']} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        name, *arguments = args.worker
        print(json.dumps(WORKERS[name](*arguments)))
        return
    results: dict[str, Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.only:
        row = CLAIMS[name](args.quick, args.rounds)
        print(name, row, flush=True)
        if not args.quick:
            results[name] = row | {"environment": environment()}
            write_json(RESULTS, results)
            write_text(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
