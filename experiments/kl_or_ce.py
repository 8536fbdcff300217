"""A pruned model is healed better by its original's distribution (KL) than by the text alone (CE), or by both.

Paper: Minitron, Compact Language Models via Pruning and Knowledge Distillation (arXiv:2407.14679), table 5: LM loss
after distilling a pruned model 2.107 with KL alone, 2.117 with CE + KL; and its finding that KL alone beats training on
CE.

Claim: at one token budget the NLL after KL is below that after CE, and not above that after both.

Protocol: a quarter of every FFN pruned and refitted; one epoch over the calibration windows (in pieces of 256 tokens),
four pieces an update, AdamW 2e-4 with warm-up and cosine, the same order for all. NLL on paired windows, averaged over
calibration seeds; 95% bootstrap over windows. CE against KL holds where the interval of CE - KL is above 0; both
against KL holds where its upper end is above 0 (both are not better).
"""

from __future__ import annotations

from collections.abc import Iterator

from distill_form import arrow, heal, mean_nll, width_pruned
from form import Bench, Finding, run
from torch import Tensor

from tinycompress.distillation.fused_loss import Loss
from tinycompress.evaluation.statistics import paired_difference


def kl_or_ce(bench: Bench) -> Iterator[Finding]:
    students = {seed: width_pruned(bench, seed) for seed in bench.seeds}
    before = mean_nll(bench, iter(students.values()))

    def after(*losses: Loss) -> Tensor:
        return mean_nll(
            bench,
            (heal(bench, student, seed, teacher=bench.graph, losses=losses) for seed, student in students.items()),
        )

    kl, ce, both = after(Loss("kl")), after(Loss("ce")), after(Loss("kl"), Loss("ce"))
    ours = paired_difference(ce, kl)
    yield Finding(f"CE less KL, nats (pruned → CE → KL: {arrow(before, ce, kl)})", "above 0", ours, "> 0", ours.low > 0)
    ours = paired_difference(both, kl)
    yield Finding(
        f"KL + CE less KL, nats (pruned → both → KL: {arrow(before, both, kl)})",
        "0.010",
        ours,
        "not below 0",
        ours.high > 0,
    )


if __name__ == "__main__":
    run(kl_or_ce, __doc__)
