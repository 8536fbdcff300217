"""GGUF files in parts, of another byte order, and damaged ones: time and memory stay small, errors name the file."""

import dataclasses
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from conftest import random_graph
from gguf_files import split, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.checkpoint import load
from tinycompress.checkpoints.gguf_reader import load_gguf
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer

SMALL = Config(vocab_size=32, hidden_size=16, head_dim=8, layers=(Layer(2, 1, 16),) * 2, max_position=64)
KINDS = gguf.GGUFValueType


def vocabulary(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_scores([float(-i) for i in range(32)])


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_file_in_parts_by_any_of_them(given, tmp_path):
    graph = random_graph(dataclasses.replace(SMALL, bos_token_id=1, eos_token_id=2))  # as "llama" vocabularies have
    paths = split(write(tmp_path / "m.gguf", graph, metadata=vocabulary), 3)
    back = load(paths[given])
    assert back.fingerprint() == graph.fingerprint() and back.tokenizer.vocab_size == 32


def test_parts_that_are_missing_or_do_not_belong(tmp_path):
    graph = random_graph(SMALL)
    paths = split(write(tmp_path / "m.gguf", graph), 3)
    kept = {path: path.read_bytes() for path in paths}
    paths[2].unlink()
    with pytest.raises(InputError, match=r"m-00001-of-00003\.gguf.*no m-00003-of-00003\.gguf \(1 of 3 parts missing\)"):
        load(paths[0])
    paths[2].write_bytes(kept[paths[1]])
    with pytest.raises(InputError, match=r"split\.no in .*m-00003-of-00003\.gguf: found 1; accepted: 2"):
        load(paths[0])
    paths[2].write_bytes(kept[paths[2]][: len(kept[paths[2]]) // 2])
    with pytest.raises(InputError, match=r"m-00003-of-00003\.gguf"):
        load(paths[0])
    other = tmp_path / "other.gguf"
    other.write_bytes(kept[paths[0]])
    with pytest.raises(InputError, match=r"other\.gguf, with split\.count 3.*-00001-of-00003\.gguf"):
        load(other)


def test_tensors_twice_and_too_few(tmp_path):
    graph = random_graph(SMALL)
    first, second = split(write(tmp_path / "m.gguf", graph), 2)
    whole = write(
        tmp_path / "whole.gguf", graph, metadata=lambda w: (w.add_uint16("split.count", 2), w.add_uint16("split.no", 1))
    )
    kept = second.read_bytes()
    second.write_bytes(whole.read_bytes())
    with pytest.raises(InputError, match=r"which another part holds too"):
        load(first)
    second.write_bytes(kept)
    data = first.read_bytes()
    at = data.index(b"split.tensors.count") + len("split.tensors.count") + 4
    first.write_bytes(data[:at] + struct.pack("<i", 99) + data[at + 4 :])
    with pytest.raises(InputError, match=r"split\.tensors\.count, 99"):
        load(first)


def test_a_big_endian_file_is_refused_in_one_line(tmp_path):
    path = write(tmp_path / "m.gguf", random_graph(SMALL), endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(InputError, match=r"m\.gguf: found a big-endian GGUF file.*gguf-convert-endian") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    graph = random_graph(dataclasses.replace(SMALL, bos_token_id=1))
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", graph, metadata=vocabulary).read_bytes()


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::UserWarning")  # keys whose names were damaged are named
def test_a_damaged_header_is_read_or_refused(small_file, tmp_path, data):
    """Bytes changed, a huge number put in, or the end cut off: an InputError with the file's name, or a graph."""
    damaged = bytearray(small_file)
    head = small_file.index(b"token_embd.weight") + 400
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, head))
        new = data.draw(
            st.binary(min_size=1, max_size=1)
            | st.sampled_from([struct.pack("<Q", n) for n in (2**20, 2**31, 2**40, 2**63, 2**64 - 1)])
        )
        damaged[at : at + len(new)] = new
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        graph = load(path)
    except InputError as error:
        assert "damaged.gguf" in str(error)
    else:
        assert all(np.prod(tensor.shape) < 10**6 for tensor in graph.weights.values())
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 50 * 2**20


def header(pairs: bytes, tensors: int, n_pairs: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, n_pairs) + pairs


def pair(key: bytes, kind: KINDS, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def array(kind: KINDS, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


HOSTILE = {
    "an array of bytes as long as the file": (
        header(pair(b"a", KINDS.ARRAY, array(KINDS.UINT8, 2**24)), 0, 1),
        "array of 16777216",
    ),
    "an array of empty strings": (
        header(pair(b"a", KINDS.ARRAY, array(KINDS.STRING, 2**22)), 0, 1),
        "array of 4194304",
    ),
    "arrays in arrays": (header(pair(b"a", KINDS.ARRAY, array(KINDS.ARRAY, 1) * 2000), 0, 1), "type ARRAY"),
    "tensors without end": (header(b"", 2**23, 0), "8388608 tensors"),
    "a tensor of many axes": (header(struct.pack("<Q1sI", 1, b"a", 2**20), 1, 0), "1048576 axes"),
    "a count of keys": (header(b"", 0, 2**60), "Duplicate"),
    "a string without end": (header(struct.pack("<Q", 2**63), 0, 1), "bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_counts_that_a_large_file_would_hold_make_nothing(name, tmp_path):
    """Numbers that stay inside a file of 32 MB of zeros, so that its end does not stop them."""
    start, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(2**25)  # a hole: no disk space
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"hostile\.gguf.*{message}"):
        load_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
