"""FLAP loses less than Wanda-sp, and the lead grows with the share that is cut.

Paper: FLAP (arXiv:2312.11983), table 2: LLaMA-1-7B on WikiText-2 at 128 tokens, 20% removed 14.62 against Wanda-sp's
22.1, 50% removed 31.8 against 366.

Claim: FLAP's score Var(x)·‖W‖², its single standardized threshold and its bias together beat Wanda-sp's |W|·‖x‖ at the
same share of every layer, at 20% and more so at 50%.

Protocol: FFN channels and query heads, of the non-embedding parameters, nothing refitted, widths in multiples of 64. The
difference Wanda-sp - FLAP of the NLLs is taken on paired windows, averaged over calibration seeds; 95% bootstrap over
windows. It holds where the lower end of the interval is above 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from form import Bench, Finding, run

from tinycompress.evaluate import paired_difference
from tinycompress.passes.prune import Prune

SETTINGS = {0.8: "log(22.1 / 14.62) = 0.41", 0.5: "log(366 / 31.8) = 2.44"}


def flap_or_wanda(bench: Bench) -> Iterator[Finding]:
    leads = {}
    for share, paper in SETTINGS.items():
        nll = {}
        for name, how in (("wanda_sp", {"allocation": "uniform", "refit": False}), ("flap", {"allocation": "global", "refit": "bias"})):
            runs = [bench.nll(Prune(bench.calibration(seed), f"params={share}", criterion=name, **how)(bench.graph)) for seed in bench.seeds]
            nll[name] = torch.stack(runs).mean(0)
        leads[share] = nll["wanda_sp"] - nll["flap"]
        ours = paired_difference(nll["wanda_sp"], nll["flap"])
        perplexities = ", ".join(f"{name} {values.mean().exp():.2f}" for name, values in nll.items())
        yield Finding(f"FLAP's lead in nats with {share:.0%} kept ({perplexities})", paper, ours, "> 0", ours.low > 0)
    growth = paired_difference(leads[0.5], leads[0.8])
    yield Finding("the lead at 50% less the lead at 80%", "grows", growth, "> 0", growth.low > 0)


if __name__ == "__main__":
    run(flap_or_wanda, __doc__)
