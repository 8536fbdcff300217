"""What a pass will make of a graph, foretold: shapes and grids, with no weight read and no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..checkpoints.format_check import blank
from ..distillation.distill import Distill
from ..errors import InputError
from ..graph.config import Config
from ..graph.graph import Graph, Pass
from ..graph.quant_tensor import Grid, QuantSpec, QuantTensor, packed_bytes
from ..pruning.prune import Prune
from ..quantization.autoround import AutoRound
from ..quantization.awq import AWQ
from ..quantization.embedding import QuantizeEmbedding
from ..quantization.linear_specs import targets
from ..quantization.mixed_bits import MixedBits, linear_shapes


@dataclass(frozen=True)
class Foretold:
    """A graph behind a pass.

    Fields:
        name: of the pass.
        graph: of the shapes and grids it will have; its tensors have no data.
        specs: how the pass searches the grids that it packs on, by parameter.
    """

    name: str
    graph: Graph
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)


def behind(step: Pass, graph: Graph) -> Foretold:
    """The graph behind a pass; an `InputError` for a pass that cannot work on `graph`."""
    if isinstance(step, Prune):
        step.check(graph)
        config = step.plan(graph.config, step.storage(graph))
    else:
        config = planned(step, graph.config)
    shapes = blank(graph, config, {})
    specs = packed_by(step, shapes)
    grids: dict[str, Grid] = {name: spec.grid for name, spec in specs.items()}
    return Foretold(type(step).__name__, blank(shapes, config, grids) if grids else shapes, specs)


def planned(step: Pass, config: Config) -> Config:
    """The config behind a pass: its own `plan`, or the same shapes for a pass that has none."""
    plan = getattr(step, "plan", None)
    if plan is None:
        return config
    behind: Config = plan(config)
    return behind


def packed_by(step: Pass, graph: Graph) -> dict[str, QuantSpec]:
    """The parameters that a pass packs, and on which grids; checked as the pass itself will."""
    if isinstance(step, QuantizeEmbedding):
        return step.tables(graph)
    if isinstance(step, MixedBits):
        return _mixed(step, graph)
    if isinstance(step, AutoRound):
        if not any(isinstance(weight, QuantTensor) for weight in graph.weights.entries.values()):
            raise InputError("AutoRound", "a graph without packed weights", "a pass such as RTN before it")
        return {}
    if isinstance(step, Distill):
        _check_rank(step, graph.config)
        spec = step.fake_quant
    elif isinstance(step, AWQ) and not step.quantize:
        spec = None
    else:
        spec = getattr(step, "spec", None)
    if spec is None:
        return {}
    specs = targets(graph, spec, getattr(step, "head", False))
    return {graph.config.weight_name(name): own for name, own in specs.items()}


def _check_rank(step: Distill, config: Config) -> None:
    """An `InputError` for low-rank updates of a rank that no linear of the layers has."""
    widest = max((min(linear.shape) for linear in config.linears() if linear.layer is not None), default=1)
    if step.lora is not None and step.lora.rank > widest:
        raise InputError("LoRA.rank", step.lora.rank, f"at most {widest}, the highest rank that a linear here has")


def _mixed(step: MixedBits, graph: Graph) -> dict[str, QuantSpec]:
    """A stand-in for a choice that needs data: all linears on the largest grid that the budget has room for."""
    specs = step.specs
    sizes = linear_shapes(graph, specs)
    limit = step.limit(sizes, specs)

    def total(spec: QuantSpec) -> int:
        return sum(packed_bytes(shape, spec) for shape in sizes.values())

    fitting = [spec for spec in specs if total(spec) <= limit] or [min(specs, key=total)]
    best = max(fitting, key=total)
    return {graph.config.weight_name(name): best for name in sizes}
