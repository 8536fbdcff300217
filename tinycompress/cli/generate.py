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
        float | None,
        typer.Option(
            min=0,
            help="0 takes the likeliest token each time; higher draws more freely.  "
            "[default: as the model's generation_config.json says, else 0]",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Draw among the K likeliest tokens; 0 is all.  [default: the file's, or all]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Draw among the likeliest tokens that make up this probability.  [default: the file's, or 1]",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1, makes tokens that were there before less likely.  [default: the file's, or 1]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.  [default: different each time]")] = None,
) -> None:
    """Go on from a prompt: the text to standard output as it comes, the speed to standard error.

    Without options the text is drawn as the model's generation_config.json says (do_sample, temperature, top_k, …), as
    transformers does; a model without such a file takes the likeliest token each time.

    \b
    Examples:
      tinycompress generate smollm2-135m "The capital of France is"
      tinycompress generate small "Once upon a time" --temperature 0
      tinycompress generate small-onnx "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    """
    import torch

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("PROMPT", ascii(prompt[:40]), "text in UTF-8") from None
    from ..model.sampling import Sampling, draw_of, words

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
    options: Sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "on_token": show,
    }
    draw = draw_of(graph.generation, options)
    if draw != draw_of(None, options):
        print(f"as generation_config.json says: {words(draw)} (--temperature 0 is greedy)", file=sys.stderr)
    engine.generate(ids, min(max_new_tokens, room), **options)
    print()
    made = len(times) - 1
    decoding = times[-1] - times[min(1, made)]  # the first token's time is the prompt's
    speed = f", {(made - 1) / decoding:.1f} tokens/s after the first" if made > 1 and decoding > 0 else ""
    print(f"{made} tokens{speed}", file=sys.stderr)
