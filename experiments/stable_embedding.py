"""A stable embedding (trained behind a norm, which is folded away) heals no worse than a plain one, and better at a
high rate.

Paper: 8-bit Optimizers via Block-wise Quantization (arXiv:2110.02861), section 2.3: a norm on the embedding's output,
with 32-bit optimizer state, makes training more stable and supports more aggressive rates. Here every state is 32-bit,
and the norm starts at the given table and is folded away exactly (tinycompress/stable_embedding.py), so only its effect
is measured.

Claim: plain less stable, in nats, is not below 0 at the usual learning rate, and above 0 at five times it.

Protocol: a quarter of every FFN pruned and refitted; KL to the original, one epoch over the calibration windows (in
pieces of 256 tokens), four pieces an update, AdamW with warm-up and cosine, the same order for all. NLL on paired
windows, averaged over calibration seeds; 95% bootstrap over windows. The usual rate holds where the upper end is above
0, the high one where the lower end is.
"""

from __future__ import annotations

from collections.abc import Iterator

from distill_form import LR, arrow, heal, mean_nll, width_pruned
from form import Bench, Finding, run
from torch import Tensor

from tinycompress.evaluation.statistics import paired_difference


def stable_embedding(bench: Bench) -> Iterator[Finding]:
    students = {seed: width_pruned(bench, seed) for seed in bench.seeds}
    before = mean_nll(bench, iter(students.values()))

    def after(lr: float, stable: bool) -> Tensor:
        how = {"teacher": bench.graph, "stable_embedding": stable}
        return mean_nll(bench, (heal(bench, student, seed, lr=lr, **how) for seed, student in students.items()))

    for lr, criterion in ((LR, "not below 0"), (5 * LR, "> 0")):
        plain, stable = after(lr, False), after(lr, True)
        ours = paired_difference(plain, stable)
        text = (
            f"plain less stable embedding at lr {lr:g}, nats (pruned → plain → stable: {arrow(before, plain, stable)})"
        )
        yield Finding(text, "not given", ours, criterion, (ours.high if lr == LR else ours.low) > 0)


if __name__ == "__main__":
    run(stable_embedding, __doc__)
