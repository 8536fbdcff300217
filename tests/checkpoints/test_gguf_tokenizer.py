"""Tokenizers in GGUF metadata: every way of cutting text, against llama.cpp and, by its own vocabularies' expected ids,
against transformers; what a file leaves out; and metadata that is wrong."""

import json
from pathlib import Path

import gguf
import pytest
from conftest import random_graph
from gguf_cases import config
from hypothesis import given, settings
from hypothesis import strategies as st
from other_libraries import folder_of, run
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import save
from tinycompress.checkpoints.gguf_config import config_from_gguf
from tinycompress.checkpoints.gguf_families import ARCHITECTURES
from tinycompress.checkpoints.gguf_file import read_gguf
from tinycompress.checkpoints.gguf_pre_tokenizers import BY_NAME, MARKS, WAYS, name_of, steps_of
from tinycompress.checkpoints.gguf_tokenizer import tokenizer_fields, tokenizer_from_gguf
from tinycompress.errors import InputError

TEXT = data.text("pydoc")[:30_000]
HARD = (
    "  two  spaces\n\n\n3 newlines, 12345 digits,\ttabs",
    "l'été, DON'T, we'LL don't; ДА нет, 漢字かな, 한국어, 👩‍🚀🏽, \u200bzero <|im_end|> </s> <unk>",
    "x_y=f(3.14)+[1,2];  /* \u00bd \u00b2 \u2167 */\r\n\r\n  #include <a/b.h>  \n",
    " 1234567890 12 123 1234 $5,000.00 (50%) 1st 2nd !!!??? ... ``` ~~~ ^^^ ||| <<= >>=",
    "camelCase PascalCase UPPER_CASE mixedUPWords ABCdef",
    "\n \n  \n\n   end  ",
    "",
)


@pytest.fixture(scope="module")
def fields() -> dict:
    """Metadata of a small byte-level BPE, trained on Python's help cut in no way, so that tokens go across words."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=alphabet, special_tokens=["<|begin|>", "<|end|>"], show_progress=False
    )
    backend.train_from_iterator([line + "\n" for line in [*TEXT.split("\n"), *HARD]], trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def write(path: Path, fields) -> Path:
    """A GGUF file of a vocabulary alone."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)](
            key, value
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def ids_of_llama_cpp(texts, paths, folder) -> list:
    (folder / "texts.json").write_text(json.dumps(texts))
    return json.loads(run("llama-cpp", "llama_cpp_tokens.py", folder / "texts.json", *paths, cwd=folder))


@pytest.mark.runtime
def test_every_way_gives_llama_cpps_ids(fields, tmp_path):
    """By every name, with a vocabulary whose tokens go across words wherever a way lets them."""
    folder_of("llama-cpp")
    texts = [*HARD, TEXT]
    cases = {name: fields | {"tokenizer.ggml.pre": name} for name in BY_NAME} | {"none": fields}
    cases["flags"] = cases["llama3"] | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    paths = [write(tmp_path / f"{name}.gguf", case) for name, case in cases.items()]
    for name, case, theirs in zip(cases, cases.values(), ids_of_llama_cpp(texts, paths, tmp_path)):
        if name == "none":
            with pytest.warns(UserWarning, match="'default'"):
                ours = tokenizer_from_gguf(case)
        else:
            ours = tokenizer_from_gguf(case)
        for text, (bare, around) in zip(texts, theirs):
            assert ours.encode(text) == bare, (name, text[:50])
            assert ours.encode(text, add_special_tokens=True) == around, (name, text[:50])


