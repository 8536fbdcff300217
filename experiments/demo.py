"""The whole road on the embedded model, in minutes on two cores: `make demo`.

SmolLM2-135M-Instruct: prune a quarter of every FFN with refit, stretch the context 2×, GPTQ to 4 bits in groups of 64,
export to ONNX, verify against the torch graph, and generate from the exported model. Prints and saves a before/after
table (parameters, bytes on disk, perplexity, tokens a second in ONNX Runtime) and a plot of size against perplexity.
Text: Python's own documentation (pydoc), calibration and evaluation halves disjoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.export import OrtModel, export, summary
from tinycompress.files import write_json, write_text
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.model.cpu_memory import keep_memory
from tinycompress.pruning.prune_ffn import PruneFFN
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.recipe import best_gptq

PROMPT = "The capital of France is"
WINDOWS, SEQ_LEN = 8, 1024


def measure(name: str, graph: Graph, folder: Path, evaluation: torch.Tensor) -> dict[str, object]:
    """One row of the table, all of it from the exported folder in ONNX Runtime."""
    model = OrtModel(folder)
    return {
        "model": name,
        "parameters": graph.config.n_params,
        "context": graph.config.max_position,
        "bytes": sum(f.stat().st_size for f in folder.glob("model.onnx*")),
        "perplexity": perplexity(model, evaluation).value,
        "tokens_per_second": model.tokens_per_second(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default: demo)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens (default: 32)")
    args = parser.parse_args()
    console, started = Console(), time.perf_counter()
    graph = load(args.model, dtype=torch.float32)
    calibration = data.tokens("pydoc", graph.tokenizer, args.samples, 512, split="train")
    evaluation = data.tokens("pydoc", graph.tokenizer, WINDOWS, SEQ_LEN, split="test")

    console.rule("Before: the float model, exported as it is")
    export(graph, args.out / "before", check=False, overwrite=True)
    rows = [measure("float32", graph, args.out / "before", evaluation)]

    small = graph
    for step in (
        PruneFFN(calibration, keep=0.75, multiple_of=64),
        ScaleRope(context=2 * graph.config.max_position, method="yarn"),
        best_gptq(calibration, QuantSpec.parse("w4g64")),
        QuantizeEmbedding(QuantSpec.parse("w8g64")),
    ):
        console.rule(repr(step))
        small = step(small)

    console.rule("Export, and verify in ONNX Runtime")
    manifest = export(small, args.out / "after", overwrite=True, tokens=evaluation)
    console.print("\n".join(summary(manifest["checks"])), markup=False, highlight=False)
    rows.append(measure("pruned, 16k context, 4 bits", small, args.out / "after", evaluation))

    console.rule("A sentence from the exported model")
    model = OrtModel(args.out / "after")
    ids = torch.tensor([graph.tokenizer.encode(PROMPT)])
    text = graph.tokenizer.decode(model.generate(ids, 24).tolist())
    console.print(PROMPT + text, markup=False, highlight=False)

    minutes = (time.perf_counter() - started) / 60
    protocol = f"ONNX Runtime, pydoc test half, {WINDOWS} windows of {SEQ_LEN} tokens; decode of one sequence"
    write_json(
        args.out / "demo.json",
        {
            "protocol": protocol,
            "rows": rows,
            "sentence": PROMPT + text,
            "minutes": minutes,
            "environment": environment(),
        },
    )
    write_text(args.out / "table.md", markdown(rows))
    plot(rows, args.out / "size_perplexity.png")
    table = Table(*HEADERS, title=f"{args.model}: {protocol}")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(
        f"{minutes:.1f} minutes; table, plot and figures in {args.out}/, models in {args.out}/before and "
        f"{args.out}/after",
        highlight=False,
    )


HEADERS = ("model", "parameters", "context", "on disk", "perplexity", "decode tok/s")


def cells(row: dict[str, object]) -> list[str]:
    return [
        str(row["model"]),
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['context']:,}",
        f"{row['bytes'] / 1e6:.0f} MB",
        f"{row['perplexity']:.2f}",
        f"{row['tokens_per_second']:.0f}",
    ]


def markdown(rows: list[dict[str, object]]) -> str:
    lines = [HEADERS, ("---",) * len(HEADERS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Size against perplexity, one point a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    sizes, values = [row["bytes"] / 1e6 for row in rows], [row["perplexity"] for row in rows]
    ax.plot(sizes, values, color="0.7", zorder=1)
    ax.scatter(sizes, values, s=60, zorder=2)
    for row, x, y in zip(rows, sizes, values):
        ax.annotate(
            f"{row['model']}\n{x:.0f} MB, {row['tokens_per_second']:.0f} tok/s",
            (x, y),
            textcoords="offset points",
            xytext=(8, 8),
        )
    ax.set(
        xlabel="MB on disk",
        ylabel="perplexity (lower is better)",
        title="Size against perplexity",
        xlim=(0, max(sizes) * 1.35),
    )
    ax.margins(y=0.35)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()
