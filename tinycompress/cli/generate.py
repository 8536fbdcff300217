"""`tinycompress generate`: a text goes on."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ..errors import InputError
from .arguments import need_tokenizer, open_model, runnable
from .options import Model, count_option


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    max_new_tokens: Annotated[int, count_option("Stop after so many tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time; higher draws more freely.")
    ] = 0.0,
    top_k: Annotated[int | None, count_option("Draw among the K likeliest tokens.  [default: all]")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Draw among the likeliest tokens that make up this probability.  [default: 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.  [default: different each time]")] = None,
) -> None:
    """Go on from a prompt: the text to standard output as it comes, the speed to standard error.

    \b
    Examples:
      tinycompress generate smollm2-135m "The capital of France is"
      tinycompress generate small-onnx "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    """
    import torch

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("PROMPT", ascii(prompt[:40]), "text in UTF-8") from None
    graph = open_model(model)
    tokenizer = need_tokenizer(graph)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=True)], dtype=torch.long)
    room = graph.config.max_position - ids.shape[1]
    if room < 1:
        accepted = f"fewer than the model's context, {graph.config.max_position}"
        raise InputError("PROMPT", f"{ids.shape[1]} tokens", accepted)
    text = tokenizer.decode_stream()
    times = [time.perf_counter()]

    def show(token: int) -> None:
        times.append(time.perf_counter())
        print(text(token), end="", flush=True)

    engine = runnable(model, graph)
    engine.generate(
        ids, min(max_new_tokens, room), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, on_token=show
    )
    print()
    made = len(times) - 1
    decoding = times[-1] - times[min(1, made)]  # the first token's time is the prompt's
    speed = f", {(made - 1) / decoding:.1f} tokens/s after the first" if made > 1 and decoding > 0 else ""
    print(f"{made} tokens{speed}", file=sys.stderr)
