"""The embedding and the head on a grid: rounded to nearest, without data.

A table [V, D] is read one row per token by the embedding, and whole by the head; tied, the two are one packed table.
Small models hold much of their bytes there (of SmolLM2-135M's 135M parameters, 28M). Every row is cut along D into
groups, as a linear's are (quant_tensor.py), so 8 bits are close to free and 4 bits are cheap where groups are short.

Letters: V vocabulary, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError
from ..graph.config import EMBEDDING, HEAD
from ..graph.graph import Graph
from ..graph.quant_tensor import QuantSpec, QuantTensor, stacked
from ..progress import tqdm
from .grid_search import round_to_nearest
from .linear_specs import Spec

ROWS = 4096  # of a table at a time: no float32 copy of it whole
HEAD_TABLE = f"{HEAD}.weight"


@dataclass(frozen=True)
class QuantizeEmbedding:
    """Packs the tables of the embedding and the head: tied ones as the one table they are, others each on its own grid.

    Fields:
        spec: the grid, as text ("w8g64") or a QuantSpec; symmetric or with integer zero points. Default w8g64.
        head: whether the head is packed as well; a tied head must be. Default True.
        head_spec: another grid for a head that is not tied, as text or a QuantSpec. Default None: that of `spec`.
        device: where rows are rounded, such as "cuda"; the results return to where the tables were. Default None: where
            the tables are.
        progress: whether a bar over the rows is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for a spec with float zero points or with a search that needs activations ("weighted"), for
    groups that do not divide D, for tables that are packed already or not finite, and for `head=False` or a `head_spec`
    where the head is tied.
    """

    spec: Spec = field(default_factory=lambda: QuantSpec(bits=8))
    head: bool = True
    head_spec: Spec | None = None
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("spec", "head_spec"):
            if getattr(self, name) is None:
                continue
            spec = QuantSpec.of(getattr(self, name))
            object.__setattr__(self, name, spec)
            if spec.search == "weighted":
                found = "'weighted', which takes activation statistics"
                raise InputError(f"QuantizeEmbedding.{name}.search", found, "'auto', 'minmax' or 'mse'")
        if QuantSpec.of(self.spec).float_zero:
            accepted = "integer zero points (-asym), or none: no runtime looks such rows up"
            raise InputError("QuantizeEmbedding.spec", str(self.spec), accepted)
        if self.head_spec and not self.head:
            raise InputError("QuantizeEmbedding.head_spec", f"{self.head_spec} with head=False", "None, or head=True")

    def __call__(self, graph: Graph) -> Graph:
        packed: dict[str, QuantTensor] = {}
        for name, spec in self.tables(graph).items():
            table = graph.tensor(name)
            packed[name] = quantize_table(table.to(self.device), spec, name, self.progress).to(table.device)
        return graph.replace(weights=packed, by=self)

    def tables(self, graph: Graph) -> dict[str, QuantSpec]:
        """The tables to pack and their grids, after checking that each is dense and that the groups divide D."""
        tied = graph.config.tie_embeddings
        remedy = "they are one table"
        if tied and not self.head:
            raise InputError("QuantizeEmbedding.head", "False for a head tied to the embedding", f"True: {remedy}")
        if tied and self.head_spec:
            found = f"{self.head_spec} for a head tied to the embedding"
            raise InputError("QuantizeEmbedding.head_spec", found, f"None: {remedy}")
        specs = {EMBEDDING: QuantSpec.of(self.spec)}
        if self.head and not tied:
            specs[HEAD_TABLE] = QuantSpec.of(self.head_spec or self.spec)
        for name, spec in specs.items():
            entry = graph.weights.entries[name]
            if isinstance(entry, QuantTensor):
                accepted = "a dense table" + (", or head=False" if name == HEAD_TABLE else "")
                raise InputError(name, f"a table that is already {entry.grid}", accepted)
            spec.group(name, entry.shape[1])
        return specs


def quantize_table(table: Tensor, spec: Spec, name: str = "table", progress: bool = False) -> QuantTensor:
    """table float [V, D] to the nearest points of the grid that `spec` finds for each row, `ROWS` rows at a time."""
    spec = QuantSpec.of(spec)
    parts: list[QuantTensor] = []
    with tqdm(total=len(table), desc=f"{name} {spec}", unit="row", delay=2, disable=not progress) as bar:
        for rows in table.split(ROWS):
            parts.append(round_to_nearest(name, rows.float(), spec))
            bar.update(len(rows))
    return stacked(parts)
