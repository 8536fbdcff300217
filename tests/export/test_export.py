"""Graph → ONNX → ONNX Runtime, onnxruntime-genai and Optimum: the same logits, the same tokens, the same bytes."""

import dataclasses

import pytest
import torch
from exported import DENSE, MIXED, YARN, assert_same_everywhere, ids_of, operators, proto, quantized, small

from tinycompress.errors import InputError
from tinycompress.export import ORT, PROFILES, OrtModel, emit, export, prepare, read
from tinycompress.export.read import initializers
from tinycompress.graph.config import Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.graph.rope import Rope

LLAMA3 = Rope(type="llama3", factor=4.0, original_max_position=32)


@pytest.mark.parametrize("changes", DENSE.values(), ids=DENSE)
def test_dense(changes, tmp_path):
    assert_same_everywhere(small(**changes), tmp_path / "out")


@pytest.mark.parametrize(
    "spec",
    [
        "w4g32",
        "w4g64",
        "w4g32-asym",
        "w4",
        "w4-asym",
        "w8g32",
        "w8g16-asym",
        "w2g32",
        "w2g16-asym",
        "w3g32",
        "w3g32-asym",
        "w3",
    ],
)
def test_quantized(spec, tmp_path):
    layers = (Layer(4, 2, 192), Layer(4, 2, 64), Layer(0, 0, 128), Layer(4, 4, 0))
    graph = quantized(small(layers=layers, biases=frozenset({"q_proj", "down_proj"})), spec)
    if "asym" not in spec:
        assert any((w.scales < 0).any() for w in graph.weights.values() if isinstance(w, QuantTensor))
    assert_same_everywhere(graph, tmp_path / "out")


