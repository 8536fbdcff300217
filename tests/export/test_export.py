"""Graph → ONNX → ONNX Runtime, onnxruntime-genai and Optimum: the same logits, the same tokens, the same bytes."""

import dataclasses
import json

import onnx
import pytest
import torch
from conftest import random_graph

from tinycompress.errors import InputError
from tinycompress.export import ORT, PROFILES, GateError, OrtModel, emit, export, prepare, read
from tinycompress.export.read import apart, initializers
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.edit import cut
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.graph.topology import feeds
from tinycompress.quantization.grid_search import find_grid, round_to_grid

MIXED = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))
YARN = Rope(type="yarn", factor=4.0, original_max_position=32)
LLAMA3 = Rope(type="llama3", factor=4.0, original_max_position=32)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of two runtimes that wait for each other cost more than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(**changes) -> Graph:
    fields = dict(
        vocab_size=128,
        hidden_size=64,
        head_dim=16,
        layers=(Layer(4, 2, 96),) * 2,
        max_position=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_graph(Config(**(fields | changes)))


def quantized(graph: Graph, text: str, embedding: bool = False, scale: str = "mse") -> Graph:
    """Round to nearest, every linear of the layers; with `embedding` the table and the head too."""
    spec = dataclasses.replace(QuantSpec.parse(text), search=scale)
    names = [
        graph.config.weight_name(reader)
        for feed in feeds(graph.config)
        for reader in feed.readers
        if embedding or reader != "lm_head"
    ]
    changed = {}
    for name in {*names, "model.embed_tokens.weight"} if embedding else names:
        weight = graph.weights[name]
        scales, zeros = find_grid(name, weight, spec)
        changed[name] = QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
    return graph.replace(weights=changed, by=f"rtn {text}")


def ids_of(graph: Graph, T: int, B: int = 1) -> torch.Tensor:
    return torch.randint(graph.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same_everywhere(graph: Graph, folder, T: int = 24) -> None:
    """Prefill and every decode step at level 0 within 1e-4 of torch; the folder read back is the graph."""
    manifest = export(graph, folder, check=False)
    model, exported, ids = prepare(graph).module(), OrtModel(folder, accuracy_level=0, threads=1), ids_of(graph, T)
    expected = model(ids)
    assert expected.abs().max() > 0.5  # logits that could differ
    torch.testing.assert_close(exported(ids), expected, atol=1e-4, rtol=0)
    cache = exported.new_cache(1, T)
    spans = [(0, 5), (5, 9), *((i, i + 1) for i in range(9, T))]  # a prompt, a chunk behind it, single tokens
    for start, stop in spans:
        torch.testing.assert_close(exported.step(ids[:, start:stop], cache), expected[:, start:stop], atol=1e-4, rtol=0)
    back = read(folder)
    assert back.fingerprint() == prepare(graph).fingerprint() == manifest["fingerprint"]
    assert back.config == graph.config and back.history == graph.history


DENSE = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "non-uniform": {"layers": MIXED},
    "no attention": {"layers": (Layer(0, 0, 32),) * 2},
    "no layers": {"layers": ()},
    "biases": {"biases": frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})},
    "head_dim apart from hidden": {"head_dim": 32},
    "multi-query": {"layers": (Layer(4, 1, 96), Layer(1, 1, 17))},
}


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


def test_bytes_and_shapes_in_the_file(tmp_path):
    graph = quantized(small(layers=(Layer(4, 2, 128),)), "w4g32")
    export(graph, tmp_path / "out", check=False)
    files, data = initializers(tmp_path / "out"), (tmp_path / "out" / "model.onnx.data").read_bytes()
    stored = apart(files, graph.config)
    for name, weight in graph.weights.items():
        if isinstance(weight, QuantTensor):
            assert weight.packed.numpy().tobytes() in data
            assert torch.equal(stored[f"{name}.packed"], weight.packed) and torch.equal(
                stored[f"{name}.scales"], weight.scales
            )
        elif weight.dim() == 2 and "embed" not in name:
            assert torch.equal(stored[name], weight.T)  # [K, N]
    for joined, parts in (
        ("self_attn.qkv_proj", "self_attn.{}_proj".format),
        ("mlp.gate_up_proj", "mlp.{}_proj".format),
    ):
        weights = [
            graph.weights[f"model.layers.0.{parts(p)}.weight"]
            for p in (("q", "k", "v") if "qkv" in joined else ("gate", "up"))
        ]
        assert torch.equal(files[f"model.layers.0.{joined}.weight.packed"], torch.cat([w.packed for w in weights]))
    assert operators(tmp_path / "out").count("MatMulNBits") == 4  # q, k and v in one, gate and up in one, o, down
    levels = [a.i for n in proto(tmp_path / "out").graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4] * 4


