"""Folders with every file that has a say in a tokenizer: ids and templates as transformers' AutoTokenizer has them."""

import copy
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tinycompress.calibration import data
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError

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


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast"}
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


TOKENS = st.sampled_from(["<s>", "</s>", "<|im_end|>", "[PAD]", "a", "", "th", " ", "▁", "<unk>"])
FLAGS = st.fixed_dictionaries({"content": TOKENS}, optional={name: st.booleans() for name in (*PLAIN, "lstrip")})
WRONG = st.one_of(st.none(), st.integers(-2, 500), st.lists(TOKENS, max_size=2), st.floats(), st.booleans())
SOME = st.one_of(TOKENS, TOKENS.map(lambda c: MARKED | {"content": c}), FLAGS, WRONG)
CONFIGS = st.fixed_dictionaries(
    {
        "tokenizer_class": st.sampled_from(
            [*(GENERIC.values()), "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", None]
        )
    },
    optional={
        **{name: SOME for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        "additional_special_tokens": st.one_of(st.lists(SOME, max_size=2), WRONG),
        "added_tokens_decoder": st.one_of(
            st.dictionaries(st.one_of(st.integers(0, 450).map(str), TOKENS), st.one_of(FLAGS, WRONG), max_size=3), WRONG
        ),
        **{name: st.one_of(st.booleans(), WRONG) for name in ("add_bos_token", "add_eos_token", "add_prefix_space")},
        "split_special_tokens": st.booleans(),
        "chat_template": st.one_of(TOKENS, st.lists(st.dictionaries(TOKENS, TOKENS, max_size=2), max_size=2), WRONG),
    },
)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(WRONG, TOKENS, st.just({}))), max_size=2)


def places(value, path=()) -> list:
    """Every place in a JSON value but those of a vocabulary and of merges."""
    out = [path] if path else []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        if key not in ("vocab", "merges"):
            out += places(inner, (*path, key))
    return out


def mutated(kind: str, changes) -> str:
    """A tokenizer.json with some of its values replaced."""
    contents = json.loads(BACKENDS[kind])
    for pick, value in changes:
        every = places(contents)
        *parents, last = every[pick % len(every)]
        inside = contents
        for key in parents:
            inside = inside[key]
        inside[last] = copy.deepcopy(value)
    return json.dumps(contents)


def try_files(kind, config, changes, added, folder) -> None:
    """Either an `InputError`, or ids as in transformers where it opens the folder."""
    make(folder, kind, tokenizer_config=config)
    (folder / "tokenizer.json").write_text(mutated(kind, changes))
    (folder / "added_tokens.json").unlink(missing_ok=True)
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    try:
        ours = Tokenizer.from_folder(folder)
    except InputError:
        return
    try:
        theirs = of_transformers(folder)
        expected = [theirs(text)["input_ids"] for text in TRIES]
    except BaseException as error:  # transformers refuses what we open; some of its panics are no Exception
        assert not isinstance(error, KeyboardInterrupt | SystemExit)
        return
    try:
        found = [ours.encode(text, add_special_tokens=True) for text in TRIES]
    except InputError:
        return
    assert found == expected


MUTATIONS = {
    "kind": st.sampled_from(sorted(BACKENDS)),
    "config": CONFIGS,
    "changes": CHANGES,
    "added": st.one_of(st.none(), st.dictionaries(TOKENS, st.one_of(st.integers(0, 500), WRONG), max_size=3)),
}
ANYTHING = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=60, **ANYTHING)
@given(**MUTATIONS)
def test_mutated_files_end_in_an_input_error_or_in_the_ids_of_transformers(kind, config, changes, added, tmp_path):
    try_files(kind, config, changes, added, tmp_path / "a")


@pytest.mark.slow
@settings(max_examples=2000, **ANYTHING)
@given(**MUTATIONS)
def test_two_thousand_mutated_files(kind, config, changes, added, tmp_path):
    try_files(kind, config, changes, added, tmp_path / "a")
