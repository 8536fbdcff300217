"""Round to nearest: every linear on its grid, without data. The baseline that every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from ..graph import Graph
from ..quantize import QuantSpec, QuantTensor, find_grid, round_to_grid, targets


@dataclass(frozen=True)
class RTN:
    """Quantizes every linear (the head only if `head`) to the nearest point of its grid; layer by layer, no data."""

    spec: QuantSpec = field(default_factory=QuantSpec)
    head: bool = False

    def __call__(self, graph: Graph) -> Graph:
        changed = {}
        for name in tqdm(targets(graph, self.spec, self.head), desc=f"RTN {self.spec}", unit="linear", delay=2):
            changed[graph.config.weight_name(name)] = rtn_quantize(graph.tensor(graph.config.weight_name(name)), self.spec, name)
        return graph.replace(weights=changed, by=self)


def rtn_quantize(weight: Tensor, spec: QuantSpec, name: str = "weight") -> QuantTensor:
    """weight float [N, K] to the nearest points of the grid that `spec` finds for it."""
    weight = weight.float()
    scales, zeros = find_grid(name, weight, spec)
    return QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
