"""Graph → a folder that ONNX Runtime, onnxruntime-genai and Optimum open, checked before it appears.

model.onnx holds the graph, model.onnx.data its weights; manifest.json says what was exported: config, history,
fingerprint, grids, hashes, and every check with its figure. config.json is Hugging Face's Llama where it can say it
(else model_type "tinycompress"); genai_config.json is for onnxruntime-genai; the tokenizer is beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tinycompress.checkpoints.vocabulary import check_vocabulary
from tinycompress.errors import InputError, need
from tinycompress.files import Claim, Target, check_space, claim, new_folder, record, write_json
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.progress import tqdm

from .card import write_card
from .configs import paths, write_configs
from .dynamic.emit import emit, features, prepare, shortened
from .dynamic.kv_cache import cache_scales, check_cache
from .gate.runtime import python_of
from .gate.verify import pass_gate
from .mobile import write_ort
from .profiles import Profile, profile_of
from .read import FORMAT, MANIFEST
from .static.write import StaticChoices, calibration_text, export_static

CHUNK = 128  # calibration windows of an int8 cache are four times as long


def export(
    graph: Graph,
    folder: Target,
    profile: str | Profile = "ort",
    *,
    dtype: str = "auto",
    scales: str = "float32",
    accuracy_level: int = 4,
    kv: str = "float32",
    calibration: Tensor | None = None,
    check: bool = True,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    context: int | None = None,
    static: StaticChoices | None = None,
    mobile: bool = False,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the folder and returns its manifest. It appears complete and checked, or not at all; where it may appear,
    and what `overwrite` replaces, say `files.claim` and `files.new_folder`.

    `dtype` "auto" keeps packed weights packed and makes dense ones float32; "float32" makes all dense; `scales`
    "float16" rounds the scales of packed weights and stores them in half the bytes. `kv` "int8" keeps keys and values
    in a quarter of the bytes, on scales from the text `calibration` [windows, T] (dynamic/kv_cache.py; by default the
    "pydoc" train split, or random ids without a tokenizer). `check` runs the gate on `tokens` (see `verify`) with
    `limits` over the profile's; a figure beyond its limit is a `GateError`. Memory needed for writing is that of one
    weight. `context` is how many positions the export is good for (by default the model's; for the static profiles at
    most 2048): tables and caches end there. `mobile` adds model.ort and the operator list of a reduced build
    (mobile.py). `static` holds what only the profiles of fixed shapes let one choose. `provenance`, as
    `tinycompress.provenance` gives it, says how the graph was made: it goes into the manifest, and a model card is made
    of it.
    """
    profile = profile_of(profile)
    claimed = claim(folder, overwrite)
    check_vocabulary(graph)
    if mobile and profile.form != "contrib":
        raise InputError(
            "mobile", f"the {profile.name} profile", "ort or web: .ort files hold ONNX Runtime's own operators"
        )
    if profile.form != "static":
        graph = shortened(graph, context)
    check_cache(kv, graph.config, profile)
    if profile.form == "static":
        static = static or StaticChoices()
        static = dataclasses.replace(static, context=context or static.context)
        common: dict[str, Any] = {
            "dtype": dtype,
            "check": check,
            "tokens": tokens,
            "limits": limits,
            "provenance": provenance,
            "progress": progress,
        }
        return export_static(graph, claimed, profile, static, **common)
    if check and profile.runtime != "onnxruntime":
        python_of(profile.runtime)  # missing, it would be missed after the work
    prepared = prepare(graph, dtype, scales)
    # bad input fails here, before anything is written
    model = emit(prepared, profile, accuracy_level=accuracy_level, scales=scales)
    about = None
    if kv == "int8":
        text, description = calibration_text(prepared, calibration, CHUNK)
        kv_scales = cache_scales(prepared, text, progress)
        model = emit(prepared, profile, accuracy_level=accuracy_level, scales=scales, kv_scales=kv_scales)
        about = {"type": kv, "scales": "one a channel of a KV head", "text": description}
    prepared.check_finite()
    with new_folder(claimed) as work:
        _write_model(model, claimed, work, paths(prepared, profile), profile, progress)
        if mobile:
            write_ort(work / paths(prepared, profile)[0], work)
        write_configs(prepared, profile, work, 1 if kv == "int8" else 4)
        manifest = _manifest(prepared, profile, dtype, scales, accuracy_level)
        manifest |= {"kv": about, "provenance": provenance}
        if about:
            manifest["minimum_onnxruntime"] = profile.minimum_version(features(prepared, profile) | {"kv_int8"})
        manifest["files"] = record(work)
        write_json(work / MANIFEST, manifest)
        if check:
            pass_gate(work, manifest, tokens=tokens, limits=limits, progress=progress)
        write_card(work, manifest, prepared)
    return manifest


def _write_model(
    model: Any, claimed: Claim, work: Path, names: tuple[str, str], profile: Profile, progress: bool
) -> None:
    """The model and its data, one initializer in memory at a time."""
    need("onnx_ir", "export")
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    needed = sum(t.nbytes for t in tensors)
    check_space(claimed, needed)
    if profile.largest_file and needed > profile.largest_file:
        raise InputError(
            "weights",
            f"{needed:,} bytes",
            f"at most {profile.largest_file:,} for the {profile.name} profile (fewer bits, or pruning)",
        )
    path = work / names[0]
    data = work / names[1]
    path.parent.mkdir(exist_ok=True)
    with tqdm(total=needed, desc="writing", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        ir.save(model, path, external_data=data.name, callback=lambda tensor, _: bar.update(tensor.nbytes))
    for file in path.parent.iterdir():  # onnx-ir writes through a private temporary file
        if file.is_file():
            file.chmod(0o666 & work.stat().st_mode)


def _manifest(graph: Graph, profile: Profile, dtype: str, scales: str, accuracy_level: int) -> dict[str, Any]:
    packed = {n: w.grid for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    return {
        "format": FORMAT,
        "profile": profile.name,
        "model": paths(graph, profile)[0],
        "minimum_onnxruntime": profile.minimum_version(features(graph, profile)),
        "config": graph.config.to_dict(),
        "history": list(graph.history),
        "fingerprint": graph.fingerprint(),
        "dtype": dtype,
        "scheme": " + ".join(sorted({str(spec) for spec in packed.values()})) or "float32",
        "scales": scales,
        "accuracy_level": accuracy_level,
        "quantized": {name: dataclasses.asdict(spec) for name, spec in packed.items()},
        "files": {},
        "checks": None,
    }
