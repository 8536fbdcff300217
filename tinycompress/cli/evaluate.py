"""`tinycompress eval`: perplexity, the divergence from a reference, questions with choices, tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .arguments import open_model, read_tokens
from .divergence import check_engine, in_engine, lines_against, measure_against
from .options import AsJson, Model, count_option, folder_option, text_option, window_option
from .spellings import positions_of
from .terminal import print_json

TEXT_OR_QUESTIONS = "Evaluation text, or JSON lines of questions (query, choices, gold), which are answered"


def evaluate(
    model: Model,
    data: Annotated[str, text_option(TEXT_OR_QUESTIONS)] = "pydoc",
    windows: Annotated[int, count_option("How many windows of the text are read.")] = 8,
    seq_len: Annotated[str | None, window_option(2048)] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Tasks of lm-evaluation-harness (extra: tasks), in place of --data."),
    ] = None,
    fewshot: Annotated[
        int | None, count_option("Solved examples before each question of a task.  [default: the task's own]", 0)
    ] = None,
    limit: Annotated[int | None, count_option("Only the first questions of the file, or of each task.")] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Another model beside it: on a text KL, agreement and perplexity ratio, on questions and tasks the "
            "differences, with intervals.",
        ),
    ] = None,
    reference_cache: Annotated[
        Path | None, folder_option("Keep what the reference says of a text there, for further models on the same text.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(metavar="llama.cpp", help="Run .gguf files in llama.cpp (needs llama-cpp-python).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: perplexity over the first windows of a text, right answers to questions, or tasks. A checkpoint
    runs in torch, an export in its runtime.

    \b
    Examples:
      tinycompress eval smollm2-135m
      tinycompress eval small --data wikitext2 --windows 16 --seq-len 2048
      tinycompress eval small-onnx --data notes.txt --json
      tinycompress eval small-onnx --reference smollm2-135m --reference-cache answers
      tinycompress eval small --data questions.jsonl --limit 200 --reference smollm2-135m
      tinycompress eval small-onnx --tasks arc_easy,piqa --limit 200 --reference smollm2-135m
    """
    length = positions_of("--seq-len", seq_len)
    from ..evaluation.perplexity import perplexity
    from ..evaluation.questions import are_questions

    asks = tasks is not None or are_questions(data)
    for option, value in (("--reference-cache", reference_cache), ("--engine", engine)):
        if asks and value is not None:
            raise InputError(option, value, "with a text only")
    if tasks is not None:
        from .tasks import evaluate_tasks

        evaluate_tasks(model, tasks, limit, fewshot, reference, as_json)
        return
    if fewshot is not None:
        raise InputError("--fewshot", fewshot, "with --tasks only")
    if asks:
        from .tasks import evaluate_questions

        evaluate_questions(model, data, limit, reference, as_json)
        return
    if limit is not None:
        raise InputError("--limit", limit, "with --tasks, or with --data questions.jsonl")
    if reference is not None:
        measured = measure_against(model, reference, data, windows, length, reference_cache, engine)
        if as_json:
            print_json(measured)
        else:
            print("\n".join(lines_against(measured)))
        return
    if reference_cache is not None:
        raise InputError("--reference-cache", reference_cache, "it with --reference MODEL only")
    check_engine(engine, model)
    graph = open_model(model)
    tokens = read_tokens(graph, data, windows, length, 2048, "test")
    result = perplexity(in_engine(model, graph, engine, tokens.shape[1]), tokens)
    if as_json:
        figures = {"perplexity": result.value, "tokens": result.tokens, "protocol": result.protocol}
        print_json({"model": model, "data": data} | figures)
    else:
        print(f"perplexity {result.value:.4f} on {data} ({result.tokens:,} tokens: {result.protocol})")
