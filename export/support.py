"""The support table: every kind of graph through every profile into every runtime that is installed.

    python export/support.py [--runtime NAME] [--quick] [--out docs/support.md] [--json benchmarks/results/support.json]

Small random graphs, exported at accuracy level 0 so that nothing but the export can differ, each checked by
export/runtimes/<name>/check.py. A cell is what a check wrote, or why the profile refuses the graph; a runtime that is
not installed has an empty column. `--quick` takes the first and the last kind only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tinycompress.checkpoints.families import QKV
from tinycompress.errors import InputError
from tinycompress.evaluation.perplexity import environment
from tinycompress.export import PROFILES, export, prepare, read, run_check
from tinycompress.export.gate.runtime import python_of
from tinycompress.files import write_json, write_text
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.rope import Rope
from tinycompress.progress import tqdm
from tinycompress.quantization.rtn import RTN

UNIFORM = (Layer(4, 2, 256),) * 3
PRUNED = (Layer(4, 2, 256), Layer(2, 1, 192), Layer(0, 0, 128), Layer(4, 2, 0))  # widths differ, sublayers are gone
STRETCHED = Rope(type="yarn", factor=4.0, original_max_position=32)
POSITIONS = 64  # of the text: twice the original context of the stretched graphs
# RKNN computes in float16 and is held to 0.1% of perplexity. Rounding that costs a KL of k moves the mean NLL of T
# tokens by √(2k / T)
# either way: at 3e-5 that is 0.1% over 64 tokens, which says nothing, and 0.03% over 512.
MORE_POSITIONS = {"static": 512}

PAIRS = {  # (profile, runtime)
    ("ort", "onnxruntime"): "",
    ("ort", "onnxruntime-genai"): "",
    (
        "ort",
        "optimum",
    ): "config.json of layers that differ is not Llama's, and Optimum takes the cache's shape from there",
    ("ort", "ort-mobile"): "",
    ("ort", "aarch64"): "",
    ("web", "transformers-js"): "",
    ("web", "chromium"): "",
    ("std", "onnxruntime"): "",
    ("std", "openvino"): "",
    ("openvino-npu", "openvino"): "",
    ("qnn", "qnn"): "",
    ("static", "rknn"): "",
}
UNIFORM_ONLY = ("optimum",)


def tiny(layers: tuple[Layer, ...] = UNIFORM, rope: Rope | None = None, tied: bool = False, **fields: Any) -> Graph:
    """A random graph whose logits are far from uniform; `fields` are more of its config."""
    config = Config(
        vocab_size=256,
        hidden_size=256,
        head_dim=64,
        layers=layers,
        rope=rope or Rope(),
        max_position=128,
        tie_embeddings=tied,
        eos_token_id=2,
        **fields,
    )
    generator = torch.Generator().manual_seed(0)
    norms = {n: torch.rand(s, generator=generator) + 0.5 for n, s in shapes(config).items() if "norm" in n}
    biases = {n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes(config).items() if n.endswith(".bias")}
    return Graph.random(config, 0, std=0.1).replace(weights=norms | biases)


SCALES = {
    "qnn": "lpbq"
}  # of 4-bit blocks: HTP rounds any others again, and so computes with other weights than the graph's

CASES: Mapping[str, Callable[[str], Graph]] = {  # of how scales are searched
    "dense": lambda scale: tiny(),
    "pruned, non-uniform": lambda scale: tiny(PRUNED),
    "4 bits": lambda scale: RTN(QuantSpec(4, 64, search=scale), head=True)(tiny()),
    "8 bits": lambda scale: RTN(QuantSpec(8, 64), head=True)(tiny()),
    "YaRN 4×": lambda scale: tiny(rope=STRETCHED),
    "Qwen2: biases": lambda scale: tiny(biases=QKV),
    "Qwen3: norms of queries and keys": lambda scale: tiny(qk_norm_eps=1e-5),
    "Mistral: a window of 16": lambda scale: tiny((Layer(4, 2, 256, window=16),) * 3),
    "SmolLM3: layers without RoPE": lambda scale: tiny((*UNIFORM, Layer(4, 2, 256, rope=False))),
    "4 bits, int8 cache": lambda scale: RTN(QuantSpec(4, 64, search=scale), head=True)(tiny()),
    "all together": lambda scale: RTN(QuantSpec(4, 64, search=scale), head=True)(tiny(PRUNED, STRETCHED)),
}
OPTIONS: Mapping[str, Mapping[str, Any]] = {"4 bits, int8 cache": {"kv": "int8"}}  # of the export


def cell(profile: str, runtime: str, case: str, folder: Path) -> dict[str, Any]:
    """What became of one kind of graph: {"state": "passed" | "failed" | "refused", "about", "figures"}."""
    graph = CASES[case](SCALES.get(profile, "auto"))
    if runtime in UNIFORM_ONLY and not graph.config.uniform:
        return {"state": "refused", "about": PAIRS[profile, runtime], "figures": {}}
    positions = MORE_POSITIONS.get(profile, POSITIONS)
    graph = graph.replace(
        config=dataclasses.replace(graph.config, max_position=max(graph.config.max_position, positions))
    )
    ids = torch.randint(graph.config.vocab_size, (positions,), generator=torch.Generator().manual_seed(1))
    try:
        manifest = export(
            graph, folder, profile, check=False, accuracy_level=0, progress=False, **OPTIONS.get(case, {})
        )
    except InputError as error:
        return {"state": "refused", "about": str(error), "figures": {}}
    prepared = (
        read(folder) if PROFILES[profile].form == "static" else prepare(graph)
    )  # static profiles round what is dense
    result = run_check(runtime, folder, prepared, profile, ids)
    state = "passed" if result["passed"] else "failed"
    about = "; ".join(result["failures"])
    return {
        "state": state,
        "about": about,
        "figures": result["figures"],
        "versions": result.get("versions", {}),
        "scheme": manifest["scheme"],
    }


def table(results: Mapping[str, Mapping[str, dict[str, Any]]], machine: Mapping[str, Any]) -> str:
    """docs/support.md."""
    columns = [f"{p} · {r}" for p, r in PAIRS]
    lines = [
        "# Support",
        "",
        "Written by `make support`; do not edit. Each cell is a check that ran: the largest difference from "
        "torch's logits",
        "",
    ]
    lines[2] += " at accuracy level 0, over a prompt, steps behind the cache, and text beyond the original context."
    lines[2] += " NPUW and RKNN compute in float16, HTP on uint16 activations, and an int8 cache is rounded:"
    lines[2] += " larger by nature, and judged by KL, top tokens and perplexity."
    lines[2] += " For `qnn` 4 bits are w4g64-lpbq, the scales that HTP has; else w4g64."
    lines += ["| graph | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    notes: list[str] = []
    for case in CASES:
        cells = [_show(results.get(c, {}).get(case), notes, f"{c}, {case}") for c in columns]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    versions = {k: v for row in results.values() for one in row.values() for k, v in one.get("versions", {}).items()}
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), "", "An empty cell was not run."]
    lines += [
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())) + f". Machine: {machine['machine']}.",
        "",
    ]
    return "\n".join(lines)


def _show(one: dict[str, Any] | None, notes: list[str], where: str) -> str:
    if one is None:
        return ""
    if one["state"] == "passed":
        errors = [v for k, v in one["figures"].items() if k.endswith("error")]
        return f"{max(errors):.1g}" if errors else "passed"
    notes.append(f"{where}: {one['about']}".replace("|", "\\|").replace("\n", " "))
    return ("**failed**" if one["state"] == "failed" else "–") + f" [{len(notes)}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", help="only this one")
    parser.add_argument("--quick", action="store_true", help="dense, and all together")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument(
        "--json", type=Path, help="keep the results here, and take those of an interrupted run from here"
    )
    args = parser.parse_args()
    if args.runtime:
        python_of(args.runtime)
    results: dict[str, dict[str, dict[str, Any]]] = (
        json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    )
    cases = [c for i, c in enumerate(CASES) if not args.quick or i in (0, len(CASES) - 1)]
    work = [(p, r, c) for p, r in PAIRS for c in cases if args.runtime in (None, r) and _installed(r)]
    failed = 0
    for profile, runtime, case in tqdm(work, desc="support", delay=2):
        row = results.setdefault(f"{profile} · {runtime}", {})
        if case in row and row[case]["state"] != "failed":
            continue
        with tempfile.TemporaryDirectory(prefix="tinycompress-") as folder:
            row[case] = cell(profile, runtime, case, Path(folder) / "export")
        failed += row[case]["state"] == "failed"
        figures = ", ".join(
            f"{k} {v}" if isinstance(v, str) else f"{k} {v:.3g}" for k, v in row[case]["figures"].items()
        )
        tqdm.write(f"{runtime} · {profile} · {case}: {row[case]['state']} {row[case]['about'] or figures}")
        if args.json:
            write_json(args.json, results)
    if args.out:
        write_text(args.out, table(results, environment()))
    sys.exit(failed > 0)


def _installed(runtime: str) -> bool:
    try:
        return python_of(runtime).is_file()
    except InputError:
        return False


if __name__ == "__main__":
    main()
