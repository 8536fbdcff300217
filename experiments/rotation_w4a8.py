"""Rotations that are folded into the weights win back what 8-bit activations and 4-bit weights lose together; smoothing
does not.

Papers: QuaRot (arXiv:2404.00456), SpinQuant (arXiv:2405.16406), SmoothQuant (arXiv:2211.10438). Published for W4A8 for
NPUs with Llama-3.2-1B (13.4): GPTQ 17.3, folded rotations and GPTQ 15.3, SmoothQuant about 100: 0.12 nats saved, 1.8
lost.

Claims: with w4 per-channel weights and int8 activations, GPTQ behind folded rotations (R1 on the residual stream, R2 on
the heads' values) has a lower NLL than GPTQ alone; behind SmoothQuant (α = 0.85) a higher one.

Protocol: every linear but the head on symmetric per-channel 4-bit grids, its inputs rounded to int8 in simulation, once
with a range for each position and once with one static range a feed, of calibration seed 0. Nats a token on paired
windows, the NLL averaged over calibration seeds; 95% bootstrap over windows. A saving holds where the interval lies
above 0, the loss where it lies below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from form import Bench, Finding, run
from torch import Tensor

from tinycompress.evaluation.perplexity import perplexity
from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.activation_rounding import simulate, static_ranges
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.rotate import Rotate
from tinycompress.quantization.smoothquant import SmoothQuant

SPEC = QuantSpec.parse("w4")
BEFORE: dict[str, Callable[[Graph, Tensor], Graph]] = {
    "GPTQ": lambda graph, tokens: graph,
    "rotations": lambda graph, tokens: Rotate()(graph),
    "SmoothQuant": lambda graph, tokens: SmoothQuant(tokens, alpha=0.85)(graph),
}
PAPER = {"rotations": "0.12", "SmoothQuant": "-1.8"}


def rotation_w4a8(bench: Bench) -> Iterator[Finding]:
    @cache
    def measured(method: str) -> dict[str, Tensor]:
        """NLL [windows] by kind of activation range."""
        nlls: dict[str, list[Tensor]] = {"per-token": [], "static": []}
        for tokens in map(bench.calibration, bench.seeds):
            graph = GPTQ(tokens, SPEC)(BEFORE[method](bench.graph, tokens)).dense()
            ranges = {"per-token": None, "static": static_ranges(graph, bench.calibration(bench.seeds[0]))}
            for kind, fixed in ranges.items():
                nlls[kind].append(perplexity(simulate(graph, 8, fixed), bench.evaluation).nll)
        return {kind: torch.stack(parts).mean(0) for kind, parts in nlls.items()}

    for method, paper in PAPER.items():
        for kind in ("per-token", "static"):
            claim = f"nats saved by {method} before GPTQ at w4, {kind} int8"
            if kept := bench.kept(claim):
                yield kept
                continue
            plain, other = measured("GPTQ")[kind], measured(method)[kind]
            ours = paired_difference(plain, other)
            perplexities = f"{plain.mean().exp():.2f} → {other.mean().exp():.2f}"
            saves = method == "rotations"
            holds = ours.low > 0 if saves else ours.high < 0
            yield Finding(
                f"{claim} ({perplexities})",
                paper if kind == "per-token" else "–",
                ours,
                "> 0" if saves else "< 0",
                holds,
            )


if __name__ == "__main__":
    run(rotation_w4a8, __doc__)
