"""Profiles `web`, `std` and `openvino-npu`: the same walk in other forms, with every integer and scale as it was."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import onnx
import pytest
import torch
from exported import DENSE, MIXED, WIDE, YARN, ids_of, operators, quantized, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinycompress.errors import InputError
from tinycompress.export import PROFILES, OrtModel, emit, export, prepare, read, run_check, verify
from tinycompress.export.dynamic.forms_standard import nibbles
from tinycompress.export.gate.runtime import RUNTIMES
from tinycompress.export.read import apart, initializers, load_proto, model_path
from tinycompress.graph.config import Layer
from tinycompress.graph.quant_tensor import QuantTensor, unpack

sys.path.insert(0, str(RUNTIMES))

SPECS = ["w4g32", "w4g32-asym", "w4", "w4-asym", "w8g16", "w8-asym", "w2g32", "w3g16-asym", "w3"]


@torch.inference_mode()
def assert_same(graph, folder, profile, T: int = 24, scales: str = "float32") -> None:
    """Prefill, a chunk and every step at level 0 within 1e-4 of torch; the folder read back is the graph."""
    manifest = export(graph, folder, profile, check=False, scales=scales)
    ready = prepare(graph, scales=scales)
    model, exported, ids = ready.module(), OrtModel(folder, accuracy_level=0, threads=1), ids_of(graph, T)
    expected, cache = model(ids), exported.new_cache(1, T)
    assert expected.abs().max() > 0.5  # logits that could differ
    torch.testing.assert_close(exported(ids), expected, atol=1e-4, rtol=0)
    for start, stop in [(0, 5), (5, 9), *((i, i + 1) for i in range(9, T))]:
        torch.testing.assert_close(exported.step(ids[:, start:stop], cache), expected[:, start:stop], atol=1e-4, rtol=0)
    assert read(folder).fingerprint() == ready.fingerprint() == manifest["fingerprint"]


@pytest.mark.parametrize("changes", DENSE.values(), ids=DENSE)
def test_dense_std(changes, tmp_path):
    assert_same(small(**changes), tmp_path / "out", "std")


@pytest.mark.parametrize("head_dim", [8, 24])
def test_std_takes_any_head_dim(head_dim, tmp_path):
    assert_same(small(head_dim=head_dim), tmp_path / "out", "std")


@pytest.mark.parametrize("profile", ["std", "web", "openvino-npu"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_quantized(spec, tied, profile, tmp_path):
    if profile == "openvino-npu":  # its blocks are multiples of 64
        spec = re.sub(r"g\d+", "g64", spec)
    graph = quantized(small(**WIDE, tie_embeddings=tied), spec, embedding=True)
    if profile == "openvino-npu" and "asym" in spec:
        with pytest.raises(InputError, match=r"grid of model.*a symmetric one"):
            export(graph, tmp_path / "out", profile, check=False)
        assert not any(tmp_path.iterdir())
        return
    assert_same(graph, tmp_path / "out", profile)


@pytest.mark.parametrize("profile", ["ort", "web", "std", "openvino-npu"])
def test_integers_and_scales_bit_for_bit(profile, tmp_path):
    """The stored initializers themselves, not what `read` makes of them, against the quantized weight."""
    graph = quantized(small(**WIDE), "w4g64", embedding=True)
    export(graph, tmp_path / "out", profile, check=False)
    stored = apart(initializers(tmp_path / "out"), graph.config)
    packed = {name: w for name, w in graph.weights.items() if isinstance(w, QuantTensor)}
    assert len(packed) == 1 + 1 + 4 * 3 + 3 * 3
    for name, weight in packed.items():
        (N, K), G = weight.shape, weight.scales.shape[1]
        if PROFILES[profile].form == "contrib" or "embed" in name:
            assert torch.equal(stored[f"{name}.packed"].reshape(N, -1), weight.packed.reshape(N, -1))
            assert torch.equal(stored[f"{name}.scales"], weight.scales)
            continue
        signed = unpack(stored[f"{name}.ints"], 4, N * K).to(torch.int16)
        q = torch.where(signed > 7, signed - 16, signed) + 8
        if profile == "std":
            assert torch.equal(q.reshape(K, N).T, weight.ints()) and torch.equal(
                stored[f"{name}.columns.scales"].reshape(G, N), weight.scales.T
            )
        else:
            assert torch.equal(q.reshape(N, K), weight.ints()) and torch.equal(
                stored[f"{name}.rows.scales"].reshape(N, G), weight.scales
            )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layers=st.lists(
        st.sampled_from([Layer(4, 2, 96), Layer(2, 1, 32), Layer(0, 0, 64), Layer(2, 2, 0)]), min_size=1, max_size=3
    ),
    spec=st.sampled_from(["w4g16", "w4-asym", "w8g32", "w2g32", "w3g32"]),
    embedding=st.booleans(),
    tied=st.booleans(),
    stretched=st.booleans(),
    profile=st.sampled_from(["ort", "web", "std"]),
)
def test_all_together(tmp_path_factory, layers, spec, embedding, tied, stretched, profile):
    changes = {"rope": YARN, "max_position": 128} if stretched else {}
    graph = quantized(small(layers=tuple(layers), tie_embeddings=tied, **changes), spec, embedding=embedding)
    assert_same(graph, tmp_path_factory.mktemp("all") / "out", profile, T=48)


@pytest.mark.parametrize("profile", ["ort", "web", "std", "openvino-npu"])
def test_half_scales(profile, tmp_path):
    graph = quantized(small(**WIDE, tie_embeddings=True), "w4g64", embedding=True)
    assert_same(graph, tmp_path / "out", profile, scales="float16")
    stored = initializers(tmp_path / "out")
    assert {t.dtype for n, t in stored.items() if n.endswith("scales")} == {torch.float16}
    size = {
        s: sum(f["bytes"] for f in export(graph, tmp_path / s, profile, check=False, scales=s)["files"].values())
        for s in ("float32", "float16")
    }
    count = sum(w.scales.numel() for w in graph.weights.values() if isinstance(w, QuantTensor))
    assert size["float32"] - size["float16"] > 1.5 * count
    scaled = {
        n: dataclasses.replace(w, scales=w.scales * 1e9) for n, w in graph.weights.items() if isinstance(w, QuantTensor)
    }
    with pytest.raises(InputError, match=r"scales of .*float16 cannot hold"):
        export(graph.replace(weights=scaled), tmp_path / "big", profile, check=False, scales="float16")


@pytest.mark.parametrize("profile", ["std", "openvino-npu"])
def test_only_operators_of_the_standard(profile):
    import onnx_ir as ir

    graph = quantized(small(**WIDE, tie_embeddings=True), "w4g64", embedding=True)
    proto = ir.to_proto(emit(graph, PROFILES[profile]))
    onnx.checker.check_model(proto)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 24)] and {
        n.domain for n in proto.graph.node
    } == {""}


def test_gate(tmp_path):
    graph = quantized(small(), "w4g32", embedding=True)
    for profile in ("std", "web"):
        export(graph, tmp_path / profile, profile)
        report = verify(tmp_path / profile)
        assert report["passed"] and {"padding", "decode", "kl"} <= {c["check"] for c in report["checks"]}


def test_web_layout(tmp_path):
    graph = quantized(small(layers=MIXED), "w4g16")
    manifest = export(graph, tmp_path / "out", "web", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        manifest["model"]
        == "onnx/model_q4.onnx"
        == model_path(tmp_path / "out").relative_to(tmp_path / "out").as_posix()
    )
    assert {"onnx/model_q4.onnx", "onnx/model_q4.onnx_data", "config.json", "generation_config.json"} == set(
        manifest["files"]
    )
    assert config["transformers.js_config"] == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
    assert (
        config["model_type"] == "llama"
        and config["num_hidden_layers"] == 4
        and len(config["tinycompress"]["layers"]) == 5
    )
    proto = load_proto(tmp_path / "out")
    assert proto.graph.input[2].type.tensor_type.shape.dim[0].dim_param == "batch_size"
    assert export(small(), tmp_path / "dense", "web", check=False)["model"] == "onnx/model.onnx"
    (tmp_path / "out" / "onnx" / "model_q4.onnx_data").write_bytes(b"short")
    with pytest.raises(InputError, match=r"model_q4.onnx_data: found 5 bytes"):
        OrtModel(tmp_path / "out")


REFUSED = {
    "file": ("web", {}, r"weights: found .* bytes; accepted: at most 1,000"),
    "width": (
        "openvino-npu",
        {"head_dim": 64, "layers": (Layer(4, 2, 96),)},
        r"layers\[0\].ffn_dim.*96.*multiple of 64",
    ),
    "head_dim": ("openvino-npu", {}, "head_dim.*16.*multiple of 64"),
    "groups": (
        "openvino-npu",
        {"head_dim": 64, "layers": (Layer(2, 2, 64),)},
        r"n_kv_heads: found 2; accepted: fewer than its 2 heads",
    ),
    "scales": ("std", {}, "scales.*'int8'.*float32 | float16"),
}


@pytest.mark.parametrize("profile,changes,match", REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(profile, changes, match, tmp_path):
    chosen = dataclasses.replace(PROFILES[profile], largest_file=1000 if profile == "web" else None)
    with pytest.raises(InputError, match=match):
        export(small(**changes), tmp_path / "out", chosen, check=False, scales="int8" if "int8" in match else "float32")
    assert not any(tmp_path.iterdir())


def test_blocks_the_npu_cannot_take(tmp_path):
    with pytest.raises(
        InputError, match=r"group_size of model.layers.0.self_attn.q_proj.*32.*a multiple of 64, or per-channel"
    ):
        export(quantized(small(**WIDE), "w4g32"), tmp_path / "out", "openvino-npu", check=False)


def test_a_missing_runtime_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("tinycompress.export.gate.runtime.RUNTIMES", tmp_path / "runtimes")
    (tmp_path / "runtimes" / "openvino").mkdir(parents=True)
    (tmp_path / "runtimes" / "openvino" / "check.py").touch()
    with pytest.raises(
        InputError, match="runtime openvino: found not installed; accepted: `make runtime NAME=openvino`"
    ):
        export(small(**WIDE), tmp_path / "out", "openvino-npu")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"runtime: found 'tpu'; accepted: openvino"):
        run_check("tpu", tmp_path / "out", small(), "ort")


def test_nibbles():
    values = torch.tensor([[-8, 7, 3], [0, -1, 5]], dtype=torch.int8)
    assert nibbles(values).tolist() == [0x78, 0x03, 0x5F]
    assert nibbles(values[:, :1]).tolist() == [0x08]
    assert nibbles(torch.tensor([9], dtype=torch.uint8)).tolist() == [9]


def test_operators_by_profile(tmp_path):
    graph = quantized(small(), "w4g32", embedding=True)
    export(graph, tmp_path / "std", "std", check=False)
    kinds = operators(Path(tmp_path / "std"))
    assert (
        kinds.count("Attention") == 2 and kinds.count("DequantizeLinear") == 15 and "GatherBlockQuantized" not in kinds
    )
