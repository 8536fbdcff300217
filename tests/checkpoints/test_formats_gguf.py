"""GGUF files: blocks against scalar loops written from ggml's structs, and back through the reader of GGUF files."""

import dataclasses
import json
import struct

import gguf
import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tinycompress.calibration import data
from tinycompress.checkpoints.checkpoint import load, save
from tinycompress.checkpoints.gguf_tokenizer import tokenizer_fields
from tinycompress.checkpoints.gguf_writer import blocks, kind_of, write_gguf
from tinycompress.checkpoints.tokenizer import Tokenizer
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.quantization.embedding import QuantizeEmbedding
from tinycompress.quantization.rtn import RTN, rtn_quantize

CONFIG = Config(vocab_size=96, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
IDS = torch.arange(24)[None]
SAMPLE = "One day, a 42-year-old cat's naïve  plan\nfell apart; 漢字 went along 👋."
TEXT = data.text("pydoc")[:40_000]


def halves(graph):
    """Scales that float16 holds, so that nothing is rounded on the way."""
    packed = {n: w for n, w in graph.weights.items() if isinstance(w, QuantTensor)}
    return graph.replace(weights={n: dataclasses.replace(w, scales=w.scales.half().float()) for n, w in packed.items()})


def quantized(grid, config=CONFIG):
    return halves(RTN(QuantSpec.parse(grid))(random_graph(config)))


def decode(row: bytes, kind: str) -> list[float]:
    """ggml's block_q4_0, block_q4_1 and block_q8_0, one value at a time."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    out = []
    for at in range(0, len(row), size):
        (d,) = struct.unpack_from("<e", row, at)
        if kind == "Q8_0":
            out += [d * q for q in struct.unpack_from("<32b", row, at + 2)]
            continue
        m = struct.unpack_from("<e", row, at + 2)[0] if kind == "Q4_1" else -8 * d
        body = row[at + size - 16 : at + size]
        out += [(byte & 15) * d + m for byte in body] + [(byte >> 4) * d + m for byte in body]
    return out


GRIDS = ["w4g32", "w4g64", "w4", "w3g32", "w2g64", "w4g32-asym", "w3g64-asym", "w2g64-floatzero", "w8g32", "w8"]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(1, 5), st.integers(0, 99))
def test_blocks_mean_the_weight(text, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = rtn_quantize(torch.randn(rows, 128, generator=generator), QuantSpec.parse(text))
    signs = torch.where(torch.rand(weight.scales.shape, generator=generator) < 0.5, -1.0, 1.0)
    weight = dataclasses.replace(weight, scales=weight.scales.half().float() * signs)
    kind = kind_of("w", weight)
    four_bits = "Q4_1" if "asym" in text or "zero" in text else "Q4_0"
    assert kind == ("Q8_0" if "w8" in text else four_bits)
    ours = torch.tensor([decode(bytes(row), kind) for row in blocks("w", weight)])
    exact = weight.dequantize()
    if kind == "Q4_1":  # its minimum is rounded to float16
        reach = 15 if weight.zeros is None else weight.zeros.float().abs().max().clamp_min(15)
        assert (ours - exact).abs().max() <= reach * weight.scales.abs().max() * 2.0**-11
    else:
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("grid", ["w4g32", "w4", "w8g32", "w4g32-asym", "w3g32"])
def test_a_file_reads_back_as_the_same_function(grid, tmp_path):
    graph = quantized(grid)
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    back = load(path)
    assert back.config == graph.config
    for name, weight in graph.dense().weights.items():  # rows of q and k came back to their places
        limit = 2e-3 if "asym" in grid else 0
        assert (back.weights[name] - weight).abs().max().item() <= limit
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.attn_norm.weight"] == kinds["token_embd.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == {"w8g32": "Q8_0", "w4g32-asym": "Q4_1"}.get(grid, "Q4_0")


def test_packed_embeddings_tied_heads_and_biases(tmp_path):
    biases = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
    config = dataclasses.replace(CONFIG, tie_embeddings=True, biases=biases, bos_token_id=1, eos_token_id=2)
    graph = halves(QuantizeEmbedding(QuantSpec(8, 32))(quantized("w4g32", config)))
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    back = load(path)
    assert torch.equal(back.module()(IDS), graph.dense().module()(IDS))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_q.bias"] == "F32" and "output.weight" not in kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_graphs_keep_their_dtype(dtype, tmp_path):
    graph = random_graph(CONFIG).dense(dtype)
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    assert load(path, dtype=dtype).fingerprint() == graph.replace().fingerprint()
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert {t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2} == {kind}


ROPES = [
    Rope(5e4),
    Rope(1e4, "linear", 2.0),
    Rope(1e4, "yarn", 4.0, 16),
    Rope(1e4, "yarn", 4.0, 16, 1.5),
    Rope(5e5, "llama3", 8.0, 8192),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.type)
def test_positions_come_back(rope, tmp_path):
    graph = random_graph(dataclasses.replace(CONFIG, rope=rope))
    back = load(save(graph, tmp_path / "m.gguf", format="gguf"))
    assert back.config.rope.type == rope.type and back.config.rope.attention_scale() == pytest.approx(
        rope.attention_scale(), rel=1e-6
    )
    assert torch.allclose(back.module()(IDS), graph.module()(IDS), atol=1e-4)


def sentencepiece() -> Tokenizer:
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        TEXT.split("\n"), trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    model = json.loads(backend.to_str())
    model["added_tokens"] = [token for token in model["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer(
        Backend.from_str(json.dumps(model)), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )


def byte_level(steps) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = steps
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return Tokenizer(backend, {"eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"})


STEPS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("kind", ["llama", *STEPS])
def test_tokenizers_come_back(kind, tmp_path):
    tokenizer = sentencepiece() if kind == "llama" else byte_level(STEPS[kind])
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size + 5, pad_token_id=0)
    graph = dataclasses.replace(random_graph(config), tokenizer=tokenizer)
    path = save(graph, tmp_path / "m.gguf", format="gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["tokenizer.ggml.model"] == ("llama" if kind == "llama" else "gpt2")
    assert fields.get("tokenizer.ggml.pre", "llama") == kind and fields["tokenizer.ggml.token_type"][-5:] == [5] * 5
    back = load(path).tokenizer
    for text in (SAMPLE, TEXT[:5000]):
        assert back.encode(text) == tokenizer.encode(text)
        assert back.decode(back.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize(
    "eos, expected",
    [(None, 0), (7, 7), ((9, 0, 7), (0, 9, 7)), ((9, 7), (9, 7))],
    ids=["the tokenizer's", "the config's", "the tokenizer's first", "not the tokenizer's"],
)
def test_every_end_is_written(eos, expected, tmp_path):
    """The tokenizer's own end is 0, <|end|>."""
    tokenizer = byte_level(STEPS["gpt-2"])
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, eos_token_id=eos)
    graph = random_graph(config).replace(tokenizer=tokenizer)
    assert load(save(graph, tmp_path / "m.gguf", format="gguf")).config.eos_token_id == expected
    bare = dataclasses.replace(graph, tokenizer=None)
    read = load(save(bare, tmp_path / "bare.gguf", format="gguf")).config.eos_token_id
    assert read == eos
    many = graph.replace(config=dataclasses.replace(config, eos_token_id=(1, 2, 3, 4)))
    with pytest.warns(UserWarning, match=r"3 ids that end a text: not \[4\]"):
        save(many, tmp_path / "many.gguf", format="gguf")


