"""Graph → a folder for an NPU's compiler: prefill.onnx and decode.onnx over one file of weights.

host.safetensors holds what the host reads (embedding, cos, sin); manifest.json says, beside what every export says, the
fixed shapes ("static") and how the activation grids were found ("activations").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinycompress.errors import InputError, need
from tinycompress.files import Claim, check_space, new_folder, record, write_json
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantTensor
from tinycompress.progress import tqdm
from tinycompress.quantization.lpbq import is_lpbq
from tinycompress.quantization.rotate import Rotate

from ..card import write_card
from ..configs import write_text_files
from ..gate.verify import pass_gate
from ..profiles import Profile
from ..read import FORMAT, MANIFEST
from . import epcontext
from .activation_ranges import METHODS, Activations
from .calibrate import calibrate, chunk_of
from .emit import emit_static
from .forms import FORMS, host_tensors, layout, make_ready
from .forms import check as check_config
from .host import GRAPHS, HOST, KEY_SCALE, WEIGHTS

WINDOWS = 8  # of calibration text, when none is given


@dataclass(frozen=True)
class StaticChoices:
    """What a caller may choose of a static export.

    Fields:
        context: slots of the cache. Default None: the model's positions, at most 2048.
        calibration: text [windows, T] of ids for activation ranges. Default None: the "pydoc" train split, or random
            ids without a tokenizer.
        ranges: how ranges are chosen from it, one of METHODS. Default "minmax".
        epcontext: HTP architecture to compile for, such as "75". Default None: not compiled.
        attention_bits: at which attention reads keys and values, 16 (default) or 8, which is less work.
        rotate: whether a dense graph is rotated first: the few channels with massive activations would take nearly all
            the steps of the residual stream's grid. Default None: where activations are integers.
    """

    context: int | None = None
    calibration: Tensor | None = None
    ranges: str = "minmax"
    epcontext: str | None = None
    attention_bits: int = 16
    rotate: bool | None = None

    def __post_init__(self) -> None:
        if self.attention_bits not in (8, 16):
            raise InputError("attention bits", self.attention_bits, "16 | 8")
        if self.ranges not in METHODS:
            raise InputError("ranges", repr(self.ranges), " | ".join(METHODS))


def export_static(
    graph: Graph,
    claimed: Claim,
    profile: Profile,
    choices: StaticChoices,
    *,
    dtype: str = "auto",
    check: bool = True,
    tokens: Tensor | None = None,
    limits: Mapping[str, float] | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """As `write.export`, for the static profiles."""
    if choices.epcontext:
        epcontext.check(choices.epcontext, profile.name)
    check_config(graph.config, profile, choices.context)
    packed = any(isinstance(w, QuantTensor) for w in graph.weights.entries.values())
    if choices.rotate and packed:
        raise InputError("rotate", "a quantized graph", "a dense one: rotate before quantizing (compress --rotate)")
    if choices.rotate or (choices.rotate is None and FORMS[profile.name].activations and not packed):
        graph = Rotate()(graph.dense(torch.float32))
    ready = make_ready(graph, profile, dtype, choices.context)
    emit_static(ready, profile, 1)  # what cannot be drawn fails here
    ready.check_finite()
    with new_folder(claimed) as work:
        check_space(claimed, 2 * ready.nbytes)  # while ranges are read, the float graph's weights lie there too
        ranges = None
        about = None
        if activations := FORMS[profile.name].activations:
            text, description = calibration_text(ready, choices.calibration, chunk_of(ready, profile))
            ranges = calibrate(ready, profile, text, choices.ranges, folder=work, progress=progress)
            ranges = dataclasses.replace(ranges, attention_bits=choices.attention_bits)
            about = {"type": activations, "ranges": choices.ranges, "text": description, "grids": len(ranges.grids)}
            about |= {"attention_bits": choices.attention_bits}
        write_graphs(ready, profile, ranges, work, progress)
        write_config(ready, work)
        manifest = _manifest(ready, profile, dtype) | {"static": layout(ready, profile), "activations": about}
        manifest["provenance"] = provenance
        _seal(manifest, work)
        if choices.epcontext:
            manifest["epcontext"] = epcontext.compile_graphs(work, choices.epcontext)
            _seal(manifest, work)
        if check:
            pass_gate(work, manifest, tokens=tokens, limits=limits, progress=progress)
        write_card(work, manifest, ready)
    return manifest


def calibration_text(graph: Graph, tokens: Tensor | None, chunk: int) -> tuple[Tensor, str]:
    """Windows of ids and what they are."""
    if tokens is not None:
        return tokens, f"{len(tokens)} × {tokens.shape[1]} given tokens"
    T = min(graph.config.max_position, 4 * chunk)
    if graph.tokenizer is not None:
        from tinycompress.calibration.data import tokens as read_tokens

        return read_tokens("pydoc", graph.tokenizer, WINDOWS, T), f"{WINDOWS} × {T} tokens, pydoc (train)"
    ids = torch.randint(graph.config.vocab_size, (WINDOWS, T), generator=torch.Generator().manual_seed(2))
    return ids, f"{WINDOWS} × {T} random ids: no tokenizer"


def write_graphs(
    graph: Graph, profile: Profile, activations: Activations | None, work: Path, progress: bool = True
) -> None:
    """Both graphs, their shared weights, and the host's file."""
    need("onnx_ir", "export")
    import onnx_ir as ir
    from safetensors.torch import save_file

    model = emit_static(graph, profile, layout(graph, profile)["chunk"], activations)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    with tqdm(total=total, desc="writing", unit="B", unit_scale=True, delay=2, disable=not progress) as bar:
        ir.save(
            model, work / GRAPHS["prefill"], external_data=WEIGHTS, callback=lambda tensor, _: bar.update(tensor.nbytes)
        )
    written = ir.load(work / GRAPHS["prefill"]).graph.initializers
    stored = {n: v.const_value for n, v in written.items() if isinstance(v.const_value, ir.ExternalTensor)}
    decode = emit_static(graph, profile, 1, activations)
    for name, value in decode.graph.initializers.items():
        if name in stored:
            t = stored[name]
            value.const_value = ir.ExternalTensor(
                t.location, t.offset, t.length, t.dtype, shape=t.shape, name=name, base_dir=work
            )
    ir.save(decode, work / GRAPHS["decode"])
    scales = activations.key_scales.values() if activations else ()
    save_file(host_tensors(graph) | {KEY_SCALE.format(slot): s for slot, s in enumerate(scales)}, work / HOST)


