"""Depth: whole layers or single sublayers removed, by what their absence does to the loss.

  SLEB (arXiv:2402.09025)       greedily, the unit whose removal leaves the least loss on the calibration text, one at a
                                time
  2SSP (arXiv:2501.17771)       the same with attention sublayers (its second stage)
  ShortGPT (arXiv:2403.03853)   is block influence, one measurement for all: `Prune(keep={"layers": n})`

Every candidate costs a forward from where it stands to the end: hidden states in front of every unit are kept, and
a greedy removal of r out of n units takes about r·n/2 forwards over `tokens`. A few thousand tokens are enough.
Letters: N windows, T positions, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.data import as_tokens
from ..calibration.walk import check_calibration, working_dtype
from ..checkpoints.unfinished import open_stage
from ..errors import InputError
from ..graph.config import Config, Layer
from ..graph.edit import cut, resized
from ..graph.graph import Graph
from ..graph.topology import axis_name
from ..model.transformer import Block, RotaryTables, Transformer
from ..progress import tqdm

KINDS_OF_UNITS = {  # what the field `parts` accepts
    "layers": ("layers",),
    "attention": ("attention",),
    "ffn": ("ffn",),
    "sublayers": ("attention", "ffn"),
}
AXIS_OF = {"attention": "heads", "ffn": "ffn"}  # the axis that a sublayer is cut along
Unit = tuple[int, str]  # a layer's index, and "attention" or "ffn" or "layers" for both


@dataclass(frozen=True)
class Drop:
    """Removes layers or sublayers, one at a time, each time the one that is missed least.

    Fields:
        tokens: calibration ids [windows, seq_len] that the loss is measured on at every step: a tensor, or an iterable
            of tensors or a DataLoader. A few thousand tokens are enough.
        count: how many units go, fewer than the model has.
        parts: what a unit is: "layers" (the default), "attention" or "ffn" sublayers, or "sublayers" of either kind.
        device: where the loss is measured; None: where the tokens are.
        progress: whether a progress bar is shown.

    An `InputError` names a field with a value it does not accept.
    """

    tokens: Tensor = field(repr=False, compare=False)
    count: int
    parts: str = "layers"
    device: str | None = field(default=None, repr=False)
    progress: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_tokens(self.tokens))
        if self.parts not in KINDS_OF_UNITS:
            raise InputError("Drop.parts", repr(self.parts), " | ".join(KINDS_OF_UNITS))
        if not isinstance(self.count, int) or self.count < 0:
            raise InputError("Drop.count", self.count, "a number of units")

    def plan(self, config: Config) -> Config:
        """A config like the one that the pass will arrive at, without data: as if the last units went.

        Where layers go that are all alike, its shapes are these, whichever go.
        """
        layers = list(config.layers)
        units = self._units(config)
        for i, kind in reversed(units[len(units) - self.count :]):
            if kind == "layers":
                del layers[i]
            else:
                layers[i] = resized(layers[i], AXIS_OF[kind], 0)
        return dataclasses.replace(config, layers=tuple(layers))

    def __call__(self, graph: Graph) -> Graph:
        units = self._units(graph.config)
        check_calibration(graph, self.tokens)
        tokens = self.tokens if self.device is None else self.tokens.to(self.device)
        removed = greedy(graph, tokens, units, self.count, self.progress)
        return remove(graph, removed).replace(by=self)

    def _units(self, config: Config) -> list[Unit]:
        """What could go; an `InputError` if nothing would be left."""
        units = units_of(config, self.parts)
        if self.count >= max(len(units), 1):
            raise InputError("Drop.count", self.count, f"fewer than the model's {len(units)} {self.parts}")
        return units


def units_of(config: Config, parts: str) -> list[Unit]:
    """What could go, in the order the model computes it."""
    return [
        (i, kind) for i, layer in enumerate(config.layers) for kind in KINDS_OF_UNITS[parts] if _is_present(layer, kind)
    ]


def _is_present(layer: Layer, kind: str) -> bool:
    if kind == "attention":
        return layer.n_heads > 0
    return kind == "layers" or layer.ffn_dim > 0


def remove(graph: Graph, units: Sequence[Unit]) -> Graph:
    """The graph without these units."""
    for i, kind in units:
        if kind != "layers":
            graph = cut(graph, axis_name(i, AXIS_OF[kind]), [])
    dropped = {i for i, kind in units if kind == "layers"}
    if not dropped:
        return graph
    return cut(graph, "layers", [i for i in range(graph.config.n_layers) if i not in dropped])


@torch.no_grad()
def greedy(graph: Graph, tokens: Tensor, units: Sequence[Unit], count: int, progress: bool = True) -> list[Unit]:
    """The `count` units that go, in order: each time the one whose removal leaves the least loss on tokens [N, T]."""
    model = graph.dense().module(tokens.device, working_dtype(graph, tokens.device))
    tables = model.tables(0, tokens.shape[1])
    # indices of the units that went; the losses without each of the others, as far as they are measured
    kept = {"removed": torch.tensor([], dtype=torch.long), "losses": torch.tensor([], dtype=torch.float64)}
    stage = open_stage("drop", kept=kept)
    removed = [units[i] for i in kept["removed"].tolist()]
    start = len(removed)
    for _ in tqdm(
        range(start, count), desc="Drop", unit="unit", initial=start, total=count, delay=2, disable=not progress
    ):
        states = _states(model, tables, tokens, removed)
        left = [unit for unit in units if unit not in removed]
        losses = kept["losses"].tolist()
        for i, kind in left[len(losses) :]:
            losses.append(_loss(model, _run(model, tables, states[i].clone(), i, {*removed, (i, kind)}), tokens))
            kept["losses"] = torch.tensor(losses, dtype=torch.float64)
            stage.save(len(removed))
        removed.append(left[losses.index(min(losses))])
        indices = [units.index(unit) for unit in removed]
        kept.update(removed=torch.tensor(indices), losses=torch.tensor([], dtype=torch.float64))
    stage.finish()
    return removed


def _states(model: Transformer, tables: RotaryTables, tokens: Tensor, removed: Sequence[Unit]) -> list[Tensor]:
    """Hidden states [N, T, D] in front of every layer."""
    states = [model.model.embed_tokens(tokens)]
    for i in range(len(model.blocks)):
        states.append(_run(model, tables, states[-1].clone(), i, set(removed), i + 1))
    return states


def _run(
    model: Transformer, tables: RotaryTables, x: Tensor, first: int, removed: set[Unit], stop: int | None = None
) -> Tensor:
    """x [N, T, D] through layers first … stop - 1 without the units that are removed, a window at a time."""
    for i, block in enumerate(model.blocks):
        if i < first or (stop is not None and i >= stop) or (i, "layers") in removed:
            continue
        assert isinstance(block, Block)
        if (i, "attention") not in removed:
            x = torch.cat([block.attention(window, tables) for window in x.split(1)])
        if (i, "ffn") not in removed:
            x = torch.cat([block.ffn(window) for window in x.split(1)])
    return x


def _loss(model: Transformer, x: Tensor, tokens: Tensor) -> float:
    """Mean next-token loss in nats; logits of one window exist at a time."""
    total = 0.0
    for hidden, ids in zip(x, tokens):
        logits = model.lm_head(model.model.norm(hidden[:-1].clone())).float()
        total += float(F.cross_entropy(logits, ids[1:].long()))
    return total / len(tokens)
