"""Static exports: the same logits as torch in both graphs, packed integers untouched, activation grids, LPBQ scales."""

import dataclasses
import json
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from conftest import random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.export import GateError, StaticChoices, StaticModel, check_static, export, read, summary, verify
from tinycompress.export.profiles import QNN, STATIC
from tinycompress.export.static.activation_ranges import Grid, Observer, choose, grids, observe
from tinycompress.export.static.calibrate import calibrate
from tinycompress.export.static.emit import emit_static
from tinycompress.export.static.forms import FORMS, make_ready
from tinycompress.export.static.host import cpu_session
from tinycompress.export.static.model import without_rounding
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.quantization.gptq import gptq_quantize
from tinycompress.quantization.grid_search import find_grid, round_to_grid
from tinycompress.quantization.lpbq import is_lpbq, snap_scales
from tinycompress.quantization.rtn import RTN, rtn_quantize

MIXED = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))
YARN = Rope(type="yarn", factor=4.0, original_max_position=16)
BIASES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
WIDE = {"kl": 9.0, "flips": 1.0, "perplexity": 9.0}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_runtime(monkeypatch):
    """The gate without third-party runtimes, whether installed or not: they have tests of their own below."""
    monkeypatch.setattr(import_module("tinycompress.export.gate.verify"), "installed", lambda name: False)


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 8 positions, so that prompts of a tiny model cross several."""
    from tinycompress.export.static import calibrate as static_calibrate
    from tinycompress.export.static import forms as static_forms
    from tinycompress.export.static import write as static_write

    forms = {name: dataclasses.replace(form, chunk=8) for name, form in FORMS.items()}
    for module in (static_forms, static_calibrate, static_write):
        monkeypatch.setattr(module, "FORMS", forms)


def small(**changes) -> Graph:
    fields = dict(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=32)
    return random_graph(Config(**(fields | changes)))


def ids_of(graph: Graph, T: int) -> torch.Tensor:
    return torch.randint(graph.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same(graph: Graph, folder, profile: str = "static", exact: bool = False, atol: float = 1e-4) -> None:
    """One prompt of the whole context, and chunks of every kind behind each other, within `atol` of torch."""
    static = StaticChoices(calibration=ids_of(graph, graph.config.max_position))
    export(graph, folder, profile, check=False, static=static, progress=False)
    stored, model = read(folder), StaticModel(folder, exact=exact, threads=1)
    torch_model, ids = stored.dense(torch.float32).module(), ids_of(graph, graph.config.max_position)
    expected = torch_model(ids)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(ids), expected, atol=atol, rtol=0)
    T = ids.shape[1]
    cache = model.new_cache(1, T)
    for start, stop in [
        (0, 7),
        (7, 8),
        (8, 16),
        (16, T - 3),
        *((i, i + 1) for i in range(T - 3, T)),
    ]:  # the last step fills the last slot
        torch.testing.assert_close(model.step(ids[:, start:stop], cache), expected[:, start:stop], atol=atol, rtol=0)
    with pytest.raises(InputError, match="at most 32"):
        model.step(ids[:, :1], cache)


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
    from tinycompress.export.gate.verify import gate

    failed = {c["check"] for c in gate(tmp_path / "out", progress=False)["checks"] if not c["passed"]}
    assert "decode" in failed and "prefill" not in failed
    with pytest.raises(GateError, match="kl"):
        export(graph, tmp_path / "strict", "qnn", limits={"kl": -1.0}, progress=False)
    assert not (tmp_path / "strict").exists()


def test_rounding_is_in_the_graph_and_can_be_left_out(tmp_path, short_chunks):
    export(small(), tmp_path / "out", "qnn", check=False, progress=False)
    exact = onnx.load_from_string(without_rounding(tmp_path / "out" / "prefill.onnx"))
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


def test_ranges_are_those_of_the_text(short_chunks):
    """The grid of a projection is the range of what torch computes there."""
    graph = make_ready(small(), QNN)
    ids = ids_of(graph, 32).repeat(2, 1)
    found = calibrate(graph, QNN, ids, progress=False).grids
    seen = []
    model = graph.dense(torch.float32).module()
    model.model.layers[1].mlp.gate_proj.register_forward_hook(
        lambda module, inputs, out: seen.append(out.clone())
    )  # silu works in place
    with torch.inference_mode():
        model(ids)
    room = FORMS["qnn"].headroom
    expected = Grid.over(room * min(s.min().item() for s in seen), room * max(s.max().item() for s in seen), "uint16")
    assert found["model.layers.1.mlp.gate_proj"].scale == pytest.approx(expected.scale, rel=1e-4)
    table = graph.weights["model.embed_tokens.weight"]
    assert found["hidden"] == Grid.over(table.min().item(), table.max().item(), "uint16")  # every row, read or not


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


def test_keys_fill_one_grid_channel_by_channel(tmp_path, short_chunks):
    """What is cached are torch's keys over the host file's scales, every channel about as large, and scores lose less at 8 bits."""
    graph = small(rope=YARN, layers=MIXED)
    loud = {}
    for i in (0, 1, 4):  # channels of the keys a hundred times as large as others, as in trained models
        q, k = (f"model.layers.{i}.self_attn.{x}_proj.weight" for x in "qk")
        size = torch.logspace(-1, 1, graph.config.head_dim // 2).repeat(2)
        heads = [len(graph.weights[n]) // graph.config.head_dim for n in (q, k)]
        loud |= {
            q: graph.weights[q] / size.repeat(heads[0])[:, None],
            k: graph.weights[k] * size.repeat(heads[1])[:, None],
        }
    graph = graph.replace(weights=loud)
    ids = ids_of(graph, 32)
    export(
        graph,
        tmp_path / "o",
        "qnn",
        progress=False,
        limits=WIDE,
        static=StaticChoices(calibration=ids.repeat(2, 1), rotate=False),
    )
    exact = StaticModel(tmp_path / "o", exact=True)
    ours, theirs = (
        exact.new_cache(1, 32),
        (model := make_ready(graph, QNN).dense(torch.float32).module()).new_cache(1, 32),
    )
    exact.step(ids, ours)
    with torch.inference_mode():
        model(ids, theirs)
    for slot, layer in enumerate(i for i, layer in enumerate(MIXED) if layer.n_heads):
        keys, scales = theirs.layers[layer][0], ours.key_scales[slot]
        assert torch.allclose(ours.layers[slot][0][:, :, :32] * scales[:, None], keys, atol=1e-4)
        assert torch.allclose(ours.layers[slot][1][:, :, :32], theirs.layers[layer][1], atol=1e-4)
        balanced = (ours.layers[slot][0][0, :, :32]).abs().amax(1)
        assert balanced.max() < 1 + 1e-4 and (balanced[scales > scales.max() / 60] > 0.9).all()
        if layer in (0, 1, 4):
            assert keys.abs().amax((0, 2)).max() > 20 * keys.abs().amax((0, 2)).min()


def test_attention_in_two_products_of_8_bits_is_attention_at_16(tmp_path, short_chunks):
    """ONNX Runtime's CPU provider reads one factor of 16 bits as it is: there the split changes next to nothing, and without the
    finer half it would."""
    graph, models = small(rope=YARN, layers=MIXED), {}
    ids = ids_of(graph, 32)
    for bits in (16, 8):
        choices = StaticChoices(calibration=ids.repeat(2, 1), attention_bits=bits)
        manifest = export(graph, tmp_path / str(bits), "qnn", progress=False, limits=WIDE, static=choices)
        assert manifest["activations"]["attention_bits"] == bits
        models[bits] = StaticModel(tmp_path / str(bits))
    plain = models[8](ids)
    assert (models[16](ids) - plain).abs().max() < 0.01 * plain.abs().max()
    proto = onnx.load(tmp_path / "16" / "prefill.onnx", load_external_data=False)
    kinds = {t.name: t.data_type for t in proto.graph.initializer if t.name.endswith(".zero")}
    read = {
        node.output[0]: kinds[node.input[2]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[2] in kinds
    }
    attention = [
        n
        for n in proto.graph.node
        if n.op_type == "MatMul" and ("self_attn.scores" in n.name or "self_attn.heads" in n.name)
    ]
    layers = sum(1 for layer in MIXED if layer.n_heads)
    assert len(attention) == 4 * layers and {read[n.input[1]] for n in attention} == {onnx.TensorProto.UINT8}
    for node in proto.graph.node:  # the finer halves on a grid of one step: nothing is left of them
        if node.op_type == "DequantizeLinear" and ".fine" in node.input[1]:
            node.input[1] = node.input[1].replace(".fine.step", ".coarse16.zero_step")
    names = {
        n.input[1] for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[1].endswith("zero_step")
    }
    assert len(names) == 2 * layers
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.float32(1e-12), name) for name in names)
    onnx.save(proto, tmp_path / "16" / "coarse.onnx")
    session, coarse = (cpu_session(tmp_path / "16" / name) for name in ("prefill.onnx", "coarse.onnx"))
    host = models[16].session
    feeds = host.feeds(ids[0, :8].numpy(), 8, host.new_cache())
    whole, halved = (torch.from_numpy(s.run(["logits"], feeds)[0]) for s in (session, coarse))
    assert (halved - whole).abs().max() > 5 * (whole - models[8](ids[:, :8])).abs().max()
    with pytest.raises(InputError, match="attention bits: found 4"):
        StaticChoices(attention_bits=4)


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


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@given(low=st.floats(-1e3, 1e3, width=32), span=st.floats(0, 1e3, width=32))
def test_a_grid_holds_its_range_and_zero(dtype, low, span):
    grid = Grid.over(low, low + span, dtype)
    ends = np.array([low, low + span, 0.0], np.float32)
    assert np.abs(grid.round(ends) - ends).max() <= grid.scale * 1.01 and grid.round(ends)[2] == 0


def test_observing_in_pieces_is_observing_at_once():
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32) * np.linspace(0.01, 9, 4000, dtype=np.float32)
    whole, pieces = {}, {}
    observe(whole, [("x", np.concatenate([x[-1:], x]))], "mse")
    observe(pieces, [("x", part) for part in np.split(x, 8)], "mse")
    assert (pieces["x"].low, pieces["x"].high) == (x.min(), x.max()) and pieces["x"].counts.sum() == 4000
    for method in ("percentile", "mse"):
        a, b = (choose("x", seen["x"], "int8", method, clip=0.005) for seen in (whole, pieces))
        assert a.scale == pytest.approx(b.scale, rel=0.02)


def test_mse_beats_minmax_and_percentile_leaves_out_what_it_says():
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    x[0] = 40.0
    seen = Observer()
    seen.see("x", x)
    errors = {
        m: np.square(choose("x", seen, "int8", m, clip=0.002).round(x) - x).mean()
        for m in ("minmax", "mse", "percentile")
    }
    assert errors["mse"] < 0.9 * errors["minmax"]
    grid = choose("x", seen, "uint8", "percentile", clip=0.002)
    low, high = -grid.zero * grid.scale, (255 - grid.zero) * grid.scale
    assert ((x < low) | (x > high)).mean() == pytest.approx(0.002, rel=0.3)


def test_saturation_and_bad_ranges_are_refused():
    seen = Observer()
    seen.see("x", np.linspace(-1, 1, 1000, dtype=np.float32))
    with pytest.raises(InputError, match=r"activation x: found 2\d\.\d% of its values outside"):
        choose("x", seen, "int8", "percentile", clip=0.25)
    with pytest.raises(InputError, match="activation y: found NaN or infinite values"):
        observe({}, [("y", np.array([1.0, np.nan], np.float32))])
    with pytest.raises(InputError, match="activation y: found no values"):
        grids({"y": Observer()}, "int8")
    with pytest.raises(InputError, match="activation type: found 'int4'"):
        Grid.over(0, 1, "int4")
    with pytest.raises(InputError, match="activation ranges: found 'max'"):
        choose("x", seen, "int8", "max")


# LPBQ ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 99))
def test_lpbq_scales_are_a_float_times_an_integer(N, G, bits, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, G * 16, generator=generator) * torch.rand(N, G, generator=generator).repeat_interleave(
        16, 1
    )
    importance = torch.rand(G * 16, generator=generator) if weighted else None
    spec = QuantSpec(bits, 16, search="lpbq")
    scales, zeros = find_grid("w", weight, spec, importance)
    multiple = scales / scales.amax(1, keepdim=True) * 16
    assert zeros is None and (scales > 0).all()
    torch.testing.assert_close(multiple, multiple.round(), atol=1e-4, rtol=0)
    assert multiple.min() >= 1 - 1e-4
    assert is_lpbq(QuantTensor.from_ints(round_to_grid(weight, scales, None, spec), scales, None, spec))


def test_is_lpbq_tells_ordinary_scales():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert not is_lpbq(rtn_quantize(weight, QuantSpec(4, 16, search="minmax")))
    assert not is_lpbq(rtn_quantize(weight, QuantSpec(4, 16, symmetric=False)))
    assert is_lpbq(rtn_quantize(weight, QuantSpec(4, None, search="minmax")))  # one block a row is its own factor
    quantized = rtn_quantize(weight, QuantSpec.parse("w4g16-lpbq"))
    assert is_lpbq(quantized) and not is_lpbq(dataclasses.replace(quantized, scales=-quantized.scales))
    assert not is_lpbq(dataclasses.replace(quantized, scales=quantized.scales * torch.tensor([1, 1, 1.03, 1])))


def test_searching_the_form_beats_rounding_to_it_afterwards():
    """Scales searched with the integers against those that the compiler would make of the best ordinary ones."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.rand(
        64, 1, generator=torch.Generator().manual_seed(1)
    )
    ordinary = rtn_quantize(weight, QuantSpec(4, 32, search="minmax"))
    step = ordinary.scales.amax(1, keepdim=True) / 16
    compiled = dataclasses.replace(ordinary, scales=(ordinary.scales / step).round().clamp(1, 16) * step)
    native = rtn_quantize(weight, QuantSpec.parse("w4g32-lpbq"))
    errors = [(q.dequantize() - weight).square().mean() for q in (native, compiled)]
    assert errors[0] < 0.85 * errors[1]


