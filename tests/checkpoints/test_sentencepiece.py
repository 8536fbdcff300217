"""Folders without tokenizer.json: SentencePiece's tokenizer.model, and vocab.json with merges.txt, against the slow and
the fast tokenizers that transformers makes of them."""

import json
import sys
import warnings

import pytest

from tinycompress.calibration import data
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError, MissingExtra

TEXT = data.text("pydoc")
HARD = [
    "",
    " ",
    "   three blanks, and at the end  ",
    "\ttabs\t\tand\n\n\nnewlines\r\n",
    "l'été, naïve café, ДА, 漢字かな, 👩‍🚀🏽 ½ ﬁ \u00a0\u200b\u3000x",
    "▁ a real ▁▁ one",
    "x" * 100 + " " * 50 + "y",
    "def f(x):\n    return x ** 2  # 12345",
]
SPECIAL = ["<s>a</s>", "a <s> b", "<s> <s>x", "Hello <s>.", "<unk>x <unk>", "a</s>\n</s> b", "x[ADDED] y[ADDED]z"]


def train(folder, text=TEXT[:150_000], **options):
    """A small SentencePiece BPE by Llama's rules."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (folder / "text.txt").write_text(text)
    rules = {
        "model_type": "bpe",
        "vocab_size": 800,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), **rules | options
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def describe(folder, **config) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))


def of_transformers(folder, fast: bool):
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder, use_fast=fast)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("sentencepiece"))


def comparable(lines, config) -> list[str]:
    """Lines on which transformers' slow and fast tokenizers agree: without `legacy` the slow one puts a blank before a
    text that begins with one."""
    return [line.lstrip(" ▁") for line in lines] if config.get("legacy") is False else lines


LEGACY = [{}, {"legacy": True}, {"legacy": False}]


@pytest.mark.parametrize("config", LEGACY, ids=str)
def test_ids_are_those_of_the_slow_tokenizer(config, folder, tmp_path):
    describe(folder, **config)
    slow = of_transformers(folder, fast=False)
    ours = Tokenizer.from_folder(folder)
    for line in comparable(HARD + TEXT[150_000:200_000].splitlines(), config):
        assert ours.encode(line, add_special_tokens=True) == slow(line)["input_ids"], line
    ours.save(tmp_path)
    reopened = of_transformers(tmp_path, fast=True)
    for line in HARD + SPECIAL:
        ids = ours.encode(line, add_special_tokens=True)
        assert reopened(line)["input_ids"] == ids
        assert ours.decode(ids[1:]) == reopened.decode(ids[1:], clean_up_tokenization_spaces=False)


ADDED = {"content": "[ADDED]", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
FAST = [
    *LEGACY,
    {"add_prefix_space": True},
    {"add_prefix_space": False, "legacy": False},
    {"add_bos_token": False, "add_eos_token": True},
    {"added_tokens_decoder": {"800": ADDED | {"special": False}}, "legacy": False},
    {"pad_token": "<unk>", "bos_token": {"__type": "AddedToken", "special": True} | ADDED | {"content": "<s>"}},
]


@pytest.mark.parametrize("config", FAST, ids=lambda config: str(config)[:40])
def test_ids_around_special_tokens_are_those_of_autotokenizer(config, folder):
    describe(folder, **config)
    fast = of_transformers(folder, fast=True)
    ours = Tokenizer.from_folder(folder)
    for line in HARD + SPECIAL:
        for special in (True, False):
            expected = fast(line, add_special_tokens=special)["input_ids"]
            assert ours.encode(line, add_special_tokens=special) == expected, line
        assert ours.decode(expected) == fast.decode(expected, clean_up_tokenization_spaces=False)


def test_without_byte_fallback_and_with_symbols_of_the_user(tmp_path):
    folder = train(tmp_path, byte_fallback=False, user_defined_symbols="<sep>,[X]", vocab_size=600)
    describe(folder)
    slow, fast = of_transformers(folder, fast=False), of_transformers(folder, fast=True)
    ours = Tokenizer.from_folder(folder)
    for line in [*TEXT[150_000:160_000].splitlines(), "漢字 and 👩‍🚀 é"]:
        assert ours.encode(line, add_special_tokens=True) == slow(line)["input_ids"], line
    for line in [*SPECIAL, "a<sep>b [X] c"]:
        assert ours.encode(line, add_special_tokens=True) == fast(line)["input_ids"], line


@pytest.mark.slow
@pytest.mark.parametrize("config", LEGACY[1:], ids=str)
def test_ids_on_ten_thousand_lines(config, tmp_path, shared):
    """A vocabulary of 8,000 pieces, trained on one text, on 10,000 lines of the others."""
    names = ("wikitext2_raw_test.txt", "arc_easy.jsonl", "piqa.jsonl")
    passages = (shared / "data/wiki_passages.txt").read_text()
    lines = [line for name in names for line in (shared / "data" / name).read_text().splitlines()]
    lines = [line for line in lines if line.strip()][:10_000]
    assert len(lines) > 7_000
    lines += [line for line in passages.splitlines() if line.strip()][: 10_000 - len(lines)]
    train(tmp_path, passages, vocab_size=8000)
    describe(tmp_path, **config)
    slow, fast = of_transformers(tmp_path, fast=False), of_transformers(tmp_path, fast=True)
    ours = Tokenizer.from_folder(tmp_path)
    assert len(lines) == 10_000
    for theirs, compared in ((fast, lines), (slow, comparable(lines, config))):
        differing = [x for x in compared if ours.encode(x, add_special_tokens=True) != theirs(x)["input_ids"]]
        assert not differing


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"model_type": "unigram"}, "model_type"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    ],
)
def test_other_rules_than_llamas_are_refused(rules, message, tmp_path):
    folder = train(tmp_path, **rules)
    with pytest.raises(InputError, match=rf"{message}"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("contents", [b"", b"\xff" * 1000, b"IQ== 0\nIg== 1\n"], ids=["empty", "noise", "tiktoken"])
def test_what_is_no_sentencepiece_model_is_named(contents, tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(contents)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_missing_extra_is_one_line_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tinycompress\[sentencepiece\]'"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("Qwen2Tokenizer", {}),
        ("Qwen2Tokenizer", {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}),
        ("GPT2Tokenizer", {"bos_token": "!"}),
        ("GPT2Tokenizer", {"add_prefix_space": True, "add_bos_token": True, "bos_token": "!"}),
    ],
    ids=str,
)
def test_a_vocabulary_with_merges(kind, config, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([TEXT[:50_000]], trainer)
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | config))
    fast = of_transformers(tmp_path, fast=True)
    ours = Tokenizer.from_folder(tmp_path)
    for line in [*HARD, *SPECIAL, "<|im_start|>user<|im_end|><|endoftext|>", TEXT[:5000]]:
        assert ours.encode(line, add_special_tokens=True) == fast(line)["input_ids"], line


def test_a_vocabulary_of_another_class_is_no_tokenizer(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert Tokenizer.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(InputError, match=r"vocab\.json"):
        Tokenizer.from_folder(tmp_path)
