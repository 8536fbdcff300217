"""GPTQ wins back a good part of what rounding to nearest loses, and more of it the coarser the grid.

Paper: GPTQ (arXiv:2210.17323); the figures are those of Llama-2-7B on WikiText-2 at 2048 tokens (fp16 5.47), as
published for round-to-nearest and GPTQ in the OmniQuant paper (arXiv:2308.13137, table 1):
w4 g128 5.72 → 5.61, w3 g128 6.66 → 6.29, w4 per-channel 6.11 → 5.83, w3 per-channel 539 → 8.37.

Claim: closure = (ln RTN - ln GPTQ) / (ln RTN - ln float) is clearly positive at every one of these settings.

Protocol: every linear but the head, symmetric grids, groups of 64 where the paper has 128 (SmolLM2's hidden size is
9·64). RTN covers each group's range; GPTQ is act-order with static groups, E[x²]-weighted scales and true-sequential
inputs. Closure is taken on paired windows, the NLL averaged over calibration seeds; 95% bootstrap over windows.
It holds where the lower end of the interval is above the criterion.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from form import Bench, Finding, run

from tinycompress.evaluation.statistics import closure
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.gptq import GPTQ
from tinycompress.quantization.rtn import RTN

SETTINGS = {  # spec: (closure in the paper, criterion)
    "w4g64": (0.43, 0.2),
    "w3g64": (0.29, 0.2),
    "w4": (0.42, 0.3),
    "w3": (0.91, 0.6),
}


def gptq_closure(bench: Bench) -> Iterator[Finding]:
    reference = cache(
        lambda: bench.nll(bench.graph)
    )  # of the float model, once, and only if there is something to measure
    for text, (paper, at_least) in SETTINGS.items():
        claim, spec = f"closure at {text}", QuantSpec.parse(text)
        if kept := bench.kept(claim):
            yield kept
            continue
        rounded = bench.nll(RTN(spec)(bench.graph))
        quantized = bench.seeds_nll(lambda tokens, spec=spec: GPTQ(tokens, spec)(bench.graph))
        ours = closure(rounded, quantized, reference())
        perplexities = " → ".join(f"{nll.mean().exp():.2f}" for nll in (reference(), rounded, quantized))
        yield Finding(
            f"{claim} (float → RTN → GPTQ: {perplexities})", f"{paper:.2f}", ours, f"≥ {at_least}", ours.low >= at_least
        )


if __name__ == "__main__":
    run(gptq_closure, __doc__)
