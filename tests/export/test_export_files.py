"""What an exported folder holds: operators, bytes, manifest, and what is refused before any of it is written."""

import json

import pytest
import torch
from exported import MIXED, assert_same_everywhere, ids_of, operators, proto, quantized, small

from tinycompress.checkpoints.checkpoint import save
from tinycompress.errors import InputError
from tinycompress.export import GateError, export, read
from tinycompress.export.read import apart, initializers
from tinycompress.files import record
from tinycompress.graph.config import Layer
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.quantization.rtn import RTN


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


def test_gate_failure_leaves_nothing(tmp_path):
    tokens = ids_of(small(), 12)
    for present in (False, True):
        if present:
            save(small(), tmp_path / "out")
        before = record(tmp_path)
        with pytest.raises(GateError, match=r"prefill .*limit 0"):
            export(small(), tmp_path / "out", tokens=tokens, limits={"prefill": 0.0}, overwrite=present)
        assert record(tmp_path) == before and (present or not any(tmp_path.iterdir()))


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


def test_equal_stored_grids_join_however_they_were_searched(tmp_path):
    graph = small()
    searches = {"query": "minmax", "key": "mse", "value": "mse"}
    specs = {
        linear.name: QuantSpec(4, 16, search=searches.get(linear.kind, "minmax"))
        for linear in graph.config.linears()
        if linear.layer is not None
    }
    export(RTN(specs)(graph), tmp_path / "out", check=False)
    products = [node.name for node in proto(tmp_path / "out").graph.node if node.op_type == "MatMulNBits"]
    assert sum("qkv" in name for name in products) == graph.config.n_layers