@pytest.mark.parametrize(
    "biased", [(), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("q_proj", "gate_proj")]
)
@pytest.mark.parametrize("head_dim", [16, 24])  # 24: no GroupQueryAttention, so the joined product is parted
def test_linears_of_one_input_are_one_product_where_their_grids_agree(biased, head_dim, tmp_path):
    graph = small(
        layers=(Layer(4, 2, 96), Layer(2, 2, 32), Layer(2, 1, 64)), head_dim=head_dim, biases=frozenset(biased)
    )
    wider, graph = quantized(graph, "w8g16-asym"), quantized(graph, "w4g16-asym")
    odd = "model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"
    graph = graph.replace(weights={name: wider.weights[name] for name in odd})
    assert_same_everywhere(graph, tmp_path / "out")
    joined = {
        n.partition(".weight")[0].removeprefix("model.layers.")
        for n in initializers(tmp_path / "out")
        if "_proj.weight" in n and ("qkv" in n or "gate_up" in n)
    }
    assert joined == (
        set()
        if len(biased) == 2
        else {"0.self_attn.qkv_proj", "0.mlp.gate_up_proj", "1.mlp.gate_up_proj", "2.self_attn.qkv_proj"}
    )


def test_joined_rows_that_do_not_fit_the_config(tmp_path):
    graph = quantized(small(layers=(Layer(4, 2, 128),)), "w4g32")
    export(graph, tmp_path / "out", check=False)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["layers"] = [[4, 2, 96]]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"qkv_proj|gate_up_proj.*96 \+ 96 rows"):
        read(tmp_path / "out")


def test_no_bloat(tmp_path):
    """The file holds each parameter once, tied tables too, and the rotary tables."""
    graph = small(tie_embeddings=True)
    export(graph, tmp_path / "out", check=False)
    tables = 2 * 64 * 8 * 4
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size <= graph.nbytes + tables + 1024


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


def test_gate_failure_leaves_nothing(tmp_path):
    tokens = ids_of(small(), 12)
    for present in (False, True):
        if present:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine.txt").write_text("kept")
        with pytest.raises(GateError, match=r"prefill .*limit 0"):
            export(small(), tmp_path / "out", tokens=tokens, limits={"prefill": 0.0}, overwrite=present)
        assert [p.name for p in tmp_path.rglob("*")] == (["out", "mine.txt"] if present else [])


def test_manifest(tmp_path):
    graph = quantized(small(), "w4g32")
    manifest = export(graph, tmp_path / "out")
    assert json.loads(json.dumps(manifest)) == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["scheme"] == "w4g32" and manifest["history"] == ["'rtn w4g32'"] and manifest["checks"]["passed"]
    assert manifest["minimum_onnxruntime"] == "1.20.1"
    assert export(quantized(small(), "w2g32"), tmp_path / "w2", check=False)["minimum_onnxruntime"] == "1.24.4"
    assert {*manifest["files"], "manifest.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    export(small(layers=MIXED), tmp_path / "mixed", check=False)
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["model_type"] == "tinycompress"
    assert (
        json.loads((tmp_path / "mixed" / "genai_config.json").read_text())["model"]["decoder"]["num_hidden_layers"] == 4
    )


BAD = {
    "profile": (dict(profile="tpu"), {}, "profile.*'tpu'.*ort"),
    "dtype": (dict(dtype="int8"), {}, "dtype.*'int8'.*auto | float32"),
    "level": (dict(accuracy_level=7), {}, "accuracy_level.*7"),
    "limits": (dict(limits={"speed": 1.0}), {}, "limits.*speed.*prefill"),
    "tokens": (dict(tokens=torch.tensor([[1, 999]])), {}, "token ids.*999"),
}


@pytest.mark.parametrize("options,changes,match", BAD.values(), ids=BAD)
def test_bad_input(options, changes, match, tmp_path):
    with pytest.raises(InputError, match=match):
        export(small(**changes), tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_groups_that_are_no_blocks(tmp_path):
    graph = quantized(small(layers=(Layer(4, 2, 96),)), "w4g8")
    with pytest.raises(
        InputError, match=r"group_size of model.layers.0.self_attn.q_proj.weight: found 8; accepted: a multiple of 16"
    ):
        export(graph, tmp_path / "out")
    assert_same_everywhere(
        quantized(small(layers=(Layer(6, 3, 96),), hidden_size=96), "w4g48"), tmp_path / "g48"
    )  # blocks of 16


def test_emit_alone():
    """The model without a folder: weights are made when they are asked for, and every node has a name."""
    model = emit(cut(small(), "layers", [1]), PROFILES["ort"], accuracy_level=0)
    assert ORT is PROFILES["ort"] and model.graph.initializers["model.norm.weight"].const_value.numpy().shape == (64,)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) and "model.layers.0.self_attn/GroupQueryAttention" in names


def proto(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False)


def operators(folder) -> list[str]:
    return [node.op_type for node in proto(folder).graph.node]
