"""Graph → a folder that ONNX Runtime, onnxruntime-genai and Optimum open, checked before it appears.

model.onnx holds the graph, model.onnx.data its weights; manifest.json says what was exported: config, history,
fingerprint, grids, hashes, and every check with its figure. config.json is Hugging Face's Llama where it can say it
(else model_type "tinycompress"); genai_config.json is for onnxruntime-genai; the tokenizer is beside them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tinycompress.config import Config
from tinycompress.errors import InputError
from tinycompress.files import new_folder, write_json
from tinycompress.graph import Graph
from tinycompress.model import end_tokens
from tinycompress.quantize import QuantTensor

from .emit import attention_layers, emit, features, prepare
from .profiles import Profile, profile_of
from .read import FORMAT, MANIFEST, MODEL
from .verify import GateError, gate, sha256


def export(
    graph: Graph,
    folder: str | Path,
    profile: str | Profile = "ort",
    *,
    dtype: str = "auto",
    accuracy_level: int = 4,
    check: bool = True,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the folder and returns its manifest. It appears complete and checked, or not at all.

    `dtype` "auto" keeps packed weights packed and makes dense ones float32; "float32" makes all dense. `check` runs the
    gate on `tokens` (see `verify`) with `limits` over the profile's; a figure beyond its limit is a `GateError`.
    Memory needed for writing is that of one weight.
    """
    profile = profile_of(profile)
    prepared = prepare(graph, dtype)
    model = emit(prepared, profile, accuracy_level=accuracy_level)  # bad input fails here, before anything is written
    with new_folder(folder, overwrite) as work:
        _write_model(model, work, progress)
        _write_configs(prepared, work)
        manifest = _manifest(prepared, profile, dtype, accuracy_level)
        manifest["files"] = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(work.iterdir())}
        write_json(work / MANIFEST, manifest)
        if check:
            manifest["checks"] = report = gate(work, tokens=tokens, limits=limits, progress=progress)
            if not report["passed"]:
                raise GateError(report)
            write_json(work / MANIFEST, manifest)
    return manifest


def _write_model(model: Any, work: Path, progress: bool) -> None:
    """model.onnx and its data, one initializer in memory at a time."""
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    needed, free = sum(t.nbytes for t in tensors), shutil.disk_usage(work).free
    if needed > free:
        raise InputError("output folder", f"{free:,} bytes free", f"{needed:,} for the weights")
    with tqdm(total=needed, desc="writing", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        ir.save(model, work / MODEL, external_data=f"{MODEL}.data", callback=lambda tensor, _: bar.update(tensor.nbytes))
    for path in work.iterdir():  # onnx-ir writes through a private temporary file
        path.chmod(0o666 & work.stat().st_mode)


def _write_configs(graph: Graph, work: Path) -> None:
    from tinycompress.hf import config_to_hf

    config = graph.config
    own = {"model_type": "tinycompress", "vocab_size": config.vocab_size}
    write_json(work / "config.json", config_to_hf(config, torch.float32) if config.uniform else own)
    if attention_layers(config):
        write_json(work / "genai_config.json", genai_config(config))
    if graph.tokenizer is not None:
        graph.tokenizer.save(work)


def genai_config(config: Config) -> dict[str, Any]:
    """For onnxruntime-genai: its layers are the cache entries, and it reads their shapes from the model itself."""
    entries = attention_layers(config)
    first, stop = config.layers[entries[0]], end_tokens(config)
    eos = list(stop) if len(stop) > 1 else stop[0] if stop else None
    pad = config.pad_token_id if config.pad_token_id is not None else stop[0] if stop else 0
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": first.n_heads,
        "num_key_value_heads": first.n_kv_heads,
        "num_hidden_layers": len(entries),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": pad}
    model = {"type": "llama", "vocab_size": config.vocab_size, "context_length": config.max_position, "decoder": decoder}
    search = {
        "do_sample": False,
        "max_length": config.max_position,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
    return {"model": model | {k: v for k, v in ids.items() if v is not None}, "search": search}


def _manifest(graph: Graph, profile: Profile, dtype: str, accuracy_level: int) -> dict[str, Any]:
    packed = {n: w.spec for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    return {
        "format": FORMAT,
        "profile": profile.name,
        "minimum_onnxruntime": profile.minimum_version(features(graph, profile)),
        "config": graph.config.to_dict(),
        "history": list(graph.history),
        "fingerprint": graph.fingerprint(),
        "dtype": dtype,
        "scheme": " + ".join(sorted({str(spec) for spec in packed.values()})) or "float32",
        "accuracy_level": accuracy_level,
        "quantized": {name: dataclasses.asdict(spec) for name, spec in packed.items()},
        "files": {},
        "checks": None,
    }
