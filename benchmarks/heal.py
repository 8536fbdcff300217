"""What distillation wins back: a pruned model and a 3-bit one, healed by CE, by KL and by cached KL, at one token
budget.

    python benchmarks/heal.py [--train pydoc] [--held-out wikitext2] [--held-out pydoc] [--tokens 16384] [--keep 0.8]
        [--work FOLDER] [--rows NAME …] [--quick]

`Prune` leaves `--keep` of the model's non-embedding parameters (FFN channels and heads, measured and refitted on some
of the training windows), and the original is the teacher. Every student then sees the same windows in the same order
with the same optimizer. The 3-bit students start from the original and learn on the grid that they are packed on; their
"before" is rounding to nearest on the best grid. Perplexity is measured on each held-out text, paired by window: a
row's gain is the mean NLL of "before" less its own, with a 95% bootstrap interval. The curve is the perplexity on a few
windows against training tokens. Texts by path are named by their file.

Results: results/heal.json, heal.md and heal.png, written after every row. Rows that are there under the same protocol
are kept, and with --work so are the pruned model, the cache and the state of the row in progress: a killed run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from tinycompress import Prune
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.cli.arguments import training_windows
from tinycompress.distillation.distill import Distill
from tinycompress.distillation.fused_loss import Loss
from tinycompress.distillation.teacher_cache import TeacherCache, write_cache
from tinycompress.distillation.training import Training
from tinycompress.evaluation.perplexity import environment, perplexity
from tinycompress.evaluation.statistics import paired_difference
from tinycompress.files import read_json, write_json, write_text
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.model.cpu_memory import keep_memory
from tinycompress.quantization.rtn import RTN

RESULTS = Path(__file__).parent / "results"
WAYS = ("CE", "KL", "cached KL")


class Bench:
    """The texts, the teacher, and the rows measured so far, by name."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.spec = args, QuantSpec.parse(args.spec)
        self.teacher = load(args.model, dtype=torch.float32)
        self.tokens = training_windows(self.teacher, args.train, args.seq_len, -(-args.tokens // args.seq_len))
        self.held_out = {
            Path(name).stem: training_windows(self.teacher, name, 512, args.windows, "test") for name in args.held_out
        }
        shown = {k: v for k, v in vars(args).items() if k not in ("work", "rows", "quick")}
        shown |= {
            "train": Path(args.train).name,
            "model": Path(args.model).name,
            "held_out": {t: len(w) for t, w in self.held_out.items()},
        }
        self.protocol = shown | {"training_windows": len(self.tokens)}
        self.work = (
            work / hashlib.sha256(json.dumps(self.protocol).encode()).hexdigest()[:8]
        )  # another protocol, another folder
        earlier = read_json(RESULTS / "heal.json") if (RESULTS / "heal.json").exists() and not args.quick else {}
        self.rows: dict[str, dict[str, Any]] = earlier["rows"] if earlier.get("protocol") == self.protocol else {}

    def names(self) -> dict[str, str | None]:
        """Every row, and the row that it is compared with."""
        nearest = f"{self.spec}, nearest"
        rows: dict[str, str | None] = {"original": None, "pruned": None} | {f"pruned, {way}": "pruned" for way in WAYS}
        return rows | {nearest: None} | {f"{self.spec}, {way}": nearest for way in WAYS}

    def row(self, name: str) -> None:
        """Measures a row, and the one that it is compared with, unless they are there."""
        if name in self.rows:
            return
        before = self.names()[name]
        if before:
            self.row(before)
        graph, curve = self.student(name, before)
        module = graph.dense(torch.float32).module()
        nll = {text: perplexity(module, windows).nll for text, windows in self.held_out.items()}
        row: dict[str, Any] = {"perplexity": {t: n.mean().exp().item() for t, n in nll.items()}}
        if before:
            base = {t: torch.tensor(n, dtype=torch.float64) for t, n in self.rows[before]["nll"].items()}
            row["gain"] = {t: vars(paired_difference(base[t], n)) for t, n in nll.items()}
        self.rows[name] = row | {
            "nll": {t: n.tolist() for t, n in nll.items()},
            "curve": curve,
            "machine": environment()["machine"],
        }
        gains = "".join(
            f"  gain on {t} {g['value']:.4f} [{g['low']:.4f}, {g['high']:.4f}]" for t, g in row.get("gain", {}).items()
        )
        print(f"{name:22s} " + "  ".join(f"{t} {p:.2f}" for t, p in row["perplexity"].items()) + gains, flush=True)
        if not self.args.quick:
            self.write()

    def student(self, name: str, before: str | None) -> tuple[Graph, list[dict[str, Any]]]:
        """A row's model, and its curve if it was trained."""
        if name == "original":
            return self.teacher, []
        start = self.pruned() if name.startswith("pruned") else self.teacher
        if before is None:
            nearest = QuantSpec(self.spec.bits, self.spec.group_size, self.spec.symmetric, search="mse")
            return (start if name == "pruned" else RTN(nearest)(start)), []
        way = name.split(", ")[1]
        how: dict[str, Any] = {
            "teacher": {"CE": None, "KL": self.teacher}.get(way) if way != "cached KL" else self.cache()
        }
        if way == "CE":
            how["losses"] = (Loss("ce"),)
        if before != "pruned":
            how |= {"fake_quant": self.spec, "grid": "learn"}
        return self.train(name, start, **how)

    def pruned(self) -> Graph:
        folder = self.work / "pruned"
        if not folder.exists():
            multiple = 64 if all(layer.ffn_dim % 64 == 0 for layer in self.teacher.config.layers) else 4
            calibration = self.tokens[: 8192 // self.args.seq_len]
            save(Prune(calibration, f"params={self.args.keep}", multiple_of=multiple)(self.teacher), folder)
        return load(folder)

    def cache(self) -> TeacherCache:
        return write_cache(self.teacher, self.tokens, self.work / "cache")

    def train(self, name: str, student: Graph, **how: Any) -> tuple[Graph, list[dict[str, Any]]]:
        args, folder = self.args, self.work / name.replace(", ", "-").replace(" ", "-")
        training = Training(
            tokens=args.tokens,
            batch=args.batch,
            micro_batch=args.micro_batch,
            lr=args.lr,
            precision=args.precision,
            eval_every=args.eval_every,
        )
        few = {text: windows[:4] for text, windows in self.held_out.items()}
        out = Distill(self.tokens, training=training, held_out=few, work=folder, log=folder, **how)(student)
        lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        return out, [{"tokens": line.get("tokens", 0), **line["perplexity"]} for line in lines if "perplexity" in line]

    def write(self) -> None:
        self.rows = {name: self.rows[name] for name in self.names() if name in self.rows}
        write_json(RESULTS / "heal.json", {"protocol": self.protocol, "rows": self.rows, "environment": environment()})
        write_text(RESULTS / "heal.md", table(self.protocol, self.rows))
        draw(self.rows, RESULTS / "heal.png")


def table(protocol: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    p, texts = protocol, protocol["held_out"]
    lines = [
        f"{p['model']}, {p['tokens']:,} training tokens of {p['train']} ({p['training_windows']} windows of "
        f"{p['seq_len']}, {p['batch']} a step, "
        f"lr {p['lr']}, {p['precision']}), {p['keep']:.0%} of the non-embedding parameters kept; perplexity over "
        f"{', '.join(f'{n} windows of 512 of {text}' for text, n in texts.items())}; the gain over the untrained "
        "student in nats a token, with its "
        "95% interval.",
        "",
        "| student | " + " | ".join(f"{text} | gain" for text in texts) + " |",
        "|---|" + "---|---|" * len(texts),
    ]
    for name, row in rows.items():
        gain = {t: f"{g['value']:.3f} [{g['low']:.3f}, {g['high']:.3f}]" for t, g in row.get("gain", {}).items()}
        lines.append(
            f"| {name} | "
            + " | ".join(f"{row['perplexity'][text]:.2f} | {gain.get(text, '')}" for text in texts)
            + " |"
        )
    return "\n".join([*lines, ""])


def draw(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Perplexity against training tokens, a panel a text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {name: row["curve"] for name, row in rows.items() if row["curve"]}
    if not curves:
        return
    texts = list(next(iter(rows.values()))["perplexity"])
    figure, panels = pyplot.subplots(1, len(texts), figsize=(5 * len(texts), 4), squeeze=False)
    for panel, text in zip(panels[0], texts):
        for name, curve in curves.items():
            panel.plot([p["tokens"] for p in curve], [p[text] for p in curve], marker="o", label=name)
        panel.set(title=text, xlabel="training tokens", ylabel="perplexity (4 windows)", yscale="log")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


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
    parser.add_argument(
        "--precision", default="float32", help="of the student's products: float32 (default) or bfloat16"
    )
    parser.add_argument("--eval-every", type=int, default=4, help="steps between points of the curve (default: 4)")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of 512 tokens a text (default: 12)")
    parser.add_argument("--spec", default="w3g64", help="grid of the quantization-aware students (default: w3g64)")
    parser.add_argument(
        "--work", type=Path, help="keep the pruned model, the cache and training states here, for a run that is killed"
    )
    parser.add_argument("--rows", nargs="+", help="only these rows, and what they are compared with")
    parser.add_argument("--quick", action="store_true", help="a smoke test: few tokens, nothing written")
    args = parser.parse_args()
    args.held_out = args.held_out or ["wikitext2", "pydoc"]
    if args.quick:
        args.tokens, args.windows, args.seq_len = 4096, 4, 128
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, args.work or Path(temporary))
        unknown = set(args.rows or ()) - set(bench.names())
        if unknown:
            parser.error(f"--rows: found {', '.join(sorted(unknown))}; accepted: {' | '.join(bench.names())}")
        for name in args.rows or bench.names():
            bench.row(name)


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()
