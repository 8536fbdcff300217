"""A tokenizer from GGUF metadata and to it; what is written is read back and compared first.

GGUF keeps a tokenizer as bare lists. Two families cover Llama models:

  "gpt2"    byte-level BPE: tokens and merges; `tokenizer.ggml.pre` says how text is split before merging
            (the patterns are llama.cpp's, src/llama-vocab.cpp)
  "llama"   SentencePiece BPE, with byte fallback: tokens and scores; merges follow from the scores: a piece is merged
            from any two pieces, higher scores first. Written, a piece's score is minus the rank of the first merge that
            makes it.
"""

from __future__ import annotations

import bisect
import json
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..graph.config import Config
from ..model.generation import end_tokens
from .chat_template import DEFAULT
from .gguf_pre_tokenizers import Way, name_of, steps_of, way_of
from .tokenizer import SPECIALS, Tokenizer

if TYPE_CHECKING:
    import tokenizers

GGUF_IDS = dict(zip(SPECIALS, ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")))
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")  # of a text, of a turn, of a message
SENTENCEPIECE_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}  # where a file names none
NORMAL = 1  # tokenizer.ggml.token_type
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
LOWEST = -1e9  # the score of a piece that no merge makes
PROBE = "Once upon a time, there were 1234 cats; they'd seen it  all.\n\tNaïve café, 漢字 & 👩‍🚀! x_y=f(3.14)"


def tokenizer_from_gguf(fields: Mapping[str, Any], where: str = "the GGUF file") -> Tokenizer | None:
    """The tokenizer in GGUF metadata (`tokenizer.ggml.*` by full name); None if there is none."""
    values = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.")
    }
    kind = values.get("model")
    if kind in (None, "no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise InputError(f"tokenizer.ggml.model in {where}", repr(kind), "gpt2 | llama")
    tokens = _list(values, "tokens", str, where)
    types = [NORMAL] * len(tokens)
    if values.get("token_type"):
        types = _list(values, "token_type", int, where, len(tokens))
    ids = (SENTENCEPIECE_IDS if kind == "llama" else {}) | values
    specials = {
        name: tokens[i] for name, key in GGUF_IDS.items() if isinstance(i := ids.get(key), int) and 0 <= i < len(tokens)
    }
    add_bos = kind == "llama"
    try:
        if kind == "gpt2":
            way = way_of(values.get("pre"), tokens, where)
            add_bos = way.add_bos
            backend = _byte_level(tokens, way, values, where)
        else:
            backend = _sentencepiece(tokens, types, ids, where)
        _add_special(backend, tokens, types)
    except InputError:
        raise
    except Exception as error:  # the library raises plain Exception, for a merge of unknown tokens for instance
        raise InputError(f"tokenizer in {where}", str(error), f"a {kind} vocabulary") from error
    _add_template(backend, specials, values, add_bos=bool(values.get("add_bos_token", add_bos)))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
    if isinstance(values.get("chat_template"), str):
        config["chat_template"] = values["chat_template"]
    return Tokenizer(backend, config)


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
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name_of(data.get("pre_tokenizer"), bool(model.get("ignore_merges"))),
        }
        fields["tokenizer.ggml.merges"] = [f"{a} {b}" for a, b in merges]
    back = tokenizer_from_gguf(fields)
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
    fields |= stop_fields(config, ids["eos_token_id"])
    around = tokenizer.encode("a", add_special_tokens=True)
    fields["tokenizer.ggml.add_bos_token"] = bool(around) and around[0] == ids["bos_token_id"]
    fields["tokenizer.ggml.add_eos_token"] = bool(around) and around[-1] == ids["eos_token_id"]
    templates = tokenizer.config.get("chat_template")
    if isinstance(templates, str):
        templates = {DEFAULT: templates}
    for name, template in (templates or {}).items():
        fields["tokenizer.chat_template" if name == DEFAULT else f"tokenizer.chat_template.{name}"] = template
    if others := [name for name in templates or {} if name != DEFAULT]:
        fields["tokenizer.chat_templates"] = others
    return fields


