"""Activation grids: what they hold, how they are chosen, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from static_exported import MIXED, WIDE, YARN, ids_of, no_runtime, short_chunks, small

from tinycompress.errors import InputError
from tinycompress.export import StaticChoices, StaticModel, export
from tinycompress.export.profiles import QNN
from tinycompress.export.static.activation_ranges import ActivationGrid, Observer, choose, grids, observe
from tinycompress.export.static.calibrate import calibrate
from tinycompress.export.static.forms import FORMS, make_ready
from tinycompress.export.static.host import cpu_session

__all__ = ["no_runtime", "short_chunks"]  # fixtures, for this file too


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
    expected = ActivationGrid.over(
        room * min(s.min().item() for s in seen), room * max(s.max().item() for s in seen), "uint16"
    )
    assert found["model.layers.1.mlp.gate_proj"].scale == pytest.approx(expected.scale, rel=1e-4)
    table = graph.weights["model.embed_tokens.weight"]
    assert found["hidden"] == ActivationGrid.over(
        table.min().item(), table.max().item(), "uint16"
    )  # every row, read or not


def test_keys_fill_one_grid_channel_by_channel(tmp_path, short_chunks):
    """What is cached are torch's keys over the host file's scales, every channel about as large, and scores lose less
    at 8 bits."""
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
    """ONNX Runtime's CPU provider reads one factor of 16 bits as it is: there the split changes next to nothing, and
    without the finer half it would."""
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


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@given(low=st.floats(-1e3, 1e3, width=32), span=st.floats(0, 1e3, width=32))
def test_a_grid_holds_its_range_and_zero(dtype, low, span):
    grid = ActivationGrid.over(low, low + span, dtype)
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
        ActivationGrid.over(0, 1, "int4")
    with pytest.raises(InputError, match="activation ranges: found 'max'"):
        choose("x", seen, "int8", "max")
