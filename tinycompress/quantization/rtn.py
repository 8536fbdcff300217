"""Round to nearest: every linear on its grid, without data. The baseline that every method is measured against.

    q = clamp(round(w / s) + z, 0, 2^bits - 1)      scale s and zero point z of each group as grid_search.py finds them

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from .grid_search import round_to_nearest
from .linear_by_linear import quantize_linears
from .linear_specs import Spec, Specs, named_specs, targets

ROWS = 1 << 22  # weights that are rounded at a time, so that no float32 copy of a large matrix is made


@dataclass(frozen=True)
class RTN:
    """Rounds linears to the nearest points of their grids, one linear after the other, without data.

    Fields:
        spec: the grid of every linear, as text ("w4g64") or a QuantSpec; or a mapping from names of linears to such,
            where linears that are not named stay float. Default w4g64.
        head: whether one spec for all is also for the head; an untied one only. Default False.
        device: where weights are rounded, such as "cuda"; the results return to where the weights were. Default None:
            where the weights are.
        progress: whether a bar over the linears is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` if a group does not divide a linear's inputs, a weight is packed already or not finite, a
    name is no linear of the graph, or the search of a spec needs activations ("weighted").
    """

    spec: Specs = field(default_factory=QuantSpec)
    head: bool = False
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", named_specs(self.spec))

    def __call__(self, graph: Graph) -> Graph:
        specs = targets(graph, self.spec, self.head)
        bar = f"RTN {self.spec}" if self.progress else None
        return graph.replace(weights=quantize_linears(graph, specs, rtn_quantize, self.device, bar), by=self)


def rtn_quantize(weight: Tensor, spec: Spec, name: str = "weight") -> QuantTensor:
    """weight float [N, K] to the nearest points of the grid that `spec` finds for it."""
    spec = QuantSpec.of(spec)
    rows = max(1, ROWS // weight.shape[1])
    return stacked([round_to_nearest(name, part.float(), spec) for part in weight.split(rows)])
