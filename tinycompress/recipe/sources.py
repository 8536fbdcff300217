"""What stands behind the names in a recipe: texts and models as they are, or stand-ins that only have their form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.data import text, tokens
from ..checkpoints.checkpoint import load
from ..checkpoints.tokenizer import encoder_of
from ..distillation.teacher_cache import TeacherCache, open_cache
from ..errors import InputError
from ..graph.config import Config, Layer
from ..graph.graph import Graph
from .vocabulary import Data

CALIBRATION_LENGTH = 1024
TRAINING_LENGTH = 512
HELD_OUT = 16  # windows of a text whose perplexity is measured during training
GIVEN = "model"  # the name of the model that a recipe starts from


def length_of(data: Data, context: int) -> int:
    """Tokens of a window for a model of `context` positions."""
    default = TRAINING_LENGTH if data.in_order else CALIBRATION_LENGTH
    return data.seq_len or min(default, context)


@dataclass(frozen=True)
class StandIns:
    """Sources without data: enough for passes to check their fields.

    Fields:
        context: positions of the model that windows default to.
    """

    context: int = CALIBRATION_LENGTH

    def tokens(self, data: Data) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.long).expand(data.samples, length_of(data, self.context))

    def graph(self, name: str) -> Graph:
        return Graph.random(Config(vocab_size=8, hidden_size=8, head_dim=8, layers=(Layer(1, 1, 8),), max_position=8))

    def teacher(self, name: str, of: str | None) -> Graph | TeacherCache:
        return self.graph(name)

    def texts(self, names: Sequence[str], seq_len: int) -> dict[str, Tensor]:
        return {name: torch.zeros(1, seq_len, dtype=torch.long) for name in names}


@dataclass
class Loaded:
    """Sources as they are, for a graph. A text is read once, however many passes take it.

    Fields:
        given: the graph that the recipe starts from.
        longest: the most tokens a window may have: the longest context that the recipe gives the model.
        open: opens a model by name. Default `load`.
        device: where windows lie, such as "cuda". Default None: the CPU.
        instead: windows that stand for those of every text. Default None.
        read: windows that were read, by what they are.
    """

    given: Graph
    longest: int
    open: Callable[[str], Graph] = load
    device: torch.device | str | None = None
    instead: Tensor | None = None
    read: dict[Data, Tensor] = field(default_factory=dict)

    def tokens(self, data: Data) -> Tensor:
        if self.instead is not None:
            return self.instead
        if data not in self.read:
            if data.seq_len and data.seq_len > self.longest:
                raise InputError("Data.seq_len", data.seq_len, f"at most the model's context, {self.longest}")
            length = length_of(data, self.given.config.max_position)
            found = self._in_order(data, length) if data.in_order else self._drawn(data, length)
            self.read[data] = found.to(self.device)
        return self.read[data]

    def _drawn(self, data: Data, length: int) -> Tensor:
        return tokens(data.text, self._tokenizer(), data.samples, length, seed=data.seed, split=data.split)

    def _in_order(self, data: Data, length: int) -> Tensor:
        """The first windows of a text: as many as it has, and at most `samples`."""
        characters = 40 * data.samples * length  # some four make a token
        encode = encoder_of(self._tokenizer())
        ids = encode(text(data.text, data.split, max_chars=characters)[:characters])[: data.samples * length]
        if len(ids) < length:
            raise InputError(f"tokens in {data.text}", len(ids), f"at least one window of {length}")
        n = len(ids) // length
        return torch.tensor(ids[: n * length]).view(n, length)

    def _tokenizer(self) -> object:
        if self.given.tokenizer is None:
            accepted = "a model with one (tokenizer.json beside the weights)"
            raise InputError("tokenizer", "none in this model", accepted)
        return self.given.tokenizer

    def graph(self, name: str) -> Graph:
        return self.given if name == GIVEN else self.open(name)

    def teacher(self, name: str, of: str | None) -> Graph | TeacherCache:
        if name != GIVEN and (Path(name) / "index.json").is_file():
            return open_cache(name, teacher=None if of is None else self.graph(of))
        return self.graph(name)

    def texts(self, names: Sequence[str], seq_len: int) -> dict[str, Tensor]:
        kept = [(Path(name).stem, Data(name, HELD_OUT, seq_len, split="test", in_order=True)) for name in names]
        return {name: self.tokens(data) for name, data in kept}
