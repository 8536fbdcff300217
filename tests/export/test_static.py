"""Static exports: the same logits as torch in both graphs, packed integers untouched, activation grids, LPBQ scales."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from static_exported import BIASES, MIXED, WIDE, YARN, assert_same, ids_of, no_runtime, short_chunks, small

from tinycompress.errors import InputError
from tinycompress.export import GateError, StaticChoices, StaticModel, check_static, export, read, summary, verify
from tinycompress.export.profiles import QNN, STATIC
from tinycompress.export.static.emit import emit_static
from tinycompress.export.static.forms import make_ready
from tinycompress.export.static.model import without_rounding
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.quantization.rtn import RTN, rtn_quantize

CASES = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "non-uniform": {"layers": MIXED},
    "biases": {"biases": BIASES, "layers": MIXED[:3]},
    "no attention": {"layers": (Layer(0, 0, 32),)},
    "no layers": {"layers": ()},
    "head_dim apart from hidden": {"head_dim": 32},
    "yarn": {"rope": YARN},
    "llama3": {"rope": Rope(type="llama3", factor=4.0, original_max_position=16)},
}

__all__ = ["no_runtime", "short_chunks"]  # fixtures, for this file too


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_float_graphs_are_torch(changes, tmp_path, short_chunks):
    assert_same(small(**changes), tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{}, {"layers": MIXED, "biases": BIASES, "rope": YARN, "tie_embeddings": True}], ids=["uniform", "mixed"]
)
@pytest.mark.parametrize("spec", [None, "w4", "w4g16-lpbq", "w3g16-lpbq"])
def test_integer_graphs_are_torch_but_for_rounding(spec, changes, tmp_path, short_chunks):
    """Without the activations' rounding the graph is torch to float32's precision; with it, to 16 bits'."""
    graph = small(**changes)
    if spec:
        graph = RTN(QuantSpec.parse(spec))(graph)
    assert_same(graph, tmp_path / "exact", "qnn", exact=True)
    assert_same(graph, tmp_path / "rounded", "qnn", atol=0.02)


@settings(max_examples=8, deadline=None)
@given(
    layers=st.lists(
        st.builds(
            lambda k, g, f: Layer(k * g, k, f), st.integers(0, 2), st.integers(1, 3), st.sampled_from([0, 8, 24])
        ),
        min_size=1,
        max_size=3,
    ),
    tied=st.booleans(),
    biased=st.booleans(),
    half=st.integers(1, 5),
)
def test_any_graph_is_drawn_right(layers, tied, biased, half):
    import onnx_ir as ir
    import onnxruntime as ort

    from tinycompress.export.static.forms import host_tensors, layout
    from tinycompress.export.static.host import StaticSession

    layers = tuple(Layer(0, 0, layer.ffn_dim) if not layer.n_kv_heads else layer for layer in layers)
    config = Config(
        29, 24, 2 * half, layers, max_position=11, tie_embeddings=tied, biases=BIASES if biased else frozenset()
    )
    graph = make_ready(random_graph(config), STATIC)
    runs = {
        name: ort.InferenceSession(ir.to_proto(emit_static(graph, STATIC, n)).SerializeToString())
        for name, n in (("prefill", 4), ("decode", 1))
    }
    shape = layout(graph, STATIC) | {"chunk": 4}
    session = StaticSession(shape, {n: t.numpy() for n, t in host_tensors(graph).items()}, runs)
    ids, cache = ids_of(graph, 11), session.new_cache()
    got = np.concatenate([session.step(ids[0, a:b].numpy(), cache) for a, b in ((0, 6), (6, 7), (7, 11))])
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(got), graph.module()(ids)[0], atol=1e-4, rtol=0)


def test_the_graphs_share_one_file_of_weights(tmp_path):
    export(small(), tmp_path / "out", "static", check=False)
    found = []
    for name in ("prefill.onnx", "decode.onnx"):
        proto = onnx.load(tmp_path / "out" / name, load_external_data=False)
        onnx.checker.check_model(tmp_path / "out" / name)
        found.append(
            {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.external_data}
        )
        assert {o.version for o in proto.opset_import} == {19}
    assert (
        found[0] == found[1] and len(found[0]) > 10 and {e["location"] for e in found[0].values()} == {"weights.data"}
    )


@pytest.mark.parametrize("spec", ["w8", "w4", "w3", "w2", "w4g16-lpbq", "w2g16-lpbq", "w4g32-lpbq"])
def test_packed_weights_travel_bit_for_bit(spec, tmp_path, short_chunks):
    graph = RTN(dataclasses.replace(QuantSpec.parse(spec), search="lpbq"), head=True)(small())
    export(graph, tmp_path / "out", "qnn", check=False)
    back = read(tmp_path / "out")
    packed = {n: w for n, w in graph.weights.items() if isinstance(w, QuantTensor)}
    assert len(packed) == 15
    for name, weight in packed.items():
        found = back.weights[name]
        assert (
            torch.equal(found.packed, weight.packed)
            and torch.equal(found.scales, weight.scales)
            and found.grid == weight.grid
        )
    stored = {t.name: t for t in onnx.load(tmp_path / "out" / "prefill.onnx").graph.initializer}
    name, weight = next(iter(packed.items()))
    if weight.scales.shape[1] > 1 and weight.grid.bits == 4:  # MatMulNBits holds our very bytes
        assert stored[f"{name}.packed"].raw_data == weight.packed.numpy().tobytes()
    elif weight.scales.shape[1] == 1:
        ints = onnx.numpy_helper.to_array(stored[f"{name}.ints"]).astype(np.int16)
        assert np.array_equal(ints.T, weight.ints().numpy().astype(np.int16) - weight.grid.zero)


