"""The reference of the checks in other runtimes, and those checks."""

import math
import sys

import pytest
import torch
from exported import WIDE, ids_of, quantized, small

from tinycompress.errors import InputError
from tinycompress.export import export, prepare, run_check, write_reference
from tinycompress.export.gate.reference import fitting, reference_text
from tinycompress.export.gate.runtime import RUNTIMES, names
from tinycompress.graph.config import Layer

sys.path.insert(0, str(RUNTIMES))
import common


def test_reference(tmp_path):
    graph = small()
    write_reference(graph, tmp_path, ids=ids_of(graph, 20)[0], prompt=6, steps=10)
    reference = common.Reference(tmp_path)
    logits = graph.module()(ids_of(graph, 20))[0].detach().numpy()
    assert common.judge(reference, common.figures(reference, [logits]), exact=True) == []
    assert (
        reference.spans()[:2] == [(0, 6), (6, 7)]
        and reference.spans(1) == [(0, 20)]
        and reference.cache == [[2, 16]] * 2
    )
    assert reference.greedy == graph.module().generate(ids_of(graph, 20)[:, :6], 10, stop=()).tolist()
    assert common.greedy_agrees(reference, reference.greedy, 0.0) == (True, "greedy 10/10")
    wrong = [*reference.greedy[:4], (reference.greedy[4] + 1) % 128]
    assert (
        common.greedy_agrees(reference, wrong, 0.0) == (False, "greedy 4/5")
        and common.greedy_agrees(reference, wrong, 1e9)[0]
    )
    assert not common.greedy_agrees(reference, [], 1e9)[0]  # a runtime that wrote nothing agrees with nothing
    logits[3] += torch.linspace(0, 3, 128).numpy()
    assert {w.split()[0] for w in common.judge(reference, common.figures(reference, [logits]), exact=True)} >= {
        "error",
        "perplexity",
    }
    logits[5, 5] = float("nan")
    assert len(common.judge(reference, common.figures(reference, [logits]))) >= 2
    for wrong in (logits[:-1], logits[:, :-1]):
        with pytest.raises(ValueError, match="logits of shape"):
            common.figures(reference, [wrong])
    for windows in ([], [logits, logits]):
        with pytest.raises(ValueError, match=r"zip\(\)"):
            common.figures(reference, windows)
    with pytest.raises(InputError, match="reference ids"):
        write_reference(graph, tmp_path, ids=torch.tensor([1, 2]), prompt=6)


def test_figures_over_windows(tmp_path, monkeypatch):
    """Against a plain computation over all positions at once, whatever is compared at once."""
    graph, noise = small(), torch.randn(3, 20, 128, generator=torch.Generator().manual_seed(1)).numpy()
    write_reference(graph, tmp_path, ids=ids_of(graph, 60).view(3, 20))
    reference = common.Reference(tmp_path)
    assert (reference.windows, reference.length, reference.start.tolist()) == (3, 20, reference.ids[0, :8].tolist())
    expected = torch.from_numpy(reference.logits.copy()).double()
    assert torch.allclose(expected.float(), graph.module()(torch.from_numpy(reference.ids)), atol=1e-5)
    for chunk in (7, 64):
        monkeypatch.setattr(common, "CHUNK", chunk)
        for first, stop in ((0, None), (5, None), (5, 12)):
            windows = slice(1 if stop else None)
            got = (reference.logits + 0.3 * noise)[windows, first:stop]
            p, q = (x.log_softmax(-1) for x in (expected[windows, first:stop], torch.from_numpy(got).double()))
            lost = (p - q)[:, :-1].gather(-1, torch.from_numpy(reference.ids)[windows, first:stop][:, 1:, None])
            found = common.figures(reference, iter(got), first, stop)
            assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()))
            assert found["flips"] == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
            assert (
                found["perplexity"] == pytest.approx(abs(math.exp(lost.mean()) - 1))
                and found["positions"] == p.shape[0] * p.shape[1]
            )


