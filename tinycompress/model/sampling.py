"""How a token is drawn from logits: what the caller asks for over what generation_config.json says.

As in transformers, a file that samples (`do_sample`) takes transformers' own value where it leaves one out (`top_k` 50,
the others off), a repetition penalty acts on greedy text too, and the order is: penalty, temperature, top_k, top_p,
min_p. Letters: V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import InputError

COLDEST = 1e-30  # a temperature below it would overflow float32, and leaves no choice
FILE = "generation_config.json"
SAMPLED = {"temperature": 1.0, "top_k": 50}  # transformers' values, where a file with do_sample has none
NEUTRAL: dict[str, tuple[Any, ...]] = {  # keys that change the text and that are not honoured: values that change none
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "guidance_scale": (1,),
    "token_healing": (False,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
}
LIMITS: dict[str, tuple[float, float, str]] = {  # what changes nothing, the largest value, and words for an error
    "temperature": (1.0, 1e30, "a number, 0 for greedy text"),
    "top_k": (0, 2**62, "a whole number, 0 for all tokens"),
    "top_p": (1.0, 1.0, "a number in 0 … 1, 1 for all tokens"),
    "min_p": (0.0, 1.0, "a number in 0 … 1, 0 for all tokens"),
    "repetition_penalty": (1.0, 1e30, "a positive number, 1 for none"),
}
ONLY_SAMPLED = ("typical_p", "epsilon_cutoff", "eta_cutoff")


class Sampling(TypedDict, total=False):
    """The options of every engine's `generate`. One that is not given, or None, is what the model's
    generation_config.json says; without such a file the likeliest token is taken each time.

    Fields:
        temperature: 0 takes the likeliest token each time; above 0, tokens are drawn.
        top_k: draw among that many of the likeliest tokens; 0 is all.
        top_p: draw among the smallest set of tokens with that much of the probability; 1 is all.
        min_p: draw among tokens with at least that share of the likeliest one's probability; 0 is all.
        repetition_penalty: what logits of tokens that have been seen, the prompt's included, are divided by (negative
            ones: multiplied); 1 is none.
        seed: of the draws; None draws differently each time.
        stop: token ids that end the text and are not returned; by default the config's end-of-text tokens.
        on_token: called with every new id.
    """

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: tuple[int, ...] | None
    on_token: Callable[[int], None] | None


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn; every value as in `Sampling`, with nothing left open.

    Fields:
        temperature: 0 is greedy.
        top_k: 0 is all.
        top_p: 1 is all.
        min_p: 0 is all.
        repetition_penalty: 1 is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def token(self, logits: Tensor, seen: Sequence[int], generator: torch.Generator | None = None) -> int:
        """One token from logits [V], after the ids in `seen`."""
        if self.repetition_penalty != 1:
            logits = penalize(logits, seen, self.repetition_penalty)
        if self.temperature < COLDEST:
            return int(logits.argmax())
        probs = (logits.float() / self.temperature).softmax(-1)
        order = probs.argsort(descending=True)
        if self.top_k:
            order = order[: self.top_k]
        if self.top_p < 1:
            before = probs[order].cumsum(-1) - probs[order]
            inside = before < self.top_p * probs[order].sum()
            order = order[inside.index_fill(0, order.new_zeros(1), True)]  # the likeliest one always
        if self.min_p > 0:
            order = order[probs[order] >= self.min_p * probs[order[0]]]
        return int(order[torch.multinomial(probs[order], 1, generator=generator)])


def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits [V] with those of ids in `seen` made less likely: positive ones divided, negative ones multiplied."""
    ids = torch.tensor(sorted(set(seen)), device=logits.device, dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def draw_of(generation: Mapping[str, Any] | None, options: Sampling) -> Draw:
    """The caller's options over generation_config.json's contents; a bad value of either is an `InputError`."""
    stored = dict(generation or {})
    samples = stored.get("do_sample") or False
    if not isinstance(samples, bool):
        raise InputError(f"do_sample in {FILE}", repr(samples), "true or false")
    stored = SAMPLED | stored if samples else stored | {"temperature": 0.0}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    values: dict[str, Any] = {}
    for name, (neutral, high, accepted) in LIMITS.items():
        where = name if name in given else f"{name} in {FILE}"
        value = given.get(name, stored.get(name))
        if value is None:
            value = neutral
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
            raise InputError(where, repr(value), accepted)
        values[name] = type(neutral)(value)
        if values[name] != value or (name == "repetition_penalty" and value == 0):
            raise InputError(where, repr(value), accepted)
    return Draw(**values)


def words(draw: Draw) -> str:
    """A draw for a person: "greedy", or what it is drawn by."""
    out = [] if draw.temperature > 0 else ["greedy"]
    for name, (neutral, _, _) in LIMITS.items():
        value = getattr(draw, name)
        drawn = draw.temperature > 0 or name == "repetition_penalty"
        if drawn and (value != neutral or name == "temperature"):
            out.append(f"{name.replace('_', ' ')} {value:g}")
    return ", ".join(out)


def ignored_keys(generation: Mapping[str, Any] | None, draw: Draw) -> list[str]:
    """The keys of generation_config.json's contents that would change the text, and that `generate` does not know."""
    out = []
    for key, neutral in NEUTRAL.items():
        value = (generation or {}).get(key)
        if value is None or value in neutral:
            continue
        if draw.temperature > 0 or key not in ONLY_SAMPLED:
            out.append(key)
    return out


def warn_ignored(generation: Mapping[str, Any] | None, draw: Draw) -> None:
    """A warning that names those keys; Python shows the same one once."""
    if keys := ignored_keys(generation, draw):
        warnings.warn(f"{FILE}: {', '.join(keys)} not honoured: the text is made without", stacklevel=1)
