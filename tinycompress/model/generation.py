"""Token ids in, token ids out: the loop of every engine's `generate`, and what ids a model takes.

The torch model, the exported one and the static one each give a `step`, from new ids to the next logits; everything
else is here, so the three write the same text. Letters: T tokens of the prompt, t new ones, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor

from ..errors import InputError
from ..graph.config import Config

COLDEST = 1e-30  # a temperature below it would overflow float32, and leaves no choice


class Sampling(TypedDict, total=False):
    """The options of every engine's `generate`.

    Fields:
        temperature: 0 (the default) takes the likeliest token each time.
        top_k: draw among that many of the likeliest tokens; None is all.
        top_p: draw among the smallest set of tokens with that much of the probability; None is all.
        seed: of the draws; None draws differently each time.
        stop: token ids that end the text and are not returned; by default the config's end-of-text tokens.
        on_token: called with every new id.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    stop: tuple[int, ...] | None
    on_token: Callable[[int], None] | None


def generate(
    config: Config,
    ids: Tensor,
    max_new_tokens: int,
    begin: Callable[[int], Callable[[Tensor], Tensor]],
    options: Sampling,
) -> Tensor:
    """The loop of every engine's `generate`: continues ids [1, T]; returns the new ids [n].

    `begin(length)` opens a cache of so many positions and gives the step: new ids [1, t] to the last position's logits
    [V]."""
    room = decode_room(config, ids, max_new_tokens)
    step = begin(ids.shape[1] + max(room - 1, 0))
    seed = options.get("seed")
    generator = None if seed is None else seeded(seed, ids.device)
    stop = options.get("stop")
    if stop is None:
        stop = end_tokens(config)
    on_token = options.get("on_token")
    temperature = options.get("temperature", 0.0)
    top_p = options.get("top_p")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError("temperature", temperature, "a finite number of at least 0")
    if top_p is not None and not 0 <= top_p <= 1:
        raise InputError("top_p", top_p, "0 … 1")
    out: list[int] = []
    for _ in range(room):
        token = sample(step(ids), temperature, options.get("top_k"), top_p, generator)
        if token in stop:
            break
        out.append(token)
        if on_token:
            on_token(token)
        ids = ids.new_tensor([[token]])
    return torch.tensor(out, dtype=torch.long)


class Stepwise(Protocol):
    """An engine that is asked step by step: new ids [1, t] and its cache to logits [1, t', V]."""

    config: Config

    def new_cache(self, batch: int, max_length: int) -> Any: ...

    def step(self, ids: Tensor, cache: Any) -> Tensor: ...


def generate_by_steps(engine: Stepwise, ids: Tensor, max_new_tokens: int, options: Sampling) -> Tensor:
    """`generate` for such an engine, from ids [1, T] or [T]."""

    def begin(length: int) -> Callable[[Tensor], Tensor]:
        cache = engine.new_cache(1, length)
        return lambda new: engine.step(new, cache)[0, -1]

    return generate(engine.config, torch.as_tensor(ids).reshape(1, -1), max_new_tokens, begin, options)


def sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> int:
    """One token from logits [V]: greedy at temperature 0, else among the top_k and the smallest set of mass top_p, of
    one token at least."""
    if temperature < COLDEST:
        return int(logits.argmax())
    probs = (logits.float() / temperature).softmax(-1)
    order = probs.argsort(descending=True)
    if top_k:
        order = order[:top_k]
    if top_p is not None:
        before = probs[order].cumsum(-1) - probs[order]
        order = order[(before < top_p * probs[order].sum()).index_fill(0, order.new_zeros(1), True)]
    return int(order[torch.multinomial(probs[order], 1, generator=generator)])


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
