"""GGUF headers with something changed: read as the file then says, or refused; never another model in silence.

`naive` reads the changed file a second time, by the format's description alone (docs/gguf.md of ggml): where this
library opens a file, its config and its weights are those that `naive` finds there.
"""

from __future__ import annotations

import random
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_cases import model_of
from mutator import COUNTS, some_bytes
from watch import watching

from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.hf import graph_from_model
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, shapes

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "initializer_range": 0.5}
IDS = torch.arange(20)[None] * 7 % 64
FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
STRING = 8
ARRAY = 9
BF16 = 30
SIZES = {0: np.dtype("<f4"), 1: np.dtype("<f2")}  # F32 and F16 by their numbers
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 16, 24, 64, 128, 0.5, 1.0, 2.0, 1e-5, 1e-3, 1e4, 1e6, *COUNTS)
TEXTS = ("", "none", "linear", "yarn", "longrope", "llama", "qwen2", "qwen3", "smollm3", "mamba")
_SUFFIXES = """
block_count embedding_length attention.head_count attention.head_count_kv attention.key_length attention.value_length
attention.layer_norm_rms_epsilon attention.sliding_window attention.sliding_window_pattern context_length
feed_forward_length rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor
rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_beta_fast expert_count logit_scale
attention.scale final_logit_softcapping vocab_size rope.scaling.whatever colour
"""
SUFFIXES = _SUFFIXES.split()
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class Header:
    """The parts of a GGUF file as lists that can be changed: pairs (key, type, value), tensors [name, dims, type,
    offset], and the data behind them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 4
        version, tensors, pairs = self.take("<I"), self.take("<Q"), self.take("<Q")
        assert data[:4] == b"GGUF" and version == 3
        self.pairs = [self.pair() for _ in range(pairs)]
        self.tensors = [self.tensor() for _ in range(tensors)]
        alignment = dict((key, value) for key, _, value in self.pairs).get("general.alignment", 32)
        self.rest = data[self.at + -self.at % alignment :]

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.take("<Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner = self.take("<I")
            return (inner, [self.value(inner) for _ in range(self.take("<Q"))])
        return self.take(FORMATS[kind])

    def pair(self) -> tuple[str, int, Any]:
        key = self.string()
        kind = self.take("<I")
        return key, kind, self.value(kind)

    def tensor(self) -> list[Any]:
        name = self.string()
        dims = [self.take("<Q") for _ in range(self.take("<I"))]
        return [name, dims, self.take("<I"), self.take("<Q")]

    def bytes(self, counts: tuple[int, int] | None = None) -> bytes:
        tensors, pairs = counts or (len(self.tensors), len(self.pairs))
        out = b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs)
        for key, kind, value in self.pairs:
            out += text(key) + struct.pack("<I", kind) + written(kind, value)
        for name, dims, kind, offset in self.tensors:
            out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        return out + bytes(-len(out) % 32) + self.rest


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string.encode())) + string.encode()


def written(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return text(value)
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(written(inner, item) for item in values)
    return struct.pack(FORMATS[kind], value)


def changed(good: bytes, architecture: str, draw: random.Random) -> bytes:
    """The file with one to three changes of its header, or some of its bytes, or its end cut off."""
    kind = draw.randrange(10)
    head = len(good) - len(Header(good).rest)
    if kind == 0:
        return good[: draw.randrange(len(good))]
    if kind == 1:
        return some_bytes(good, draw, head)
    header = Header(good)
    counts = None
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.randrange(10)
        pair = draw.randrange(len(header.pairs))
        tensor = draw.choice(header.tensors)
        if kind < 4:
            change_value(header, pair, draw)
        elif kind < 6:
            header.pairs.append((f"{architecture}.{draw.choice(SUFFIXES)}", *typed(draw)))
        elif kind == 6:
            del header.pairs[pair]
        elif kind == 7:
            tensor[1] = draw.choice((tensor[1][::-1], [*tensor[1], 1], [*tensor[1][:-1], draw.choice(COUNTS)], []))
        elif kind == 8:
            other = draw.choice(header.tensors)
            field = draw.choice((0, 2, 3))
            tensor[field] = draw.choice(
                (other[field], tensor[field], "x" if field == 0 else draw.choice((1, 2, 30, 64)))
            )
        else:
            counts = (len(header.tensors) + draw.choice((-1, 1, 2**40)), len(header.pairs) + draw.choice((-1, 0, 1)))
    return header.bytes(counts)


def change_value(header: Header, at: int, draw: random.Random) -> None:
    """Another value or another type of a key."""
    key, kind, value = header.pairs[at]
    if kind in FORMATS and draw.random() < 0.3:
        header.pairs[at] = (key, *fitting(draw.choice(list(FORMATS)), value))
    elif kind in FORMATS and draw.random() < 0.8:
        header.pairs[at] = (key, *fitting(kind, draw.choice(NUMBERS)))
    else:
        header.pairs[at] = (key, *typed(draw))


def typed(draw: random.Random) -> tuple[int, Any]:
    """A value of any type."""
    kind = draw.choice((*FORMATS, STRING, ARRAY))
    if kind == STRING:
        return kind, draw.choice(TEXTS)
    if kind == ARRAY:
        return kind, (4, [draw.choice((0, 1, 2, 24)) for _ in range(draw.choice((1, 4)))])
    return fitting(kind, draw.choice(NUMBERS))


def fitting(kind: int, value: float) -> tuple[int, Any]:
    """The value as a type can hold it; a wider type where it cannot."""
    try:
        number = float(value) if kind in (6, 12) else bool(value) if kind == 7 else int(value)
        struct.pack(FORMATS[kind], number)
    except (struct.error, OverflowError):
        return 12, float(value)
    return kind, number


def naive(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys by name without their architecture, and the float tensors by name, [rows, columns]."""
    header = Header(data)
    name = next(value for key, _, value in header.pairs if key == "general.architecture")
    keys = {key.removeprefix(f"{name}."): value for key, _, value in header.pairs}
    tensors = {}
    for tensor, dims, kind, offset in header.tensors:
        if kind in SIZES:
            values = np.frombuffer(header.rest, SIZES[kind], int(np.prod(dims)), offset).astype(np.float32)
        elif kind == BF16:
            halves = np.frombuffer(header.rest, "<u2", int(np.prod(dims)), offset)
            values = (halves.astype(np.uint32) << 16).view(np.float32)
        else:
            per_block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
            stored = np.frombuffer(header.rest, np.uint8, int(np.prod(dims)) // per_block * size, offset)
            values = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(kind))
        tensors[tensor] = values.reshape(dims[::-1])
    return keys | {"architecture": name}, tensors


