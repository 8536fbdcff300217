"""The embedding and the head on a grid: RTN for the two tables that passes over linears leave alone, without data.

A table [V, D] is read a row a token by the embedding, and whole by the head; tied, the two are one packed table. Small
models hold much of their bytes there (of SmolLM2-135M's 135M parameters, 28M). Every row is cut along D into groups, as
a linear's are (quant_tensor.py), so 8 bits are close to free and 4 bits are cheap where groups are short.
Letters: V vocabulary, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from .grid_search import find_grid, round_to_grid

ROWS = 4096  # of a table at a time: no float32 copy of it whole
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class QuantizeEmbedding:
    """Packs the embedding and, unless `head` is False, the head: tied ones as the one table they are, others each on a
    grid of its own. `head_spec` gives an untied head another grid than `spec`."""

    spec: QuantSpec = field(default_factory=lambda: QuantSpec(bits=8))
    head: bool = True
    head_spec: QuantSpec | None = None

    def __post_init__(self) -> None:
        for name, spec in (("spec", self.spec), ("head_spec", self.head_spec)):
            if spec and spec.search == "weighted":
                raise InputError(
                    f"QuantizeEmbedding.{name}.search",
                    "'weighted', which takes activation statistics",
                    "'auto', 'minmax' or 'mse'",
                )
        if self.spec.float_zero:
            raise InputError(
                "QuantizeEmbedding.spec",
                str(self.spec),
                "integer zero points (-asym), or none: no runtime looks such rows up",
            )
        if self.head_spec and not self.head:
            raise InputError("QuantizeEmbedding.head_spec", f"{self.head_spec} with head=False", "None, or head=True")

    def __call__(self, graph: Graph) -> Graph:
        packed = {name: quantize_table(graph.tensor(name), spec, name) for name, spec in self.tables(graph).items()}
        return graph.replace(weights=packed, by=self)

    def tables(self, graph: Graph) -> dict[str, QuantSpec]:
        """The tables to pack and their grids, after checking that each is dense and that the groups divide D."""
        tied = graph.config.tie_embeddings
        if tied and not self.head:
            raise InputError(
                "QuantizeEmbedding.head", "False for a head tied to the embedding", "True: they are one table"
            )
        if tied and self.head_spec:
            raise InputError(
                "QuantizeEmbedding.head_spec",
                f"{self.head_spec} for a head tied to the embedding",
                "None: they are one table",
            )
        out = {EMBEDDING: self.spec}
        if self.head and not tied:
            out[HEAD] = self.head_spec or self.spec
        for name, spec in out.items():
            entry = graph.weights.entries[name]
            if isinstance(entry, QuantTensor):
                remedy = "a dense table" + (", or head=False" if name == HEAD else "")
                raise InputError(name, f"a table that is already {entry.grid}", remedy)
            spec.group(name, entry.shape[1])
        return out


def quantize_table(table: Tensor, spec: QuantSpec, name: str = "table") -> QuantTensor:
    """table float [V, D] to the nearest points of the grid that `spec` finds for each row, `ROWS` rows at a time."""
    done = []
    with tqdm(total=len(table), desc=f"{name} {spec}", unit="row", delay=2) as bar:
        for rows in table.split(ROWS):
            weight = rows.float()
            scales, zeros = find_grid(name, weight, spec)
            done.append(QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec))
            bar.update(len(rows))
    return stacked(done)
