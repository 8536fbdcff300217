"""Context scaling survives export: every method, prefill and decode over the trained length, in two runtimes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from context_cases import MIXED, ids_of, small

from tinycompress.checkpoints.checkpoint import load
from tinycompress.context.scale_rope import METHODS, ScaleRope
from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph
from tinycompress.graph.rope import Rope

TRAINED = 32


def stretched(method: str, times: int, head_dim: int = 16) -> Graph:
    graph = small(max_position=TRAINED, head_dim=head_dim, layers=MIXED)
    if method == "longrope":
        factors = tuple(1.0 + i * (times - 1) / (head_dim // 2 - 1) for i in range(head_dim // 2))
        rope = Rope(
            type="longrope",
            factor=float(times),
            original_max_position=TRAINED,
            short_factor=(1.0,) * len(factors),
            long_factor=factors,
        )
        return graph.replace(config=dataclasses.replace(graph.config, rope=rope, max_position=times * TRAINED))
    return ScaleRope(times * TRAINED, method)(graph)


@pytest.mark.parametrize("times", [2, 4, 8])
@pytest.mark.parametrize("method", [*METHODS, "longrope"])
def test_every_method_survives_export(method, times, tmp_path):
    """Prefill, and decoding over the trained length to the last position, in ONNX Runtime against torch; the gate
    too."""
    pytest.importorskip("onnxruntime")
    from tinycompress.export import OrtModel, export

    graph = stretched(method, times)
    manifest = export(graph, tmp_path / "out", accuracy_level=0, progress=False)
    assert {"beyond_context", "end_of_context"} <= {check["check"] for check in manifest["checks"]["checks"]}
    model, exported, T = graph.module(), OrtModel(tmp_path / "out", threads=1), times * TRAINED
    ids = ids_of(graph, 1, T)
    expected = model(ids)
    torch.testing.assert_close(exported(ids), expected, atol=1e-4, rtol=0)
    lost = graph.replace(config=dataclasses.replace(graph.config, rope=Rope())).module()
    assert (lost(ids) - expected)[:, TRAINED:].abs().max() > 1e-2  # a scaling lost on the way would show
    ours, theirs = exported.new_cache(1, T), model.new_cache(1, T)
    for piece in ids.split([TRAINED - 3, *[1] * 6, T - TRAINED - 7, 1, 1, 1, 1], 1):
        torch.testing.assert_close(exported.step(piece, ours), model(piece, theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("times", [2, 4, 8])
@pytest.mark.parametrize("method", [*METHODS, "longrope"])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_genai_decodes_over_the_trained_length(method, head_dim, times, tmp_path):
    """Greedy text over the trained length to the end of the context; the prompt ends before it, and beyond it."""
    og = pytest.importorskip("onnxruntime_genai")
    from tinycompress.export import export

    graph = stretched(method, times, head_dim)
    export(graph, tmp_path / "out", accuracy_level=0, check=False, progress=False)
    runtime, model, end = og.Model(str(tmp_path / "out")), graph.module(), times * TRAINED
    for length in (TRAINED - 8, end - 24):
        prompt = [1, *ids_of(graph, length).clamp(min=3).tolist()]
        params = og.GeneratorParams(runtime)
        params.set_search_options(max_length=end)
        generator = og.Generator(runtime, params)
        generator.append_tokens(torch.tensor(prompt, dtype=torch.int32).numpy())
        while not generator.is_done():
            generator.generate_next_token()
        written = [int(t) for t in generator.get_sequence(0)][len(prompt) :]
        expected = model.generate(torch.tensor(prompt), end - len(prompt)).tolist()
        assert written[: len(expected)] == expected and written[len(expected) :] in ([], [graph.config.eos_token_id])


def test_padding_on_either_side_changes_nothing(tmp_path):
    """Attention in standard operators takes positions from the mask."""
    ort = pytest.importorskip("onnxruntime")
    from tinycompress.export import export

    graph, T = stretched("dynamic", 2), 40  # beyond the trained length: padding must not count as length in use
    export(graph, tmp_path / "out", check=False, progress=False)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")
    ids = ids_of(graph, 1, T)
    expected = graph.module()(ids)
    empty = {
        node.name: torch.zeros(1, node.shape[1], 0, 16).numpy() for node in session.get_inputs() if "past" in node.name
    }
    for before, after in [(3, 0), (0, 4)]:
        padded = F.pad(ids, (before, after), value=7)
        mask = F.pad(torch.ones_like(ids), (before, after))
        logits = torch.from_numpy(
            session.run(["logits"], empty | {"input_ids": padded.numpy(), "attention_mask": mask.numpy()})[0]
        )
        assert torch.isfinite(logits).all()
        torch.testing.assert_close(logits[:, before : before + T], expected, atol=1e-4, rtol=0)


def test_a_runtime_refuses_what_its_tables_do_not_hold(tmp_path):
    pytest.importorskip("onnxruntime")
    from tinycompress.export import OrtModel, export

    export(stretched("yarn", 2), tmp_path / "out", check=False, progress=False)
    with pytest.raises(InputError, match=r"65.*at most 64: the rotary tables in the file end there"):
        OrtModel(tmp_path / "out").new_cache(1, 65)


@pytest.mark.slow
def test_stories260k_exports_and_passes_its_gate(shared, tmp_path):
    pytest.importorskip("onnxruntime")
    from tinycompress.export import export, verify

    graph = ScaleRope(2048, "ntk")(load(shared / "models" / "stories260K"))
    assert export(graph, tmp_path / "out", progress=False)["checks"]["passed"]
    assert verify(tmp_path / "out", graph, progress=False)["passed"]
