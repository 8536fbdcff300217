"""AWQ at 3 bits beats rounding to nearest, and its v → o fold, which grouped-query attention allows, adds to that.

Paper: AWQ (arXiv:2306.00978); Llama-2-7B, w3 g128, as published in the OmniQuant paper (arXiv:2308.13137, table 1): RTN
6.66, AWQ 6.24, float 5.47, a closure of 0.33. Where several query heads read one KV head, implementations skip the fold
of v_proj into o_proj because the widths differ; averaged over the query heads it is as exact as the others
(passes/awq.py).

Claims: closure = (ln RTN - ln AWQ) / (ln RTN - ln float) is positive; AWQ with the fold has a lower NLL than without.

Protocol: every linear but the head, symmetric grids, groups of 64; RTN covers each group's range, AWQ's grids are
E[x²]-weighted. Paired windows, the NLL averaged over calibration seeds; 95% bootstrap over windows. The first holds
where the interval lies above 0.1, the second where it lies above 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from form import Bench, Finding, run
from torch import Tensor

from tinycompress.evaluation.statistics import closure, paired_difference
from tinycompress.graph.quant_tensor import QuantSpec
from tinycompress.quantization.awq import AWQ
from tinycompress.quantization.rtn import RTN

SPEC = QuantSpec.parse("w3g64")


def awq_gqa_fold(bench: Bench) -> Iterator[Finding]:
    @cache
    def awq(gqa: bool) -> Tensor:
        return bench.seeds_nll(lambda tokens: AWQ(tokens, SPEC, gqa=gqa)(bench.graph))

    claim = f"closure of AWQ at {SPEC}"
    if kept := bench.kept(claim):
        yield kept
    else:
        reference, rounded = bench.nll(bench.graph), bench.nll(RTN(SPEC)(bench.graph))
        ours = closure(rounded, awq(True), reference)
        perplexities = " → ".join(f"{nll.mean().exp():.2f}" for nll in (reference, rounded, awq(True)))
        yield Finding(f"{claim} (float → RTN → AWQ: {perplexities})", "0.33", ours, "≥ 0.1", ours.low >= 0.1)
    claim = f"nats saved by the v → o fold at {SPEC}"
    if kept := bench.kept(claim):
        yield kept
        return
    ours = paired_difference(awq(False), awq(True))
    perplexities = " → ".join(f"{awq(gqa).mean().exp():.2f}" for gqa in (False, True))
    yield Finding(f"{claim} (without → with: {perplexities})", "–", ours, "> 0", ours.low > 0)


if __name__ == "__main__":
    run(awq_gqa_fold, __doc__)
