"""The ways to prune that benchmarks/prune.py compares, and the statistics they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tinycompress.graph.edit import cut, fold_norms, turn
from tinycompress.graph.graph import Graph, Pass
from tinycompress.graph.topology import axes
from tinycompress.pruning.axis_statistics import Statistics, collect
from tinycompress.pruning.importance import block_influence, hidden_importance
from tinycompress.pruning.prune import Prune
from tinycompress.pruning.refit import keep_best
from tinycompress.pruning.sensitivity import sensitivities
from tinycompress.pruning.slice import Slice

CRITERIA = ("wanda_sp", "magnitude", "flap", "minitron", "taylor", "obs")


FFN_ONLY = ("wanda_sp", "minitron")


@dataclass(frozen=True)
class Recipe:
    """`cut(graph, share, tokens, statistics)`, with what COLLECT gathers under the names in `reads`."""

    cut: Callable[[Graph, float, Tensor, dict[str, Tensor]], Graph]
    reads: tuple[str, ...] = ()


def collect_inputs(graph: Graph, tokens: Tensor) -> dict[str, Tensor]:
    """Of every FFN and head axis: Σ x xᵀ, E[x] and each window's mean |x|."""
    names = [name for name in axes(graph.config) if name.endswith((".ffn", ".heads"))]
    found = collect(graph, tokens, names)
    return {f"{n}.{kind}": getattr(s, kind) for n, s in found.items() for kind in ("gram", "mean", "absolute")}


def collect_gradients(graph: Graph, tokens: Tensor) -> dict[str, Tensor]:
    """∂L/∂w over a quarter of the windows, as `Prune` measures it."""
    found = sensitivities(graph, tokens[: max(1, len(tokens) // 4)], gradients=True, fisher=False).gradients
    assert found is not None
    return dict(found)


COLLECT: dict[str, Callable[[Graph, Tensor], dict[str, Tensor]]] = {
    "inputs": collect_inputs,
    "gradients": collect_gradients,
    "influence": lambda graph, tokens: {"influence": block_influence(graph, tokens)},
    "channels": lambda graph, tokens: {"channels": hidden_importance(graph, tokens)},
    "rotation": lambda graph, tokens: {"rotation": Slice(tokens, graph.config.hidden_size).rotation(fold_norms(graph))},
}


def statistics(graph: Graph, tokens: Tensor, found: dict[str, Tensor]) -> dict[str, Statistics]:
    """The statistics of `collect_inputs` and `collect_gradients` as criteria read them."""
    out = {}
    for name, axis in axes(graph.config).items():
        if f"{name}.gram" in found:
            gradients = {n: found[n] for n in axis.cuts} if set(axis.cuts) <= found.keys() else None
            coupled = {n: graph.tensor(n) for n in axis.cuts}
            gram, mean, absolute = (found[f"{name}.{kind}"] for kind in ("gram", "mean", "absolute"))
            out[name] = Statistics(axis, coupled[axis.reader], gram, mean, absolute, tokens.numel(), coupled, gradients)
    return out


def one_shot(criterion: str, refit: bool, cut: tuple[str, ...] = ("ffn", "heads")) -> Recipe:
    own = "bias" if criterion == "flap" else False
    allocation = "global" if criterion == "flap" else "uniform"

    def cut_it(graph: Graph, share: float, tokens: Tensor, found: dict[str, Tensor]) -> Graph:
        target, how = f"params={share}", refit or own
        step = Prune(
            tokens,
            target,
            axes=cut,
            criterion=criterion,
            allocation=allocation,
            refit=how,
            probe=len(tokens),
            one_shot=True,
        )
        return step.from_statistics(graph, statistics(graph, tokens, found))

    return Recipe(cut_it, ("inputs", "gradients") if criterion == "taylor" else ("inputs",))


def by_pass(make: Callable[[Tensor, float], Pass]) -> Recipe:
    return Recipe(lambda graph, share, tokens, found: make(tokens, share)(graph))


def fewer_layers(graph: Graph, share: float, tokens: Tensor, found: dict[str, Tensor]) -> Graph:
    return cut(graph, "layers", keep_best(found["influence"], round(share * graph.config.n_layers)))


def narrower(graph: Graph, share: float, tokens: Tensor, found: dict[str, Tensor]) -> Graph:
    return cut(graph, "hidden", keep_best(found["channels"], hidden_size(share, graph)))


def sliced(graph: Graph, share: float, tokens: Tensor, found: dict[str, Tensor]) -> Graph:
    return cut(turn(fold_norms(graph), found["rotation"]), "hidden", range(hidden_size(share, graph)))


def hidden_size(share: float, graph: Graph) -> int:
    """Every linear of a layer has one side on the stream: parameters go with its width."""
    return math.floor(share * graph.config.hidden_size / 32) * 32


RECIPES: dict[str, Recipe] = {
    **{f"{name} + refit" if refit else name: one_shot(name, refit) for name in CRITERIA for refit in (False, True)},
    **{
        f"{name} + refit, FFNs only" if refit else f"{name}, FFNs only": one_shot(name, refit, ("ffn",))
        for name in FFN_ONLY
        for refit in (False, True)
    },
    "layers": Recipe(fewer_layers, ("influence",)),
    "slice": Recipe(sliced, ("rotation",)),
    "hidden": Recipe(narrower, ("channels",)),
    "ours": by_pass(lambda tokens, share: Prune(tokens[: max(1, len(tokens) // 2)], f"params={share}")),
    "ours, own target": by_pass(lambda tokens, share: Prune(tokens, f"params={share}", refit=True)),
    "ours, heads too": by_pass(
        lambda tokens, share: Prune(tokens[: max(1, len(tokens) // 2)], f"params={share}", axes=("ffn", "heads"))
    ),
    "wanda_sp, layer by layer": by_pass(
        lambda tokens, share: Prune(
            tokens, f"params={share}", axes=("ffn", "heads"), criterion="wanda_sp", allocation="uniform", refit=False
        )
    ),
}
