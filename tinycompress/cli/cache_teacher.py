"""`tinycompress cache-teacher`: a teacher's answers, written down once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import open_model, training_windows
from .options import Teacher, TrainingText, count_option, window_option
from .spellings import positions_of


def cache_teacher(
    teacher: Teacher,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", help="The folder of the cache. A stopped run goes on there."),
    ],
    data: TrainingText = "pydoc",
    windows: Annotated[int, count_option("At most so many windows of the text are read.")] = 2048,
    seq_len: Annotated[str | None, window_option(512)] = None,
    kind: Annotated[
        str,
        typer.Option(help="What is kept of each distribution: sample (unbiased random draws), or topk (the largest)."),
    ] = "sample",
    draws: Annotated[int, count_option("With --kind sample: draws per token.")] = 50,
    k: Annotated[int, count_option("With --kind topk: probabilities per token.")] = 50,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Read the teacher layer by layer, if it does not fit in memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Write down, once, the probabilities that TEACHER gives the tokens of a text, for `tinycompress distill --cache`.

    \b
    Examples:
      tinycompress cache-teacher smollm2-135m --data wikitext2 -o cache
      tinycompress cache-teacher meta-llama/Llama-2-7b-hf --data big.jsonl --seq-len 2048 --streamed -o cache
    """
    length = positions_of("--seq-len", seq_len)
    import torch

    from ..distillation.teacher_cache import write_cache
    from ..evaluation import report

    graph = open_model(teacher)
    tokens = training_windows(graph, data, length, windows)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cache = write_cache(graph, tokens, output, kind, draws=draws, k=k, seed=seed, streamed=streamed, device=device)
    share = cache.nbytes / tokens.numel()
    size = report.human(cache.nbytes)
    print(f"{output}: {size} for {cache.windows} windows of {cache.seq_len} tokens, {share:.1f} bytes per token")
