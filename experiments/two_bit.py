"""At 2 bits a fold is not enough: AWQ alone fails where GPTQ, which moves errors into later columns, still holds.

Paper: Llama-2-7B on WikiText-2 (fp16 5.47), w2 g128, as published in the OmniQuant paper (arXiv:2308.13137, table 1):
GPTQ (arXiv:2210.17323) 36.8, AWQ (arXiv:2306.00978) 2.2e5: 8.7 nats apart.

Claim: AWQ's NLL is far above GPTQ's at 2 bits.

Protocol: every linear but the head, groups of 64, with integer zero points (as in the paper) and symmetric; both
methods on E[x²]-weighted grids. NLL(AWQ) - NLL(GPTQ) in nats a token on paired windows, averaged over calibration
seeds; 95% bootstrap over windows. It holds where the interval lies above 1, that is, where AWQ's perplexity is e times
as high.
"""

from __future__ import annotations

from collections.abc import Iterator

from form import Bench, Finding, run

from tinycompress.evaluation.statistics import paired_difference
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.awq import AWQ
from tinycompress.quantization.gptq import GPTQ

SETTINGS = {"w2g64-asym": "8.7", "w2g64": "–"}  # spec: nats in the paper


def two_bit(bench: Bench) -> Iterator[Finding]:
    for text, paper in SETTINGS.items():
        claim, spec = f"nats between AWQ and GPTQ at {text}", QuantSpec.parse(text)
        if kept := bench.kept(claim):
            yield kept
            continue
        awq, gptq = (
            bench.seeds_nll(lambda tokens, make=make, spec=spec: make(tokens, spec)(bench.graph))
            for make in (AWQ, GPTQ)
        )
        ours = paired_difference(awq, gptq)
        perplexities = f"{awq.mean().exp():.4g}, {gptq.mean().exp():.4g}"
        yield Finding(f"{claim} (perplexities: {perplexities})", paper, ours, "> 1", ours.low > 1)


if __name__ == "__main__":
    run(two_bit, __doc__)
