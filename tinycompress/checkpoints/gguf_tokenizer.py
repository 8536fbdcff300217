"""A tokenizer as GGUF metadata: the inverse of `Tokenizer.from_gguf`, and checked against it before it is written.

Byte-level BPE becomes "gpt2" (tokens, merges, and `pre`, which names how text is split); BPE with byte fallback becomes
"llama", which has scores in the place of merges: a piece's score is minus the rank of the first merge that makes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..graph.config import Config
from .tokenizer import BYTE, CONTROL, GGUF_IDS, SPLITS, UNKNOWN, USER_DEFINED, Tokenizer

NORMAL = 1  # tokenizer.ggml.token_type, beside those of tokenizer.py
UNUSED = 5
LOWEST = -1e9  # the score of a piece that no merge makes
PROBE = "Once upon a time, there were 1234 cats; they'd seen it  all.\n\tNaïve café, 漢字 & 👩‍🚀! x_y=f(3.14)"


def tokenizer_fields(tokenizer: Tokenizer, config: Config) -> dict[str, Any]:
    """`tokenizer.ggml.*` by full name; an `InputError` for a tokenizer that GGUF cannot express, found on a text."""
    data = json.loads(tokenizer.backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise InputError("tokenizer for GGUF", f"a {model.get('type')} model", "BPE")
    fields = _common(tokenizer, data, config)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        first: dict[str, int] = {}
        for rank, (a, b) in enumerate(merges):
            first.setdefault(a + b, rank)
        scores = [float(-first[token]) if token in first else LOWEST for token in fields["tokenizer.ggml.tokens"]]
        fields |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.add_space_prefix": _prefixes(data),
        }
    else:
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _pre(data.get("pre_tokenizer"))}
        fields["tokenizer.ggml.merges"] = [f"{a} {b}" for a, b in merges]
    back = Tokenizer.from_gguf(fields)
    if back is None or back.encode(PROBE) != tokenizer.encode(PROBE):
        raise InputError(
            "tokenizer for GGUF",
            "rules of splitting or merging that GGUF has no words for",
            "a tokenizer like Llama's or GPT-2's",
        )
    return fields


def _common(tokenizer: Tokenizer, data: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Tokens, their types, and the special ones."""
    added = {token["content"]: bool(token["special"]) for token in data.get("added_tokens", ())}
    by_id = {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    unknown = data["model"].get("unk_token")
    fallback = data["model"].get("byte_fallback")
    tokens = []
    types = []
    for i in range(config.vocab_size):
        token = by_id.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif token == unknown:
            types.append(UNKNOWN)
        elif token in added:
            types.append(CONTROL if added[token] else USER_DEFINED)
        else:
            types.append(BYTE if fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL)
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    ids = {key: _id(tokenizer, name, config) for name, key in GGUF_IDS.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None}
    around = tokenizer.encode("a", add_special_tokens=True)
    fields["tokenizer.ggml.add_bos_token"] = bool(around) and around[0] == ids["bos_token_id"]
    fields["tokenizer.ggml.add_eos_token"] = bool(around) and around[-1] == ids["eos_token_id"]
    if isinstance(template := tokenizer.config.get("chat_template"), str):
        fields["tokenizer.chat_template"] = template
    return fields


def _id(tokenizer: Tokenizer, name: str, config: Config) -> int | None:
    """The id of a special token: by tokenizer_config.json, else by the model's config (the first of several)."""
    token = tokenizer.config.get(name)
    token = token.get("content") if isinstance(token, Mapping) else token
    if isinstance(token, str) and (token_id := tokenizer.backend.token_to_id(token)) is not None:
        return token_id
    value = getattr(config, f"{name}_id", None)
    return value[0] if isinstance(value, tuple) else value


def _pre(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The name of a way of splitting that llama.cpp knows."""
    steps: list[Any] = [] if pre_tokenizer is None else list(pre_tokenizer.get("pretokenizers", [pre_tokenizer]))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        for name, known in SPLITS.items():
            if known is not None and known == pattern:
                return name
    raise InputError("tokenizer for GGUF", f"text split by {kinds or 'nothing'}", " | ".join(SPLITS))


def _prefixes(data: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer = data.get("normalizer") or {}
    splitter = data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or splitter.get("prepend_scheme", "never") != "never"
