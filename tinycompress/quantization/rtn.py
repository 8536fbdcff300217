"""Round to nearest: every linear on its grid, without data. The baseline that every method is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from .grid_search import find_grid, round_to_grid
from .linear_specs import named_specs, targets
from .mapped_memory import keeper

ROWS = 1 << 22  # weights that are rounded at a time, so that no float32 copy of a large matrix is made


@dataclass(frozen=True)
class RTN:
    """Quantizes every linear (the head only if `head`), or those that a mapping names, to the nearest point of its grid;
    layer by layer, no data; a large model's results are kept on disk (mapped_memory.py)."""

    spec: QuantSpec | Mapping[str, QuantSpec] = field(default_factory=QuantSpec)
    head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))

    def __call__(self, graph: Graph) -> Graph:
        found = {
            graph.config.weight_name(name): (name, spec) for name, spec in targets(graph, self.spec, self.head).items()
        }
        keep = keeper(
            (math.prod(graph.weights.entries[weight].shape), spec.bits) for weight, (_, spec) in found.items()
        )
        changed = {}
        for weight, (name, spec) in tqdm(found.items(), desc=f"RTN {self.spec}", unit="linear", delay=2):
            changed[weight] = keep(rtn_quantize(graph.tensor(weight), spec, name))
        return graph.replace(weights=changed, by=self)


def rtn_quantize(weight: Tensor, spec: QuantSpec, name: str = "weight") -> QuantTensor:
    """weight float [N, K] to the nearest points of the grid that `spec` finds for it."""
    rows = max(1, ROWS // weight.shape[1])
    return stacked([_nearest(part.float(), spec, name) for part in weight.split(rows)])


def _nearest(weight: Tensor, spec: QuantSpec, name: str) -> QuantTensor:
    scales, zeros = find_grid(name, weight, spec)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