@pytest.mark.parametrize("K", [144, 96, 200, 8, 13])  # 16·9, 32·3, 8·25, shorter than a block, odd
@pytest.mark.parametrize("spec", ["w4", "w8-asym", "w3"])
def test_per_channel_of_any_width(K, spec, tmp_path):
    graph = quantized(small(layers=(Layer(4, 2, K),)), spec)
    assert_same_everywhere(graph, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spec", ["w4g32", "w8g32-asym", "w3g16-asym", "w4-asym"])
def test_quantized_embedding_and_head(spec, tied, tmp_path):
    graph = quantized(small(tie_embeddings=tied), spec, embedding=True)
    assert_same_everywhere(graph, tmp_path / "out")
    assert "GatherBlockQuantized" in operators(tmp_path / "out")
    assert not any(t.dtype == torch.float32 and t.numel() == 128 * 64 for t in initializers(tmp_path / "out").values())


ROPES = {
    "linear": Rope(type="linear", factor=4.0, original_max_position=32),
    "yarn": YARN,
    "llama3": LLAMA3,
    "NTK-aware": Rope(theta=80000.0, original_max_position=32),
    "yarn, factor given": dataclasses.replace(YARN, attention_factor=1.7),
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_beyond_the_original_context(rope, tmp_path):
    graph = small(rope=rope, max_position=128)
    assert_same_everywhere(graph, tmp_path / "out", T=128)
    plain = dataclasses.replace(graph.config, rope=Rope())  # the scaling reaches the logits: without it they differ
    difference = Graph(plain, graph.weights).module()(ids_of(graph, 128)) - graph.module()(ids_of(graph, 128))
    assert difference[:, 32:].abs().max() > 1e-2


def test_dtypes(tmp_path):
    base = small()
    half = Graph(base.config, {n: w.to(torch.bfloat16) for n, w in base.weights.items()}, history=("bf16",))
    assert_same_everywhere(half, tmp_path / "bf16")
    graph = quantized(small(), "w4g32")
    packed_half = graph.replace(
        weights={n: w.to(dtype=torch.float16) for n, w in graph.weights.items() if isinstance(w, QuantTensor)}
    )
    assert_same_everywhere(packed_half, tmp_path / "fp16-scales")
    manifest = export(graph, tmp_path / "dense", dtype="float32", check=False)
    assert (
        manifest["scheme"] == "float32"
        and manifest["quantized"] == {}
        and "MatMulNBits" not in operators(tmp_path / "dense")
    )
    ids = ids_of(graph, 12)
    torch.testing.assert_close(OrtModel(tmp_path / "dense")(ids), graph.module()(ids), atol=1e-4, rtol=0)
    assert read(tmp_path / "dense").fingerprint() == prepare(graph, "float32").fingerprint()


def test_cache_entries_count_attention_layers(nonuniform, tmp_path):
    export(nonuniform, tmp_path / "out", check=False)
    names = [node.name for node in proto(tmp_path / "out").graph.output]
    assert names == ["logits"] + [
        f"present.{j}.{kind}" for j in range(4) for kind in ("key", "value")
    ]  # four layers have attention


def test_generate_and_steps(tmp_path):
    graph = small()
    export(graph, tmp_path / "out", check=False)
    model, prompt, seen = OrtModel(tmp_path / "out"), ids_of(graph, 6), []
    assert (
        model.generate(prompt, 20, on_token=seen.append, stop=()).tolist()
        == graph.module().generate(prompt, 20, stop=()).tolist()
        == seen
    )
    sampled = dict(temperature=0.9, top_k=20, top_p=0.9, seed=3, stop=())
    assert torch.equal(model.generate(prompt, 20, **sampled), graph.module().generate(prompt, 20, **sampled))
    assert len(model.generate(ids_of(graph, 64), 5, stop=())) == 1  # the context is full after one
    batch = ids_of(graph, 10, B=3)
    torch.testing.assert_close(model(batch), graph.module()(batch), atol=1e-4, rtol=0)
    assert model.tokens_per_second(8, 8) > 0
    with pytest.raises(InputError, match="at most 64: the rotary tables"):
        model(ids_of(graph, 65))
    with pytest.raises(InputError, match="token ids"):
        model(torch.tensor([[128]]))
    with pytest.raises(InputError, match="KV cache"):
        model.step(prompt, model.new_cache(1, 5))


def test_accuracy_level_override(tmp_path):
    graph = quantized(small(layers=(Layer(4, 2, 128),) * 2), "w4g32")
    export(graph, tmp_path / "out", check=False)
    ids, before = ids_of(graph, 16), (tmp_path / "out" / "model.onnx").read_bytes()
    expected = graph.module()(ids)
    exact, int8 = (OrtModel(tmp_path / "out", accuracy_level=level)(ids) for level in (0, 4))
    assert (exact - expected).abs().max() < 1e-4 < (int8 - expected).abs().max()
    assert (
        torch.equal(OrtModel(tmp_path / "out")(ids), int8) and (tmp_path / "out" / "model.onnx").read_bytes() == before
    )


@pytest.mark.parametrize(
    "layers", [(Layer(4, 2, 96),) * 2, MIXED, (Layer(4, 2, 96), Layer(4, 2, 32))], ids=["uniform", "mixed", "ffn"]
)
@pytest.mark.parametrize("spec", [None, "w4g16"])
def test_genai_writes_the_same_tokens(layers, spec, tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    graph = small(layers=layers)
    if spec:
        graph = quantized(graph, spec)
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    prompt = [1, 5, 9, 77, 3, 8]
    model = og.Model(str(tmp_path / "out"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=40)
    generator = og.Generator(model, params)
    generator.append_tokens(torch.tensor(prompt, dtype=torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    written = [int(t) for t in generator.get_sequence(0)][len(prompt) :]
    expected = graph.module().generate(torch.tensor(prompt), 40 - len(prompt)).tolist()
    assert len(expected) > 3 and written[: len(expected)] == expected
    assert written[len(expected) :] in ([], [graph.config.eos_token_id])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_optimum_opens_a_uniform_export(tmp_path):
    ort = pytest.importorskip("optimum.onnxruntime")
    graph = small()
    export(graph, tmp_path / "out", check=False)
    prompt = torch.tensor([[1, 5, 9, 77, 3, 8]])
    model = ort.ORTModelForCausalLM.from_pretrained(tmp_path / "out")
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, eos_token_id=None
    )
    assert out[0, 6:].tolist() == graph.module().generate(prompt, 16, stop=()).tolist()


def test_emit_alone():
    """The model without a folder: weights are made when they are asked for, and every node has a name."""
    model = emit(cut(small(), "layers", [1]), PROFILES["ort"], accuracy_level=0)
    assert ORT is PROFILES["ort"] and model.graph.initializers["model.norm.weight"].const_value.numpy().shape == (64,)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) and "model.layers.0.self_attn/GroupQueryAttention" in names
