"""Token ids in, token ids out: the loop of every engine's `generate`, and what ids a model takes.

The torch model, the exported one and the static one each give a `step`, from new ids to the next logits; everything
else is here, so the three write the same text. Letters: T tokens of the prompt, t new ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config
from .sampling import Sampling, draw_of, warn_ignored


def generate(
    config: Config,
    ids: Tensor,
    max_new_tokens: int,
    begin: Callable[[int], Callable[[Tensor], Tensor]],
    options: Sampling,
    generation: Mapping[str, Any] | None = None,
) -> Tensor:
    """The loop of every engine's `generate`: continues ids [1, T]; returns the new ids [n].

    `begin(length)` opens a cache of so many positions and gives the step: new ids [1, t] to the last position's logits
    [V]. `generation` is the contents of generation_config.json, for what `options` leave open."""
    draw = draw_of(generation, options)
    warn_ignored(generation, draw)
    room = decode_room(config, ids, max_new_tokens)
    step = begin(ids.shape[1] + max(room - 1, 0))
    seed = options.get("seed")
    generator = None if seed is None else seeded(seed, ids.device)
    stop = options.get("stop")
    if stop is None:
        stop = end_tokens(config)
    on_token = options.get("on_token")
    seen = ids[0].tolist()
    out: list[int] = []
    for _ in range(room):
        token = draw.token(step(ids), seen, generator)
        if token in stop:
            break
        out.append(token)
        seen.append(token)
        if on_token:
            on_token(token)
        ids = ids.new_tensor([[token]])
    return torch.tensor(out, dtype=torch.long)


class Stepwise(Protocol):
    """An engine that is asked step by step: new ids [1, t] and its cache to logits [1, t', V]."""

    config: Config

    @property
    def generation(self) -> Mapping[str, Any] | None: ...

    def new_cache(self, batch: int, max_length: int) -> Any: ...

    def step(self, ids: Tensor, cache: Any) -> Tensor: ...


def generate_by_steps(engine: Stepwise, ids: Tensor, max_new_tokens: int, options: Sampling) -> Tensor:
    """`generate` for such an engine, from ids [1, T] or [T]."""

    def begin(length: int) -> Callable[[Tensor], Tensor]:
        cache = engine.new_cache(1, length)
        return lambda new: engine.step(new, cache)[0, -1]

    prompt = torch.as_tensor(ids).reshape(1, -1)
    return generate(engine.config, prompt, max_new_tokens, begin, options, engine.generation)


def seeded(seed: int, device: torch.device | None = None) -> torch.Generator:
    """A generator of random numbers; an `InputError` for a seed that it does not take."""
    if not -(2**63) <= seed < 2**64:
        raise InputError("seed", seed, "an integer of 64 bits")
    return torch.Generator(device or torch.device("cpu")).manual_seed(seed)


def decode_room(config: Config, ids: Tensor, max_new_tokens: int) -> int:
    """How many tokens can follow the prompt ids [1, T] within the context (the last one is not fed back)."""
    check_ids(ids, config.vocab_size)
    if ids.shape[1] > config.max_position:
        raise InputError("prompt", f"{ids.shape[1]} tokens", f"at most the model's context, {config.max_position}")
    return min(max_new_tokens, config.max_position - ids.shape[1] + 1)


def end_tokens(config: Config) -> tuple[int, ...]:
    """The ids that end a text."""
    eos = config.eos_token_id
    if isinstance(eos, tuple):
        return eos
    return () if eos is None else (eos,)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Token ids must lie in the vocabulary: a wrong tokenizer otherwise reads memory that is not the model's."""
    if ids.numel() == 0:
        raise InputError("token ids", "none", "at least one token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            "token ids", f"{low} … {high}", f"0 … {vocab_size - 1}: the model's vocabulary (is it the right tokenizer?)"
        )
