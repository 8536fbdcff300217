"""An exported folder in OpenVINO: its CPU plugin, the stateful form, openvino-genai, and the NPU's LLM pipeline run on
the CPU.

    python check.py FOLDER … [--json FILE]

  onnx ─ read ─┬─ CPU, past and present as inputs and outputs
               └─ beam_idx ─ stateful (the cache becomes variables) ─┬─ CPU
                                                                     ├─ openvino-genai on the CPU: its own greedy search
                                                                     └─ NPU plugin with NPUW on the CPU, openvino-genai
                                                                        on that (openvino-npu exports)

The last run what an NPU runs (static prefill and decode models cut from the stateful one, int4 weights in its layout)
with the CPU in the NPU's place: correctness, not speed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import Reference, figures, greedy_agrees, judge, main

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
# logits that two tokens may be apart in torch where a greedy path parts from it
MARGIN = 1e-3
NPUW_MARGIN = 0.25
NPUW_POSITIONS = 64  # of the first window: on a CPU it takes its time
NPUW = {"NPU_USE_NPUW": "YES", "NPUW_DEVICES": "CPU", "NPUW_LLM": "YES", "NPUW_LLM_PREFILL_HINT": "STATIC"}


def check(folder: Path, reference: Reference) -> tuple[dict[str, Any], list[str]]:
    """Figures and failures of every form that the folder's profile promises."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    core = ov.Core()
    path = folder / manifest["model"]
    out: dict[str, Any] = {}
    failures: list[str] = []

    def add(name: str, found: dict[str, float], exact: bool) -> None:
        out.update({f"{name}_{k}": v for k, v in found.items()})
        failures.extend(f"{name} {words}" for words in judge(reference, found, exact))

    model = core.read_model(path)
    add("cpu", figures(reference, with_cache(core.compile_model(model, "CPU", EXACT), reference)), True)
    stateful_model = stateful(core.read_model(path), len(reference.cache))
    add("stateful", figures(reference, with_state(core.compile_model(stateful_model, "CPU", EXACT), reference)), True)

    def search(name: str, device: str, properties: dict[str, Any], margin: float) -> None:
        fine, about = greedy_agrees(reference, generated(folder, stateful_model, reference, device, properties), margin)
        out[f"{name}_greedy"] = about.split()[1]
        failures.extend([] if fine else [f"{name} {about}"])

    search("genai", "CPU", {"ATTENTION_BACKEND": "SDPA"} | EXACT, MARGIN)
    if manifest["profile"] == "openvino-npu":
        lengths = {"NPUW_LLM_MAX_PROMPT_LEN": NPUW_POSITIONS, "NPUW_LLM_MIN_RESPONSE_LEN": NPUW_POSITIONS}
        compiled = core.compile_model(stateful(core.read_model(path), len(reference.cache)), "NPU", NPUW | lengths)
        last = figures(
            reference, [last_steps(compiled, reference, NPUW_POSITIONS)], reference.prompt - 1, NPUW_POSITIONS
        )
        add("npuw", last, False)
        search(
            "genai_npuw",
            "NPU",
            NPUW | {"MAX_PROMPT_LEN": NPUW_POSITIONS, "MIN_RESPONSE_LEN": NPUW_POSITIONS},
            NPUW_MARGIN,
        )
    return out, failures


def with_cache(compiled: Any, reference: Reference) -> Iterator[np.ndarray]:
    """Logits [T, V] of each window with the cache as inputs and outputs."""
    names = [i.get_any_name() for i in compiled.inputs]
    for window, ids in enumerate(reference.ids):
        past = {
            f"past_key_values.{j}.{kind}": np.zeros((1, heads, 0, width), np.float32)
            for j, (heads, width) in enumerate(reference.cache)
            for kind in ("key", "value")
        }
        rows = []
        for start, stop in reference.spans(window):
            outputs = compiled(_feeds(names, ids, start, stop) | past)
            past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
            rows.append(outputs["logits"][0])
        yield np.concatenate(rows)


