"""Exports that lie in a hub's cache, where every file is a link to a blob: they open as elsewhere."""

import onnxruntime
import pytest
import torch
from exported import ids_of, quantized, small
from hub_cache import as_hub_cache

from tinycompress.errors import InputError
from tinycompress.export import OrtModel, StaticModel, export, read, verify
from tinycompress.export.read import model_path


@pytest.mark.parametrize("profile", ["ort", "std", "static"])
def test_an_export_of_links_reads_verifies_and_runs(profile, tmp_path):
    graph = quantized(small(), "w4g32")
    ids = ids_of(graph, 12)
    options = {} if profile != "static" else {"tokens": ids_of(graph, 16, 4)}
    export(graph, tmp_path / "out", profile, progress=False, **options)
    snapshot = as_hub_cache(tmp_path / "out", tmp_path / "cache")
    assert all(path.is_symlink() for path in snapshot.iterdir())
    assert read(snapshot).fingerprint() == read(tmp_path / "out").fingerprint()
    assert verify(snapshot, progress=False)["passed"]
    model = StaticModel if profile == "static" else OrtModel
    assert torch.equal(model(snapshot)(ids), model(tmp_path / "out")(ids))


def test_the_runtime_follows_the_links_of_a_file(tmp_path):
    export(small(), tmp_path / "out", check=False, progress=False)
    snapshot = as_hub_cache(tmp_path / "out", tmp_path / "cache")
    onnxruntime.InferenceSession(str(model_path(snapshot)), providers=["CPUExecutionProvider"])


def test_a_changed_export_of_links_is_given_from_memory(tmp_path):
    graph = quantized(small(), "w4g32")
    export(graph, tmp_path / "out", check=False, progress=False)
    snapshot = as_hub_cache(tmp_path / "out", tmp_path / "cache")
    ids = ids_of(graph, 12)
    exact = OrtModel(snapshot, accuracy_level=0)(ids)
    assert torch.equal(exact, OrtModel(tmp_path / "out", accuracy_level=0)(ids))
    data = snapshot / "model.onnx.data"
    data.unlink()
    data.symlink_to(tmp_path / "out" / "model.onnx.data")  # one file elsewhere than the others
    assert torch.equal(OrtModel(snapshot, accuracy_level=0)(ids), exact)


def test_a_link_to_nothing_is_refused_by_name(tmp_path):
    export(small(), tmp_path / "out", check=False, progress=False)
    snapshot = as_hub_cache(tmp_path / "out", tmp_path / "cache")
    (snapshot / "model.onnx.data").unlink()
    (snapshot / "model.onnx.data").symlink_to("../../blobs/none")
    with pytest.raises(InputError, match=r"model\.onnx\.data"):
        OrtModel(snapshot)
    with pytest.raises(InputError, match=r"model\.onnx\.data.*a file inside"):
        read(snapshot)