def test_gptq_rounds_on_the_lpbq_grid():
    generator = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(16, 64, generator=generator),
        torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator),
    )
    spec, H = QuantSpec.parse("w4g16-lpbq"), (x.T @ x).double()
    quantized = gptq_quantize(weight, H, spec)
    scales, _ = find_grid("w", weight, spec, H.diagonal().float())
    assert is_lpbq(quantized) and torch.equal(quantized.scales, scales)
    nearest = round_to_grid(weight, scales, None, spec)
    error = [
        ((q - weight) @ x.T).square().sum()
        for q in (quantized.dequantize(), QuantTensor.from_ints(nearest, scales, None, spec).dequantize())
    ]
    assert error[0] < 0.8 * error[1]


def test_lpbq_in_the_spec():
    spec = QuantSpec.parse("w4g32-lpbq")
    assert (spec.search, str(spec), spec.symmetric) == ("lpbq", "w4g32-lpbq", True)
    with pytest.raises(InputError, match="lpbq"):
        QuantSpec(4, 32, symmetric=False, search="lpbq")
    with pytest.raises(InputError, match=r"\[-asym\|-floatzero\|-lpbq\]"):
        QuantSpec.parse("w4g32-asym-lpbq")
    with pytest.raises(InputError, match=r"scales: found \(2, 3\)"):
        snap_scales(torch.ones(2, 16), torch.ones(2, 3), 4)


