"""The right word for a wrong one: what was probably meant, in one line, before anything heavy is imported."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import InputError

ELSEWHERE = {  # what other tools call it: what to type here
    "quantize quantise quant": "tinycompress compress MODEL --quantize w4g64 -o OUT",
    "prune sparsify": "tinycompress compress MODEL --prune params=0.8 -o OUT",
    "slice": "tinycompress compress MODEL --prune slice=512 -o OUT",
    "stretch rope longrope context": "tinycompress compress MODEL --context 16384 -o OUT",
    "chat": 'tinycompress generate MODEL "PROMPT"',
    "run infer inference complete": 'tinycompress generate MODEL "PROMPT"',
    "benchmark bench perf": "tinycompress eval MODEL (perplexity); tinycompress generate prints tokens per second",
    "perplexity ppl measure score": "tinycompress eval MODEL",
    "convert": "tinycompress export MODEL -o OUT, or tinycompress compress MODEL --format gguf -o OUT.gguf",
    "onnx compile build deploy": "tinycompress export MODEL -o OUT",
    "gguf": "tinycompress compress MODEL --format gguf -o OUT.gguf",
    "serve server api": "tinycompress export MODEL -o OUT, or compress --format gguf, for a server of your own",
    "train finetune fine-tune heal lora": "tinycompress distill STUDENT --teacher TEACHER -o OUT",
    "info show stats summary describe": "tinycompress inspect MODEL",
    "validate check test": "tinycompress verify OUT",
    "download pull fetch": "tinycompress inspect org/model (a hub name is fetched when it is first used)",
    "help": "tinycompress --help, or tinycompress COMMAND --help",
    "version": "tinycompress --version",
}
OPTIONS_ELSEWHERE = {  # the same for options
    "--out": "--output",
    "--output-dir": "--output",
    "--outfile": "--output",
    "--bits": "--quantize",
    "--wbits": "--quantize",
    "--w-bit": "--quantize",
    "--group-size": "--quantize",
    "--sparsity": "--prune",
    "--ratio": "--prune",
    "--dataset": "--data",
    "--max-tokens": "--max-new-tokens",
    "--force": "--overwrite",
    "--learning-rate": "--lr",
    "--batch-size": "--batch",
    "--rank": "--lora",
    "--max-length": "--seq-len",
}


def unknown_command(word: str, commands: Iterable[str]) -> InputError:
    """The error for a command that is none."""
    names = list(commands)
    for words, command in ELSEWHERE.items():
        if word.lower() in words.split():
            return InputError("command", repr(word), command)
    return InputError("command", repr(word), nearest(word, names) or " | ".join(names))


def nearest(word: str, names: Iterable[str]) -> str:
    """The name that a word was probably meant to be, or nothing."""
    known = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower().replace("_", "-"), known, n=1, cutoff=0.6)
    return known[close[0]] if close else ""


def misuse(error: Any) -> object:
    """What to say of an error of the parser of the command line: in the library's form where names are at hand.

    error: typer's, whichever copy of click it comes with; known by the names of its classes.
    """
    kind = type(error).__name__
    context = error.ctx
    path = context.command_path if context is not None else "tinycompress"
    if kind == "NoSuchOption":
        known = [name for parameter in context.command.get_params(context) for name in parameter.opts]
        word = str(error.option_name)
        meant = OPTIONS_ELSEWHERE.get(word.replace("_", "-"), "")
        meant = meant if meant in known else nearest(word, [name for name in known if name.startswith("-")])
        return InputError("option", repr(word), meant or f"those of {path} --help")
    cause = error.__cause__ or error.__context__
    if isinstance(cause, InputError):
        return cause
    parameter = getattr(error, "param", None)
    name = _name(parameter) if parameter is not None else ""
    if kind == "MissingParameter" and name:
        return InputError(name, "none", f"one ({path} --help)")
    if kind == "BadParameter" and name:
        return f"{name}: {error.message}"
    return f"{error.format_message()} ({path} --help)"


def empty_option(args: Sequence[str]) -> str:
    """The option that an empty value was typed for, or nothing: `-o ""` would be the current folder."""
    for before, word in zip(["", *args], args):
        if before.startswith("-") and not word.strip():
            return before
        if word.startswith("--") and word.endswith("="):
            return word[:-1]
    return ""


def _name(parameter: Any) -> str:
    """An option by its longest name, an argument as the help writes it."""
    options = [name for name in parameter.opts if name.startswith("-")]
    return max(options, key=len) if options else str(parameter.metavar or parameter.name).upper()
