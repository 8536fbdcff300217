"""Whether to ship a compressed model: what was lost and what was gained beside a reference, against stated limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..graph.config import layer_of
from ..graph.graph import Graph
from .report import human, parameters
from .statistics import Interval

SHIP, LOOK, DO_NOT = "Ship it", "Look before you ship it", "Do not ship it"


@dataclass(frozen=True)
class Limits:
    """What a model may lose: within the first of a pair it ships, beyond the second it does not. The worse end of an
    interval is held to them.

    Fields:
        perplexity: more than the reference's, as a share of it.
        top_1: positions with the same likeliest token, as a share.
        kl_99: KL of the position that 99% of all do not exceed, in nats.
    """

    perplexity: tuple[float, float] = (0.05, 0.25)
    top_1: tuple[float, float] = (0.9, 0.75)
    kl_99: tuple[float, float] = (1.0, 3.0)


@dataclass(frozen=True)
class Judged:
    """A model and all that is known of it.

    Fields:
        name: as it was typed.
        nbytes: on disk.
        parameters: how many.
        context: positions.
        layers: of each layer, heads, FFN channels and mean bits of a weight.
        figures: of the divergence from the reference, by name; empty for the reference itself.
        gate: the checks of an export's gate, as its manifest has them; None for what is no export, or was not checked.
        metrics: of tasks, by name: value, low, high, and where it is known the reference's value.
        provenance: how it was made, or None where nothing says.
        history: its passes, in order.
    """

    name: str
    nbytes: int
    parameters: int
    context: int
    layers: Sequence[tuple[int, int, float]]
    figures: Mapping[str, Interval] = field(default_factory=dict)
    gate: Mapping[str, Any] | None = None
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    history: Sequence[str] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether to ship a model.

    Fields:
        decision: `SHIP`, `LOOK` or `DO_NOT`.
        reasons: sentences: what speaks for it and against it, the worst first.
    """

    decision: str
    reasons: tuple[str, ...]


def layers_of(graph: Graph) -> list[tuple[int, int, float]]:
    """Of each layer: heads, FFN channels, and mean bits of a stored weight, scales and zero points included."""
    stored = [[0, 0] for _ in range(graph.config.n_layers)]
    for name, shape, _, size in parameters(graph):
        layer = layer_of(name)
        if layer is not None and len(shape) == 2:
            stored[layer][0] += 8 * size
            stored[layer][1] += shape[0] * shape[1]
    return [
        (layer.n_heads, layer.ffn_dim, bits / max(1, weights))
        for layer, (bits, weights) in zip(graph.config.layers, stored)
    ]


def verdict(model: Judged, reference: Judged, limits: Limits) -> Verdict:
    """Whether to ship `model`, whose `figures` are beside `reference`."""
    ratio, top, tail = (model.figures[name] for name in ("perplexity_ratio", "top_1", "kl_99"))
    more = "higher" if ratio.value >= 1 else "lower"
    found = [
        (
            _level(ratio.high - 1, limits.perplexity, 1),
            f"Perplexity is {abs(ratio.value - 1):.1%} {more} than the reference's "
            f"({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%}); up to {limits.perplexity[0]:+.0%} ships, beyond "
            f"{limits.perplexity[1]:+.0%} does not.",
        ),
        (
            _level(top.low, limits.top_1, -1),
            f"The likeliest next token is the same at {top.value:.1%} of positions ({top.low:.1%} to {top.high:.1%}); "
            f"from {limits.top_1[0]:.0%} it ships, below {limits.top_1[1]:.0%} it does not.",
        ),
        (
            _level(tail.high, limits.kl_99, 1),
            f"At one position in a hundred the KL is above {tail.value:.2g} nats ({tail.low:.2g} to {tail.high:.2g}); "
            f"up to {limits.kl_99[0]:g} ships, beyond {limits.kl_99[1]:g} does not.",
        ),
    ]
    if model.gate is not None:
        failed = [check["check"] for check in model.gate.get("checks", ()) if not check["passed"]]
        passed = bool(model.gate.get("passed"))
        words = "passed: it computes what the graph does" if passed else f"failed ({', '.join(failed)})"
        found.append((0 if passed else 2, f"The gate of the export {words}."))
    found.sort(key=lambda reason: -reason[0])
    smaller = reference.nbytes / max(1, model.nbytes)
    gain = f"It takes {human(model.nbytes)} in place of {human(reference.nbytes)}, {smaller:.1f} times smaller."
    if smaller < 1:
        gain = f"It takes {human(model.nbytes)}, more than the reference's {human(reference.nbytes)}."
    decision = (SHIP, LOOK, DO_NOT)[found[0][0]]
    return Verdict(decision, (*(sentence for _, sentence in found), gain))


def _level(value: float, limits: tuple[float, float], sign: int) -> int:
    """0 within the first limit, 2 beyond the second, else 1; `sign` is -1 where less is worse."""
    good, bad = limits
    if sign * value <= sign * good:
        return 0
    return 2 if sign * value > sign * bad else 1
