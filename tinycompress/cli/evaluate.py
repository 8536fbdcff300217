"""`tinycompress eval`: perplexity."""

from __future__ import annotations

import json
from typing import Annotated

from .arguments import open_model, read_tokens, runnable
from .options import AsJson, Model, count_option, text_option, window_option


def evaluate(
    model: Model,
    data: Annotated[str, text_option("Evaluation text")] = "pydoc",
    windows: Annotated[int, count_option("How many windows of the text are read.")] = 8,
    seq_len: Annotated[int | None, window_option(2048)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity over the first windows of a text: a checkpoint in torch, an export in its runtime.

    \b
    Examples:
      tinycompress eval smollm2-135m
      tinycompress eval small --data wikitext2 --windows 16 --seq-len 2048
      tinycompress eval small-onnx --data notes.txt --json
    """
    from ..evaluation.perplexity import perplexity

    graph = open_model(model)
    tokens = read_tokens(graph, data, windows, seq_len, 2048, "test")
    result = perplexity(runnable(model, graph), tokens)
    if as_json:
        figures = {"perplexity": result.value, "tokens": result.tokens, "protocol": result.protocol}
        print(json.dumps({"model": model, "data": data} | figures, indent=2))
    else:
        print(f"perplexity {result.value:.4f} on {data} ({result.tokens:,} tokens: {result.protocol})")