@pytest.mark.runtime
def test_llama_cpps_own_vocabularies(tmp_path):
    """Real vocabularies, with the ids that transformers gave for llama.cpp's own hard texts."""
    folder = folder_of("llama-cpp") / "vocabularies"
    paths = sorted(path for path in folder.glob("ggml-vocab-*.gguf") if path.with_name(f"{path.name}.out").exists())
    kinds = ("command-r", "deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "mpt", "qwen2", "refact")
    paths = [path for path in paths if path.stem.removeprefix("ggml-vocab-") in kinds]
    if not paths:
        pytest.skip(f"no vocabularies in {folder} (tests/checkpoints/runtimes/README.md)")
    texts = Path(f"{paths[0]}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    theirs = ids_of_llama_cpp([*texts, TEXT], paths, tmp_path)
    for path, of_llama_cpp in zip(paths, theirs):
        ours = tokenizer_from_gguf(read_gguf(path).fields)
        lines = Path(f"{path}.out").read_text().split("\n")
        expected = [[int(number) for number in line.split()] for line in lines[: len(texts)]]
        assert [ours.encode(text) for text in texts] == expected, path.name
        assert [[ours.encode(text, around) for around in (False, True)] for text in [*texts, TEXT]] == of_llama_cpp


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.names[0])
def test_a_way_is_written_by_its_name(way, fields):
    ours = tokenizer_from_gguf(fields | {"tokenizer.ggml.pre": way.names[0]})
    data = json.loads(ours.backend.to_str())
    assert name_of(data["pre_tokenizer"], data["model"]["ignore_merges"]) == way.names[0]
    size = config(vocab_size=len(fields["tokenizer.ggml.tokens"]))
    written = tokenizer_fields(ours, size)
    assert written["tokenizer.ggml.pre"] == way.names[0]
    assert written["tokenizer.ggml.add_bos_token"] == way.add_bos
    back = tokenizer_from_gguf(written)
    assert all(back.encode(text) == ours.encode(text) for text in HARD)
    assert all(ours.decode(ours.encode(text)) == text for text in HARD)


def test_names_are_of_one_way_each():
    names = [name for way in WAYS for name in way.names]
    assert len(names) == len(set(names)) and set(MARKS) <= set(names)


def test_ways_differ_where_it_matters():
    """What becomes of digits and of a newline behind a symbol."""
    pieces = {way.names[0]: [piece for piece, _ in steps_of(way, False).pre_tokenize_str("ab12345!\n")] for way in WAYS}
    assert pieces["gpt-2"] == ["ab", "12345", "!", "Ċ"]
    assert pieces["smollm"] == ["ab", *"12345", "!", "Ċ"]
    assert pieces["llama-bpe"] == pieces["smaug-bpe"] == ["ab", "123", "45", "!Ċ"]
    assert pieces["qwen2"] == pieces["tekken"] == ["ab", *"12345", "!Ċ"]
    assert pieces["seed-coder"] == ["ab", *"12345", "!", "Ċ"]
    assert pieces["default"] == ["ab", "123", "45", "!", "Ċ"]


@pytest.mark.parametrize("name", MARKS)
def test_a_missing_name_is_known_by_the_vocabulary(name, fields):
    index, token = MARKS[name]
    own = fields["tokenizer.ggml.tokens"]
    tokens = [*own, *(f"<|{i}|>" for i in range(len(own), index + 1))] if index >= len(own) else list(own)
    tokens[index] = token
    changed = fields | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": None}
    if own[index : index + 1]:  # an id that a merge speaks of
        changed["tokenizer.ggml.merges"] = ["t h"]
    ours = tokenizer_from_gguf(changed)
    named = tokenizer_from_gguf(changed | {"tokenizer.ggml.pre": name})
    assert ours.backend.to_str() == named.backend.to_str()


def test_a_missing_name_of_an_unknown_vocabulary_is_warned_of(fields):
    with pytest.warns(UserWarning, match=r"m\.gguf: no tokenizer\.ggml\.pre.*'default'"):
        ours = tokenizer_from_gguf(fields, "m.gguf")
    named = tokenizer_from_gguf(fields | {"tokenizer.ggml.pre": "default"})
    assert ours.backend.to_str() == named.backend.to_str()


def config_of(tmp_path, more):
    """The config of a tiny model's file with that metadata beside its own."""
    file = read_gguf(save(random_graph(config()), tmp_path / "m.gguf", format="gguf"))
    return config_from_gguf({**file.fields, **more}, file.tensors, ARCHITECTURES["llama"], file.where)


def test_ids_of_sentencepiece_where_a_file_names_none(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "▁", "a"]
    more = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [0.0] * 5}
    tokenizer = tokenizer_from_gguf(more | {"tokenizer.ggml.token_type": [2, 3, 3, 1, 1]})
    assert tokenizer.encode("a", add_special_tokens=True)[0] == 1
    assert [tokenizer.config[f"{name}_token"] for name in ("bos", "eos", "unk")] == ["<s>", "</s>", "<unk>"]
    read = config_of(tmp_path, more)
    assert (read.bos_token_id, read.eos_token_id) == (1, 2)


def test_stops_of_turns_and_messages_are_stops(tmp_path):
    more = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 5}
    assert config_of(tmp_path, more).eos_token_id == (5, 7)


VALUES = (
    st.none() | st.booleans() | st.integers(-2, 3000) | st.text(max_size=4) | st.lists(st.integers(-1, 9), max_size=3)
)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_wrong_metadata_is_an_error_that_names_it(fields, data):
    key = data.draw(st.sampled_from(sorted(fields)))
    changed = fields | {"tokenizer.ggml.pre": "gpt-2", key: data.draw(VALUES)}
    try:
        tokenizer = tokenizer_from_gguf(changed, "m.gguf")
    except InputError as error:
        assert "m.gguf" in str(error)
    else:
        assert tokenizer is None or tokenizer.decode(tokenizer.encode("ab")) == "ab"
