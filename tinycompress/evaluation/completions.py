"""Continuations of many prompts: the same text as `generate` writes for each, several prompts at a time.

Prompts of a batch stand left-aligned, so that no position is padded: the batch begins at the end of its shortest
prompt, and a longer one is given its own next token until it ends, while others already write (as Llama's first code
did). Prompts are batched by length, so these steps are few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.generation import Stepwise, decode_room, end_tokens, seeded
from ..model.sampling import Draw, Sampling, draw_of
from ..model.transformer import Transformer
from ..progress import tqdm

SPREAD = 64  # prompts of a batch differ in length by less


@torch.inference_mode()
def completions(
    model: Transformer | Stepwise,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: Sampling,
    finished: Callable[[list[int]], bool] | None = None,
    together: int = 8,
    progress: bool = True,
) -> list[list[int]]:
    """The new ids behind every prompt, in the order of the prompts, without the token that ends a text.

    Args:
        model: in torch, or an exported one that is asked step by step.
        prompts: token ids, none empty.
        max_new_tokens: of each, at most.
        options: as of `generate`; every batch draws with the seed anew.
        finished: whether new ids end a text, besides tokens that do.
        together: prompts of a batch, at most; a static export takes one.
        progress: whether a bar is shown after two seconds.
    """
    draw = draw_of(model.generation, options)
    stop = options.get("stop") or end_tokens(model.config)
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    with tqdm(total=len(prompts), desc="completions", unit="text", delay=2, disable=not progress) as bar:
        while order:
            longest = len(prompts[order[0]])
            batch = [number for number in order[:together] if longest - len(prompts[number]) < SPREAD]
            texts = [_Text(list(prompts[number]), max_new_tokens, model) for number in batch]
            _complete(model, texts, draw, options.get("seed"), lambda new: bool(finished and finished(new)), stop)
            for number, text in zip(batch, texts):
                out[number] = text.new
            order = order[len(batch) :]
            bar.update(len(batch))
    return out


class _Text:
    """A prompt and what was written behind it; `done` once nothing more is."""

    def __init__(self, prompt: list[int], max_new_tokens: int, model: Transformer | Stepwise) -> None:
        self.prompt = prompt
        self.new: list[int] = []
        self.room = decode_room(model.config, torch.tensor([prompt]), max_new_tokens)
        self.done = self.room < 1


def _complete(
    model: Transformer | Stepwise,
    texts: list[_Text],
    draw: Draw,
    seed: int | None,
    finished: Callable[[list[int]], bool],
    stop: Sequence[int],
) -> None:
    """Writes behind every text, until all are done. A text that is done leaves the batch."""
    device = model.device if isinstance(model, Transformer) else torch.device("cpu")
    generator = None if seed is None else seeded(seed, device)
    active = [text for text in texts if not text.done]
    if not active:
        return
    length = min(len(text.prompt) for text in active)  # positions that every row's next step stands behind
    cache = model.new_cache(len(active), max(len(text.prompt) + text.room for text in active))
    ids = torch.tensor([text.prompt[:length] for text in active], device=device)
    while True:
        logits = _last(model, ids, cache)
        next_ids: list[int] = []
        for row, text in enumerate(active):
            if length < len(text.prompt):
                next_ids.append(text.prompt[length])
                continue
            token = draw.token(logits[row], text.prompt + text.new, generator)
            next_ids.append(token)
            if token in stop:
                text.done = True
                continue
            text.new.append(token)
            text.done = len(text.new) >= text.room or finished(text.new)
        kept = [row for row, text in enumerate(active) if not text.done]
        if not kept:
            return
        if len(kept) < len(active):
            cache = cache.rows(torch.tensor(kept, device=device))
            active = [active[row] for row in kept]
        ids = torch.tensor([[next_ids[row]] for row in kept], device=device)
        length += 1


def _last(model: Transformer | Stepwise, ids: Tensor, cache: object) -> Tensor:
    """Logits [N, V] behind the last of ids [N, T]."""
    if isinstance(model, Transformer):
        return model.lm_head(model.hidden(ids, cache)[:, -1])  # type: ignore[arg-type]
    return model.step(ids, cache)[:, -1]
