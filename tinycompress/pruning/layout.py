"""What a pruned model must fit: every layer its own widths, or no more than a runtime reads.

  uniform        layers all alike: any tool opens it
  deci           llama.cpp's GGUF of uneven layers: an FFN in every layer, attention in the first
  nemotron-nas   DeciLM's layout (vLLM, exllamav3): query heads alike, attention in the first layer

Sizes that a layout rules out are left out of the choices before any is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import InputError
from ..graph.config import Config
from .allocation import Choice

LAYOUTS = ("uniform", "deci", "nemotron-nas")


def check_layout(config: Config, layout: str | None, kinds: Sequence[str]) -> None:
    """An `InputError` for a model that does not fit the layout before it is cut, and for axes whose cuts leave it."""
    if layout is None:
        return
    first = config.layers[0]
    if layout == "uniform" and not config.uniform:
        accepted = "a model whose layers are alike, or another layout: a cut makes no layer wider"
        raise InputError("Prune.layout", "'uniform' for layers of different widths", accepted)
    if layout != "uniform" and not first.n_heads:
        raise InputError("Prune.layout", f"{layout!r} for a first layer without attention", "no layout")
    if layout == "deci" and (bare := [i for i, layer in enumerate(config.layers) if not layer.ffn_dim]):
        raise InputError("Prune.layout", f"'deci' for layers {bare[:8]} without an FFN", "nemotron-nas, or no layout")
    if layout == "nemotron-nas":
        if len({layer.n_heads for layer in config.layers if layer.n_heads}) > 1:
            raise InputError("Prune.layout", "'nemotron-nas' for layers with different query heads", "deci")
        if cut := sorted({"heads", "kv_heads"} & set(kinds)):
            accepted = 'axes=("ffn",), or layout="deci": query heads are alike in every layer of nemotron-nas'
            raise InputError("Prune.axes", f"{', '.join(cut)} with layout='nemotron-nas'", accepted)


def within_layout(choices: list[Choice], layout: str | None) -> list[Choice]:
    """The choices without the sizes that the layout has no room for."""
    return [choice if _may_go(choice, layout) else _without_nothing(choice) for choice in choices]


def _may_go(choice: Choice, layout: str | None) -> bool:
    """Whether the sublayer of a choice may go as a whole."""
    if layout == "uniform" or (layout == "deci" and choice.kind == "ffn"):
        return False
    return layout is None or not choice.axis.startswith("layers.0.") or choice.kind == "ffn"


def _without_nothing(choice: Choice) -> Choice:
    kept = [(size, price) for size, price in zip(choice.sizes, choice.prices) if size]
    return dataclasses.replace(choice, sizes=tuple(s for s, _ in kept), prices=tuple(p for _, p in kept))


def alike(choices: Sequence[Choice], limit: int) -> list[Choice]:
    """One size for all choices of a kind: those of the largest common share within the limit, and then of each kind in
    turn what room is left for. Choices of a kind are alike."""
    kinds = {choice.kind: choice for choice in choices}
    count = {kind: sum(choice.kind == kind for choice in choices) for kind in kinds}

    def price(sizes: dict[str, int]) -> int:
        return sum(count[kind] * one.prices[one.sizes.index(sizes[kind])] for kind, one in kinds.items())

    shares = sorted({size / one.now for one in kinds.values() for size in one.sizes}, reverse=True)
    sizes = {kind: one.sizes[0] for kind, one in kinds.items()}
    for share in shares:
        fitting = {
            kind: max((size for size in one.sizes if size <= share * one.now + 1e-9), default=one.sizes[0])
            for kind, one in kinds.items()
        }
        if price(fitting) <= limit:
            sizes = fitting
            break
    for kind, one in kinds.items():
        sizes[kind] = max(size for size in one.sizes if size == sizes[kind] or price(sizes | {kind: size}) <= limit)
    return [
        dataclasses.replace(c, sizes=(sizes[c.kind],), prices=(c.prices[c.sizes.index(sizes[c.kind])],))
        for c in choices
    ]