def parameter(name: str) -> str:
    """The name that the graph has for a tensor."""
    *layer, part, ending = name.split(".")
    return f"model.layers.{layer[1]}.{NAMES[part]}.{ending}" if layer else f"{NAMES[part]}.{ending}"


def check_same(graph: Any, data: bytes) -> None:
    """The config and the weights of a graph are those of the naive reading."""
    keys, tensors = naive(data)
    config: Config = graph.config
    first = config.layers[0]
    heads = one(keys["attention.head_count"])
    for found, expected in (
        (config.n_layers, keys["block_count"]),
        (config.hidden_size, keys["embedding_length"]),
        (first.n_heads, heads),
        (first.n_kv_heads, one(keys.get("attention.head_count_kv", heads))),
        (first.ffn_dim, one(keys["feed_forward_length"])),
        (config.head_dim, keys.get("attention.key_length", keys["embedding_length"] // max(1, int(heads)))),
        (first.window or 0, keys.get("attention.sliding_window", 0) if pattern(keys) else 0),
    ):
        assert found == expected
    assert config.norm_eps == pytest.approx(keys["attention.layer_norm_rms_epsilon"], rel=1e-6)
    assert config.rope.theta == pytest.approx(keys.get("rope.freq_base", 1e4), rel=1e-6)
    if config.rope.type != "yarn":
        assert config.max_position == keys["context_length"]
    factor = keys.get("rope.scaling.factor") or 1.0
    if config.rope.type in ("linear", "yarn"):
        assert config.rope.factor == pytest.approx(factor, rel=1e-6)
    elif keys.get("rope.scaling.type") != "none":
        assert factor == 1.0 or config.rope.type == "longrope"
    neighbours = keys["architecture"] in ("llama", "smollm3", "deci")
    named = {name for name, *_ in Header(data).tensors if not name.startswith("rope_")}  # of other types too
    assert {parameter(name) for name in named} == set(shapes(config))
    for name, expected in tensors.items():
        if name.startswith("rope_"):
            continue
        count = first.n_heads if ".attn_q." in name else first.n_kv_heads
        if neighbours and name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
            pairs = expected.reshape(count, config.head_dim // 2, 2, *expected.shape[1:])
            expected = pairs.swapaxes(1, 2).reshape(expected.shape)
        assert np.array_equal(graph.tensor(parameter(name)).numpy(), expected, equal_nan=True), name


def one(value: Any) -> Any:
    """The first of one number for each layer, or the number for all."""
    return value[1][0] if isinstance(value, tuple) else value


def pattern(keys: dict[str, Any]) -> bool:
    """Whether the first layer has the window."""
    value = keys.get("attention.sliding_window_pattern", True)
    if isinstance(value, tuple):
        return bool(value[1][0])
    return value if isinstance(value, bool) else value != 1


def check(case: str, count: int, folder: Path) -> dict[str, int]:
    """How many of `count` changed files are read, read with the logits of the good one, and refused."""
    graph = graph_from_model(model_of(case, **SMALL))
    path = folder / "m.gguf"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(graph, path, format="gguf")
    good = path.read_bytes()
    base = load(path)
    architecture = naive(good)[0]["architecture"]
    counts = {"read": 0, "with the same logits": 0, "refused": 0}
    with torch.no_grad():
        expected = base.module()(IDS)
    for number in range(count):
        data = changed(good, architecture, random.Random(f"{case} {number}"))
        path.unlink()
        path.write_bytes(data)
        with watching(folder) as watch:
            try:
                found = load(path)
                weights = [found.tensor(name) for name in found.weights]
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                found = None
        assert not watch.faults and watch.seconds < 5 and watch.peak < 32 * 2**20, (case, number)
        if found is None:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        try:
            check_same(found, data)
        except BaseException as error:
            error.add_note(f"{case}, number {number}")
            raise
        same = found.config == base.config and found.fingerprint() == base.fingerprint()
        if same and all(torch.isfinite(weight).all() for weight in weights):
            with torch.no_grad():
                assert torch.equal(found.module()(IDS), expected)
            counts["with the same logits"] += 1
    return counts


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_changed_headers_are_read_as_they_say_or_refused(case, tmp_path):
    counts = check(case, 60, tmp_path)
    assert counts["refused"] > 10 and counts["read"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_two_thousand_changed_headers(case, tmp_path):
    counts = check(case, 2000, tmp_path)
    print(case, counts)
    assert counts["refused"] > 300 and counts["with the same logits"] > 50
