"""What distillation wins back: a pruned model healed by CE, by KL and by cached KL, and a 3-bit student, at one token budget.

    python benchmarks/heal.py [--train pydoc] [--held-out wikitext2] [--held-out pydoc] [--tokens 16384] [--keep 0.8] [--quick]

`Prune` leaves `--keep` of the model's non-embedding parameters (FFN channels and heads, measured and refitted on some of the
training windows), and the original is the teacher. Every student then sees the same windows in the same order
with the same optimizer. The 3-bit student starts from the original and learns on the grid that it is packed on; its
"before" is rounding to nearest on the best grid. Perplexity is measured on each held-out text, paired by window: a row's
gain is the mean NLL of "before" less its own, with a 95% bootstrap interval. The curve is the perplexity on a few windows
against training tokens. Texts by path are named by their file. Results: results/heal.json and results/heal.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycompress import Prune
from tinycompress.checkpoint import load
from tinycompress.cli_distill import windows_of
from tinycompress.evaluate import environment, paired_difference, perplexity
from tinycompress.files import write_json
from tinycompress.graph import Graph
from tinycompress.losses import Loss
from tinycompress.passes.distill import Distill
from tinycompress.passes.rtn import RTN
from tinycompress.quantize import QuantSpec
from tinycompress.teacher_cache import write_cache
from tinycompress.training import Training

HERE = Path(__file__).parent


class Bench:
    """The texts, the teacher, and what has been measured so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.perf_counter()
        self.teacher = load(args.model, dtype=torch.float32)
        self.tokens = windows_of(self.teacher, args.train, args.seq_len, -(-args.tokens // args.seq_len))
        self.held_out = {Path(name).stem: windows_of(self.teacher, name, 512, args.windows, "test") for name in args.held_out}
        self.rows: list[dict[str, Any]] = []
        self.nll: dict[str, dict[str, Tensor]] = {}

    def measure(self, name: str, graph: Graph, before: str | None, curve: list[dict[str, Any]] | None = None) -> None:
        """A row of the table: perplexities, and the gain over `before` on the same windows."""
        module = graph.dense(torch.float32).module()
        self.nll[name] = {text: perplexity(module, windows).nll for text, windows in self.held_out.items()}
        row: dict[str, Any] = {"student": name, "curve": curve or [], "perplexity": {t: n.mean().exp().item() for t, n in self.nll[name].items()}}
        if before:
            row["gain"] = {t: vars(paired_difference(self.nll[before][t], n)) for t, n in self.nll[name].items()}
        self.rows.append(row)
        gains = "".join(f"  gain on {t} {g['value']:.4f} [{g['low']:.4f}, {g['high']:.4f}]" for t, g in row.get("gain", {}).items())
        print(f"{name:22s} " + "  ".join(f"{t} {p:.2f}" for t, p in row["perplexity"].items()) + gains, flush=True)
        if not self.args.quick:
            self.write()

    def train(self, name: str, student: Graph, before: str, **how: Any) -> None:
        """Distils and measures."""
        args = self.args
        training = Training(tokens=args.tokens, batch=args.batch, micro_batch=args.micro_batch, lr=args.lr, eval_every=args.eval_every)
        with tempfile.TemporaryDirectory() as folder:
            few = {text: windows[:4] for text, windows in self.held_out.items()}
            out = Distill(self.tokens, training=training, held_out=few, log=Path(folder), **how)(student)
            lines = [json.loads(line) for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
        curve = [{"tokens": line.get("tokens", 0), **line["perplexity"]} for line in lines if "perplexity" in line]
        self.measure(name, out, before, curve)

    def write(self) -> None:
        shown = {k: [Path(v).name for v in value] if isinstance(value, list) else value for k, value in vars(self.args).items()}
        shown |= {"train": Path(self.args.train).name, "model": Path(self.args.model).name, "windows": {t: len(w) for t, w in self.held_out.items()}}
        minutes = round((time.perf_counter() - self.started) / 60, 1)
        result = {"protocol": shown, "rows": self.rows, "minutes": minutes, "environment": environment()}
        write_json(HERE / "results" / "heal.json", result)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against training tokens, a panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    texts = list(rows[0]["perplexity"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for panel, text in zip(panels[0], texts):
        for row in rows:
            if row["curve"]:
                panel.plot([p["tokens"] for p in row["curve"]], [p[text] for p in row["curve"]], marker="o", label=row["student"])
        panel.set(title=text, xlabel="training tokens", ylabel="perplexity (4 windows)")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", default="pydoc", help="training text: a path or a data set's name (default: pydoc)")
    parser.add_argument("--held-out", action="append", help="texts to measure on (default: wikitext2 and pydoc)")
    parser.add_argument("--keep", type=float, default=0.8, help="share of the non-embedding parameters (default: 0.8)")
    parser.add_argument("--tokens", type=int, default=16384, help="training tokens of each student (default: 16384)")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--eval-every", type=int, default=4, help="steps between points of the curve (default: 4)")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of 512 tokens a text (default: 12)")
    parser.add_argument("--spec", default="w3g64", help="grid of the quantization-aware student (default: w3g64)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few tokens, nothing written")
    args = parser.parse_args()
    args.held_out = args.held_out or ["wikitext2", "pydoc"]
    if args.quick:
        args.tokens, args.windows, args.seq_len = 4096, 4, 128
    bench = Bench(args)
    bench.measure("original", bench.teacher, None)
    multiple = 64 if all(layer.ffn_dim % 64 == 0 for layer in bench.teacher.config.layers) else 4
    calibration = bench.tokens[: 8192 // args.seq_len]
    pruned = Prune(calibration, f"params={args.keep}", multiple_of=multiple)(bench.teacher)
    bench.measure("pruned", pruned, None)
    bench.train("pruned, CE", pruned, "pruned", teacher=None, losses=(Loss("ce"),))
    bench.train("pruned, KL", pruned, "pruned", teacher=bench.teacher)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_cache(bench.teacher, bench.tokens, Path(folder) / "cache")
        bench.train("pruned, cached KL", pruned, "pruned", teacher=cache)
    spec = QuantSpec.parse(args.spec)
    bench.measure(f"{spec}, nearest", RTN(QuantSpec(spec.bits, spec.group_size, spec.symmetric, "mse"))(bench.teacher), None)
    bench.train(f"{spec}, aware", bench.teacher, f"{spec}, nearest", teacher=bench.teacher, fake_quant=spec, grid="learn")
    if not args.quick:
        draw(bench.rows, HERE / "results" / "heal.png")


if __name__ == "__main__":
    main()
