"""A graph in tables, for people: layers, parameters and feeds with runs of equal layers folded, and before against
after."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..files import human
from ..graph.config import Layer, layer_of, layer_prefix, shapes
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantTensor
from ..graph.topology import Feed, feeds

T = TypeVar("T", bound=Hashable)
Entry = tuple[str, tuple[int, ...], str, int]  # name, shape, stored as, bytes


def parameters(graph: Graph) -> Iterator[Entry]:
    """Every parameter, without reading one."""
    entries = graph.weights.entries
    for name in shapes(graph.config):
        entry = entries[name]
        stored = str(entry.grid) if isinstance(entry, QuantTensor) else str(entry.dtype).removeprefix("torch.")
        size = entry.nbytes if isinstance(entry, QuantTensor) else math.prod(entry.shape) * entry.dtype.itemsize
        yield name, tuple(entry.shape), stored, size


def summary(graph: Graph) -> dict[str, Any]:
    """What `inspect --json` prints."""
    config = graph.config
    return {
        "config": config.to_dict(),
        "parameters": config.n_params,
        "non_embedding_parameters": config.n_body_params,
        "bytes": graph.nbytes,
        "tokenizer": graph.tokenizer is not None,
        "weights": [
            {"name": n, "shape": list(shape), "stored": stored, "bytes": size}
            for n, shape, stored, size in parameters(graph)
        ],
        "feeds": [
            {"source": f.source, "readers": list(f.readers), "repeat": f.repeat, "width": feed_width(graph, f)}
            for f in feeds(config)
        ],
        "history": list(graph.history),
    }


def feed_width(graph: Graph, feed: Feed) -> int:
    return shapes(graph.config)[graph.config.weight_name(feed.readers[0])][1]


def runs(items: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Runs of equal neighbours as (first, last)."""
    out: list[tuple[int, int]] = []
    for i, item in enumerate(items):
        if out and items[out[-1][0]] == item:
            out[-1] = out[-1][0], i
        else:
            out.append((i, i))
    return out


def folded(rows: Iterable[tuple[str, T]], n_layers: int) -> Iterator[tuple[str, str, T]]:
    """Rows (name, what) as (layers, name in the layer, what), those of equal neighbouring layers once."""
    layers: list[list[tuple[str, T]]] = [[] for _ in range(n_layers)]
    before: list[tuple[str, T]] = []
    behind: list[tuple[str, T]] = []
    for name, what in rows:
        layer = layer_of(name)
        if layer is not None:
            layers[layer].append((name.removeprefix(f"{layer_prefix(layer)}."), what))
        else:
            (behind if any(layers) else before).append((name, what))
    yield from (("", name, what) for name, what in before)
    for first, last in runs([tuple(layer) for layer in layers]):
        yield from ((span(first, last), name, what) for name, what in layers[first])
    yield from (("", name, what) for name, what in behind)


def span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}–{last}"


def print_graph(graph: Graph, name: str, all_feeds: bool = False) -> None:
    """What `inspect` prints."""
    console, config = Console(highlight=False), graph.config
    head = "tied head" if config.tie_embeddings else "own head"
    widths = f"{config.n_layers} layers, hidden {config.hidden_size}, head_dim {config.head_dim}"
    vocabulary = f"vocabulary {config.vocab_size}"
    console.print(f"[bold]{escape(name)}[/]: {widths}, {vocabulary}, {head}")
    console.print(f"parameters {config.n_params:,}, non-embedding {config.n_body_params:,}, {human(graph.nbytes)}")
    rope = config.rope
    scaled = "" if rope.type == "default" else f", factor {rope.factor:g} over {rope.original_max_position}"
    tokenizer = "with tokenizer" if graph.tokenizer else "no tokenizer"
    console.print(f"context {config.max_position}, RoPE {rope.type}, theta {rope.theta:g}{scaled}, {tokenizer}")
    console.print(_layers(config.layers))
    console.print(_parameters(graph))
    console.print(_feeds(graph, all_feeds))
    print_history(graph, console)


def print_comparison(before: Graph, after: Graph, written: int) -> None:
    """Before against after, the bytes `written`, and the history."""
    console = Console(highlight=False)
    table = Table("", "before", "after", "", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = (
        ("parameters", before.config.n_params, after.config.n_params, "{:,}".format),
        ("non-embedding", before.config.n_body_params, after.config.n_body_params, "{:,}".format),
        ("bytes of weights", before.nbytes, after.nbytes, human),
        ("context", before.config.max_position, after.config.max_position, "{:,}".format),
    )
    for name, old, new, text in rows:
        table.add_row(name, text(old), text(new), f"{new / old:.1%}" if old else "")
    console.print(table)
    console.print(f"written: {human(written)}")
    print_history(after, console)


def print_history(graph: Graph, console: Console) -> None:
    for number, step in enumerate(graph.history, 1):
        console.print(f"{number}. {escape(step)}", soft_wrap=True)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in ([folder] if folder.is_file() else folder.rglob("*")) if path.is_file())


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # a name is never cut short
    return table


def _layers(layers: Sequence[Layer]) -> Table:
    table = _table("layers", "heads", "KV heads", "FFN", title="widths")
    for first, last in runs(layers):
        layer = layers[first]
        table.add_row(span(first, last), f"{layer.n_heads}", f"{layer.n_kv_heads}", f"{layer.ffn_dim}")
    return table


def _parameters(graph: Graph) -> Table:
    table = _table("layers", "name", "shape", "stored as", "bytes", title="parameters")
    rows = ((name, (shape, stored, size)) for name, shape, stored, size in parameters(graph))
    for layers, name, (shape, stored, size) in folded(rows, graph.config.n_layers):
        table.add_row(
            layers, name, " × ".join(map(str, shape)), stored, human(size) + (" each" if "–" in layers else "")
        )
    return table


def _feeds(graph: Graph, every: bool) -> Table:
    table = _table("layers", "written by", "width", "read by", title=f"feeds: {len(feeds(graph.config))}")
    rows = [
        (f.source, (feed_width(graph, f), f.repeat, tuple(reader.rsplit(".", 1)[-1] for reader in f.readers)))
        for f in feeds(graph.config)
    ]
    for layers, name, (width, repeat, readers) in (
        [("", *row) for row in rows] if every else folded(rows, graph.config.n_layers)
    ):
        table.add_row(
            layers, name, f"{width}" + (f" ({repeat} × {width // repeat})" if repeat > 1 else ""), ", ".join(readers)
        )
    return table
