"""Ids that a model has no row for: config ids and tokens at or beyond `vocab_size`.

transformers opens folders with a [PAD] that a fine-tune added or with an eos of another model, so `load` does too, with
a warning. A runtime would read memory that is not the model's: an export and a GGUF file are refused. A tokenizer whose
very vocabulary goes beyond, without the added tokens, is another model's, and an error everywhere.
"""

from __future__ import annotations

import warnings

from ..errors import InputError
from ..graph.config import Config
from ..graph.graph import Graph
from ..model.generation import end_tokens
from .tokenizer import Tokenizer

SHOWN = 3  # tokens that a message names


def beyond_vocabulary(config: Config, tokenizer: Tokenizer | None) -> str:
    """What lies beyond the vocabulary, in words; empty where nothing does."""
    ids = {"eos_token_id": end_tokens(config), "bos_token_id": (config.bos_token_id,)}
    ids["pad_token_id"] = (config.pad_token_id,)
    found = [
        f"{key} {value}" for key, values in ids.items() for value in values if value and value >= config.vocab_size
    ]
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
        tokens = sorted((i, token) for token, i in vocabulary.items() if i >= config.vocab_size)
        found += [f"token {token!r} {i}" for i, token in tokens[:SHOWN]]
        if len(tokens) > SHOWN:
            found.append(f"{len(tokens) - SHOWN} more tokens")
    return ", ".join(found)


def check_vocabulary(graph: Graph) -> None:
    """An `InputError` for a graph whose ids or tokenizer go beyond its vocabulary."""
    if found := beyond_vocabulary(graph.config, graph.tokenizer):
        accepted = f"ids below vocab_size = {graph.config.vocab_size} (take them out of the JSON files of the model)"
        raise InputError("ids beyond the vocabulary", found, accepted)


def warn_beyond(config: Config, tokenizer: Tokenizer | None, where: str) -> None:
    """A warning for the same; an `InputError` where it is more than added tokens."""
    if tokenizer is not None:
        own = max(tokenizer.backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if own > config.vocab_size:
            accepted = f"at most vocab_size = {config.vocab_size}: the model has no row for the others"
            raise InputError(f"tokenizer in {where}", f"{own} tokens", accepted)
    if found := beyond_vocabulary(config, tokenizer):
        message = f"{where}: {found} beyond vocab_size = {config.vocab_size}: the model has no row for them"
        warnings.warn(message, stacklevel=2)
