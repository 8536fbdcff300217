"""The options by which text is drawn, for the commands that write text."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import count_option

if TYPE_CHECKING:
    from ..model.sampling import Sampling

MaxNewTokens = Annotated[int, count_option("Stop after so many tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="0 takes the likeliest token each time; higher draws more freely.  "
        "[default: as the model's generation_config.json says, else 0]",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(min=0, help="Draw among the K likeliest tokens; 0 is all.  [default: the file's, or all]"),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Draw among the likeliest tokens that make up this probability.  [default: the file's, or 1]",
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(help="Above 1, makes tokens that were there before less likely.  [default: the file's, or 1]"),
]
Seed = Annotated[int | None, typer.Option(help="Makes draws repeatable.  [default: different each time]")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]


def say_draw(generation: Mapping[str, Any] | None, options: Sampling) -> None:
    """One line on standard error, where generation_config.json says how text is drawn."""
    from ..model.sampling import draw_of, words

    draw = draw_of(generation, options)
    if draw != draw_of(None, options):
        print(f"as generation_config.json says: {words(draw)} (--temperature 0 is greedy)", file=sys.stderr)


def speed(times: list[float]) -> str:
    """How many tokens there were and how fast, from the time of the start and of each token."""
    made = len(times) - 1
    decoding = times[-1] - times[min(1, made)]  # the first token's time is the prompt's
    rate = f", {(made - 1) / decoding:.1f} tokens/s after the first" if made > 1 and decoding > 0 else ""
    return f"{made} tokens{rate}"
