"""What a model answers to windows of tokens, as blocks of logits: from torch, from a runtime, or kept from before.

All that a comparison needs of a torch model is its last hidden states and its head: D numbers a token in place of V. So
one model can be asked, put away, and compared later with another, bit for bit. Logits exist for some positions at a
time, whatever the vocabulary. Letters: W windows, T positions, D hidden width, V vocabulary, n and r rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..graph.config import HEAD
from ..graph.graph import Graph
from ..model.linear import linear
from ..model.transformer import Transformer
from .perplexity import LOGITS, check_windows, streamed_states

BLOCK = 1 << 22  # logits of a block: 85 positions of a vocabulary of 49,152
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of every token of some windows.

    Fields:
        states: the number of a window to parts [n, width] of what is known of its T positions, in order. A part has a
            multiple of `rows_together(V)` rows, but for the last one.
        head: rows [r, width] of them to logits [r, V]; None where they are the logits.
        vocab_size: V; None where it is not known before the first logits.
    """

    states: Callable[[int], Iterator[Tensor]]
    head: Head | None = None
    vocab_size: int | None = None

    def logits(self, number: int) -> Iterator[Tensor]:
        """Blocks float32 [r, V] of a window's logits, in order, on the CPU; r is `rows_together(V)` but for the last
        one."""
        for part in self.states(number):
            for rows in part.split(rows_together(self.vocab_size or part.shape[-1])):
                yield (rows if self.head is None else self.head(rows)).float().cpu()

    @torch.inference_mode()
    def collected(self, windows: int, name: str, progress: bool = True) -> Answers:
        """The same answers out of memory, without the model: the states of all windows are asked for now. `name`
        stands before the progress bar."""
        numbers = tqdm(range(windows), desc=name, unit="window", delay=2, disable=not progress)
        kept = [torch.cat(list(self.states(number))) for number in numbers]
        return Answers(lambda number: iter((kept[number],)), self.head, self.vocab_size)


def rows_together(vocab_size: int) -> int:
    """Positions of a block of logits."""
    return max(1, BLOCK // vocab_size)


def answers_of(model: Any, tokens: Tensor) -> Answers:
    """The answers of a module of torch, of an export in its runtime, or of any function from ids [1, T] to logits
    [1, T, V], to `tokens` [W, T]: computed window by window as they are asked for."""
    check_windows(model, tokens)
    if isinstance(model, Transformer):

        def hidden(number: int) -> Iterator[Tensor]:
            yield model.hidden(tokens[number : number + 1].to(model.device))[0]

        return Answers(hidden, model.lm_head, model.config.vocab_size)
    config = getattr(model, "config", None)
    return Answers(lambda number: _runtime_logits(model, tokens[number]), None, config and config.vocab_size)


def streamed_answers(graph: Graph, tokens: Tensor, progress: bool = True) -> Answers:
    """The answers of a graph in float32, with one block's weights in memory at a time; all are computed here."""
    states = torch.cat(list(streamed_states(graph, tokens, progress))).split(tokens.shape[1])
    return Answers(lambda number: iter((states[number],)), head_of(graph), graph.config.vocab_size)


def head_of(graph: Graph) -> Head:
    """What makes logits [r, V] of last hidden states [r, D], in float32, as the whole module does."""
    return linear(graph.dense(torch.float32).linear(HEAD), None)


def _runtime_logits(model: Any, ids: Tensor) -> Iterator[Tensor]:
    """Logits [n, V] of a window [T]: at once, or where they are too many, step by step behind a cache."""
    if not hasattr(model, "step"):
        yield model(ids[None])[0]
        return
    rows = rows_together(model.config.vocab_size)
    together = max(rows, LOGITS // model.config.vocab_size // rows * rows)
    if len(ids) <= together:
        yield model(ids[None])[0]
        return
    cache = model.new_cache(1, len(ids))
    for part in ids.split(together):
        yield model.step(part[None], cache)[0]
