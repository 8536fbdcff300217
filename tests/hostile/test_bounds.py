"""Bounds one by one: what a small file could once make large, and what a message could once do to a terminal."""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch
from conftest import random_graph
from hostile_cases import CONFIG, SECRET, as_hf, gguf_file
from safetensors.torch import save_file
from watch import watching

from tinycompress.checkpoints.checkpoint import load
from tinycompress.checkpoints.gguf_tokenizer import tokenizer_from_gguf
from tinycompress.distillation.teacher_cache import open_cache, write_cache
from tinycompress.errors import LONGEST, InputError
from tinycompress.files import inside, read_json


def test_a_message_holds_nothing_that_a_terminal_acts_on():
    error = InputError("a\x1b[2J", "b\nc\x07\ud800\u202e", "d\x9b")
    assert str(error) == r"a\x1b[2J: found b\nc\x07\ud800\u202e; accepted: d\x9b"
    assert str(InputError("naïve 漢字", "👩", "½")) == "naïve 漢字: found 👩; accepted: ½"


def test_a_long_value_is_shortened():
    error = InputError("field", "a" * 10**6 + "end", "less")
    assert len(error.found) < LONGEST + 10 and error.found.endswith("end") and "…" in error.found
    assert InputError("field", "a" * LONGEST, "less").found == "a" * LONGEST


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/../../b", "/etc/passwd", "a\0b", "\ud800", "x" * 256, "x/" * 3 + "/.."]
)
def test_names_that_no_file_in_the_folder_has(name, tmp_path):
    with pytest.raises(InputError, match="inside the folder"):
        inside(tmp_path, name)


def test_names_that_files_have(tmp_path):
    for name in ("a", "a/b.c", "x" * 255, "漢字", "..a"):
        assert inside(tmp_path, name) == tmp_path / name


def test_a_long_piece_of_a_vocabulary_costs_no_square(tmp_path):
    """Each cut of a piece was two strings once: 200,000 characters made 40 GB."""
    tokens = ["<unk>", "a", "b", "ab", "ab" * 100_000]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
    }
    with watching(tmp_path) as watch:
        tokenizer = tokenizer_from_gguf(fields)
    assert watch.peak < 32 * 2**20 and watch.seconds < 1
    assert tokenizer is not None and json.loads(tokenizer.backend.to_str())["model"]["merges"] == [["a", "b"]]


def test_layers_are_no_more_than_tensors(tmp_path):
    """The names of 10,000 layers took 500 MB, in a file of a few kB."""
    gguf_file(tmp_path / "f")
    path = tmp_path / "f/m.gguf"
    data = path.read_bytes()
    at = data.index(b"llama.block_count") + len("llama.block_count") + 4
    path.unlink()
    path.write_bytes(data[:at] + (10_000).to_bytes(4, "little") + data[at + 4 :])
    with watching(tmp_path) as watch, pytest.raises(InputError, match=r"block_count.*10000"):
        load(path)
    assert watch.peak < 32 * 2**20


def test_a_tensor_without_axes(tmp_path):
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    name = b"token_embd.weight"
    info = struct.pack("<Q", len(name)) + name + struct.pack("<IIQ", 0, 0, 0)
    path = tmp_path / "m.gguf"
    path.write_bytes((header + info).ljust(128, bytes(1)))
    with pytest.raises(InputError, match=r"m\.gguf.*0 axes"):
        load(path)


@pytest.mark.parametrize("entry", [0, 1, -1])
def test_a_shard_whose_hash_is_right_and_whose_windows_are_not(entry, tmp_path):
    write_cache(random_graph(CONFIG), torch.arange(60).reshape(5, 12), tmp_path, draws=20)
    shard = tmp_path / "shard-00000.bin"
    data = shard.read_bytes()
    begins = np.frombuffer(data[:48], "<i8").copy()
    begins[entry] = 2**40
    shard.write_bytes(begins.tobytes() + data[48:])
    index = json.loads((tmp_path / "index.json").read_text())
    index["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"shard-00000\.bin.*windows"):
        open_cache(tmp_path).target([0])


@pytest.mark.parametrize("name", ["../secret.safetensors", "{absolute}", "a/../../secret.safetensors"])
def test_an_index_reads_nothing_outside(name, tmp_path):
    folder = tmp_path / "model"
    as_hf(folder)
    (folder / "model.safetensors").unlink()
    save_file({"model.norm.weight": torch.full((32,), SECRET)}, tmp_path / "secret.safetensors")
    named = name.format(absolute=tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    with watching(folder) as watch, pytest.raises(InputError, match="inside the folder"):
        load(folder)
    assert not watch.faults


def test_half_a_surrogate_pair_is_refused_where_it_is_read(tmp_path):
    """JSON can say it, and no file that we write could."""
    path = tmp_path / "config.json"
    path.write_text('{"name": "\\ud83d\\ude00 \\\\ud800"}')
    assert read_json(path) == {"name": "😀 \\ud800"}
    path.write_text('{"name": "\\ud800"}')
    with pytest.raises(InputError, match="half of a surrogate pair"):
        read_json(path)