def write_config(graph: Graph, work: Path) -> None:
    """config.json, Hugging Face's where it can say it, generation_config.json and the tokenizer."""
    from tinycompress.checkpoints.families import family_of
    from tinycompress.checkpoints.hf import config_to_hf

    config = graph.config
    own = {"model_type": "tinycompress", "vocab_size": config.vocab_size}
    write_json(work / "config.json", config_to_hf(config, torch.float32) if family_of(config) else own)
    write_text_files(graph, work)


def _manifest(graph: Graph, profile: Profile, dtype: str) -> dict[str, Any]:
    packed = {n: w for n, w in graph.weights.entries.items() if isinstance(w, QuantTensor)}
    return {
        "format": FORMAT,
        "profile": profile.name,
        "model": GRAPHS["prefill"],
        "minimum_onnxruntime": profile.floors["base"],
        "config": graph.config.to_dict(),
        "history": list(graph.history),
        "fingerprint": graph.fingerprint(),
        "dtype": dtype,
        "scheme": " + ".join(sorted({str(w.grid) for w in packed.values()})) or "float32",
        "block_scales": _block_scales(packed.values()),
        "quantized": {name: dataclasses.asdict(w.grid) for name, w in packed.items()},
        "files": {},
        "checks": None,
    }


def _block_scales(weights: Iterable[QuantTensor]) -> str | None:
    """The form of the scales of weights in blocks; None where there are no such weights."""
    blocks = [weight for weight in weights if weight.scales.shape[1] > 1]
    if not blocks:
        return None
    return "lpbq" if all(map(is_lpbq, blocks)) else "ordinary"


def _seal(manifest: dict[str, Any], work: Path) -> None:
    """The manifest with the hash of every file beside it."""
    for path in work.iterdir():
        if path.is_file():  # some are written through private temporary files
            path.chmod(0o666 & work.stat().st_mode)
    manifest["files"] = record(work, without=MANIFEST)
    write_json(work / MANIFEST, manifest)
