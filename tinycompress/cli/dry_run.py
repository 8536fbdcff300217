"""`--dry-run`: what a recipe will make, and what it will cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..graph.graph import Graph
    from ..recipe.foretell import Foretold
    from ..recipe.recipe import Recipe

WIDTH = 130  # characters of a line, at least: figures are never cut short


def print_plan(
    recipe: Recipe, graph: Graph, foretold: Sequence[Foretold], output: Path | None, work: Path | None
) -> None:
    """Shapes and bytes behind each pass, and estimates of time, memory and disk."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..files import human
    from ..recipe.estimate import costs

    prices = costs(graph, recipe.stand_ins(graph), foretold)
    columns = ("", "layers", "hidden", "heads", "KV", "FFN", "context", "parameters", "bytes", "time", "memory")
    table = Table(*columns, box=box.SIMPLE, show_edge=False)
    table.add_row(*_shapes(recipe.model or "model", graph), human(graph.nbytes), "", "")
    for number, (step, price) in enumerate(zip(foretold, prices), 1):
        row = _shapes(f"{number}. {step.name}", step.graph)
        table.add_row(*row, human(step.graph.nbytes), duration(price.seconds), human(price.memory))
    Console(highlight=False, width=max(Console().width, WIDTH)).print(table)
    last = foretold[-1].graph if foretold else graph
    kept = sum(price.disk for price in prices) if work else 0
    peak = max((price.memory for price in prices), default=0)
    total = duration(sum(price.seconds for price in prices))
    print(f"estimated, within a factor of three: {total}, {human(peak)} of memory")
    print(f"disk: {human(last.nbytes)} for {output or 'OUT'}" + (f", {human(kept)} for {work}" if work else ""))


def _shapes(name: str, graph: Graph) -> tuple[str, ...]:
    config = graph.config
    return (
        name,
        str(config.n_layers),
        str(config.hidden_size),
        _range(layer.n_heads for layer in config.layers),
        _range(layer.n_kv_heads for layer in config.layers),
        _range(layer.ffn_dim for layer in config.layers),
        f"{config.max_position:,}",
        f"{config.n_params:,}",
    )


def _range(widths: Iterable[int]) -> str:
    known = sorted(set(widths))
    return str(known[0]) if len(known) == 1 else f"{known[0]}–{known[-1]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever can be read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
