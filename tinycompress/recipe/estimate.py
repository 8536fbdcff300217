"""What a recipe will cost, estimated: seconds, memory and disk, by simple rates and without data.

A pass is W forwards of every token that it reads, and O operations for every weight of the layers (`WORK`); a forward
of one token is 2 operations a weight. The machine does `CPU_RATE` operations a second a thread, or `GPU_RATE` on a GPU.
The rates are those of SmolLM2-135M on one busy core of a server (2026-11). Expect a factor of three.

Memory is what the library itself takes (`BASE`), the graph that a pass makes, the hidden states of all windows, and one
block's weights, gradients and Gram matrices in float32; training holds the whole model four times (weights, gradients,
two moments).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distillation.distill import Distill
from ..graph.config import Config
from ..graph.graph import Graph, Pass
from ..pruning.prune import Prune
from .foretell import Foretold

CPU_RATE = 15e9  # operations a second of one thread
GPU_RATE = 2e13
BASE = 600_000_000  # bytes of the process with torch and nothing in it
WORK: dict[str, tuple[float, float]] = {  # forwards of each token, operations a weight
    "AWQ": (30, 3_000),
    "AutoRound": (0, 0),  # by its steps
    "ChooseRope": (3, 0),
    "Distill": (0, 0),  # by its steps
    "Drop": (0, 0),  # by its count
    "GPTQ": (4, 12_000),
    "HQQ": (0, 3_000),
    "LongRope": (60, 0),
    "MixedBits": (12, 15_000),
    "Prune": (8, 4_000),
    "PruneFFN": (4, 1_000),
    "QuantizeEmbedding": (0, 300),
    "RTN": (0, 3_000),
    "Rotate": (0, 1_000),
    "Slice": (3, 2_000),
    "SmoothQuant": (2, 10),
}
FORWARD_AND_BACKWARD = 3  # in forwards


@dataclass(frozen=True)
class Cost:
    """An estimate for one pass.

    Fields:
        seconds: of work.
        memory: bytes at the peak.
        disk: bytes of the graph behind it, which a work folder keeps.
    """

    seconds: float
    memory: int
    disk: int


def costs(graph: Graph, passes: Sequence[Pass], foretold: Sequence[Foretold]) -> list[Cost]:
    """The cost of each pass, from passes on stand-in tokens and what is foretold of each."""
    out: list[Cost] = []
    before = graph
    for step, after in zip(passes, foretold):
        out.append(
            Cost(_operations(step, before) / _rate(), _memory(step, before) + after.graph.nbytes, after.graph.nbytes)
        )
        before = after.graph
    return out


def _rate() -> float:
    return GPU_RATE if torch.cuda.is_available() else CPU_RATE * torch.get_num_threads()


def _operations(step: Any, graph: Graph) -> float:
    weights = graph.config.n_body_params
    tokens = _tokens(step)
    name = type(step).__name__
    forwards, each = WORK.get(name, (0, 0))
    if name == "Distill":
        windows = step.training.total_steps(len(step.tokens)) * step.training.batch
        return 2.0 * weights * windows * step.tokens.shape[1] * (FORWARD_AND_BACKWARD + 1)
    if name == "AutoRound":
        return 2.0 * weights * FORWARD_AND_BACKWARD * step.tuning.steps * step.tuning.batch * step.tokens.shape[1]
    if name == "Drop":
        forwards = step.count * graph.config.n_layers / 2
    return 2.0 * weights * tokens * forwards + each * weights


def _tokens(step: Any) -> int:
    tokens = getattr(step, "tokens", None)
    return tokens.numel() if isinstance(tokens, Tensor) else 0


def _memory(step: Any, graph: Graph) -> int:
    config = graph.config
    if isinstance(step, Distill):
        rows = (step.training.micro_batch or step.training.batch) * step.tokens.shape[1]
        whole = 4 if not step.scales else 1
        states = rows * config.n_layers * config.hidden_size * 4 * 16
        return BASE + 4 * config.n_params * whole + states + _teacher_bytes(step)
    streams = 2 if getattr(step, "propagate", 0) or hasattr(step, "reference") else 1
    states = _tokens(step) * config.hidden_size * 4 * streams
    widest = max((_widest(config, i) for i in range(config.n_layers)), default=0)
    block = max((_block_weights(config, i) for i in range(config.n_layers)), default=0)
    grams = 3 * 8 * widest * widest if _tokens(step) else 0
    if isinstance(step, Prune):  # what was measured of every layer is kept until sizes are chosen
        grams += 8 * widest * widest * config.n_layers
    return BASE + states + 3 * 4 * block + grams


def _teacher_bytes(step: Distill) -> int:
    return step.teacher.nbytes if isinstance(step.teacher, Graph) else 0


def _widest(config: Config, layer: int) -> int:
    widths = config.layers[layer]
    return max(config.hidden_size, widths.n_heads * config.head_dim, widths.ffn_dim)


def _block_weights(config: Config, layer: int) -> int:
    return sum(linear.shape[0] * linear.shape[1] for linear in config.linears() if linear.layer == layer)
