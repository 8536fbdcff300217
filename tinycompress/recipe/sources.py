"""What stands behind the names in a recipe: texts and models as they are, or stand-ins that only have their form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.data import TokenStream, cut, enough, token_stream
from ..checkpoints.checkpoint import load
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

    def answers(self, windows: Tensor) -> Tensor | None:
        return None

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
        chats: those of them that are conversations.
    """

    given: Graph
    longest: int
    open: Callable[[str], Graph] = load
    device: torch.device | str | None = None
    instead: Tensor | None = None
    read: dict[Data, Tensor] = field(default_factory=dict)
    chats: set[Data] = field(default_factory=set)

    def tokens(self, data: Data) -> Tensor:
        if self.instead is not None:
            return self.instead
        if data not in self.read:
            if data.seq_len and data.seq_len > self.longest:
                raise InputError("Data.seq_len", data.seq_len, f"at most the model's context, {self.longest}")
            length = length_of(data, self.given.config.max_position)
            stream = self._stream(data, length)
            self.read[data] = self._windows(data, stream.ids, length).to(self.device)
            if stream.chat:
                self.chats.add(data)
        return self.read[data]

    def answers(self, windows: Tensor) -> Tensor | None:
        """For windows [N, T] of conversations that `tokens` gave: 1.0 for each token that the assistant wrote, which a
        model that answers learns from, and 0.0 for the others. None for windows of a text."""
        data = next((data for data, known in self.read.items() if known is windows), None)
        if data is None or data not in self.chats:
            return None
        length = windows.shape[1]
        stream = self._stream(data, length, answers=True)
        return self._windows(data, stream.answers, length).float().to(self.device)

    def _stream(self, data: Data, length: int, answers: bool = False) -> TokenStream:
        characters = enough(data.samples, length)
        first = characters if data.in_order else None
        return token_stream(data.text, self._tokenizer(), data.split, characters, answers, first)

    @staticmethod
    def _windows(data: Data, values: list[Any], length: int) -> Tensor:
        """Windows of a source with a value for each token: drawn, or the first ones, as many as there are and at most
        `samples`."""
        if not data.in_order:
            return cut(values, data.text, data.samples, length, data.seed)
        n = min(data.samples, len(values) // length)
        if not n:
            raise InputError(f"tokens in {data.text}", len(values), f"at least one window of {length}")
        return cut(values, data.text, n, length)

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
