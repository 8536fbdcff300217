"""Which linears a quantization pass works on, and the grid of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from ..errors import InputError
from ..graph.config import HEAD
from ..graph.graph import Graph
from ..graph.quant_tensor import Grid, QuantSpec, QuantTensor

Spec: TypeAlias = str | Grid  # one grid as passes take it: text such as "w4g64", or a QuantSpec
Specs: TypeAlias = Spec | Mapping[str, Spec]  # one for all linears, or one for each linear that is named


class LinearSpecs(Mapping[str, QuantSpec]):
    """A grid for each linear by name. Its repr counts them, so that a history of hundreds of linears can be read."""

    def __init__(self, specs: Mapping[str, QuantSpec]) -> None:
        self._specs = dict(specs)

    def __getitem__(self, name: str) -> QuantSpec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __repr__(self) -> str:
        counts = Counter(map(str, self._specs.values()))
        return f"{{{', '.join(f'{count} × {spec}' for spec, count in sorted(counts.items()))}}}"


def named_specs(spec: Specs) -> QuantSpec | LinearSpecs:
    """`spec` as a pass keeps it: one grid for all linears, or one for each that is named, text parsed."""
    if isinstance(spec, LinearSpecs):
        return spec
    if isinstance(spec, Mapping):
        return LinearSpecs({name: QuantSpec.of(value) for name, value in spec.items()})
    return QuantSpec.of(spec)


def each_spec(spec: Specs) -> list[QuantSpec]:
    """The grids of `spec`: the one for all linears, or all those of a mapping."""
    named = named_specs(spec)
    return [named] if isinstance(named, QuantSpec) else list(named.values())


def targets(graph: Graph, spec: Specs, head: bool = False) -> dict[str, QuantSpec]:
    """The linears that a quantization pass works on and their grids, in model order.

    One spec is for every linear, the head only if `head`; a mapping is for those that it names, and the others stay
    float. It is an `InputError`, before any work is done, if a name is no linear of the graph, a linear is packed
    already, the groups do not divide its inputs, or the head is tied to the embedding.
    """
    linears = {linear.name: linear for linear in graph.config.linears()}
    named = named_specs(spec)
    if isinstance(named, QuantSpec):
        specs = {name: named for name in linears if head or name != HEAD}
    else:
        for name in named:
            if name not in linears:
                example = next(iter(linears))
                raise InputError("spec", f"{name!r}, which is no linear of this graph", f"names such as {example}")
        if head and HEAD not in named:
            raise InputError("head", f"True, with specs that do not name {HEAD}", f"a spec for {HEAD}")
        specs = {name: named[name] for name in linears if name in named}
    if HEAD in specs and graph.config.tie_embeddings:
        remedy = "head=False (a tied head is quantized with the embedding)"
        raise InputError("head", "a head tied to the embedding", remedy)
    for name, own in specs.items():
        linear = linears[name]
        weight = graph.weights.entries[linear.weight]
        if isinstance(weight, QuantTensor):
            remedy = "a dense weight (quantize once, from the float model)"
            raise InputError(name, f"a weight that is already {weight.grid}", remedy)
        own.group(name, linear.shape[1])
    return specs
