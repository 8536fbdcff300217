"""Candidates at one budget, each healed for a while, the best kept: Minitron's practice (arXiv:2407.14679, section 3).

Which of several pruned shapes is best right after the cut says little of which is best after retraining: rankings flip
within some hundred steps. So each candidate gets the same short healing before the choice is made, on text that neither
the cut nor the healing has seen. A healing is any pass: a distillation of a few hundred steps, or none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..evaluation.perplexity import perplexity
from ..graph.graph import Graph, Pass


@dataclass(frozen=True, eq=False)
class Trial:
    """One candidate: the graph as cut and as healed, its perplexity on the held-out text after each."""

    pruned: Graph
    healed: Graph
    before: float
    after: float


def search(
    graph: Graph,
    candidates: Sequence[Pass],
    heal: Pass,
    held_out: Tensor,
    progress: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Every candidate applied to `graph` and healed; the best by perplexity on `held_out` [windows, seq_len] comes first.

    The full retraining starts from `pruned` or `healed` of the first trial. `progress` is called with each trial as it ends.
    """
    if not candidates:
        raise InputError("candidates", "none", "at least one pass")
    trials: list[Trial] = []
    for candidate in tqdm(candidates, desc="search", unit="candidate", delay=2):
        pruned = candidate(graph)
        before = perplexity(pruned.module(), held_out).value
        healed = heal(pruned)
        trials.append(Trial(pruned, healed, before, perplexity(healed.module(), held_out).value))
        if progress:
            progress(trials[-1])
    return sorted(trials, key=lambda trial: trial.after)
