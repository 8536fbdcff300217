"""Which linears a quantization pass works on, and the grid of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..errors import InputError
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor
from ..graph.topology import feeds


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


def named_specs(spec: QuantSpec | Mapping[str, QuantSpec]) -> QuantSpec | LinearSpecs:
    """`spec` as a pass keeps it: one grid for all linears, or one for each that is named."""
    if isinstance(spec, QuantSpec | LinearSpecs):
        return spec
    if not isinstance(spec, Mapping) or not all(isinstance(value, QuantSpec) for value in spec.values()):
        raise InputError("spec", repr(spec)[:80], "a QuantSpec, or QuantSpecs by the name of a linear")
    return LinearSpecs(spec)


def targets(graph: Graph, spec: QuantSpec | Mapping[str, QuantSpec], head: bool = False) -> dict[str, QuantSpec]:
    """The linears a quantization pass works on and their grids, in model order, after checking that each is still dense
    and that the groups divide its inputs: before any work is done. One spec is for every linear (the head only if
    `head`); a mapping is for those that it names, and the others stay float."""
    names = [name for feed in feeds(graph.config) for name in feed.readers]
    if isinstance(spec, QuantSpec):
        specs = {name: spec for name in names if head or name != "lm_head"}
    else:
        if unknown := [name for name in spec if name not in names]:
            raise InputError("spec", f"{unknown[0]!r}, which is no linear of this graph", f"names such as {names[0]}")
        if head and "lm_head" not in spec:
            raise InputError("head", "True, with specs that do not name lm_head", "a spec for lm_head")
        specs = {name: spec[name] for name in names if name in spec}
    if "lm_head" in specs and graph.config.tie_embeddings:
        raise InputError(
            "head", "a head tied to the embedding", "head=False (a tied head is quantized with the embedding)"
        )
    for name, own in specs.items():
        weight = graph.weights.entries[graph.config.weight_name(name)]
        if isinstance(weight, QuantTensor):
            raise InputError(
                name, f"a weight that is already {weight.grid}", "a dense weight (quantize once, from the float model)"
            )
        own.group(name, weight.shape[1])
    return specs
