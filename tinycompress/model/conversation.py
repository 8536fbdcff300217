"""Text that goes on turn by turn: what was run stays in the KV cache, and only what is new is run.

Letters: T tokens of the whole text, t new ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from ..errors import InputError
from .generation import Stepwise, generate
from .sampling import Sampling
from .transformer import Transformer


class Conversation:
    """A model with a cache that is kept between calls of `generate`.

    Fields:
        engine: a Transformer, or an exported model.
        positions: how many tokens all turns together may have.
        cached: the ids whose keys and values are in the cache.
        ran: how many tokens the last call has run.
    """

    def __init__(self, engine: Transformer | Stepwise, positions: int | None = None) -> None:
        context = engine.config.max_position
        if positions is not None and not 1 <= positions <= context:
            raise InputError("positions", positions, f"1 … {context}, the model's context")
        self.engine = engine
        self.positions = positions or context
        self.cached: list[int] = []
        self.ran = 0
        self.cache: Any = None

    @torch.inference_mode()
    def generate(self, ids: Tensor, max_new_tokens: int = 64, **options: Unpack[Sampling]) -> Tensor:
        """Continues ids [1, T] (or [T]), the whole text so far, by at most `max_new_tokens`: the new ids [n].

        The same ids as the engine's own `generate`. A call that was interrupted leaves the conversation sound.
        """
        prompt = torch.as_tensor(ids).reshape(1, -1)
        T = prompt.shape[1]
        if self.positions <= T:
            raise InputError(
                "conversation", f"{T} tokens", f"fewer than the {self.positions} positions there is room for"
            )
        self.ran = 0
        known = self._rewind(prompt[0].tolist())

        def begin(length: int) -> Callable[[Tensor], Tensor]:
            first = [True]

            def step(new: Tensor) -> Tensor:
                rest = new[:, known:] if first[0] else new
                first[0] = False
                return self._run(rest)

            return step

        room = min(max_new_tokens, self.positions - T)
        return generate(self.engine.config, prompt, room, begin, options, self.engine.generation)

    def _rewind(self, ids: list[int]) -> int:
        """Takes the cache back to what it shares with ids; returns how many of them need not be run."""
        shared = next((i for i, (a, b) in enumerate(zip(ids, self.cached)) if a != b), min(len(ids), len(self.cached)))
        shared = min(shared, len(ids) - 1)  # the last one's logits are asked for
        # a layer with a window has let go of what a shorter text would see
        gone = self.engine.config.window is not None and shared < len(self.cached)
        if self.cache is None or gone:
            self.cache = self.engine.new_cache(1, self.positions)
            shared = 0
        self.cached = ids[:shared]
        return shared

    def _run(self, ids: Tensor) -> Tensor:
        """Runs ids [1, t] behind the cache: the last one's logits [V]."""
        self.cache.length = len(self.cached)  # an interrupted run may have left it elsewhere
        if isinstance(self.engine, Transformer):
            logits = self.engine.lm_head(self.engine.hidden(ids.to(self.engine.device), self.cache)[0, -1])
        else:
            logits = self.engine.step(ids, self.cache)[0, -1]
        self.cached += ids[0].tolist()
        self.ran += ids.shape[1]
        return logits