def test_a_packed_embedding_stays_packed(tmp_path, short_chunks):
    graph = small()
    for spec in ("w4g16", "w3g16-asym", "w8"):
        table = rtn_quantize(graph.weights["model.embed_tokens.weight"], QuantSpec.parse(spec))
        assert_same(graph.replace(weights={"model.embed_tokens.weight": table}), tmp_path / spec, "qnn", exact=True)
        assert torch.equal(read(tmp_path / spec).weights["model.embed_tokens.weight"].packed, table.packed)


def test_dense_linears_become_int8_a_channel(tmp_path, short_chunks):
    graph = small(tie_embeddings=True)
    manifest = export(graph, tmp_path / "out", "qnn", limits=WIDE, progress=False, static=StaticChoices(rotate=False))
    head, table = read(tmp_path / "out").weights["lm_head.weight"], graph.weights["model.embed_tokens.weight"]
    assert manifest["scheme"] == "w8" and isinstance(head, QuantTensor)
    assert ((head.dequantize() - table).abs() <= head.scales / 2 + 1e-7).all()
    assert torch.equal(read(tmp_path / "out").weights["model.embed_tokens.weight"], table)


def test_the_gate_passes_and_catches_a_changed_scale(tmp_path, short_chunks):
    graph = small(rope=YARN, layers=MIXED)
    report = export(graph, tmp_path / "out", "qnn", progress=False, limits={"flips": 0.2})["checks"]
    assert report["not_run"] == ["qnn: not installed (make runtime NAME=qnn)"] and "not run qnn" in "\n".join(
        summary(report)
    )
    assert {"prefill", "decode", "beyond_context", "end_of_context", "kl", "perplexity"} <= {
        c["check"] for c in report["checks"]
    }
    path = tmp_path / "out" / "decode.onnx"
    proto = onnx.load(path, load_external_data=False)
    scale = next(t for t in proto.graph.initializer if t.name.endswith("query_scale"))
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 1.05, scale.name))
    onnx.save(proto, path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [c["passed"] for c in verify(tmp_path / "out")["checks"]] == [False]  # by its hash, and nothing else is run
    manifest["files"]["decode.onnx"] = {"sha256": "", "bytes": path.stat().st_size}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))

    failed = {c["check"] for c in verify(tmp_path / "out", hashes=False, progress=False)["checks"] if not c["passed"]}
    assert "decode" in failed and "prefill" not in failed
    with pytest.raises(GateError, match="kl"):
        export(graph, tmp_path / "strict", "qnn", limits={"kl": -1.0}, progress=False)
    assert not (tmp_path / "strict").exists()


