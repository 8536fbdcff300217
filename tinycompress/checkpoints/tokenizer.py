"""Text to token ids and back, by Hugging Face's `tokenizers`: from a folder's tokenizer.json or from a tokenizer of
transformers. gguf_tokenizer.py builds one from GGUF metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import write_json
from .chat_template import read_templates, write_templates
from .tokenizer_config import complete, read_config, to_write
from .tokenizer_model import read_backend

if TYPE_CHECKING:
    import tokenizers

SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A tokenizer of a graph.

    Fields:
        backend: the `tokenizers.Tokenizer` that does the work.
        config: the dictionary that transformers keeps beside it (tokenizer_config.json).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] | None = None) -> None:
        backend.no_truncation()  # some tokenizer.json files carry settings that cut or pad what is encoded
        backend.no_padding()
        self.backend = backend
        self.config = dict(config or {})

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} tokens)"

    @staticmethod
    def of(tokenizer: Any) -> Tokenizer:
        """A tokenizer of ours as it is; a `tokenizers.Tokenizer`, or a fast one of transformers, as a copy.

        A slow one of transformers has no backend to copy, and is an `InputError`.
        """
        import tokenizers

        if isinstance(tokenizer, Tokenizer):
            return tokenizer
        if isinstance(tokenizer, tokenizers.Tokenizer):
            return Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.to_str()))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            accepted = "a tokenizer of tinycompress or tokenizers, or a fast one: AutoTokenizer.from_pretrained(…)"
            raise InputError("tokenizer", f"a {type(tokenizer).__name__}, which has no backend_tokenizer", accepted)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {name: str(token) for name in SPECIALS if (token := getattr(tokenizer, name, None)) is not None}
        if template := getattr(tokenizer, "chat_template", None):
            config["chat_template"] = template
        return Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str()), config)

    @staticmethod
    def from_folder(folder: str | Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face folder, with the ids of transformers' AutoTokenizer; None if it has none."""
        folder = Path(folder)
        config = read_config(folder)
        backend = read_backend(folder, config)
        if backend is None:
            return None
        complete(backend, config, folder)
        if (templates := read_templates(folder, config.get("chat_template"))) is not None:
            config["chat_template"] = templates
        return Tokenizer(backend, config)

    def save(self, folder: str | Path, named_in_config: bool = False) -> None:
        """tokenizer.json, tokenizer_config.json and chat templates, as transformers.AutoTokenizer reads them.

        `named_in_config`: see `write_templates`.
        """
        folder = Path(folder)
        write_json(folder / "tokenizer.json", json.loads(self.backend.to_str()))
        config = to_write(self.backend, self.config)
        if (template := write_templates(folder, config.pop("chat_template", None), named_in_config)) is not None:
            config["chat_template"] = template
        write_json(folder / "tokenizer_config.json", config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def token_id(self, name: str) -> int | None:
        """The id of the special token that tokenizer_config.json has under `name` ("bos_token"); None without one."""
        token = self.config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        return self.backend.token_to_id(token) if isinstance(token, str) else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self, skip_special_tokens: bool = True) -> Callable[[int], str]:
        """A function from each next token id to the text it completes: "" while a character's bytes are incomplete."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        return lambda token: stream.step(self.backend, token) or ""


def encoder_of(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function from text to token ids, without special tokens.

    tokenizer: whatever `Tokenizer.of` accepts, another object with transformers' method `encode` (a slow tokenizer), or
    a function from text to a mapping with `input_ids`.
    """
    if tokenizer is None:
        raise InputError("tokenizer", "none", "a model folder with a tokenizer.json")
    try:
        return Tokenizer.of(tokenizer).encode
    except InputError:  # it has no backend
        if hasattr(tokenizer, "encode"):
            return lambda text: list(tokenizer.encode(text, add_special_tokens=False))
        if callable(tokenizer):
            return lambda text: list(tokenizer(text)["input_ids"])
        raise
