"""Text to token ids and back, by Hugging Face's `tokenizers`: from a folder's tokenizer.json, from a tokenizer of
transformers, or built from GGUF metadata.

GGUF keeps a tokenizer as bare lists. Two families cover Llama models:

  "gpt2"    byte-level BPE: tokens and merges; `tokenizer.ggml.pre` says how text is split before merging
            (the patterns are llama.cpp's, src/llama-vocab.cpp)
  "llama"   SentencePiece BPE: tokens and scores; merges follow from the scores: a piece is merged from any two pieces,
            higher scores first
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files import read_json, read_text, write_json

if TYPE_CHECKING:
    import tokenizers

SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
GGUF_IDS = dict(zip(SPECIALS, ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")))
UNKNOWN = 2  # tokenizer.ggml.token_type
CONTROL = 3
USER_DEFINED = 4
BYTE = 6
SPLITS = {  # tokenizer.ggml.pre: None splits as GPT-2 does
    "default": None,
    "gpt-2": None,
    "smollm": None,  # as GPT-2, but every digit on its own (transformers' GGUF import ignores that)
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


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
        """The tokenizer of a Hugging Face folder; None if the folder has no tokenizer.json."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise InputError(str(path), str(error), "a tokenizer.json of Hugging Face tokenizers") from error
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
            if (folder / name).exists():
                config |= read_json(folder / name)
        if (template := folder / "chat_template.jinja").exists():
            config["chat_template"] = read_text(template)
        return Tokenizer(backend, config)

    @staticmethod
    def from_gguf(fields: Mapping[str, Any], where: str = "the GGUF file") -> Tokenizer | None:
        """The tokenizer in GGUF metadata (`tokenizer.ggml.*` by full name); None if there is none."""
        values = {
            key.removeprefix("tokenizer.").removeprefix("ggml."): value
            for key, value in fields.items()
            if key.startswith("tokenizer.")
        }
        kind = values.get("model")
        if kind in (None, "no_vocab", "none"):
            return None
        build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(kind)
        if build is None:
            raise InputError(f"tokenizer.ggml.model in {where}", repr(kind), "gpt2 | llama")
        tokens = values.get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise InputError(f"tokenizer.ggml.tokens in {where}", "no list", "the vocabulary")
        types = values.get("token_type") or [1] * len(tokens)
        specials = {
            name: tokens[i]
            for name, key in GGUF_IDS.items()
            if isinstance(i := values.get(key), int) and 0 <= i < len(tokens)
        }
        try:
            backend = build(tokens, types, values, where)
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception, for a merge of unknown tokens for instance
            raise InputError(f"tokenizer in {where}", str(error), f"a {kind} vocabulary") from error
        _add_special(backend, tokens, types)
        _add_template(backend, specials, values, add_bos=bool(values.get("add_bos_token", kind == "llama")))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
        if "chat_template" in values:
            config["chat_template"] = values["chat_template"]
        return Tokenizer(backend, config)

    def save(self, folder: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them."""
        folder = Path(folder)
        write_json(folder / "tokenizer.json", json.loads(self.backend.to_str()))
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | self.config)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

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


def _byte_level(tokens: list[str], types: list[int], values: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pre = values.get("pre", "default")
    if pre not in SPLITS:
        raise InputError(f"tokenizer.ggml.pre in {where}", repr(pre), " | ".join(SPLITS))
    merges = [tuple(merge.split(" ")) for merge in values.get("merges", ())]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 looks a whole word up before it merges
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=pre == "llama-bpe")
    )
    pattern = SPLITS[pre]
    prefix = bool(values.get("add_space_prefix", False))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if pattern:
        steps.insert(0, pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], types: list[int], values: Mapping[str, Any], where: str) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = values.get("scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"tokenizer.ggml.scores in {where}", "no list of that length", f"{len(tokens)} scores")
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for piece, i in pieces.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
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
