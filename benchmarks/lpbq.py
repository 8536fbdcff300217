"""What Qualcomm's HTP makes of 4-bit blocks: scales of its own form (lpbq) against ordinary ones, on its emulator.

    python benchmarks/lpbq.py --model stories260K --calibration wiki_passages.txt --evaluation wikitext2_raw_test.txt

GPTQ on 32 windows of 512 tokens, the `qnn` profile with ranges from the first 8 of them, and one window of --tokens
evaluation tokens in the emulator (`make runtime NAME=qnn` installs it): KL and perplexity against torch with the very
same weights, so that what is lost is lost in the runtime. FFNs are cut to whole blocks where their width is none.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load
from tinycompress.evaluation.perplexity import environment
from tinycompress.export import StaticChoices, export, read, run_check
from tinycompress.files import write_json, write_text
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.gptq import GPTQ

RESULTS = Path(__file__).parent / "results" / "lpbq.json"
SHOWN = ("kl", "flips", "perplexity", "cpu_kl")


def whole_blocks(graph: Graph, block: int) -> Graph:
    for i, layer in enumerate(graph.config.layers):
        if layer.ffn_dim % block:
            graph = cut(graph, f"layers.{i}.ffn", range(layer.ffn_dim // block * block))
    return graph


def measure(graph: Graph, spec: QuantSpec, calibration: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    quantized = GPTQ(calibration, spec)(graph)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "export"
        export(quantized, folder, "qnn", check=False, progress=False, static=StaticChoices(calibration=calibration[:8]))
        found = run_check("qnn", folder, read(folder), "qnn", ids)
    return {name: found["figures"][name] for name in SHOWN} | {"versions": found["versions"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--groups", type=int, nargs="+", default=(32, 16))
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    graph = whole_blocks(load(args.model, dtype=torch.float32), max(args.groups))
    calibration = data.tokens(args.calibration, graph.tokenizer, 32, min(512, graph.config.max_position))
    ids = data.tokens(args.evaluation, graph.tokenizer, 1, args.tokens, split="test")[0]
    specs = [QuantSpec(4, group, search=scale) for group in args.groups for scale in ("lpbq", "minmax")]
    rows = {str(spec): measure(graph, spec, calibration, ids) for spec in tqdm(specs, desc="grids")}
    protocol = {key: Path(str(value)).name for key, value in vars(args).items() if key != "groups"}
    write_json(RESULTS, {"protocol": protocol, "rows": rows, "environment": environment()})
    lines = [
        f"{protocol}; made by `benchmarks/lpbq.py`.",
        "",
        "| grid | KL | other top token | perplexity off by | KL on the CPU provider |",
    ]
    lines.append("|---" * 5 + "|")
    lines += [
        f"| {n} | {r['kl']:.2g} | {r['flips']:.1%} | {r['perplexity']:.2%} | {r['cpu_kl']:.2g} |"
        for n, r in rows.items()
    ]
    write_text(RESULTS.with_suffix(".md"), "\n".join(["# Block scales on HTP's emulator", "", *lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
