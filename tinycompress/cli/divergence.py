"""`tinycompress eval MODEL --reference REFERENCE`: how far a model has moved from another."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .arguments import LARGEST_DENSE, is_export, open_model, read_tokens, runnable

if TYPE_CHECKING:
    from torch import Tensor

    from ..evaluation.answers import Answers
    from ..graph.graph import Graph

LLAMA_CPP = "llama.cpp"
LINES = {  # of what is printed: the figure, its words, and how it is written
    "perplexity_ratio": ("perplexity ratio", "{:.4f}"),
    "kl": ("KL, mean", "{:.3g}"),
    "kl_median": ("KL, median", "{:.3g}"),
    "kl_99": ("KL, 99%", "{:.3g}"),
    "kl_99_9": ("KL, 99.9%", "{:.3g}"),
    "kl_largest": ("KL, largest", "{:.3g}"),
    "top_1": ("same likeliest token", "{:.1%}"),
    "top_5": ("same five likeliest", "{:.1%}"),
}


def measure_against(
    model: str,
    reference: str,
    data: str,
    windows: int,
    seq_len: int | None,
    cache: Path | None = None,
    engine: str | None = None,
) -> dict[str, Any]:
    """The figures of `eval --reference`, ready for JSON. An `InputError` for two models that read the text as
    different tokens."""
    from ..evaluation.divergence import divergence

    graph, other = open_model(model), open_model(reference)
    check_engine(engine, model, reference)
    shorter = min(graph, other, key=lambda g: g.config.max_position)
    default = min(2048, shorter.config.max_position)
    tokens = read_tokens(graph, data, windows, seq_len, default, "test")
    if other.tokenizer is not None:
        _check_tokens(read_tokens(other, data, windows, seq_len, default, "test"), tokens)
    expected = _reference_answers(reference, other, tokens, cache, engine)
    result = divergence(expected, _answers(model, graph, tokens, engine), tokens)
    figures = result.figures()
    protocol = f"{len(tokens)} non-overlapping windows of {tokens.shape[1]} tokens, 95% bootstrap over windows"
    return {
        "model": model,
        "data": data,
        "engine": engine_of(model, engine),
        "perplexity": figures["perplexity"].value,
        "tokens": result.nll.numel(),
        "protocol": protocol,
        "reference": {
            "model": reference,
            "engine": engine_of(reference, engine),
            "positions": result.tokens,
            "figures": {name: asdict(interval) for name, interval in figures.items()},
        },
    }


def lines_against(measured: Mapping[str, Any]) -> list[str]:
    """What `measure_against` found, for people."""
    figures = measured["reference"]["figures"]
    values = [figures["perplexity"]["value"], figures["reference_perplexity"]["value"]]
    head = "perplexity {:.4f}, of the reference {:.4f}, on {}".format(*values, measured["data"])
    lines = [f"{head} ({measured['tokens']:,} tokens: {measured['protocol']})"]
    lines.append(f"against {measured['reference']['model']}, at {measured['reference']['positions']:,} positions:")
    for name, (words, form) in LINES.items():
        value, low, high = (form.format(figures[name][key]) for key in ("value", "low", "high"))
        lines.append(f"  {words:22} {value:>8}  [{low}, {high}]")
    return lines


def check_engine(engine: str | None, *models: str) -> None:
    """An `InputError` for an engine that is not known, or that none of the models has a file for."""
    if engine is None:
        return
    if engine != LLAMA_CPP:
        raise InputError("--engine", repr(engine), LLAMA_CPP)
    if not any(is_gguf(name) for name in models):
        raise InputError(f"--engine {LLAMA_CPP}", " and ".join(models), "a .gguf file among the models")


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf") and Path(name).is_file()


def engine_of(name: str, engine: str | None) -> str:
    """What computes a model's logits, by name."""
    if engine is not None and is_gguf(name):
        return engine
    return "onnxruntime" if is_export(name) else "torch"


def in_engine(name: str, graph: Graph, engine: str | None, context: int) -> Any:
    """What computes logits of windows up to `context`: as `runnable`, but for a GGUF file in the engine asked for."""
    if engine_of(name, engine) == LLAMA_CPP:
        from ..evaluation.llama_cpp import LlamaCppModel

        return LlamaCppModel(name, graph.config, context)
    return runnable(name, graph)


def _check_tokens(of_reference: Tensor, of_model: Tensor) -> None:
    import torch

    if not torch.equal(of_reference, of_model):
        accepted = "one with the tokenizer of the model: other tokens have other probabilities"
        raise InputError("--reference", "a model that reads the text as other tokens", accepted)


def _answers(name: str, graph: Graph, tokens: Tensor, engine: str | None) -> Answers:
    """Asked window by window; a graph that is too large to be unpacked, all at once and layer by layer."""
    from ..evaluation.answers import answers_of, streamed_answers

    if engine_of(name, engine) == "torch" and 4 * graph.config.n_params > LARGEST_DENSE:
        return streamed_answers(graph, tokens)
    return answers_of(in_engine(name, graph, engine, tokens.shape[1]), tokens)


def _reference_answers(name: str, graph: Graph, tokens: Tensor, folder: Path | None, engine: str | None) -> Answers:
    """From the cache, or asked now. A reference in torch is put away before the model is made: only one of the two is
    in memory at a time."""
    in_torch = engine_of(name, engine) == "torch"
    if folder is None:
        answers = _answers(name, graph, tokens, engine)
        return answers.collected(len(tokens), "reference") if in_torch else answers
    from ..evaluation.answers import head_of
    from ..evaluation.reference_cache import ReferenceCache
    from ..evaluation.report import human
    from ..recipe.run import fingerprint_of

    config = graph.config
    width = config.hidden_size if in_torch else config.vocab_size
    key = {**_identity(name, graph, engine), "tokens": fingerprint_of(tokens)}
    cache = ReferenceCache(folder, key, (len(tokens), tokens.shape[1], width))
    if not cache.is_filled:
        print(f"reference cache: {human(cache.nbytes)} in {folder}", file=sys.stderr)
    cache.fill(lambda: _answers(name, graph, tokens, engine))
    return cache.answers(head_of(graph) if in_torch else None, config.vocab_size)


def _identity(name: str, graph: Graph, engine: str | None) -> dict[str, str]:
    """What a reference's answers depend on: the model's bytes, and what computes with them."""
    from importlib.metadata import version

    from .. import files

    computing = engine_of(name, engine)
    if computing == LLAMA_CPP:
        return {"engine": f"{computing} {version('llama-cpp-python')}", "file": files.sha256(Path(name))}
    identity = {"engine": f"{computing} {version(computing)}", "graph": graph.fingerprint()}
    if is_export(name):  # the same graph may be exported in several ways
        identity["manifest"] = files.sha256(Path(name) / "manifest.json")
    return identity
