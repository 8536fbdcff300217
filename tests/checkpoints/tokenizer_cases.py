"""What the tests of tokenizer folders share: small tokenizers, texts, and folders with every file."""

import json
import warnings
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tinycompress.calibration import data

TEXT = data.text("pydoc")[:20_000]
TRIES = [
    "<|im_start|>user hi<|im_end|>\n",
    "<s>a </s> b<unk>",
    "  two  spaces, 12345 digits, l'été 漢字 👩‍🚀",
    "[PAD]x[EXTRA] y<|new|>",
    "",
    TEXT[:500],
]
PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
MARKED = {"__type": "AddedToken", "content": "<s>"} | PLAIN


def byte_level() -> Backend:
    """A small BPE of bytes with two special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return backend


def with_blanks() -> Backend:
    """The same kind with SentencePiece's blanks in place of bytes, as Llama 2's."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return backend


BACKENDS = {"bytes": byte_level().to_str(), "blanks": with_blanks().to_str()}


def make(folder: Path, kind: str = "bytes", model_type: str = "llama", **files) -> Path:
    """A folder with a tokenizer.json; `files` by stem: a dictionary is JSON."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(BACKENDS[kind])
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def of_transformers(folder: Path):
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder)


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
