"""Pruned and quantized at one training budget: the model learns best on the grid that it ends on.

Paper: LLM-QAT: Data-Free Quantization Aware Training for Large Language Models (arXiv:2305.17888): below 4 bits,
training that sees the grid beats quantization after training. Orders of pruning, distilling and quantizing have no
agreed figure.

Claim: prune → distil on the grid beats prune → distil → quantize, and both beat prune → quantize, at 3 bits.

Protocol: a quarter of every FFN pruned and refitted; groups of 64 where they divide every input, else per-channel;
rounding to nearest on the best grid; the grid of training is learned. One epoch over the calibration windows (in pieces
of 256 tokens), KL, four pieces an update, AdamW 2e-4; "half, half" spends half of the budget before and half on the
grid. NLL on paired windows, averaged over calibration seeds; 95% bootstrap over windows. A finding holds where its
interval is above 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill_form import arrow, heal, mean_nll, width_pruned
from form import Bench, Finding, run

from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.config import shapes
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.graph.topology import feeds
from tinycompress.quantization.rtn import RTN


def grid_of(graph: Graph) -> QuantSpec:
    """3 bits, in groups of 64 if the student's widths allow it."""
    sizes = shapes(graph.config)
    widths = [
        sizes[f"{name}.weight"][1] for feed in feeds(graph.config) if feed.layer is not None for name in feed.readers
    ]
    return QuantSpec(3, 64 if all(width % 64 == 0 for width in widths) else None, scale="mse")


def order_of_passes(bench: Bench) -> Iterator[Finding]:
    students = {seed: width_pruned(bench, seed) for seed in bench.seeds}
    spec = grid_of(next(iter(students.values())))
    rounded = mean_nll(bench, (RTN(spec)(student) for student in students.values()))
    after, aware, halves = [], [], []
    for seed, student in students.items():
        how = {"seed": seed, "teacher": bench.graph}
        on_grid = {"fake_quant": spec, "grid": "learn"}
        after.append(RTN(spec)(heal(bench, student, **how)))
        aware.append(heal(bench, student, **how, **on_grid))
        halves.append(heal(bench, heal(bench, student, epochs=0.5, **how), epochs=0.5, order=1, **how, **on_grid))
    nll = {
        "distil, quantize": mean_nll(bench, iter(after)),
        "on the grid": mean_nll(bench, iter(aware)),
        "half, half": mean_nll(bench, iter(halves)),
    }
    best = nll["on the grid"]
    for name, worse in (
        ("quantize", rounded),
        ("distil, quantize", nll["distil, quantize"]),
        ("half, half", nll["half, half"]),
    ):
        ours = paired_difference(worse, best)
        text = f"prune, {name} less prune, distil on the grid of {spec}, nats ({arrow(worse, best)})"
        yield Finding(text, "not given", ours, "> 0", ours.low > 0)


if __name__ == "__main__":
    run(order_of_passes, __doc__)
