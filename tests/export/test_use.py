"""Exports as runtimes use them: batches padded on either side, conversations, in the raw runtime as in OrtModel."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import MIXED, ids_of, quantized, small

from tinycompress.errors import InputError
from tinycompress.export import GateError, OrtModel, export, prepare
from tinycompress.export.dynamic import padding
from tinycompress.graph.config import Layer

KINDS = {
    "ort": ("ort", {}, {}),
    "ort, layers that differ": ("ort", {"layers": MIXED}, {}),
    "ort, drawn attention": ("ort", {"head_dim": 8}, {}),
    "ort, int8 cache": ("ort", {}, {"kv": "int8"}),
    "web": ("web", {}, {}),
    "std": ("std", {}, {}),
}
LENGTHS = (9, 4, 1, 7)  # of the prompts in one batch


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and mask [B, T]; what pads is a token of the vocabulary, which must not matter."""
    T = max(map(len, rows))
    fill = [[3] * (T - len(row)) for row in rows]
    ids = [f + row if side == "left" else row + f for f, row in zip(fill, rows)]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(f) for f in fill]
    mask = [z + o if side == "left" else o + z for z, o in zip(zeros, ones)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("profile", "changes", "options"), KINDS.values(), ids=KINDS)
@torch.inference_mode()
def test_rows_of_a_padded_batch_are_what_they_are_alone(profile, changes, options, side, tmp_path):
    graph = small(**changes)
    export(graph, tmp_path / "out", profile, check=False, **options)
    model = prepare(graph).module()
    exported = OrtModel(tmp_path / "out", accuracy_level=0, threads=1, float_cache=True)
    text = ids_of(graph, max(LENGTHS) + 3, B=len(LENGTHS))
    rows = [text[i, :n].tolist() for i, n in enumerate(LENGTHS)]
    ids, mask = padded(rows, side)
    cache = exported.new_cache(len(rows), ids.shape[1] + 3)
    got = exported.step(ids, cache, mask)
    for i, row in enumerate(rows):
        torch.testing.assert_close(got[i, mask[i] == 1], model(torch.tensor([row]))[0], atol=1e-4, rtol=0)
    for t in range(3):
        new = text[:, -3 + t]
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.long)], 1)
        step = exported.step(new[:, None], cache, mask)
        for i, row in enumerate(rows):
            row.append(int(new[i]))
            torch.testing.assert_close(step[i, 0], model(torch.tensor([row]))[0, -1], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_left_padded_batch_in_the_runtime_itself(tmp_path):
    """Growing caches that are passed by value, as Optimum and transformers.js pass them."""
    graph = quantized(small(), "w4g32")
    export(graph, tmp_path / "out", check=False, accuracy_level=0)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    rows = [[5, 9, 77, 3, 8, 2, 4], [11, 12, 13]]
    ids, mask = padded(rows, "left")
    past = {f"past_key_values.{i}.{k}": np.zeros((2, 2, 0, 16), np.float32) for i in (0, 1) for k in ("key", "value")}
    model = graph.dense(torch.float32).module()
    for new in ([6, 7], [8, 9], None):
        out = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **past})
        for i, row in enumerate(rows):
            np.testing.assert_allclose(out[0][i, -1], model(torch.tensor([row]))[0, -1], atol=1e-4)
        if new:
            past = dict(zip(past, out[1:]))
            ids = torch.tensor(new)[:, None]
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            rows = [[*row, token] for row, token in zip(rows, new)]


def test_the_gate_sees_left_padding_that_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(padding, "put_back", lambda draw, x, moved: x)
    with pytest.raises(GateError, match="left_padding") as caught:
        export(small(), tmp_path / "out")
    assert [c["check"] for c in caught.value.report["checks"] if not c["passed"]] == ["left_padding"]


def test_several_new_tokens_a_row_behind_a_cache(tmp_path):
    """GroupQueryAttention refuses them in words that name no way round; standard attention takes them."""
    graph = small()
    ids = ids_of(graph, 9, B=2)
    for profile in ("ort", "std"):
        export(graph, tmp_path / profile, profile, check=False)
    model = OrtModel(tmp_path / "ort", threads=1)
    cache = model.new_cache(2, 9)
    model.step(ids[:, :5], cache)
    with pytest.raises(InputError, match="4 in each of 2 rows"):
        model.step(ids[:, 5:], cache)
    model = OrtModel(tmp_path / "std", threads=1)
    cache = model.new_cache(2, 9)
    model.step(ids[:, :5], cache)
    with torch.inference_mode():
        torch.testing.assert_close(model.step(ids[:, 5:], cache), graph.module()(ids)[:, 5:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("profile", ["ort", "web", "std", "openvino-npu", "static", "qnn"])
def test_every_graph_passes_the_checker_of_onnx(profile, peculiar, tmp_path):
    """Whole, with shapes inferred. ONNX Runtime keeps its norm operator in the standard's domain, where the checker
    looks for it in vain: there it is checked under the name of ONNX Runtime's own."""
    wide = small(hidden_size=64, head_dim=64, layers=(Layer(2, 1, 64),) * 2)
    export(wide if profile == "openvino-npu" else peculiar, tmp_path / "out", profile, check=False)
    paths = list((tmp_path / "out").rglob("*.onnx"))
    assert paths
    for path in paths:
        model = onnx.load(path)
        renamed = [node for node in model.graph.node if node.op_type == "SimplifiedLayerNormalization"]
        assert bool(renamed) == (profile in ("ort", "web"))
        for node in renamed:
            node.domain = "com.microsoft"
        onnx.checker.check_model(model, full_check=True)
