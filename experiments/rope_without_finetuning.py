"""Which context scaling works at once, without any training, and what it costs within the trained length.

Papers: position interpolation (arXiv:2306.15595), YaRN (arXiv:2309.00071), LongRoPE (arXiv:2402.13753), Self-Extend
(arXiv:2401.01325). Published for models that are not fine-tuned: unscaled ≫ PI > NTK-aware, YaRN at twice the trained
length L (Chinese-LLaMA at 4k: PI 12.42, NTK 11.05; unscaled 173 at 3k), and PI by 2 is worse than no scaling within L
(5.92 against 5.28).

Protocol: full windows of s·L tokens that do not overlap, s by s the same text for every method; mean NLL a window; 95%
bootstrap over windows, comparisons paired by window. Each method is set for exactly the length it is measured at, and
also, set for 2·L, at L. LongRoPE's factors are searched on other text: windows drawn from another seed, or from the
calibration text. "unscaled" is the model as it is, run beyond its length. `--text self` is text sampled from the model
(see context_form.py): in it nothing far away helps, so it shows what breaks and not what a longer context gives.

    python experiments/rope_without_finetuning.py --model stories260K --text self wikitext2
    python experiments/rope_without_finetuning.py --model smollm2-135m --text wikitext2 --times 2 --tokens 65536

Every row is written when it is measured, and a rerun takes up from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from context_form import Rows, named, nll_of, stream
from form import Finding

from tinycompress.checkpoints.checkpoint import load
from tinycompress.context.longrope import LongRope
from tinycompress.context.scale_rope import ScaleRope
from tinycompress.evaluation.long_context import full_windows, perplexity_interval
from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.graph import Graph
from tinycompress.model.cpu_memory import keep_memory
from tinycompress.model.self_extend import SelfExtend
from tinycompress.model.transformer import Transformer

METHODS = ("unscaled", "linear", "ntk", "ntk-by-parts", "yarn", "dynamic", "longrope", "self-extend")
PUBLISHED = {"linear": "≫ 0 (173 at 1.5·L against 12.4 at 2·L)", "ntk": "ln(12.42 / 11.05) = 0.12", "yarn": "> 0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a folder, a GGUF file, a hub name, or smollm2-135m (default)"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=["wikitext2"],
        help="self, or a text's path or name (default: wikitext2, its test split)",
    )
    parser.add_argument(
        "--calibration", help="for LongRoPE's search, beside the text self (default: pydoc)", default="pydoc"
    )
    parser.add_argument("--times", nargs="+", type=int, default=[2], help="lengths, in trained lengths (default: 2)")
    parser.add_argument(
        "--tokens", type=int, default=53248, help="evaluation tokens a length and text (default: 53,248)"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--within",
        nargs="+",
        choices=METHODS[1:],
        default=list(METHODS[1:]),
        help="methods set for 2·L that are measured at L too (default: all)",
    )
    parser.add_argument("--population", type=int, default=12, help="of LongRoPE's search (default: 12)")
    parser.add_argument("--generations", type=int, default=4, help="of LongRoPE's search (default: 4)")
    parser.add_argument(
        "--search-windows", type=int, default=1, help="of LongRoPE's search, each of the target length (default: 1)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "tinycompress-rope", help="journals of the searches"
    )
    parser.add_argument("--name", help="of the result file (default: this script's and the model's)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, nothing written")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.population, args.generations = 0, 4, 1
    graph = load(args.model, dtype=torch.float32)
    protocol = {k: v for k, v in vars(args).items() if k not in ("work", "quick", "name", "methods", "within")}
    protocol |= {
        "model": named(args.model),
        "text": [named(t) for t in args.text],
        "calibration": named(args.calibration),
    }
    protocol["trained"] = graph.config.max_position
    rows = Rows(
        args.name or f"rope_without_finetuning_{protocol['model']}",
        (__doc__ or "").splitlines()[0],
        protocol,
        how(protocol),
        not args.quick,
    )
    findings = [finding for text in args.text for finding in measure(graph, text, args, rows)]
    rows.finish(findings)


def how(p: dict[str, Any]) -> str:
    """The line of the index that says how it was measured."""
    defaults = {"calibration": "pydoc", "population": 12, "generations": 4, "search_windows": 1}
    search = "".join(f" --{k.replace('_', '-')} {p[k]}" for k, v in defaults.items() if p[k] != v)
    return (
        f"- `rope_without_finetuning`: {p['model']} (trained on {p['trained']}), about {p['tokens']:,} tokens a "
        f"length of {' and '.join(p['text'])}; "
        f"`python experiments/rope_without_finetuning.py --model {p['model']} --text {' '.join(p['text'])} --times "
        f"{' '.join(map(str, p['times']))} "
        f"--tokens {p['tokens']}{search}`."
    )


def measure(graph: Graph, text: str, args: argparse.Namespace, rows: Rows) -> list[Finding]:
    """All rows of one text, then the claims on them."""
    trained, name = graph.config.max_position, named(text)
    ids = stream(graph, text, max(args.tokens, max(args.times) * trained), seed=1)

    def row(method: str, target: int, length: int) -> dict[str, Any]:
        return rows.get(
            f"{name} {method} ×{target} at {length}", partial(evaluate, graph, method, target, length, text, ids, args)
        )

    by: dict[tuple[str, int, int], dict[str, Any]] = {("unscaled", 1, trained): row("unscaled", 1, trained)}
    for times in args.times:
        for method in args.methods:
            by[method, times, times * trained] = row(method, times, times * trained)
    if 2 in args.times:
        for method in args.within:
            by[method, 2, trained] = row(method, 2, trained)

    def difference(a: tuple[str, int, int], b: tuple[str, int, int], claim: str, paper: str) -> list[Finding]:
        if a not in by or b not in by:
            return []
        ours = paired_difference(nll_of(by[a]), nll_of(by[b]))
        return [Finding(f"{claim}, {protocol_name(args)}, text {name}", paper, ours, "> 0 nats a token", ours.low > 0)]

    findings = []
    for times in args.times:
        at = times * trained
        paper = PUBLISHED if times == 2 else {}
        findings += difference(
            ("unscaled", times, at),
            ("linear", times, at),
            f"PI beats unscaled at {times}·L",
            paper.get("linear", "> 0"),
        )
        for method in ("ntk", "yarn"):
            findings += difference(
                ("linear", times, at), (method, times, at), f"{method} beats PI at {times}·L", paper.get(method, "> 0")
            )
    return findings + difference(
        ("linear", 2, trained),
        ("unscaled", 1, trained),
        "PI by 2 is worse than unscaled at L",
        "ln(5.92 / 5.28) = 0.11",
    )


def protocol_name(args: argparse.Namespace) -> str:
    return named(args.model)


def evaluate(
    graph: Graph, method: str, target: int, length: int, text: str, ids: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Perplexity at `length` of the model stretched by `method` to `target` trained lengths."""
    model = build(graph, method, target, text, args)()
    windows = max(1, args.tokens // length)
    nll = full_windows(model, ids, length, windows)
    interval = perplexity_interval(nll)
    return {
        "method": method,
        "text": named(text),
        "target": target * graph.config.max_position,
        "length": length,
        "windows": windows,
        "perplexity": [round(x, 4) for x in (interval.value, interval.low, interval.high)],
        "nll": [round(x, 6) for x in nll.tolist()],
        "rope": {
            k: v
            for k, v in dataclasses.asdict(model.config.rope).items()
            if k in ("type", "theta", "factor", "long_factor")
        },
    }


def build(graph: Graph, method: str, target: int, text: str, args: argparse.Namespace) -> Callable[[], Transformer]:
    """The model to measure, made when it is called."""
    trained, context = graph.config.max_position, target * graph.config.max_position
    if method == "unscaled":
        return graph.replace(config=dataclasses.replace(graph.config, max_position=context)).module
    if method == "self-extend":
        window = trained // 2
        group = -(-(context - window) // (trained - window))  # the smallest that reaches
        return lambda: graph.module().extend(SelfExtend(group, window))
    if method == "longrope":
        seed_text = "self" if text == "self" else args.calibration
        journal = args.work / f"{named(args.model)} {named(text)} {context}.json"
        tokens = stream(graph, seed_text, args.search_windows * context, seed=2, split="train")[
            : args.search_windows * context
        ]
        search = LongRope(tokens.view(args.search_windows, context), args.population, args.generations, journal=journal)
        return search(graph).module
    return ScaleRope(context, method)(graph).module


if __name__ == "__main__":
    with keep_memory():  # as the command line does
        main()
