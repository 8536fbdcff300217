"""AutoRound / SignRound (arXiv:2309.05516) on any quantized graph.

Block after block is tuned (block_tuning.py) towards the float graph that it came from, each on what the tuned blocks
before it give. A quantizer that already makes each block good for what the blocks before it have lost
(`GPTQ(propagate=…)`) should be tuned while it walks instead (`GPTQ(tuning=…)`): tuning afterwards changes the prefix
that the later blocks were made for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.walk import walk_blocks
from ..errors import InputError
from ..graph.graph import Graph, Weight
from ..graph.quant_tensor import QuantTensor
from ..model.transformer import RotaryTables
from .block_tuning import BlockTuning


@dataclass(frozen=True)
class AutoRound:
    """Tunes rounding and scales of the packed linears of a quantized graph, block by block.

    Fields:
        tokens: ids [windows, seq_len], or an iterable of them such as a DataLoader. Their device does the work.
        reference: the float graph that is tuned towards, with as many layers and as wide a residual stream.
        tuning: steps, rates and seed of a block (BlockTuning). Default BlockTuning().
        device: where the work is done, such as "cuda". Default None: the device of `tokens`.
        progress: whether a bar over the layers is shown once it takes longer than two seconds. Default True.

    Errors: an `InputError` for a graph without packed weights, a reference of another shape, tokens that are not of the
    model, and activations that are not finite.
    """

    tokens: Tensor | Iterable[Any] = field(repr=False, compare=False)
    reference: Graph = field(repr=False, compare=False)
    tuning: BlockTuning = field(default_factory=BlockTuning)
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))

    def __call__(self, graph: Graph) -> Graph:
        if not any(isinstance(weight, QuantTensor) for weight in graph.weights.entries.values()):
            raise InputError("AutoRound", "a graph without packed weights", "a quantized graph: run RTN or GPTQ first")

        def visit(
            layer: int, inputs: list[Tensor], targets: list[Tensor], tables: RotaryTables
        ) -> Mapping[str, Weight]:
            return self.tuning.tuned(graph, self.reference, layer, inputs, targets, tables)

        tokens = as_tokens(self.tokens).to(self.device)
        bar = "AutoRound" if self.progress else None
        return walk_blocks(graph, self.reference, tokens, visit, kept={}, progress=bar).replace(by=self)