def test_reference_text(monkeypatch):
    graph = small()
    assert reference_text(graph).shape == (8, graph.config.max_position) and reference_text(graph, 1, 9).shape == (1, 9)
    assert set(range(128)) - set(reference_text(graph, 64).unique().tolist()) == {graph.config.eos_token_id}
    monkeypatch.setattr(
        "tinycompress.export.gate.reference.LARGEST", 3 * 4 * graph.config.vocab_size * graph.config.max_position
    )  # bytes of logits
    assert reference_text(graph).shape[0] == 3
    assert fitting(8, graph.config.max_position, graph.config.vocab_size) == 3 and fitting(8, 10**6, 10**6) == 1


def test_all_flips_are_judged_and_the_decided_ones_told(tmp_path):
    """Two tokens as good as level that change places are a flip too, but not one that torch had decided."""
    graph = small()
    write_reference(graph, tmp_path, "ort", ids=ids_of(graph, 20)[0])
    reference = common.Reference(tmp_path)
    reference.logits = reference.logits * 0
    reference.logits[..., 0], reference.logits[..., 1], reference.logits[..., 2] = 8.0, 7.9, 7.0
    level, wrong = reference.logits[0].copy(), reference.logits[0].copy()
    level[:, 1], wrong[:, 2] = 8.05, 8.05
    found = common.figures(reference, level[None])
    assert (
        found["flips"] == 1
        and found["decided_flips"] == 0
        and any(words.startswith("flips") for words in common.judge(reference, found))
    )
    found = common.figures(reference, wrong[None])
    assert found["flips"] == found["decided_flips"] == 1 and any(
        words.startswith("flips") for words in common.judge(reference, found)
    )


def test_figures_over_few_positions_name_their_standard_error(tmp_path):
    graph = small()
    write_reference(graph, tmp_path, "ort", ids=ids_of(graph, 33)[0])
    reference, noise = (
        common.Reference(tmp_path),
        torch.randn(33, 128, generator=torch.Generator().manual_seed(0)).numpy(),
    )
    logits = reference.logits[0]
    found = common.figures(reference, [logits + 0.3 * noise])
    nll = [
        -common._log_softmax(x.astype(float))[range(32), reference.ids[0, 1:]] for x in (logits, logits + 0.3 * noise)
    ]
    assert found["perplexity_se"] == pytest.approx((nll[1] - nll[0]).std() / 32**0.5)
    reference.limits = {"perplexity": found["perplexity"] - found["perplexity_se"] / 2}  # the limit is the limit
    assert [w.split()[0] for w in common.judge(reference, found)] == ["perplexity"]


@pytest.mark.runtime
@pytest.mark.parametrize("name", names())
def test_runtime(name, tmp_path):
    """Each check that is installed passes on a quantized graph, and fails on logits of another."""
    if not (RUNTIMES / name / ".venv" / "bin" / "python").is_file():
        pytest.skip(f"make runtime NAME={name}")
    profile = {
        "openvino": "openvino-npu",
        "transformers-js": "web",
        "chromium": "web",
        "qnn": "qnn",
        "rknn": "static",
    }.get(name, "ort")
    if profile in ("qnn", "static"):
        pytest.skip("tested with the static profiles")
    heads = Layer(2, 1, 192) if name == "optimum" else Layer(4, 2, 192)  # it takes head_dim to be hidden / heads
    graph = quantized(small(**(WIDE | {"layers": (heads,) * 2})), "w4g64")
    export(graph, tmp_path / "out", profile, check=False, accuracy_level=0)
    ready = prepare(graph)
    assert run_check(name, tmp_path / "out", ready, profile)["passed"]
    other = ready.replace(weights={"model.norm.weight": -ready.weights["model.norm.weight"]})
    result = run_check(name, tmp_path / "out", other, profile)
    assert not result["passed"] and result["failures"]


@pytest.mark.runtime
def test_aarch64_with_int8_activations(tmp_path):
    """As shipped, in the kernels of a core with int8 dot products."""
    if not (RUNTIMES / "aarch64" / ".venv" / "bin" / "python").is_file():
        pytest.skip("make runtime NAME=aarch64")
    graph = quantized(small(**(WIDE | {"layers": (Layer(4, 2, 192),) * 2})), "w4g64", embedding=True)
    export(graph, tmp_path / "out", check=False)
    result = run_check("aarch64", tmp_path / "out", prepare(graph), "ort")
    assert result["passed"] and result["versions"]["aarch64 core"] == "cortex-a76"
    assert result["figures"]["error"] > 1e-4  # float kernels would be closer