def stop_fields(config: Config, of_tokenizer: int | None) -> dict[str, int]:
    """The ids that end a text, a turn and a message: all that GGUF has words for. llama.cpp stops at each.

    of_tokenizer: the tokenizer's end of text, which comes first where it is one of the config's, and is the only one
        where the config has none.
    """
    stops = list(end_tokens(config))
    if of_tokenizer is not None and (of_tokenizer in stops or not stops):
        stops = [of_tokenizer, *(stop for stop in stops if stop != of_tokenizer)]
    if len(stops) > len(STOPS):
        warnings.warn(f"GGUF holds {len(STOPS)} ids that end a text: not {stops[len(STOPS) :]}", stacklevel=2)
    return {f"tokenizer.ggml.{name}": stop for name, stop in zip(STOPS, stops)}


def _id(tokenizer: Tokenizer, name: str, config: Config) -> int | None:
    """The id of a special token: by tokenizer_config.json, else by the model's config (the first of several)."""
    if (token_id := tokenizer.token_id(name)) is not None:
        return token_id
    value = getattr(config, f"{name}_id", None)
    return value[0] if isinstance(value, tuple) else value


def _prefixes(data: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text."""
    normalizer = data.get("normalizer") or {}
    splitter = data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    return any(step.get("type") == "Prepend" for step in steps) or splitter.get("prepend_scheme", "never") != "never"


def _merges(values: Mapping[str, Any], where: str) -> list[str]:
    """The merges; an empty list is one, for a vocabulary of bytes alone."""
    return [] if values.get("merges") == [] else _list(values, "merges", str, where)


def _list(values: Mapping[str, Any], key: str, kind: type, where: str, length: int | None = None) -> list[Any]:
    """A list of that length (None: any but 0) whose values are all of one kind."""
    value = values.get(key)
    if not isinstance(value, list) or not value or not all(type(item) is kind for item in value):
        raise InputError(
            f"tokenizer.ggml.{key} in {where}", "no list", f"a list of {kind.__name__}, one for each token"
        )
    if length is not None and len(value) != length:
        raise InputError(f"tokenizer.ggml.{key} in {where}", f"{len(value)} values", f"{length}, one for each token")
    return value


def _byte_level(tokens: list[str], way: Way, values: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models

    merges = [tuple(merge.split(" ")) for merge in _merges(values, where)]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=way.whole_words)
    )
    backend.pre_tokenizer = steps_of(way, bool(values.get("add_space_prefix", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], types: list[int], values: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = _list(values, "scores", float, where, len(tokens))
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind not in (UNKNOWN, CONTROL, BYTE)}
    lengths = sorted(
        {len(piece) for piece in pieces}
    )  # only there can a piece be cut: a long one would cost its square
    ranked = []
    for piece, i in pieces.items():
        cuts = lengths[: bisect.bisect_left(lengths, len(piece))]
        halves = ((piece[:cut], piece[cut:]) for cut in cuts)
        pairs = sorted((pieces[a], pieces[b], a, b) for a, b in halves if a in pieces and b in pieces)
        ranked += [(-scores[i], a, b) for _, _, a, b in pairs]
    ranked.sort(key=lambda merge: merge[0])  # stable: equal scores keep the vocabulary's order
    unknown = values.get("unknown_token_id")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(a, b) for _, a, b in ranked],
            unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(values.get("add_space_prefix", True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] * prefix
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Marks control tokens as special and user-defined ones as whole, so that no merge takes them apart."""
    from tokenizers import AddedToken

    chosen = [(token, kind) for token, kind in zip(tokens, types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(token, normalized=False, special=kind != USER_DEFINED) for token, kind in chosen])


def _add_template(
    backend: tokenizers.Tokenizer, specials: Mapping[str, str], values: Mapping[str, Any], add_bos: bool
) -> None:
    """What `add_special_tokens` puts around the text."""
    from tokenizers import processors

    before = [specials["bos_token"]] if add_bos and "bos_token" in specials else []
    after = [specials["eos_token"]] if values.get("add_eos_token") and "eos_token" in specials else []
    if before or after:
        around = [(token, backend.token_to_id(token)) for token in {*before, *after}]
        pair = [*before, "$A", *after, *before, "$B:1", *after]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=pair, special_tokens=around
        )
