"""The int8 cache of an export: its scales, its bytes, its gate, and what refuses it."""

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from exported import ids_of, proto, quantized, small
from gate_results import checks, failed

from tinycompress.errors import InputError
from tinycompress.export import OrtModel, cache_scales, export, kv_scales, prepare, read, verify
from tinycompress.export.dynamic.kv_cache import HEADROOM, LARGEST_INTEGER
from tinycompress.export.read import load_proto
from tinycompress.graph.config import Layer
from tinycompress.graph.rope import Rope
from tinycompress.model.fused_ops import rotate

YARN = Rope(type="yarn", factor=4.0, original_max_position=32)
LAYERS = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32))


@pytest.mark.parametrize(
    "graph",
    [small(), quantized(small(layers=LAYERS, tie_embeddings=True), "w4g32", True), small(rope=YARN, max_position=128)],
    ids=["dense", "w4g32", "yarn"],
)
def test_export_and_gate(graph, tmp_path):
    text = ids_of(graph, 48, 4)
    manifest = export(graph, tmp_path / "out", kv="int8", calibration=text)
    assert manifest["kv"] == {"type": "int8", "scales": "one a channel of a KV head", "text": "4 × 48 given tokens"}
    assert manifest["minimum_onnxruntime"] == "1.27.0"
    report = verify(tmp_path / "out")
    assert report["passed"] and "kv_cache" in checks(report)
    assert read(tmp_path / "out").fingerprint() == prepare(graph).fingerprint() == manifest["fingerprint"]
    found, expected = kv_scales(tmp_path / "out"), cache_scales(prepare(graph), text)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    pasts = [i for i in proto(tmp_path / "out").graph.input if i.name.startswith("past_key_values.")]
    assert len(pasts) == len(found) and {i.type.tensor_type.elem_type for i in pasts} == {3}  # INT8


def test_the_cache_is_a_quarter_and_holds_rounded_keys(tmp_path):
    graph, ids = small(), ids_of(small(), 32)
    export(graph, tmp_path / "out", kv="int8", calibration=ids, check=False, accuracy_level=0)
    model, plain = OrtModel(tmp_path / "out", threads=1), OrtModel(tmp_path / "out", threads=1, float_cache=True)
    cache, whole = model.new_cache(1, 32), plain.new_cache(1, 32)
    assert 4 * cache.nbytes == whole.nbytes
    got, expected = model.step(ids, cache), plain.step(ids, whole)
    torch.testing.assert_close(expected, prepare(graph).module()(ids), atol=1e-4, rtol=0)  # a float cache is torch's
    assert not torch.equal(got, expected)
    scales = list(kv_scales(tmp_path / "out").values())
    for n, (q, x) in enumerate(zip(cache.layers[0], whole.layers[0])):  # of the first layer, whose inputs are the same
        assert q.dtype == torch.int8
        torch.testing.assert_close(
            q.float(), (x / scales[n]).round(), atol=1, rtol=0
        )  # 1: a value on the edge of two steps
        assert ((q.float() - (x / scales[n]).round()) != 0).float().mean() < 0.01
    stepped = model.new_cache(1, 32)
    parts = [model.step(ids[:, a:b], stepped) for a, b in [(0, 7), *((i, i + 1) for i in range(7, 32))]]
    torch.testing.assert_close(
        torch.cat(parts, 1), got, atol=2e-2, rtol=0
    )  # what is written once is never touched again


def test_ranges_hold_at_every_position():
    """Keys of the text, wherever in the context they may come to stand."""
    config = dataclasses.replace(small().config, max_position=4096, rope=Rope(theta=100.0))
    graph = small(max_position=4096, rope=Rope(theta=100.0))
    ids, d = ids_of(graph, 16), config.head_dim
    scales = cache_scales(graph, ids)["model.layers.0.self_attn.key_scale"]
    cache = graph.module().new_cache(1, 16)
    graph.module()(ids, cache)
    cos, sin = config.rope.tables(d, 4096)
    plain = rotate(cache.layers[0][0], cos[:16], -sin[:16])
    seen = torch.zeros_like(scales)
    for at in range(0, 4096, 16):
        seen = torch.maximum(seen, rotate(plain, cos[at : at + 16], sin[at : at + 16]).abs().amax(2, keepdim=True))
    range_ = scales * LARGEST_INTEGER / HEADROOM["key"]
    assert (seen <= range_ * (1 + 1e-5)).all()
    assert (seen > 0.5 * range_).all()  # and are no wider than that asks for
    assert (
        cache.layers[0][0].abs().amax(2, keepdim=True) < 0.99 * seen
    ).any()  # which the text's own positions do not show


@pytest.mark.parametrize(
    "options, changes, match",
    [
        ({"kv": "int4"}, {}, "kv.*int4.*float32 | int8"),
        ({"kv": "int8", "profile": "web"}, {}, "kv for the web profile"),
        ({"kv": "int8", "profile": "std"}, {}, "kv for the std profile"),
        ({"kv": "int8", "profile": "qnn"}, {}, "kv for the qnn profile"),
        ({"kv": "int8"}, {"head_dim": 8}, "kv 'int8'.*head_dim 8"),
        ({"kv": "int8"}, {"rope": Rope(type="dynamic", factor=4.0, original_max_position=32)}, "kv 'int8'.*dynamic"),
    ],
)
def test_refused(options, changes, match, tmp_path):
    with pytest.raises(InputError, match=match):
        export(small(**changes), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [0.02, 60.0])
def test_the_gate_fails_wrong_scales(factor, tmp_path):
    """Ranges that clip, or steps that are too wide, behind the manifest's back."""
    graph = small()
    export(graph, tmp_path / "out", kv="int8", check=False)
    names, model = kv_scales(tmp_path / "out"), load_proto(tmp_path / "out")
    for tensor in model.graph.initializer:
        if tensor.name in names:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(factor), tensor.name)
            )
    (tmp_path / "out" / "model.onnx").write_bytes(model.SerializeToString())
    assert "kv_cache" in failed(verify(tmp_path / "out", hashes=False, limits={"kl": 0.002}))
