"""Runs a recipe: passes in order, what they cost, and how good the result is."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import files, pipeline
from ..calibration.data import as_tokens
from ..checkpoints.checkpoint import load
from ..distillation.distill import Distill
from ..distillation.distributed import rank
from ..errors import InputError
from ..evaluation.perplexity import streamed_perplexity
from ..graph.graph import Graph, Pass
from ..provenance import peak_memory, provenance
from .recipe import Recipe
from .sources import Loaded
from .vocabulary import Data

LARGEST = 1 << 31  # parameters up to which a perplexity takes minutes


@dataclass(frozen=True)
class Made:
    """What a recipe made.

    Fields:
        before: the graph that it started from.
        graph: the graph behind its passes.
        provenance: how it was made, as `provenance` gives it.
    """

    before: Graph
    graph: Graph
    provenance: dict[str, Any]


def run_recipe(
    recipe: Recipe,
    graph: Graph | None = None,
    work: str | Path | None = None,
    *,
    open: Callable[[str], Graph] = load,
    adapt: Callable[[Pass], Pass] | None = None,
    device: torch.device | str | None = None,
    command: str | None = None,
    fresh: bool = False,
) -> Made:
    """Runs the passes of a recipe, one after the other.

    Args:
        recipe: what to do.
        graph: the model. Default None: the one that the recipe names, opened by `open`.
        work: folder that keeps every step, as for `pipeline.run`. Default None.
        open: opens a model by name. Default `load`.
        adapt: changes a pass before it runs, such as where it keeps its state. Default None.
        device: where windows lie, and so where the work is done. Default None: the CPU.
        command: what was typed, for the provenance. Default None.
        fresh: whether steps that `work` keeps of these passes are made again. Default False.

    Errors: an `InputError` for a recipe without a model, and for whatever does not fit the model or the texts.
    """
    start = time.perf_counter()
    if graph is None:
        if recipe.model is None:
            raise InputError("model", "none in the recipe", 'model = "…", or a graph')
        graph = open(recipe.model)
    sources = recipe.sources(graph, open, device)
    passes = recipe.passes(graph, sources)
    if adapt:
        passes = [adapt(step) for step in passes]
    after = pipeline.run(graph, passes, work, fresh=fresh)
    measured = None
    if recipe.measure is not None and rank() == 0:  # of several processes one measures
        measured = quality(graph, after, recipe.measure, sources, work)
    facts = provenance(
        recipe=recipe.toml(),
        model=recipe.model,
        data=[_described(data, windows) for data, windows in sources.read.items()],
        history=after.history,
        measured=measured,
        command=command,
        seconds=time.perf_counter() - start,
        peak=peak_memory(),
    )
    return Made(graph, after, facts)


def quality(
    before: Graph, after: Graph, data: Data, sources: Loaded, work: str | Path | None = None
) -> dict[str, Any] | None:
    """Perplexities of two graphs on the windows of `data`; with `work`, they are kept there and measured once.

    None for models that are too large to be measured in passing.
    """
    if before.config.n_params > LARGEST:
        return None
    windows = sources.tokens(data)
    digest = hashlib.sha256(f"{before.fingerprint()} {after.fingerprint()} {fingerprint_of(windows)}".encode())
    known = None if work is None else Path(work) / f"measured-{digest.hexdigest()[:16]}.json"
    if known is not None and known.is_file():
        kept: dict[str, Any] = files.read_json(known)
        return kept
    figures = [streamed_perplexity(graph, windows) for graph in (before, after)]
    out = _described(data, windows) | {
        "perplexity": {"before": figures[0].value, "after": figures[1].value},
        "protocol": figures[0].protocol,
    }
    if known is not None:
        files.write_json(known, out)
    return out


def fingerprint_of(windows: Tensor) -> str:
    """SHA-256 of token ids [N, T]: equal text and tokenizer, equal fingerprint."""
    return hashlib.sha256(windows.cpu().contiguous().numpy().tobytes()).hexdigest()


def _described(data: Data, windows: Tensor) -> dict[str, Any]:
    """A text by its name and by what was read of it."""
    drawn = {} if data.in_order else {"seed": data.seed}
    shape = {"windows": windows.shape[0], "seq_len": windows.shape[1]}
    return {"text": data.text, "split": data.split} | shape | drawn | {"sha256": fingerprint_of(windows)}


def keeping_state(work: Path | None, log: Path | None, stop: Callable[[], bool] | None) -> Callable[[Pass], Pass]:
    """For `run_recipe(adapt=…)`: where training keeps its state and its log, and what stops it."""

    def adapt(step: Pass) -> Pass:
        if isinstance(step, Distill):
            return dataclasses.replace(step, tokens=as_tokens(step.tokens), work=work, log=log, stop=stop)
        return step

    return adapt