def test_rounding_is_in_the_graph_and_can_be_left_out(tmp_path, short_chunks):
    export(small(), tmp_path / "out", "qnn", check=False, progress=False)
    exact = without_rounding(tmp_path / "out" / "prefill.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "out" / "prefill.onnx").graph.node]
    assert "QuantizeLinear" not in {n.op_type for n in exact.graph.node} and kinds.count("QuantizeLinear") > 50
    ids = ids_of(small(), 20)
    difference = (StaticModel(tmp_path / "out")(ids) - StaticModel(tmp_path / "out", exact=True)(ids)).abs().max()
    assert 1e-6 < difference < 0.02


def test_generate_is_torch_s(tmp_path, short_chunks):
    graph = small()
    export(graph, tmp_path / "out", "static", check=False)
    ids = ids_of(graph, 11)
    assert torch.equal(StaticModel(tmp_path / "out").generate(ids, 12), graph.module().generate(ids, 12))


def refused(match: str, graph: Graph, folder, profile: str = "qnn", **options) -> None:
    with pytest.raises(InputError, match=match):
        export(graph, folder, profile, **options)
    assert not folder.exists()


def test_what_a_profile_cannot_carry_fails_before_any_work(tmp_path):
    graph, out = small(), tmp_path / "out"
    dynamic = small(rope=Rope(type="dynamic", factor=2.0, original_max_position=16))
    refused("rope.type for the static profile: found 'dynamic'", dynamic, out, "static")
    assert (
        export(dynamic, tmp_path / "short", "static", check=False, static=StaticChoices(context=16))["static"][
            "context"
        ]
        == 16
    )
    refused("context: found 64; accepted: 2 … 32", graph, out, static=StaticChoices(context=64))
    refused("dtype: found 'float32'", graph, out, dtype="float32")
    refused(r"grid of .*q_proj.*w4g16-asym; accepted: a symmetric one", RTN(QuantSpec.parse("w4g16-asym"))(graph), out)
    refused(r"found w8g16; accepted: w8, one scale a channel", RTN(QuantSpec.parse("w8g16"))(graph), out)
    refused(
        r"scales of .*not positive; accepted: positive scales .* -lpbq", RTN(QuantSpec(4, 16, search="mse"))(graph), out
    )
    refused("group_size of .*: found 8", RTN(QuantSpec(4, 8, search="minmax"))(graph), out)
    refused("epcontext: found '12'", graph, out, static=StaticChoices(epcontext="12"))
    refused("the qnn profile", graph, out, "static", static=StaticChoices(epcontext="75"))
    with pytest.raises(InputError, match=r"ranges: found 'best'; accepted: minmax \| percentile \| mse"):
        StaticChoices(ranges="best")
    with pytest.raises(InputError, match="ends in -lpbq"):
        check_static(graph.config, QNN, QuantSpec.parse("w4g16"), {"model.layers.0.self_attn.q_proj": 64})
    check_static(graph.config, QNN, QuantSpec.parse("w4g16-lpbq"), {"model.layers.0.self_attn.q_proj": 64})


def test_a_missing_runtime_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYCOMPRESS_QNN_PYTHON", "false")
    refused(
        "no onnxruntime_qnn for false; accepted: onnxruntime-qnn >= 2.7",
        small(),
        tmp_path / "out",
        static=StaticChoices(epcontext="75"),
    )


def test_calibration_that_is_short_or_not_finite_is_refused(tmp_path, short_chunks):
    graph = small()
    refused(
        "calibration tokens: found windows of 4; accepted: windows of at least 8",
        graph,
        tmp_path / "o",
        static=StaticChoices(calibration=ids_of(graph, 4)),
    )
    weight = graph.weights["model.layers.1.mlp.up_proj.weight"].clone()
    weight[0, 0] = torch.inf
    refused(
        "NaN or infinite weights", graph.replace(weights={"model.layers.1.mlp.up_proj.weight": weight}), tmp_path / "o"
    )
    norm = graph.weights["model.layers.1.input_layernorm.weight"].clone()
    norm[3] = torch.nan
    broken = graph.replace(weights={"model.layers.1.input_layernorm.weight": norm})
    refused("model.layers.1.input_layernorm.weight: found NaN or infinite weights", broken, tmp_path / "o")
    refused("NaN or infinite values", broken, tmp_path / "o", static=StaticChoices(rotate=False))


def test_dense_graphs_are_rotated_and_packed_ones_stay(tmp_path, short_chunks):
    """One massive channel takes the steps of the residual stream's grid from all others; a rotation gives them back."""
    graph, kl = small(layers=MIXED), {}
    massive = {
        n: w.clone() for n, w in graph.weights.items() if n.endswith(("embed_tokens.weight", "down_proj.weight"))
    }
    for name, weight in massive.items():
        (weight.T if "embed" in name else weight)[3] *= 2000
    graph = graph.replace(weights=massive)
    for rotate in (None, False):
        manifest = export(
            graph, tmp_path / str(rotate), "qnn", limits=WIDE, progress=False, static=StaticChoices(rotate=rotate)
        )
        assert any(step.startswith("Rotate(") for step in manifest["history"]) == (rotate is None)
        kl[rotate] = next(c["figure"] for c in manifest["checks"]["checks"] if c["check"] == "kl")
    assert kl[None] < kl[False] / 5
    packed = RTN(QuantSpec(4, 16, search="lpbq"), head=True)(small())
    assert export(packed, tmp_path / "packed", "qnn", limits=WIDE, progress=False)["history"] == list(packed.history)
    with pytest.raises(InputError, match="quantized"):
        export(packed, tmp_path / "no", "qnn", progress=False, static=StaticChoices(rotate=True))
    assert export(small(), tmp_path / "static", "static", progress=False)["history"] == list(small().history)


def test_the_command_line_writes_checks_and_runs_them(tmp_path):
    from typer.testing import CliRunner

    from tinycompress.checkpoints import checkpoint
    from tinycompress.cli.main import app

    def run(*args: object) -> str:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.stdout

    checkpoint.save(small(), tmp_path / "model")
    out = run(
        "export",
        tmp_path / "model",
        "--profile",
        "qnn",
        "--context",
        16,
        "--ranges",
        "mse",
        "--verify",
        "-o",
        tmp_path / "out",
    )
    assert "passed" in out and "kl" in out
    assert json.loads(run("verify", tmp_path / "out", "--json"))["passed"]
    assert json.loads(run("inspect", tmp_path / "out", "--json"))["config"]["max_position"] == 16


# Activation grids ---------------------------------------------------------------------------------------------------


# LPBQ ---------------------------------------------------------------------------------------------------------------


# Real runtimes: `make runtime NAME=qnn`, `make runtime NAME=rknn`
# -------------------------------------------------------
