"""Which files of a folder hold the weights, and their tensors as memory maps.

  model.safetensors              one file, or
  model.safetensors.index.json   the names of several: {"weight_map": {tensor: file}}

These are transformers' names, and the first of them counts. Older tools had names of their own (AutoGPTQ's
gptq_model-4bit-128g.safetensors): a file is taken under any name where it is the only one. Nothing is unpickled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from .. import files
from ..errors import InputError
from ..graph.graph import LazyTensor

SINGLE = "model.safetensors"
INDEX_ENDING = ".safetensors.index.json"
INDEX = "model" + INDEX_ENDING
ADAPTER = "adapter_config.json"
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors")
# adapters, and the original of a conversion that lies beside it under Meta's and Mistral's name
OTHERS = re.compile(r"(adapter_|consolidated).*")
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def weight_file(names: Collection[str], where: str | Path) -> str:
    """The file of the weights, or the index of several, among the file `names` of a folder.

    `where` names the folder in the `InputError` of a folder that has none, or several of which none is transformers'.
    """
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    candidates = sorted(name for name in names if name.endswith((".safetensors", INDEX_ENDING)))
    candidates = [name for name in candidates if not OTHERS.fullmatch(name)]
    whole = [name for name in candidates if not SHARD.fullmatch(name)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise InputError(str(where), f"several files of weights: {', '.join(whole)}", f"one (or one named {SINGLE})")
    if candidates:
        raise InputError(str(where), f"{candidates[0]}, but no index", f"shards with {INDEX} beside them")
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        given = f"only {pickles[0]}, a pickle, which can run code when opened and is never opened here"
        raise InputError(str(where), given, "safetensors (convert it: from_pretrained, then save_pretrained)")
    raise InputError(str(where), f"no {SINGLE} and no {INDEX}", "a Hugging Face folder with safetensors weights")


def refuse_adapter(folder: Path, names: Collection[str]) -> None:
    """An `InputError` where an adapter lies in the folder, alone or beside weights: transformers would apply it."""
    if ADAPTER not in names:
        return
    base = files.read_json(folder / ADAPTER).get("base_model_name_or_path")
    remedy = "peft's merge_and_unload(), then save_pretrained()"
    if any(name.endswith((".safetensors", *PICKLES)) and not OTHERS.fullmatch(name) for name in names):
        accepted = f"one model: {remedy} (or without {ADAPTER}, if it is merged already)"
        raise InputError(str(folder), f"weights and beside them an adapter ({ADAPTER}, of {base!r})", accepted)
    accepted = f"a whole model: load {base!r} and the adapter, {remedy}"
    raise InputError(str(folder), f"only an adapter of {base!r} ({ADAPTER})", accepted)


def shards_of(folder: Path, index: str) -> dict[str, list[str]]:
    """The files that an index in `folder` names, and the tensors that it says each has."""
    path = folder / index
    weight_map = files.read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"weight_map in {path}", repr(weight_map)[:80], "tensor names to file names")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.inside(folder, file)
        shards.setdefault(file, []).append(name)
    return shards


def open_weights(folder: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, LazyTensor]:
    """Every stored tensor by name.

    A read gives a view of the memory map. None is read here, because safetensors asks the system to fetch what it hands
    out, and a large checkpoint should not be fetched whole to be opened.
    """
    main = weight_file({path.name for path in folder.iterdir()}, folder)
    shards: Mapping[str, list[str]] = {main: []}
    if main.endswith(INDEX_ENDING):
        shards = shards_of(folder, main)
    tensors: dict[str, LazyTensor] = {}
    for file, promised in shards.items():
        path = folder / file
        if not path.exists():
            raise InputError(str(path), "no such file", f"the file that {main} names, or a link that leads to one")
        opened = dict(_tensors(path, dtypes))
        if lacking := set(promised) - set(opened):
            raise InputError(str(path), f"no tensor {min(lacking)}", "the tensors that the index says it has")
        for name in sorted(set(opened) & set(tensors)):
            if not _alike(opened[name], tensors[name]):
                raise InputError(f"{name} in {folder}", f"two tensors, the second in {file}", "one tensor of a name")
        tensors |= opened
    return tensors


def _tensors(path: Path, dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, LazyTensor]]:
    """The tensors of one file by name, each of a dtype in `dtypes`."""
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(path, framework="pt")  # stays open as long as a tensor may be asked for
        names = handle.keys()
        for name in names:
            tensor = handle.get_slice(name)
            kind = tensor.get_dtype()
            if kind not in dtypes:
                raise InputError(f"dtype of {name} in {path}", kind, " | ".join(dtypes))
            yield name, LazyTensor(tuple(tensor.get_shape()), dtypes[kind], functools.partial(handle.get_tensor, name))
    except (SafetensorError, OSError) as error:
        given = f"{error} ({path.stat().st_size:,} bytes)"
        raise InputError(str(path), given, "a complete safetensors file") from error


def _alike(one: LazyTensor, other: LazyTensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.read(), other.read())
