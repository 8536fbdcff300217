"""Mutated tokenizer files: an `InputError`, or the ids of transformers where it opens the folder."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_cases import BACKENDS, GENERIC, MARKED, PLAIN, TRIES, make, of_transformers

from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError

TOKENS = st.sampled_from(["<s>", "</s>", "<|im_end|>", "[PAD]", "a", "", "th", " ", "▁", "<unk>"])
FLAGS = st.fixed_dictionaries({"content": TOKENS}, optional={name: st.booleans() for name in (*PLAIN, "lstrip")})
WRONG = st.one_of(st.none(), st.integers(-2, 500), st.lists(TOKENS, max_size=2), st.floats(), st.booleans())


def mostly(values):
    """Those values, and one in twenty of any kind."""
    return st.integers(0, 19).flatmap(lambda pick: WRONG if pick == 7 else values)


SOME = mostly(st.one_of(TOKENS, TOKENS.map(lambda content: MARKED | {"content": content})))
CLASSES = [*GENERIC.values(), "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", None]
CONFIGS = st.fixed_dictionaries(
    {"tokenizer_class": st.sampled_from(CLASSES)},
    optional={
        **{name: SOME for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        "additional_special_tokens": mostly(st.lists(SOME, max_size=2)),
        "added_tokens_decoder": mostly(st.dictionaries(st.integers(0, 450).map(str), mostly(FLAGS), max_size=3)),
        **{name: mostly(st.booleans()) for name in ("add_bos_token", "add_eos_token")},
        "add_prefix_space": mostly(st.booleans()),
        "split_special_tokens": st.booleans(),
        "chat_template": mostly(TOKENS),
    },
)
CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.one_of(WRONG, TOKENS, st.just({}))), max_size=2)
CHANGES = st.one_of(st.just([]), CHANGES)


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
