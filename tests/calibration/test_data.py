"""Windows of tokens: what is read, how it is cut, and what is said when there is too little."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tinycompress.calibration import data
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """One token a byte."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def test_pydoc_halves_share_no_paragraph():
    from pydoc_data.topics import topics

    train = data.text("pydoc")
    test = data.text("pydoc", "test")
    assert data.text("pydoc", "validation") == test
    names = sorted(topics)
    assert train == "\n\n".join(topics[name] for name in names[::2])
    assert test.startswith(topics[names[1]].split("\n\n")[0])
    assert not set(train.split("\n\n")) & set(test.split("\n\n"))
    assert min(len(train), len(test)) > 100_000


def test_windows_in_a_row(letters):
    text = data.text("pydoc")
    windows = data.tokens("pydoc", letters, 5, 32)
    assert windows.shape == (5, 32) and windows.dtype == torch.int64
    assert letters.decode(windows.flatten().tolist()) == text[:160]


def test_random_windows_are_seeded_and_do_not_overlap(letters):
    text = data.text("pydoc")
    a, b, c = (data.tokens("pydoc", letters, 50, 64, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    starts = [text.find(letters.decode(window.tolist())) for window in a]
    assert min(starts) >= 0
    everything = data.tokens("pydoc", letters, fits := len(letters.encode(text)) // 64, 64, seed=5)
    in_a_row = data.tokens("pydoc", letters, fits, 64)
    assert sorted(everything.tolist()) == sorted(in_a_row.tolist()) and not torch.equal(everything, in_a_row)


def test_text_files_are_kept_whole_with_plain_newlines(tmp_path):
    path = tmp_path / "a [b]*.txt"  # a name that is also a pattern
    path.write_bytes("one\r\n\r\n two é\rthree\n\n".encode())
    assert data.text(path) == data.text(str(path)) == "one\n\n two é\nthree\n\n"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["text", "content"])
def test_tables(kind, column, tmp_path):
    rows = [{column: "one\r\n", "n": 1}, {column: "", "n": 2}, {column: "three", "n": 3}]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    assert data.text(path) == "one\n\n\n\n\nthree"


def test_text_wins_among_several_columns_and_null_is_empty(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"title": "x", "text": "one"}\n{"title": "y", "text": null}\n')
    assert data.text(path) == "one\n\n"


BAD = {
    "two columns": ("t.jsonl", b'{"a": "x", "b": "y"}', "a .str., b .str."),
    "no strings": ("t.jsonl", b'{"a": 1}', "a .int."),
    "bad JSON": ("t.jsonl", b'{"text": ', "t.jsonl"),
    "bad parquet": ("t.parquet", b"PAR1", "t.parquet"),
    "not UTF-8": ("t.txt", b"\xff\xfe\x00", "t.txt.*UTF-8|utf-8"),
    "unknown type": ("t.csv", b"x", "unknown type.*txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_clear_error(name, tmp_path):
    file, content, message = BAD[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.text(tmp_path / file)


@pytest.mark.parametrize("source", ["./none.txt", "none.txt", "/no/such/folder", "."])
def test_what_looks_like_a_path_never_goes_to_the_hub(source):
    with pytest.raises(InputError, match=r"no such file|a folder"):
        data.text(source)


def test_too_few_tokens_says_how_many_fit(letters, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("x" * 100)
    assert data.tokens(path, letters, 3, 32).shape == (3, 32)
    with pytest.raises(
        InputError, match=r"t\.txt: found 100; accepted: at least 4 × 32 = 128, or at most 3 windows of 32"
    ):
        data.tokens(path, letters, 4, 32)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(InputError):
            data.tokens(tmp_path / name, letters, 1, 8)


def test_bad_arguments(letters):
    with pytest.raises(InputError, match="windows"):
        data.tokens("pydoc", letters, 0, 8)
    with pytest.raises(InputError, match="length"):
        data.tokens("pydoc", letters, 1, -8)
    with pytest.raises(InputError, match="split"):
        data.tokens("pydoc", letters, 1, 8, split="dev")
    with pytest.raises(InputError, match="tokenizer"):
        data.tokens("pydoc", None, 1, 8)


@pytest.mark.parametrize("source", ["no-such-org-here/nothing"])
def test_an_unreachable_hub_says_what_is_accepted(source):
    code = (
        "import sys; from tinycompress.calibration import data\nfrom tinycompress.errors import InputError\n"
        "try: data.text(sys.argv[1])\nexcept InputError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, source], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert source in run.stdout and "the hub said" in run.stdout and "wikitext2" in run.stdout, run


def test_wikitext_windows(shared, smollm2):
    windows = data.tokens(shared / "data/wikitext2_raw_test.txt", smollm2.tokenizer, 2, 256)
    text = smollm2.tokenizer.decode(windows.flatten().tolist())
    assert "\r" not in text and text.startswith("\n\n = Robert Boulter = \n\n")


def transformers_tokenizer(letters: Tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(letters.backend.to_str()), model_max_length=16)


def test_tokenizers_of_other_libraries_give_the_same_windows(letters):
    expected = data.tokens("pydoc", letters, 5, 32, seed=1)
    of_transformers = transformers_tokenizer(letters)
    for tokenizer in (of_transformers, letters.backend, lambda text: {"input_ids": letters.encode(text)}):
        assert torch.equal(data.tokens("pydoc", tokenizer, 5, 32, seed=1), expected)
    with pytest.raises(InputError, match="tokenizer: found a dict"):
        data.tokens("pydoc", {}, 5, 32)


def test_calibration_tokens_come_in_many_forms():
    windows = torch.arange(48).view(6, 8)
    loader = torch.utils.data.DataLoader(windows, batch_size=4)
    forms = [windows, list(windows), iter(windows.split(4)), loader, [{"input_ids": ids} for ids in windows.split(2)]]
    for tokens in forms:
        assert torch.equal(data.as_tokens(tokens), windows)
    assert data.as_tokens(windows) is windows
    assert torch.equal(data.as_tokens(windows.tolist()), windows)
    for bad, message in (([], "no windows"), ([windows[0], windows[0, :4]], "windows of one length")):
        with pytest.raises(InputError, match=message):
            data.as_tokens(bad)
