"""`tinycompress generate`: a text goes on, or a question is answered."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from ..errors import InputError
from .arguments import need_tokenizer, open_model, runnable
from .options import Model
from .sampling_options import MaxNewTokens, RepetitionPenalty, Seed, System, Temperature, TopK, TopP, say_draw, speed


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="PROMPT is what a user says, through the model's chat template.")
    ] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
) -> None:
    """Go on from a prompt: the text to standard output as it comes, the speed to standard error.

    Without options the text is drawn as the model's generation_config.json says (do_sample, temperature, top_k, …), as
    transformers does; a model without such a file takes the likeliest token each time.

    \b
    Examples:
      tinycompress generate smollm2-135m "The capital of France is"
      tinycompress generate smollm2-135m "What is the capital of France?" --chat
      tinycompress generate small "Once upon a time" --temperature 0
      tinycompress generate small-onnx "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 1
    """
    import torch

    from ..checkpoints.chat_rendering import ChatTemplate, opening
    from ..model.sampling import Sampling

    if system is not None and not chat:
        raise InputError("--system", "without --chat", "both: a text that goes on is told nothing")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("PROMPT", ascii(prompt[:40]), "text in UTF-8") from None
    graph = open_model(model)
    tokenizer = need_tokenizer(graph)
    if chat:
        messages = [*opening(system), {"role": "user", "content": prompt}]
        found = ChatTemplate.of(tokenizer).ids(messages, add_generation_prompt=True)
    else:
        found = tokenizer.encode(prompt, add_special_tokens=True)
    ids = torch.tensor([found], dtype=torch.long)
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
    say_draw(graph.generation, options)
    engine.generate(ids, min(max_new_tokens, room), **options)
    print()
    print(speed(times), file=sys.stderr)
