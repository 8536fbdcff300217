"""The model of a tokenizer, from whichever file a folder has: tokenizer.json, SentencePiece's tokenizer.model (the
first TinyLlama and Llama 2 folders), or vocab.json with merges.txt (Qwen2, GPT-2).

The last two are built as transformers builds its fast tokenizers from them. A tokenizer.model is read by the packages
sentencepiece and protobuf, the extra `sentencepiece`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, need
from .tokenizer_config import class_of

if TYPE_CHECKING:
    import tokenizers

BPE = 2  # trainer_spec.model_type of a SentencePiece model
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer | None:
    """The tokenizer of a folder as `tokenizers` has it, without what the other files add; None if it has none.

    config: the contents of tokenizer_config.json.
    """
    if (folder / "tokenizer.json").exists():
        return _from_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").exists():
        return _from_sentencepiece(folder / "tokenizer.model", config)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return _from_vocabulary(folder, config)
    return None


def _from_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(str(path), str(error), "a tokenizer.json of Hugging Face tokenizers") from error


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with the blanks of Llama's class: `legacy` (the default) puts one before every stretch of
    text between special tokens, otherwise one stands before a text that does not begin with one (there transformers'
    slow tokenizer adds one too, its fast one none)."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    from .gguf_tokenizer import tokenizer_from_gguf

    proto = _proto(path)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": proto.trainer_spec.unk_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = tokenizer_from_gguf(fields, str(path))
    assert tokenizer is not None
    backend = tokenizer.backend
    prefix = config.get("add_prefix_space") is not False
    if config.get("legacy") is False:
        backend.normalizer = None
        scheme = "first" if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    else:
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * prefix)
    return backend


def _proto(path: Path) -> Any:
    """The contents of a SentencePiece model, checked to be one whose rules are Llama's."""
    need("sentencepiece", "sentencepiece")
    need("google.protobuf", "sentencepiece")
    from google.protobuf.message import DecodeError

    proto = need("sentencepiece.sentencepiece_model_pb2", "sentencepiece").ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(
            str(path), f"no SentencePiece model ({error})", "SentencePiece's, or a tokenizer.json"
        ) from None
    if not proto.pieces:
        raise InputError(str(path), "no pieces", "a SentencePiece model, or a tokenizer.json")
    if proto.trainer_spec.model_type != BPE:
        raise InputError(f"model_type in {path}", proto.trainer_spec.model_type, f"{BPE}: BPE, as Llama's")
    rules = proto.normalizer_spec
    changes = {
        "precompiled_charsmap": bool(rules.precompiled_charsmap),
        "remove_extra_whitespaces": rules.remove_extra_whitespaces,
        "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
        "escape_whitespaces=false": not rules.escape_whitespaces,
    }
    if given := [name for name, changed in changes.items() if changed]:
        raise InputError(f"normalization in {path}", ", ".join(given), "text taken as it is, as Llama does")
    return proto


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer | None:
    """Byte-level BPE by the rules of Qwen2's or GPT-2's class; None for another class, which has other files."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    kind = class_of(folder, config)
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        return None
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(str(folder / "vocab.json"), str(error), "the vocabulary and merges of a BPE") from error
    backend = tokenizers.Tokenizer(model)
    prefix = config.get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    bos = config.get("bos_token")
    if kind == "GPT2Tokenizer" and config.get("add_bos_token") is True and isinstance(bos, str):
        around = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 $B:1", special_tokens=around
        )
    return backend
