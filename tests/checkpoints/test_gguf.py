"""GGUF files, written here with the gguf package's own writer: every layout it may hold, and what is refused."""

import dataclasses
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import random_graph
from gguf_files import permute, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinycompress.checkpoints.checkpoint import load
from tinycompress.checkpoints.gguf_reader import load_gguf, unpermute
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.rope import Rope

WIDE = Config(
    vocab_size=64, hidden_size=256, head_dim=32, layers=(Layer(8, 2, 256),), max_position=64
)  # rows of one K-quant block
Q = gguf.GGMLQuantizationType
IDS = torch.arange(32)[None]


def test_unpermute_is_the_inverse_of_llama_cpps_permute():
    for heads, rows in ((4, 64), (1, 8), (9, 9 * 64)):
        array = np.random.default_rng(0).normal(size=(rows, 5))
        assert np.array_equal(unpermute(permute(array, heads), heads), array)
        assert heads * 2 == rows or not np.array_equal(permute(array, heads), array)


@pytest.mark.parametrize("which", ["tiny", "nonuniform"])
def test_float32_is_exact(which, request, tmp_path):
    graph = request.getfixturevalue(which)
    back = load(write(tmp_path / "m.gguf", graph))
    assert back.config == graph.config
    assert back.fingerprint() == graph.fingerprint()
    assert torch.equal(back.module()(IDS), graph.module()(IDS))


def test_tied_head_biases_and_dtype(tmp_path):
    config = dataclasses.replace(
        WIDE, tie_embeddings=True, biases=frozenset({"q_proj", "k_proj", "down_proj"}), bos_token_id=1, eos_token_id=2
    )
    graph = random_graph(config)

    def ids(writer):
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    path = write(tmp_path / "m.gguf", graph, metadata=ids)
    assert load(path).config == config
    assert load(path).fingerprint() == graph.fingerprint()
    half = load(path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_that_the_library_can_write(kind, tmp_path):
    graph = random_graph(WIDE)

    def encode(name, array):
        if array.ndim == 1:
            return array, None
        return gguf.quants.quantize(array, Q[kind]), Q[kind]

    back = load(write(tmp_path / "m.gguf", graph, encode))
    for name, weight in graph.weights.items():
        error = (back.weights[name] - weight).abs().max().item()
        bits = {"F16": 11, "BF16": 8, "Q8_0": 7}.get(kind, int(kind[1]) - 1 if kind[0] == "Q" else 8)
        assert error <= weight.abs().max().item() * 2.0**-bits, (name, error)
        assert weight.dim() == 1 or error > 0


def llama3_divisors(factor, length=8192, head_dim=32, theta=5e5):
    return (Rope(theta).inv_freq(head_dim) / Rope(theta, "llama3", factor, length).inv_freq(head_dim)).numpy()


ROPES = {
    "linear": (
        Rope(1e4, "linear", 2.0),
        lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(2.0)),
        (),
    ),
    "none": (Rope(1e4), lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), ()),
    "yarn": (
        Rope(1e4, "yarn", 4.0, 16),
        lambda w: (
            w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            w.add_rope_scaling_factor(4.0),
            w.add_rope_scaling_orig_ctx_len(16),
        ),
        (),
    ),
    "llama3": (Rope(5e5, "llama3", 32.0, 8192), lambda w: None, (("rope_freqs.weight", llama3_divisors(32.0)),)),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(name, tmp_path):
    rope, metadata, extra = ROPES[name]
    graph = random_graph(dataclasses.replace(WIDE, rope=rope))
    back = load(write(tmp_path / "m.gguf", graph, metadata=metadata, extra=extra))
    assert back.config == graph.config


REFUSED = {
    "another architecture": (
        {"architecture": "gemma2"},
        r"general.architecture.*gemma2.*llama \| qwen2 \| qwen3 \| smol",
    ),
    "experts": ({"metadata": lambda w: w.add_expert_count(8)}, "expert_count"),
    "partial rotary": ({"metadata": lambda w: w.add_rope_dimension_count(16)}, "rope.dimension_count"),
    "longrope": ({"metadata": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)}, "rope.scaling.type"),
    "too few divisors": ({"extra": (("rope_freqs.weight", np.ones(15, np.float32)),)}, "rope_freqs.weight"),
    "unknown tensor": ({"extra": (("blk.0.attn_q_norm.weight", np.ones(32, np.float32)),)}, "attn_q_norm"),
    "widths a layer": ({"ffn": [256, 256]}, "feed_forward_length.*2 numbers"),
    "a wrong width": ({"ffn": 255}, "255"),
    "integers": ({"encode": lambda n, a: (a.astype(np.int32), None) if a.ndim == 2 else (a, None)}, "I32"),
    "an unknown type": (
        {"encode": lambda n, a: (np.zeros((len(a), 292), np.uint8), Q.Q8_K) if a.ndim == 2 else (a, None)},
        "Q8_K",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_plain_llama_is_refused(name, tmp_path):
    changes, message = REFUSED[name]
    path = write(tmp_path / "m.gguf", random_graph(WIDE), **changes)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_tensors_and_files(tmp_path):
    graph = random_graph(WIDE)

    path = write(tmp_path / "m.gguf", graph)
    data = path.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight")
    path.write_bytes(data)
    with pytest.raises(InputError, match="ffn_up"):
        load(path)
    with pytest.raises(InputError, match="no such file"):
        load_gguf(tmp_path / "none.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    config = Config(vocab_size=32, hidden_size=16, head_dim=8, layers=(Layer(2, 1, 16),), max_position=64)
    path = write(tmp_path_factory.mktemp("gguf") / "m.gguf", random_graph(config))
    return path.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused(small_file, tmp_path, data):
    head = 1500  # metadata and tensor descriptions
    damaged = bytearray(small_file)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, head))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged) - 1))]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"damaged\.gguf"):  # it is always shorter than it should be
        load(path)


def test_hostile_counts_end_at_once(small_file, tmp_path):
    for at in (8, 16):  # tensor count, metadata count
        path = tmp_path / "hostile.gguf"
        path.write_bytes(small_file[:at] + struct.pack("<Q", 2**60) + small_file[at + 8 :])
        with pytest.raises(InputError, match="hostile"):
            load(path)


def test_smollm2(smollm2):
    assert smollm2.config.n_params == 134_515_008 and smollm2.config.tie_embeddings
    assert smollm2.config.norm_eps == 1e-5 and smollm2.config.rope.theta == 100000.0
    assert set(smollm2.weights) == set(shapes(smollm2.config))
    prompt = smollm2.tokenizer.encode("The capital of France is")
    text = smollm2.tokenizer.decode(smollm2.module().generate(torch.tensor(prompt), 4).tolist())
    assert "Paris" in text  # greedy, and wrong at once if q and k rows were left interleaved
