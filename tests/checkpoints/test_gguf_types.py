"""Every type of block that is read, against scalar loops over ggml's structs or the gguf package on random blocks."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from conftest import random_graph
from gguf_files import write

from tinycompress.checkpoints.checkpoint import load
from tinycompress.checkpoints.gguf_reader import FLOATS, TYPES, dequantized, unpermute
from tinycompress.graph.config import Config, Layer

Q = gguf.GGMLQuantizationType
WIDE = Config(vocab_size=64, hidden_size=256, head_dim=32, layers=(Layer(8, 2, 256),), max_position=64)
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
HALVES = {  # where a block keeps its float16 scales, in bytes; those of IQ1_M are spread over other fields
    **{"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,)},
}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 1) -> np.ndarray:
    """Rows of random bytes, the scales of their blocks moderate numbers."""
    block, size = gguf.GGML_QUANT_SIZES[Q[kind]]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for at in HALVES.get(kind, ()):
        data[:, at : at + 2] = rng.uniform(0.01, 0.1, (len(data), 1)).astype("<f2").view(np.uint8)
    if kind == "IQ1_M":  # the high halves of four 16-bit fields
        half = rng.uniform(0.01, 0.1, len(data)).astype("<f2").view("<u2").astype(np.uint16)
        for index in range(4):
            nibble = (half >> (4 * index)) & 15
            data[:, 49 + 2 * index] = (data[:, 49 + 2 * index] & 15) | (nibble << 4).astype(np.uint8)
    if kind == "MXFP4":  # a power of two
        data[:, 0] = rng.integers(120, 130, len(data))
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in FLOATS])
def test_a_file_of_random_blocks(kind, tmp_path):
    graph = random_graph(WIDE)
    floats = {}

    def encode(name, array):
        if array.ndim == 1:
            return array, None
        data = random_blocks(kind, *array.shape)
        floats[name] = torch.from_numpy(gguf.quants.dequantize(data, Q[kind]))
        return data, Q[kind]

    back = load(write(tmp_path / "m.gguf", graph, encode))
    for name, expected in floats.items():
        heads = {"q_proj": 8, "k_proj": 2}.get(name.split(".")[-2])
        expected = torch.from_numpy(unpermute(expected.numpy(), heads)) if heads else expected
        assert torch.equal(back.weights[name], expected)
        assert expected.isfinite().all() and expected.std() > 0.01


def iq4_nl(block: bytes) -> list[float]:
    """ggml's block_iq4_nl, one value at a time."""
    (d,) = struct.unpack_from("<e", block)
    return [d * IQ4[byte & 15] for byte in block[2:]] + [d * IQ4[byte >> 4] for byte in block[2:]]


def iq4_xs(block: bytes) -> list[float]:
    """ggml's block_iq4_xs: eight groups of 32, each with a scale of six bits."""
    d, high = struct.unpack_from("<eH", block)
    low, qs = block[4:8], block[8:]
    out = []
    for group in range(8):
        scale = (low[group // 2] >> 4 * (group % 2)) & 15 | ((high >> 2 * group) & 3) << 4
        own = qs[16 * group : 16 * group + 16]
        step = np.float32(d) * np.float32(scale - 32)
        out += [step * IQ4[byte & 15] for byte in own] + [step * IQ4[byte >> 4] for byte in own]
    return out


@pytest.mark.parametrize("kind, decode", [("IQ4_NL", iq4_nl), ("IQ4_XS", iq4_xs)])
def test_four_bits_of_a_codebook_by_scalar_loops(kind, decode):
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    data = random_blocks(kind, 3, 512)
    ours = dequantized(data, Q[kind], torch.float32)
    blocks = [decode(bytes(block)) for block in data.reshape(-1, size)]
    assert torch.equal(ours, torch.tensor(blocks, dtype=torch.float32).reshape(3, 512))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_read_in_the_memory_of_itself(dtype, monkeypatch):
    """In steps, of which the last is a short one; numpy's memory for the pieces is that of a step."""
    monkeypatch.setattr("tinycompress.checkpoints.gguf_reader.STEP", 2**15)
    data = random_blocks("Q4_K", 1001, 1024)
    expected = torch.from_numpy(gguf.quants.dequantize(data, Q.Q4_K)).to(dtype)
    tracemalloc.start()
    ours = dequantized(data, Q.Q4_K, dtype)
    peak = tracemalloc.get_traced_memory()[1]  # of numpy; torch's own memory is not traced
    tracemalloc.stop()
    assert torch.equal(ours, expected) and peak < 2**15 * 4 * 8