# Real runtimes: `make runtime NAME=qnn`, `make runtime NAME=rknn` -------------------------------------------------------


def in_runtime(graph: Graph, folder, profile: str, runtime: str) -> dict:
    """What the runtime's check says about an export of the graph; skips where the runtime is not installed."""
    from tinycompress.export.gate.runtime import installed, run_check

    if not installed(runtime):
        pytest.skip(f"make runtime NAME={runtime}")
    export(graph, folder, profile, check=False, progress=False)
    return run_check(runtime, folder, read(folder), profile)


@pytest.mark.runtime
@pytest.mark.parametrize("spec", [None, "w4", "w4g32-lpbq"])
def test_htp_runs_the_graphs(spec, tmp_path):
    layers = (Layer(4, 2, 128), Layer(2, 1, 64), Layer(0, 0, 64), Layer(4, 4, 0))
    graph = small(layers=layers, rope=YARN, biases=frozenset({"q_proj", "down_proj"}), max_position=64)
    result = in_runtime(RTN(QuantSpec.parse(spec))(graph) if spec else graph, tmp_path / "out", "qnn", "qnn")
    assert result["passed"], result["failures"]


@pytest.mark.runtime
def test_htp_keeps_lpbq_scales_and_changes_ordinary_ones(tmp_path):
    """FFN layers only, so that nothing but the weights can differ between HTP and the CPU."""
    graph = small(layers=(Layer(0, 0, 128),) * 2, max_position=64)
    specs = {"native": QuantSpec.parse("w4g32-lpbq"), "ordinary": QuantSpec(4, 32, search="minmax")}
    found = {
        name: in_runtime(RTN(spec)(graph), tmp_path / name, "qnn", "qnn")["figures"]["htp_to_cpu"]
        for name, spec in specs.items()
    }
    assert found["native"] < found["ordinary"] / 10, found


@pytest.mark.runtime
def test_rknn_runs_the_graphs(tmp_path):
    graph = small(layers=MIXED, rope=YARN, biases=frozenset({"q_proj", "down_proj"}), max_position=64)
    result = in_runtime(graph, tmp_path / "out", "static", "rknn")
    assert result["passed"], result["failures"]
