"""Candidates at one budget, each healed for a while, the best kept: Minitron's practice (arXiv:2407.14679, section 3).

Which of several pruned shapes is best right after the cut says little of which is best after retraining: rankings flip
within some hundred steps. So each candidate gets the same short healing before the choice is made, on text that neither
the cut nor the healing has seen. A healing is any pass: a distillation of a few hundred steps, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..calibration.data import as_tokens
from ..errors import InputError
from ..evaluation.perplexity import perplexity
from ..graph.graph import Graph, Pass
from ..progress import tqdm


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate.

    Fields:
        pruned: the graph as cut.
        healed: the graph after the healing.
        before: the perplexity of `pruned` on the held-out text.
        after: the perplexity of `healed` on the held-out text.
    """

    pruned: Graph
    healed: Graph
    before: float
    after: float


def search(
    graph: Graph,
    candidates: Sequence[Pass],
    heal: Pass,
    held_out: Tensor,
    on_trial: Callable[[Trial], None] | None = None,
    progress: bool = True,
) -> list[Trial]:
    """Every candidate applied to `graph` and healed; the best by perplexity comes first.

    The full retraining starts from `pruned` or `healed` of the first trial.

    Args:
        candidates: passes that prune, at least one.
        heal: the pass that retrains for a while.
        held_out: ids [windows, seq_len] that the perplexity is measured on.
        on_trial: called with each trial as it ends.
        progress: whether a progress bar is shown.
    """
    if not candidates:
        raise InputError("candidates", "none", "at least one pass")
    held_out = as_tokens(held_out)
    trials: list[Trial] = []
    for candidate in tqdm(candidates, desc="search", unit="candidate", delay=2, disable=not progress):
        pruned = candidate(graph)
        before = perplexity(pruned.module(), held_out).value
        healed = heal(pruned)
        trials.append(Trial(pruned, healed, before, perplexity(healed.module(), held_out).value))
        if on_trial:
            on_trial(trials[-1])
    return sorted(trials, key=lambda trial: trial.after)
