"""Edits of a graph that a pass is made of.

  cut      a new graph with some indices of an axis kept
  fold     a scale moved across a feed, which changes nothing
  turn     the whole residual stream in other coordinates, behind fold_norms

RMSNorm commutes with an orthogonal matrix once its weight is folded into its readers: norm(xR) = norm(x)R. With the
norms at one, the embedding and every writer ·R and every reader Rᵀ· compute the same function in turned coordinates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import InputError
from .config import Config, Layer, layer_prefix, shapes
from .graph import Graph, LazyTensor, Weight, Weights
from .topology import Axis, Feed, axes, feeds, stream_norms, stream_writers


def fold_norm(graph: Graph, feed: Feed) -> dict[str, Weight | LazyTensor]:
    """The norm's weight multiplied into its readers, when they are read; ones are left, for dead channels (weight 0)
    too."""
    norm = f"{feed.source}.weight"
    w = graph.tensor(norm).double()
    changed: dict[str, Weight | LazyTensor] = {norm: torch.ones_like(graph.tensor(norm))}
    for name in map(graph.config.weight_name, feed.readers):
        entry = graph.weights.entries[name]
        if not isinstance(entry, Tensor | LazyTensor):
            graph.tensor(name)  # refuses a packed weight now, not when it is read
        changed[name] = LazyTensor(tuple(entry.shape), graph.dtype, partial(_folded, graph, name, w))
    return changed


def _folded(graph: Graph, name: str, scale: Tensor) -> Tensor:
    return (graph.tensor(name).double() * scale).to(graph.dtype)


def fold_norms(graph: Graph) -> Graph:
    """The same function with every norm at one; a tied head is untied, for it reads the last norm and the embedding
    does not."""
    graph = untie(graph)
    for feed in feeds(graph.config):
        if feed.behind_norm:
            graph = graph.replace(weights=fold_norm(graph, feed))
    return graph


def untie(graph: Graph) -> Graph:
    """A graph whose head is a parameter of its own; the same function."""
    if not graph.config.tie_embeddings:
        return graph
    config = dataclasses.replace(graph.config, tie_embeddings=False)
    return graph.replace(config=config, weights={"lm_head.weight": graph.linear("lm_head")})


def turn(graph: Graph, R: Tensor, keep: Callable[[Tensor], Weight | LazyTensor] = lambda weight: weight) -> Graph:
    """The graph in the coordinates x·R, for an orthogonal R [D, D] in float64; norms must be ones. `keep` says where a
    new weight is held."""
    changed: dict[str, Weight | LazyTensor] = {}
    writers = stream_writers(graph.config)
    for name in graph.weights:
        weight = graph.tensor(name)
        if name in writers and weight.dim() == 2:
            changed[name] = keep((R.T @ weight.double()).to(weight.dtype))
        elif name in writers or weight.dim() == 2:
            changed[name] = keep((weight.double() @ R).to(weight.dtype))
    return graph.replace(weights=changed)


def cut(graph: Graph, axis: str | Axis, keep: Sequence[int] | Tensor) -> Graph:
    """A new graph with only the indices `keep` of `axis`; an empty `keep` of a layer's axis removes that sublayer.

    The result computes exactly what the model with the dropped indices set to zero computes. (For `hidden` that
    takes a correction: RMSNorm's mean runs over fewer channels, so with r = D / D' the norm weights gain √r and
    norm_eps gains r.)
    """
    if isinstance(axis, str):
        known = axes(graph.config)
        if axis not in known:
            raise InputError("axis", repr(axis), ", ".join(known))
        axis = known[axis]
    index = _checked(axis, keep)
    if axis.kind == "layers":
        return _drop_layers(graph, index)
    config = _cut_config(graph.config, axis, len(index))
    changed: dict[str, Weight] = {}
    remaining = shapes(config)
    for name, (dim, stride) in axis.cuts.items():
        if name in remaining:
            positions = (index[:, None] * stride + torch.arange(stride)).flatten()
            changed[name] = _select(name, graph.weights[name], dim, positions)
    if axis.kind == "hidden":
        ratio = axis.size / len(index)
        for name in stream_norms(config):
            changed[name] = graph.tensor(name).index_select(0, index) * math.sqrt(ratio)
    return graph.replace(config=config, weights=changed)


def _checked(axis: Axis, keep: Sequence[int] | Tensor) -> Tensor:
    index = torch.as_tensor(keep, dtype=torch.long).flatten().cpu()
    if (len(index) and (index.min() < 0 or index.max() >= axis.size)) or len(index.unique()) != len(index):
        raise InputError(f"keep of {axis.name}", f"{index.tolist()[:8]}…", f"distinct indices below {axis.size}")
    if not len(index) and axis.kind == "hidden":
        raise InputError("keep of hidden", "nothing", "at least one channel")
    index = index.sort().values
    if axis.groups > 1 or axis.kind == "heads":
        counts = torch.bincount(index // (axis.size // axis.groups), minlength=axis.groups)
        if len(counts.unique()) > 1:
            raise InputError(
                f"keep of {axis.name}", f"{counts.tolist()} heads by KV group", "the same count in every KV group"
            )
    return index


def _cut_config(config: Config, axis: Axis, size: int) -> Config:
    if axis.layer is None:
        norm_eps = config.norm_eps * config.hidden_size / size
        return dataclasses.replace(config, hidden_size=size, norm_eps=norm_eps)
    layers = list(config.layers)
    layers[axis.layer] = resized(layers[axis.layer], axis.kind, size)
    return dataclasses.replace(config, layers=tuple(layers))


def resized(layer: Layer, kind: str, size: int) -> Layer:
    """The layer with `size` units of the axis of that kind."""
    if kind == "ffn":
        return dataclasses.replace(layer, ffn_dim=size)
    if kind == "heads":
        return dataclasses.replace(layer, n_heads=size, n_kv_heads=layer.n_kv_heads if size else 0)
    return dataclasses.replace(layer, n_heads=size * layer.group, n_kv_heads=size)


def _drop_layers(graph: Graph, index: Tensor) -> Graph:
    old = graph.config
    config = dataclasses.replace(old, layers=tuple(old.layers[i] for i in index.tolist()))
    entries = graph.weights.entries
    moved: dict[str, Weight | LazyTensor] = {}
    for new, i in enumerate(index.tolist()):
        prefix = layer_prefix(i) + "."
        moved |= {layer_prefix(new) + "." + n[len(prefix) :]: w for n, w in entries.items() if n.startswith(prefix)}
    ends = {n: w for n, w in entries.items() if not n.startswith("model.layers.")}
    return Graph(config, Weights(ends | moved), graph.history, graph.tokenizer, graph.generation)


def _select(name: str, weight: Weight, dim: int, index: Tensor) -> Weight:
    if isinstance(weight, Tensor):
        return weight.index_select(dim, index.to(weight.device))
    return weight.select(name, dim, index)


def fold(graph: Graph, feed: Feed, scale: Tensor) -> dict[str, Weight]:
    """The parameters with which the feed's activation is divided by `scale` [K] and its readers multiply by it: the
    source's rows (or norm weight) / scale, the readers' columns · scale, in float64. Exact, whatever the scale, if it
    is alike for all the query heads that read one KV channel.
    """
    if "lm_head" in feed.readers and graph.config.tie_embeddings:
        raise InputError("fold", "the feed of a head tied to the embedding", "an untied graph")
    per_row = scale.double()
    if feed.repeat > 1:
        heads = per_row.reshape(-1, feed.repeat, graph.config.head_dim)
        if not torch.equal(heads, heads[:, :1].expand_as(heads)):
            raise InputError(
                f"scale of {feed.source}", "values that differ between the query heads of a KV head", "equal ones"
            )
        per_row = heads[:, 0].reshape(-1)
    changed: dict[str, Weight] = {}
    for name in (f"{feed.source}.weight", f"{feed.source}.bias"):
        if name in graph.weights:
            weight = graph.weights[name]
            rows = per_row.to(weight.device)
            if isinstance(weight, Tensor):
                changed[name] = (weight.double() / rows.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
            else:
                changed[name] = weight.divide_rows(rows)
    for reader in map(graph.config.weight_name, feed.readers):
        weight = graph.tensor(reader)
        changed[reader] = (weight.double() * scale.double().to(weight.device)).to(weight.dtype)
    return changed