def with_state(compiled: Any, reference: Reference) -> Iterator[np.ndarray]:
    """Logits [T, V] of each window with the cache inside."""
    for window, ids in enumerate(reference.ids):
        yield np.concatenate(list(_states(compiled, ids, reference.spans(window))))


def last_steps(compiled: Any, reference: Reference, positions: int) -> np.ndarray:
    """Logits of the first window's prompt and steps, the last position of each, with the cache inside."""
    spans = [(start, stop) for start, stop in reference.spans() if stop <= positions]
    return np.concatenate([logits[-1:] for logits in _states(compiled, reference.ids[0], spans)])


def _states(compiled: Any, ids: np.ndarray, spans: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    request = compiled.create_infer_request()
    names = [i.get_any_name() for i in compiled.inputs]
    for start, stop in spans:
        yield request.infer(_feeds(names, ids, start, stop) | {"beam_idx": np.zeros(1, np.int32)})["logits"][0].copy()


def generated(
    folder: Path, model: ov.Model, reference: Reference, device: str, properties: dict[str, Any]
) -> list[int]:
    """The greedy continuation of the prompt by openvino-genai's pipeline, which reads a folder of its own layout."""
    with tempfile.TemporaryDirectory() as temporary:
        ov.save_model(model, Path(temporary) / "openvino_model.xml", compress_to_fp16=False)
        (Path(temporary) / "config.json").write_bytes((folder / "config.json").read_bytes())
        pipeline = openvino_genai.LLMPipeline(temporary, device, **properties)
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = len(reference.greedy)
        settings.do_sample = False
        settings.ignore_eos = True
        settings.eos_token_id, settings.stop_token_ids = (
            0,
            {0},
        )  # unset they are -1, which it refuses even where they are ignored
        made = pipeline.generate(ov.Tensor(reference.start[None].copy()), settings)
        return list(made.tokens[0])


def _feeds(names: list[str], ids: np.ndarray, start: int, stop: int) -> dict[str, np.ndarray]:
    feeds = {"input_ids": ids[None, start:stop], "attention_mask": np.ones((1, stop), np.int64)}
    return feeds | ({"position_ids": np.arange(start, stop)[None]} if "position_ids" in names else {})


def stateful(model: ov.Model, entries: int) -> ov.Model:
    """Past inputs and present outputs become variables that `beam_idx` int32 [B] reorders; they start with 0
    positions."""
    inputs = {i.get_any_name(): i for i in model.inputs}
    names = [f"past_key_values.{j}.{kind}" for j in range(entries) for kind in ("key", "value")]
    beam = op.parameter(name="beam_idx", dtype=np.int32, shape=ov.PartialShape([-1]))
    beam.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam])
    for name in names:
        readers = list(inputs[name].get_target_inputs())
        gathered = op.gather(inputs[name].get_node(), beam, op.constant(0))
        for reader in readers:
            reader.replace_source_output(gathered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {name: name.replace("past_key_values", "present") for name in names})
    batch = op.gather(
        op.shape_of(inputs["input_ids"].get_node(), output_type="i64"), op.constant(np.array([0])), op.constant(0)
    )
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = node.get_output_partial_shape(0)
            widths = [op.constant(np.array([n])) for n in (heads.get_length(), 0, width.get_length())]
            shape = op.concat([batch, *widths], 0)
            node.set_arguments([op.broadcast(op.constant(np.float32(0)), shape).output(0)])
        if node.get_type_name() == "Reshape" and node.input_value(0).get_node().get_type_name() == "Multiply":
            shape = node.input_value(
                1
            ).get_node()  # of a packed weight: NPUW makes int64 constants of repeated layers parameters
            if shape.get_type_name() == "Constant":
                node.input(1).replace_source_output(op.constant(shape.get_data().astype(np.int32)).output(0))
    model.validate_nodes_and_infer_types()
    return model


if __name__ == "__main__":
    main("openvino", lambda: {"openvino": ov.__version__, "openvino-genai": openvino_genai.__version__}, check)
