"""The residual stream as a space: norms folded into their readers, heads untied, the whole stream turned.

RMSNorm commutes with an orthogonal matrix once its weight is folded into its readers: norm(xR) = norm(x)R. With the norms
at one, the embedding and every writer ·R and every reader Rᵀ· compute the same function in turned coordinates.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .graph import Feed, Graph, Weight, feeds


def fold_norm(graph: Graph, feed: Feed) -> dict[str, Weight]:
    """The norm's weight multiplied into its readers; ones are left, for dead channels (weight 0) too."""
    norm = f"{feed.source}.weight"
    w = graph.tensor(norm).double()
    changed: dict[str, Weight] = {norm: torch.ones_like(graph.tensor(norm))}
    for name in map(graph.config.weight_name, feed.readers):
        changed[name] = (graph.tensor(name).double() * w).to(graph.dtype)
    return changed


def fold_norms(graph: Graph) -> Graph:
    """The same function with every norm at one; a tied head is untied, for it reads the last norm and the embedding does not."""
    graph = untie(graph)
    for feed in feeds(graph.config):
        if "norm" in feed.source:
            graph = graph.replace(weights=fold_norm(graph, feed))
    return graph


def untie(graph: Graph) -> Graph:
    """A graph whose head is a parameter of its own; the same function."""
    if not graph.config.tie_embeddings:
        return graph
    config = dataclasses.replace(graph.config, tie_embeddings=False)
    return graph.replace(config=config, weights={"lm_head.weight": graph.linear("lm_head")})


def turn(graph: Graph, R: Tensor) -> Graph:
    """The graph in the coordinates x·R, for an orthogonal R [D, D] in float64; norms must be ones."""
    changed: dict[str, Weight] = {}
    for name in graph.weights:
        weight, writes = graph.tensor(name), name.endswith(("o_proj.weight", "down_proj.weight"))
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            changed[name] = (weight.double() @ R).to(weight.dtype)
        elif weight.dim() == 2:
            changed[name] = (R.T @ weight.double() if writes else weight.double() @ R).to(weight.dtype)
    return graph.replace(weights=changed)
