"""AutoRound / SignRound (arXiv:2309.05516) on any quantized graph: block after block is tuned (block_tuning.py) towards the float
graph that it came from, each on what the tuned blocks before it give.

A quantizer that makes a block for what the blocks before it have lost (`GPTQ(propagate=…)`) should be tuned while it walks
instead (`GPTQ(tuning=…)`): tuning afterwards changes the prefix that the later blocks were made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..calibration.walk import walk_blocks
from ..errors import InputError
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantTensor
from ..model.transformer import RotaryTables
from .block_tuning import BlockTuning


@dataclass(frozen=True)
class AutoRound:
    """Tunes the packed linears of a quantized graph on calibration `tokens` [windows, seq_len] towards the float `reference`."""

    tokens: Tensor = field(repr=False, compare=False)
    reference: Graph = field(repr=False, compare=False)
    tuning: BlockTuning = field(default_factory=BlockTuning)

    def __call__(self, graph: Graph) -> Graph:
        if not any(isinstance(w, QuantTensor) for w in graph.weights.entries.values()):
            raise InputError("AutoRound", "a graph without packed weights", "a quantized graph: run RTN or GPTQ first")

        def visit(
            layer: int, inputs: list[Tensor], targets: list[Tensor], tables: RotaryTables
        ) -> Mapping[str, Weight]:
            return self.tuning.tuned(graph, self.reference, layer, inputs, targets, tables)

        return walk_blocks(graph, self.reference, self.tokens, visit, progress="AutoRound").replace(by=self)
