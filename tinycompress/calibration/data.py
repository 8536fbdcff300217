"""Text for calibration and evaluation, as windows of token ids.

  "wikitext2"     WikiText-2 raw from the hub, lines joined by a blank line (as perplexities are reported on)
  org/name        any other hub data set with a text column (org/name:config to choose a configuration)
  a local path    .txt, .json, .jsonl or .parquet
  "pydoc"         the English of Python's own help topics: always there, no download. Its topics, by name, are dealt
                  alternately into two halves: "train" to calibrate on, and "test" to evaluate on, which shares no
                  paragraph with the other

Text is tokenized once, without special tokens, and cut into windows that do not overlap.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.tokenizer import encoder_of
from ..errors import InputError
from ..model.generation import seeded

SPLITS = ("train", "validation", "test")
FILE_TYPES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ACCEPTED = (
    f"pydoc | wikitext2 | a {', '.join(FILE_TYPES)} file | a hub data set such as Salesforce/wikitext:wikitext-2-raw-v1"
)
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"


def tokens(
    source: str | Path, tokenizer: Any, n: int, seq_len: int, seed: int | None = None, split: str = "train"
) -> Tensor:
    """Token ids [n, seq_len], int64: the first n windows in a row, or with a `seed` n windows drawn from all of them.

    Args:
        source: where the text is: "pydoc", "wikitext2", a file, or a hub data set (see above).
        tokenizer: a graph's, one of transformers or of `tokenizers`, or a function from text to a mapping with
            `input_ids`. Special tokens are left out.
        n: how many windows.
        seq_len: how many tokens each has.
        seed: of the draw; None takes the first windows.
        split: "train" | "validation" | "test", for sources that have them.

    Too little text is an `InputError`. Ids fit the tokenizer; whether they fit a model is checked where they are used.
    """
    encode = encoder_of(tokenizer)
    for name, value in (("number of windows", n), ("window length", seq_len)):
        if value < 1:
            raise InputError(name, value, "a positive integer")
    # a hub data set can be endless: a tenth of what is read is plenty to draw from, at some four characters a token
    ids = encode(text(source, split, max_chars=40 * n * seq_len))
    fits = len(ids) // seq_len
    if n > fits:
        needed = f"at least {n} × {seq_len} = {n * seq_len}, or at most {fits} windows of {seq_len}"
        raise InputError(f"tokens in {source}", len(ids), needed)
    windows = torch.tensor(ids[: fits * seq_len]).view(fits, seq_len)
    if seed is None:
        return windows[:n].clone()
    return windows[torch.randperm(fits, generator=seeded(seed))[:n]]


def as_tokens(tokens: Tensor | Iterable[Any]) -> Tensor:
    """Calibration windows [N, T] as passes take them.

    tokens: a tensor, which is returned as it is; or an iterable (a list, a generator, a DataLoader) whose items are put
    one below the other, each of them ids [T] or [b, T], or a mapping with `input_ids`, as transformers' collators give
    it.
    """
    if isinstance(tokens, Tensor):
        return tokens
    rows: list[Tensor] = []
    for item in tokens:
        ids = torch.as_tensor(item["input_ids"] if isinstance(item, Mapping) else item)
        rows.append(ids[None] if ids.dim() == 1 else ids)
    if not rows:
        accepted = "ids [windows, seq_len], or an iterable of ids [seq_len] or [b, seq_len]"
        raise InputError("tokens", "no windows", accepted)
    lengths = {tuple(ids.shape[1:]) for ids in rows}
    if len(lengths) > 1 or rows[0].dim() != 2:
        raise InputError("tokens", f"windows of shapes {sorted(lengths)}", "windows of one length")
    return torch.cat(rows)


def text(source: str | Path, split: str = "train", max_chars: int | None = None) -> str:
    """The text of a source, newlines as "\\n". `split` is ignored for a file, which has only one; `max_chars` stops
    reading a hub data set once it has that many."""
    if split not in SPLITS:
        raise InputError("split", repr(split), " | ".join(SPLITS))
    name = str(source)
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path)
    if name == "pydoc":
        return _pydoc(split)
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or path.suffix in FILE_TYPES or path.exists():
        raise InputError("text source", f"{name}, {'a folder' if path.exists() else 'no such file'}", ACCEPTED)
    if name == "wikitext2":
        return _hub(WIKITEXT2, split, None)
    return _hub(name, split, max_chars)


def _pydoc(split: str) -> str:
    from pydoc_data.topics import topics

    train, test = ("\n\n".join(topics[name] for name in sorted(topics)[half::2]) for half in (0, 1))
    if split == "train":
        return train
    seen = set(train.split("\n\n"))  # some topics quote others: a quarter of this half
    return "\n\n".join(paragraph for paragraph in test.split("\n\n") if paragraph not in seen)


def _file(path: Path) -> str:
    from datasets import load_dataset

    kind = FILE_TYPES.get(path.suffix)
    if kind is None:
        raise InputError("text source", f"{path}, of an unknown type", ACCEPTED)
    whole = {"sample_by": "document"} if kind == "text" else {}  # the text as it is, not line by line
    # streaming: nothing is copied into a cache. The name is escaped, for it is taken as a pattern.
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(path.absolute())), split="train", streaming=True, **whole)
        return "\n\n".join(_texts(rows, str(path)))
    except (ValueError, OSError, TypeError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), f"{type(error).__name__}: {error}", f"a readable {kind} file, UTF-8") from error


def _hub(name: str, split: str, max_chars: int | None) -> str:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split, streaming=True)
        parts = []
        size = 0
        for row in _texts(rows, name):
            parts.append(row)
            size += len(row)
            if max_chars and size >= max_chars:
                break
        return "\n\n".join(parts)
    except (ValueError, OSError, RuntimeError) as error:  # the library's own errors are subclasses of these
        if isinstance(error, InputError):
            raise
        raise InputError("text source", f"{name!r}: no such local file, and the hub said: {error}", ACCEPTED) from error


def _texts(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[str]:
    """The text column: "text", or else the only one with strings."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    columns = [key for key, value in first.items() if isinstance(value, str)]
    if "text" in columns:
        columns = ["text"]
    if len(columns) != 1:
        given = ", ".join(f"{key} ({type(value).__name__})" for key, value in first.items())
        raise InputError(f"columns of {where}", given, 'a string column "text", or one string column only')
    (column,) = columns
    for number, row in enumerate(chain([first], rows), 1):
        value = row.get(column) or ""
        if not isinstance(value, str):
            raise InputError(f"{column} in row {number} of {where}", f"a {type(value).__name__}", "a string")
        yield value.replace("\r\n", "\n").replace("\r", "\n")
