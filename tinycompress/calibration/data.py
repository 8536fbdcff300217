"""Text for calibration and evaluation, as windows of token ids.

  "wikitext2"     WikiText-2 raw from the hub, lines joined by a blank line (as perplexities are reported on)
  org/name        any other hub data set with a text column (org/name:config to choose a configuration)
  a local path    .txt, .json, .jsonl or .parquet
  "pydoc"         the English of Python's own help topics: always there, no download. Its topics, by name, are dealt
                  alternately into two halves: "train" to calibrate on, and "test" to evaluate on, which shares no
                  paragraph with the other

Text is tokenized once, without special tokens, and cut into windows that do not overlap. Rows that are conversations
(their shapes are in rows.py) are written by the model's own chat template, one behind the other.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.chat_answers import encode_conversations
from ..checkpoints.chat_rendering import REMEDY, ChatTemplate
from ..checkpoints.tokenizer import Tokenizer, encoder_of
from ..errors import InputError
from ..model.generation import seeded
from .rows import Content, Row, contents, read_json_rows

SPLITS = ("train", "validation", "test")
FILE_TYPES = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ACCEPTED = (
    f"pydoc | wikitext2 | a {', '.join(FILE_TYPES)} file | a hub data set such as Salesforce/wikitext:wikitext-2-raw-v1"
)
WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1"
TOGETHER = 256  # conversations that are rendered at a time


class TokenStream(NamedTuple):
    """A source as token ids, before it is cut into windows.

    Fields:
        ids: of the whole source.
        chat: whether its rows are conversations.
        answers: for each id, whether the assistant wrote it; empty for text, and where it was not asked for.
    """

    ids: list[int]
    chat: bool
    answers: list[bool]


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
    encoder_of(tokenizer)  # refused before anything is read
    for name, value in (("number of windows", n), ("window length", seq_len)):
        if value < 1:
            raise InputError(name, value, "a positive integer")
    return cut(token_stream(source, tokenizer, split, enough(n, seq_len)).ids, source, n, seq_len, seed)


def enough(n: int, seq_len: int) -> int:
    """Characters of a hub data set, which can be endless, to draw n windows from: ten times what they hold, at some
    four characters a token."""
    return 40 * n * seq_len


def cut(values: list[Any], source: str | Path, n: int, seq_len: int, seed: int | None = None) -> Tensor:
    """The first n windows [n, seq_len] of a list with a value for each token of a source, or with a `seed` n windows
    drawn from all of them. Too few are an `InputError`."""
    fits = len(values) // seq_len
    if n > fits:
        needed = f"at least {n} × {seq_len} = {n * seq_len}, or at most {fits} windows of {seq_len}"
        raise InputError(f"tokens in {source}", len(values), needed)
    windows = torch.tensor(values[: fits * seq_len]).view(fits, seq_len)
    if seed is None:
        return windows[:n].clone()
    return windows[torch.randperm(fits, generator=seeded(seed))[:n]]


def token_stream(
    source: str | Path,
    tokenizer: Any,
    split: str = "train",
    max_chars: int | None = None,
    answers: bool = False,
    first: int | None = None,
) -> TokenStream:
    """All token ids of a source: a text's in one piece, conversations' one behind the other.

    Args:
        source, tokenizer, split: as in `tokens`. Conversations need a tokenizer with a chat template.
        max_chars: as in `text`.
        answers: whether to tell which ids the assistant wrote.
        first: characters after which a text is cut off, and no further conversation is begun. None: none.
    """
    encode = encoder_of(tokenizer)
    parts = _parts(source, split, max_chars)
    if not parts or isinstance(parts[0][1], str):
        return TokenStream(encode("\n\n".join(str(content) for _, content in parts)[:first]), False, [])
    template = _template(tokenizer, source)
    ids: list[int] = []
    counted: list[bool] = []
    rest = iter(parts)
    size = 0
    while (some := list(islice(rest, TOGETHER))) and (first is None or size < first):
        places = [place for place, _ in some]
        conversations: list[Any] = [content for _, content in some]
        for one, which in encode_conversations(template, conversations, places, answers):
            ids += one
            counted += which
        size += sum(_size(content) for _, content in some)
    return TokenStream(ids, True, counted)


def _template(tokenizer: Any, source: str | Path) -> ChatTemplate:
    try:
        return ChatTemplate.of(Tokenizer.of(tokenizer))
    except InputError:
        found = "none in this tokenizer, for the conversations in it"
        raise InputError(f"chat template for {source}", found, f"{REMEDY}; or rows with plain text") from None


def _size(content: Content) -> int:
    """Characters of a text or conversation."""
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


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
    parts = _parts(source, split, max_chars)
    if any(not isinstance(content, str) for _, content in parts):
        raise InputError(
            f"text source {source}", "conversations", "text; windows of conversations are what `tokens` makes"
        )
    return "\n\n".join(str(content) for _, content in parts)


def _parts(source: str | Path, split: str, max_chars: int | None) -> list[tuple[str, Content]]:
    """What a source consists of, each part with its place: texts, or conversations."""
    if split not in SPLITS:
        raise InputError("split", repr(split), " | ".join(SPLITS))
    name = str(source)
    path = Path(source).expanduser()
    if path.is_file():
        return list(_file(path))
    if name == "pydoc":
        return [(name, _pydoc(split))]
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


def _file(path: Path) -> Iterator[tuple[str, Content]]:
    kind = FILE_TYPES.get(path.suffix)
    if kind is None:
        raise InputError("text source", f"{path}, of an unknown type", ACCEPTED)
    if kind == "json":
        yield from contents(read_json_rows(path))
        return
    from datasets import load_dataset

    whole = {"sample_by": "document"} if kind == "text" else {}  # the text as it is, not line by line
    # streaming: nothing is copied into a cache. The name is escaped, for it is taken as a pattern.
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(path.absolute())), split="train", streaming=True, **whole)
        yield from contents(_placed(rows, str(path)))
    except (ValueError, OSError, TypeError, StopIteration) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(str(path), f"{type(error).__name__}: {error}", f"a readable {kind} file, UTF-8") from error


def _hub(name: str, split: str, max_chars: int | None) -> list[tuple[str, Content]]:
    from datasets import load_dataset

    repository, _, config = name.partition(":")
    try:
        rows = load_dataset(repository, config or None, split=split, streaming=True)
        parts = []
        size = 0
        for part in contents(_placed(rows, name)):
            parts.append(part)
            size += _size(part[1])
            if max_chars and size >= max_chars:
                break
        return parts
    except (ValueError, OSError, RuntimeError) as error:  # the library's own errors are subclasses of these
        if isinstance(error, InputError):
            raise
        raise InputError("text source", f"{name!r}: no such local file, and the hub said: {error}", ACCEPTED) from error


def _placed(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        yield f"row {number} of {where}", row
