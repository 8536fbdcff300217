"""Depth: whole layers or single sublayers removed, by what their absence does to the loss.

  SLEB (arXiv:2402.09025)    greedily, the unit whose removal leaves the least loss on the calibration text, one at a time
  2SSP (arXiv:2501.17771)    the same with attention sublayers (its second stage)
  ShortGPT (arXiv:2403.03853) is block influence, one measurement for all: `Prune(keep={"layers": n})`

Every candidate costs a forward from where it stands to the end: hidden states in front of every unit are kept, and
a greedy removal of r out of n units takes about r·n/2 forwards over `tokens`. A few thousand tokens are enough.
Letters: N windows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..calibration.walk import check_calibration
from ..errors import InputError
from ..graph.edit import cut
from ..graph.graph import Graph
from ..model.transformer import Block, RotaryTables, Transformer

PARTS = ("layers", "attention", "ffn", "sublayers")
Unit = tuple[int, str]  # layer, and "attention" or "ffn" or "layers" for both


@dataclass(frozen=True)
class Drop:
    """Removes `count` units of `parts` ("layers", "attention" or "ffn" sublayers, or "sublayers" of either kind).

    tokens: calibration ids [windows, seq_len] that the loss is measured on, at every step.
    """

    tokens: Tensor = field(repr=False, compare=False)
    count: int
    parts: str = "layers"

    def __post_init__(self) -> None:
        if self.parts not in PARTS:
            raise InputError("Drop.parts", repr(self.parts), " | ".join(PARTS))
        if not isinstance(self.count, int) or self.count < 0:
            raise InputError("Drop.count", self.count, "a number of units")

    def __call__(self, graph: Graph) -> Graph:
        units = units_of(graph, self.parts)
        if self.count >= max(len(units), 1):
            raise InputError("Drop.count", self.count, f"fewer than the model's {len(units)} {self.parts}")
        check_calibration(graph, self.tokens)
        gone = greedy(graph, self.tokens, units, self.count)
        return remove(graph, gone).replace(by=self)


def units_of(graph: Graph, parts: str) -> list[Unit]:
    """What could go, in the order the model computes it."""
    kinds = {"layers": ("layers",), "attention": ("attention",), "ffn": ("ffn",), "sublayers": ("attention", "ffn")}[
        parts
    ]
    there = {
        "layers": lambda layer: True,
        "attention": lambda layer: layer.n_heads > 0,
        "ffn": lambda layer: layer.ffn_dim > 0,
    }
    return [(i, kind) for i, layer in enumerate(graph.config.layers) for kind in kinds if there[kind](layer)]


def remove(graph: Graph, gone: Sequence[Unit]) -> Graph:
    """The graph without these units."""
    for i, kind in gone:
        if kind != "layers":
            graph = cut(graph, f"layers.{i}.{'heads' if kind == 'attention' else 'ffn'}", [])
    dropped = {i for i, kind in gone if kind == "layers"}
    if not dropped:
        return graph
    return cut(graph, "layers", [i for i in range(graph.config.n_layers) if i not in dropped])


@torch.no_grad()
def greedy(graph: Graph, tokens: Tensor, units: Sequence[Unit], count: int) -> list[Unit]:
    """The units that go, in the order they were chosen: each time the one whose removal leaves the least loss."""
    dtype = torch.float32 if tokens.device.type == "cpu" and graph.dtype.itemsize < 4 else graph.dtype
    model = graph.dense().module(tokens.device, dtype)
    tables = model.tables(0, tokens.shape[1])
    gone: list[Unit] = []
    for _ in tqdm(range(count), desc="Drop", unit="unit", delay=2):
        states = _states(model, tables, tokens, gone)
        left = [unit for unit in units if unit not in gone]
        losses = [
            _loss(model, _run(model, tables, states[i].clone(), i, {*gone, (i, kind)}), tokens) for i, kind in left
        ]
        gone.append(left[losses.index(min(losses))])
    return gone


def _states(model: Transformer, tables: RotaryTables, tokens: Tensor, gone: Sequence[Unit]) -> list[Tensor]:
    """Hidden states [N, T, D] in front of every layer."""
    out = [model.model.embed_tokens(tokens)]
    for i in range(len(model.model.layers)):
        out.append(_run(model, tables, out[-1].clone(), i, set(gone), i + 1))
    return out


def _run(
    model: Transformer, tables: RotaryTables, x: Tensor, first: int, gone: set[Unit], stop: int | None = None
) -> Tensor:
    """x through layers first … stop - 1 without the units that are gone."""
    for i, block in enumerate(model.model.layers):
        if i < first or (stop is not None and i >= stop) or (i, "layers") in gone:
            continue
        assert isinstance(block, Block)
        if block.self_attn is not None and (i, "attention") not in gone:
            x = torch.cat([h + block.self_attn(block.input_layernorm(h), tables) for h in x.split(1)])
        if block.mlp is not None and (i, "ffn") not in gone:
            x = torch.cat([h + block.mlp(block.post_attention_layernorm(h)) for h in x.split(1)])
    return x


def _loss(model: Transformer, x: Tensor, tokens: Tensor) -> float:
    """Mean next-token loss in nats; logits of one window exist at a time."""
    total = 0.0
    for hidden, ids in zip(x, tokens):
        total += float(F.cross_entropy(model.lm_head(model.model.norm(hidden[:-1].clone())).float(), ids[1:].long()))
    return total / len(tokens)