def test_named_chat_templates_are_written():
    tokenizer = byte_level(STEPS["gpt-2"])
    tokenizer.config["chat_template"] = {"default": "a", "tool_use": "b"}
    fields = tokenizer_fields(tokenizer, dataclasses.replace(CONFIG, vocab_size=600))
    assert fields["tokenizer.chat_template"] == "a" and fields["tokenizer.chat_templates"] == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"] == "b"


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    graph = random_graph(dataclasses.replace(CONFIG, eos_token_id=CONFIG.vocab_size))
    with pytest.raises(InputError, match=r"ids beyond the vocabulary.*eos_token_id"):
        save(graph, tmp_path / "m.gguf", format="gguf")


def test_a_tokenizer_that_gguf_cannot_say_is_refused():
    odd = byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )
    with pytest.raises(InputError, match=r"split by \['Punctuation', 'ByteLevel'\].*smollm"):
        tokenizer_fields(odd, dataclasses.replace(CONFIG, vocab_size=600))
    normalized = byte_level(STEPS["gpt-2"])
    normalized.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="no words for"):
        tokenizer_fields(normalized, dataclasses.replace(CONFIG, vocab_size=600))


def test_groups_that_no_block_holds_are_refused_or_requantized(tmp_path):
    for grid, message in (("w4g16", "groups of 16.*multiples of 32"), ("w8g32-asym", "zero points")):
        graph = quantized(grid)
        with pytest.raises(InputError, match=rf"proj.*{message}.*requantize"):
            save(graph, tmp_path / "m.gguf", format="gguf")
        assert not list(tmp_path.iterdir())
        back = load(write_gguf(graph, tmp_path / f"{grid}.gguf", requantize="Q8_0"))
        (tmp_path / f"{grid}.gguf").unlink()
        name = "model.layers.0.self_attn.q_proj.weight"
        exact = graph.weights[name].dequantize()
        assert 0 < (back.weights[name] - exact).abs().max() <= exact.abs().max() / 127
    with pytest.raises(InputError, match=r"requantize.*'Q9'.*Q8_0"):
        write_gguf(graph, tmp_path / "m.gguf", requantize="Q9")


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: random_graph(dataclasses.replace(CONFIG, layers=(Layer(4, 2, 96), Layer(4, 2, 0)))),
            "without an FFN",
        ),
        (lambda: random_graph(dataclasses.replace(CONFIG, rope=Rope(1e4, "dynamic", 2.0, 64))), "dynamic"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(make, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save(make(), tmp_path / "m.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_files_are_not_overwritten_unasked_nor_left_in_part(tmp_path, monkeypatch):
    graph = quantized("w4g32")
    path = tmp_path / "m.gguf"
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        save(graph, tmp_path / "m", format="gguf")
    save(graph, path, format="gguf")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"exists.*overwrit"):
        save(graph, path, format="gguf")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(OSError):
        save(graph, path, format="gguf", overwrite=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_stories(shared, tmp_path):
    """A real model: its text is the same, before the file and behind it."""
    graph = load(shared / "models" / "stories260K")
    for i in range(graph.config.n_layers):
        graph = cut(graph, f"layers.{i}.ffn", range(160))
    graph = halves(QuantizeEmbedding(QuantSpec(8, 32))(RTN(QuantSpec(8, 32))(graph)))
    back = load(save(graph, tmp_path / "m.gguf", format="gguf"))
    ids = torch.tensor(graph.tokenizer.encode("Once upon a time", add_special_tokens=True))
    assert back.tokenizer.encode("Once upon a time", add_special_tokens=True) == ids.tolist()
    text = graph.tokenizer.decode(graph.dense().module().generate(ids, 40).tolist())
    assert back.tokenizer.decode(back.module().generate(ids, 40).tolist()) == text and "little girl" in text
