"""Folders with every file that has a say in a tokenizer: ids and templates as transformers' AutoTokenizer has them."""

import json
from pathlib import Path

import pytest
from tokenizer_cases import BACKENDS, GENERIC, MARKED, PLAIN, TRIES, make, of_transformers
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError


def agree(folder: Path, saved: Path) -> None:
    """Ours has the ids of transformers, and so has what we save, in both libraries."""
    theirs = of_transformers(folder)
    ours = Tokenizer.from_folder(folder)
    saved.mkdir()
    ours.save(saved)
    again = Tokenizer.from_folder(saved)
    reopened = of_transformers(saved)
    for text in TRIES:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            for encode in (ours.encode, again.encode, reopened.encode):
                assert encode(text, add_special_tokens=special) == expected, (text, special)
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == reopened.decode(ids, clean_up_tokenization_spaces=False)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(theirs, name) == ours.config.get(name) == getattr(reopened, name)
    assert list(reopened(TRIES[0])) == ["input_ids", "attention_mask"]
    assert reopened.chat_template == theirs.chat_template
    assert reopened.additional_special_tokens == theirs.additional_special_tokens
    assert reopened.padding_side == theirs.padding_side


CHAT = {"500": PLAIN | {"content": "<|im_start|>"}, "501": PLAIN | {"content": "<|im_end|>"}}
FOLDERS = {
    "tokenizer.json alone, of a Llama": ("blanks", {}),
    "tokenizer.json alone, bytes of a Llama": ("bytes", {}),
    "added_tokens_decoder": ("bytes", {"tokenizer_config": GENERIC | {"added_tokens_decoder": CHAT}}),
    "their order is that of the ids": (
        "bytes",
        {"tokenizer_config": GENERIC | {"added_tokens_decoder": dict(reversed(list(CHAT.items())))}},
    ),
    "one that is not special and one normalized": (
        "blanks",
        {
            "tokenizer_config": GENERIC
            | {
                "added_tokens_decoder": {
                    "700": PLAIN | {"content": "<|im_end|>", "special": False},
                    "701": PLAIN | {"content": "[EXTRA]", "normalized": True, "lstrip": True},
                }
            }
        },
    ),
    "special by its name alone, so not normalized": (
        "blanks",
        {
            "tokenizer_config": GENERIC
            | {"eos_token": "<|im_end|>", "added_tokens_decoder": {"300": {"content": "<|im_end|>"}}}
        },
    ),
    "added_tokens.json": (
        "bytes",
        {
            "tokenizer_config": GENERIC | {"pad_token": "[PAD]"},
            "added_tokens": {"<|new|>": 402, "[PAD]": 401, "<|im_end|>": 400},
        },
    ),
    "special_tokens_map.json wins": (
        "bytes",
        {
            "tokenizer_config": GENERIC | {"eos_token": "</s>"},
            "special_tokens_map": {"eos_token": {"content": "<|im_end|>"} | PLAIN, "bos_token": "<s>"},
        },
    ),
    "but not over added_tokens_decoder": (
        "bytes",
        {
            "tokenizer_config": GENERIC | {"eos_token": "</s>", "added_tokens_decoder": CHAT},
            "special_tokens_map": {"eos_token": "<|im_end|>"},
        },
    ),
    "additional_special_tokens": (
        "bytes",
        {
            "tokenizer_config": GENERIC | {"additional_special_tokens": ["<|im_start|>", "[EXTRA]"]},
            "special_tokens_map": {"additional_special_tokens": ["[EXTRA]", {"content": "<|new|>"} | PLAIN]},
        },
    ),
    "tokens as objects": ("bytes", {"tokenizer_config": GENERIC | {"bos_token": MARKED, "model_max_length": 10**30}}),
    "Llama's class": ("blanks", {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "legacy": True}}),
    "Llama's class, without bos, with eos": (
        "blanks",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False, "add_eos_token": True}},
    ),
    "Llama's class, other tokens": (
        "bytes",
        {"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|im_start|>", "unk_token": "</s>"}},
    ),
    "Qwen2's class": ("bytes", {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}}),
    "GPT-2's class": ("bytes", {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}}),
    "special tokens are split": ("bytes", {"tokenizer_config": GENERIC | {"split_special_tokens": True}}),
    "a named template": (
        "bytes",
        {"tokenizer_config": GENERIC | {"chat_template": [{"name": "rag", "template": "{{ x }}"}]}},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_autotokenizer(name, tmp_path):
    kind, files = FOLDERS[name]
    agree(make(tmp_path / "a", kind, **files), tmp_path / "b")


def test_the_padding_of_tokenizer_json_brings_its_token(tmp_path):
    backend = Backend.from_str(BACKENDS["bytes"])
    backend.enable_padding(pad_token="[PAD]", pad_id=0)
    folder = make(tmp_path / "a", tokenizer_config=GENERIC)
    (folder / "tokenizer.json").write_text(backend.to_str())
    assert Tokenizer.from_folder(folder).encode("a[PAD]") == of_transformers(folder)("a[PAD]")["input_ids"]


def test_a_prefix_space_survives_saving(tmp_path):
    """transformers takes it from tokenizer_config.json, whatever tokenizer.json says."""
    backend = Backend.from_str(BACKENDS["bytes"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = Tokenizer(backend)
    tokenizer.save(tmp_path)
    for again in (Tokenizer.from_folder(tmp_path), of_transformers(tmp_path)):
        assert (
            again.encode("word") == tokenizer.encode("word") != Backend.from_str(BACKENDS["bytes"]).encode("word").ids
        )


def test_what_transformers_5_writes_opens_in_4(tmp_path):
    config = {
        "tokenizer_class": "TokenizersBackend",
        "backend": "tokenizers",
        "is_local": True,
        "extra_special_tokens": ["<|im_start|>", "[EXTRA]"],
        "model_max_length": 1000000000000000019884624838656,
        "bos_token": MARKED,
        "eos_token": "</s>",
    }
    ours = Tokenizer.from_folder(make(tmp_path / "a", tokenizer_config=config))
    ours.save(tmp_path / "b")
    reopened = of_transformers(tmp_path / "b")
    for text in TRIES:
        assert reopened.encode(text) == ours.encode(text, add_special_tokens=True)
    assert reopened.additional_special_tokens == ["<|im_start|>", "[EXTRA]"]
    assert (reopened.bos_token, reopened.eos_token) == ("<s>", "</s>")
    assert reopened.model_max_length == config["model_max_length"]
    written = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert written["bos_token"] == "<s>" and "is_local" not in written


NAMED = {"default": "{{ messages[0].content }}!", "tool_use": "{{ messages }} tools"}


def keep_templates(folder: Path, form: str) -> None:
    """The same templates in one of the forms that folders have."""
    config = GENERIC
    if form == "list":
        config = config | {"chat_template": [{"name": n, "template": t} for n, t in NAMED.items()]}
    elif form == "string":
        config = config | {"chat_template": NAMED["default"]}
    else:
        (folder / "chat_template.jinja").write_text(NAMED["default"])
        config = config | {"chat_template": "of the config: files win"}
    if form == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text(NAMED["tool_use"])
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("form", ["string", "list", "file", "folder"])
def test_chat_templates_are_kept_in_the_form_that_a_runtime_takes(form, tmp_path):
    folder = make(tmp_path / "a")
    keep_templates(folder, form)
    expected = NAMED if form in ("list", "folder") else NAMED["default"]
    assert of_transformers(folder).chat_template == expected
    ours = Tokenizer.from_folder(folder)
    assert ours.config["chat_template"] == expected
    ours.save(tmp_path / "b")
    ours.save(tmp_path / "web", named_in_config=True)
    for name in ("b", "web"):
        assert of_transformers(tmp_path / name).chat_template == expected
        assert Tokenizer.from_folder(tmp_path / name).config["chat_template"] == expected
    read = {name: json.loads((tmp_path / name / "tokenizer_config.json").read_text()) for name in ("b", "web")}
    assert read["b"]["chat_template"] == NAMED["default"]  # onnxruntime-genai wants a string
    if form in ("list", "folder"):
        assert {entry["name"]: entry["template"] for entry in read["web"]["chat_template"]} == NAMED
        assert not (tmp_path / "web/additional_chat_templates").exists()


@pytest.mark.parametrize(
    "template, message",
    [
        (3, "chat_template"),
        ([3], "chat_template"),
        ([{"name": "a"}], "chat_template"),
        ([{"name": "../../a", "template": "x"}], "names that can name a file"),
        ({"default": 3}, "chat_template"),
    ],
)
def test_a_bad_template_is_one_clear_error(template, message, tmp_path):
    folder = make(tmp_path / "a", tokenizer_config=GENERIC | {"chat_template": template})
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": PLAIN | {"content": "a"}}}}, "token ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": "a", "4": 5}}}, "added_tokens_decoder"),
        ({"tokenizer_config": {"added_tokens_decoder": {"3": {"content": "a", "special": 1}}}}, "special 1"),
        ({"tokenizer_config": {"bos_token": 3}}, "bos_token"),
        ({"tokenizer_config": {"additional_special_tokens": "abc"}}, "additional_special_tokens"),
        ({"tokenizer_config": {"tokenizer_class": "LlamaTokenizer", "bos_token": None}}, "add_bos_token"),
        ({"added_tokens": {"a": "b"}}, r"added_tokens\.json"),
        ({"special_tokens_map": {"eos_token": {}}}, "eos_token"),
    ],
)
def test_bad_files_are_one_clear_error(files, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_folder(make(tmp_path / "a", **files))


def test_an_id_that_is_another_tokens_is_refused(tmp_path):
    """transformers gives such a token another id than the file says, without a word."""
    files = {"tokenizer_config": GENERIC, "added_tokens": {"[PAD]": 0}}
    with pytest.raises(InputError, match=r"added_tokens.json: found id 0 for '\[PAD\]'"):
        Tokenizer.from_folder(make(tmp_path / "a", **files))
