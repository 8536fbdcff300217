"""A folder of safetensors files and JSON to a Graph: Hugging Face's, other tools' quantized ones, and `save`'s own."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import files
from ..errors import InputError
from ..graph.config import EMBEDDING, HEAD, Config, shapes
from ..graph.graph import Graph, LazyTensor, Weights
from ..graph.quant_tensor import Grid, QuantTensor
from ..model.sampling import FILE as GENERATION
from .generation_config import generation_of_config, read_generation, with_ids
from .hf import config_from_hf, missing_biases
from .json_fields import flag, token_id, token_ids
from .layouts import read_packed
from .quantization_config import Foreign, find
from .safetensors_file import DTYPES, INTEGERS
from .tokenizer import Tokenizer
from .vocabulary import warn_beyond
from .weight_files import open_weights, refuse_adapter

if TYPE_CHECKING:
    from ..graph.graph import Weight

    Entry = Weight | LazyTensor

FORMAT = 1
DESCRIPTION = "tinycompress.json"


@dataclass(frozen=True)
class Description:
    """What the JSON files of a folder say.

    Fields:
        config: the model's config.
        own: whether `save` wrote the folder in its native format.
        history: the passes that the graph went through.
        grids: of quantized weights by parameter, in the native format.
        foreign: another tool's quantization config, or None.
        generation: the contents of generation_config.json, or None; its ids are in `config`.
    """

    config: Config
    own: bool = False
    history: tuple[str, ...] = ()
    grids: Mapping[str, Grid] = dataclasses.field(default_factory=dict)
    foreign: Foreign | None = None
    generation: Mapping[str, Any] | None = None


def read_folder(folder: Path, dtype: torch.dtype | None) -> Graph:
    """The graph of a folder, its weights in `dtype` or (None) as they are stored."""
    refuse_adapter(folder, {path.name for path in folder.iterdir()})
    description = _read_description(folder)
    stored = open_weights(folder, DTYPES if description.foreign is None else DTYPES | INTEGERS)
    description = _untied(folder, description, stored)
    config = description.config
    entries: dict[str, Entry] = {}
    if description.foreign is not None:
        packed = read_packed(stored, description.foreign, config)
        entries |= {name: weight if dtype is None else weight.to(dtype=dtype) for name, weight in packed.items()}
    for name, grid in description.grids.items():
        weight = _read_quantized(folder, stored, name, grid, config)
        entries[name] = weight if dtype in (None, weight.dtype) else weight.to(dtype=dtype)
    entries |= _floats(folder, _without_extra(stored, description), dtype, description.own)
    tokenizer = Tokenizer.from_folder(folder)
    warn_beyond(config, tokenizer, str(folder))
    try:
        return Graph(config, Weights(entries), description.history, tokenizer, description.generation)
    except InputError as error:  # missing, unexpected or misshapen tensors
        raise InputError(f"{error.field} in {folder}", error.found, error.accepted) from None


def _read_description(folder: Path) -> Description:
    """What the JSON files say, with the ids of generation_config.json."""
    generation = read_generation(folder)
    path = folder / DESCRIPTION
    if path.exists():
        description = _read_own(path)
    else:
        path = folder / "config.json"
        data = files.read_json(path)
        foreign = find(folder, data)
        values = generation_of_config(data)
        description = Description(config_from_hf(data, str(path)), foreign=foreign, generation=values)
    if generation is None:
        return description
    config = with_ids(description.config, generation, str(folder / GENERATION))
    return dataclasses.replace(description, config=config, generation=generation)


def _read_own(path: Path) -> Description:
    """tinycompress.json, checked."""
    data = files.read_json(path)
    if data.get("format") != FORMAT:
        raise InputError(f"format in {path}", repr(data.get("format")), FORMAT)
    history = data.get("history", [])
    if not isinstance(history, list) or not all(isinstance(line, str) for line in history):
        raise InputError(f"history in {path}", repr(history)[:80], "a list of strings")
    try:
        config = _own_config(data["config"], path)
        grids = {name: Grid.from_dict(fields) for name, fields in data.get("quantized", {}).items()}
        expected = shapes(config)
    except InputError as error:
        raise InputError(f"{error.field} in {path}", error.found, error.accepted) from None
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise InputError(str(path), f"{type(error).__name__} {error}", "what tinycompress writes there") from error
    if unknown := [name for name in grids if len(expected.get(name, ())) != 2]:
        raise InputError(f"quantized in {path}", unknown[0], "matrices of the config")
    return Description(config, True, tuple(history), grids)


def _own_config(data: Mapping[str, Any], path: Path) -> Config:
    """The config in tinycompress.json, with a check of the fields that no shape checks later."""
    return dataclasses.replace(
        Config.from_dict(data),
        tie_embeddings=flag(data, "tie_embeddings", str(path)),
        bos_token_id=token_id(data, "bos_token_id", str(path), None),
        eos_token_id=token_ids(data, "eos_token_id", str(path), None),
        pad_token_id=token_id(data, "pad_token_id", str(path), None),
    )


def _read_quantized(folder: Path, stored: dict[str, LazyTensor], name: str, grid: Grid, config: Config) -> QuantTensor:
    """A weight in the native format; its parts leave `stored`."""
    suffixes = (".packed", ".scales") if grid.symmetric else (".packed", ".scales", ".zeros")
    if lacking := [name + suffix for suffix in suffixes if name + suffix not in stored]:
        accepted = f"the parts of {name}, which {DESCRIPTION} says is quantized"
        raise InputError(str(folder), f"no tensor {lacking[0]}", accepted)
    parts = {suffix: stored.pop(name + suffix).read() for suffix in suffixes}
    N, K = shapes(config)[name]
    try:
        return QuantTensor.from_tensors(parts, grid, (N, K))
    except InputError as error:
        raise InputError(f"{name} in {folder}", error.found, error.accepted) from None


def _untied(folder: Path, description: Description, stored: Mapping[str, LazyTensor]) -> Description:
    """The description with a head of its own, where one is stored beside the embedding that it should be tied to and
    is another (fine-tunes are saved so by mistake). transformers 5 does the same; 4.x drops the head."""
    head, embedding = stored.get(f"{HEAD}.weight"), stored.get(EMBEDDING)
    if not description.config.tie_embeddings or head is None or embedding is None:
        return description
    if torch.equal(head.read().to(embedding.dtype), embedding.read()):
        return description
    warnings.warn(
        f"{folder}: tie_word_embeddings is true, but the stored {HEAD}.weight is not the embedding: it is kept",
        stacklevel=3,
    )
    return dataclasses.replace(description, config=dataclasses.replace(description.config, tie_embeddings=False))


def _without_extra(stored: Mapping[str, LazyTensor], description: Description) -> dict[str, LazyTensor]:
    """The tensors without rotary buffers of old checkpoints, a tied head, and the zero biases that `save` adds."""
    config = description.config
    ignored = {f"{HEAD}.weight"} if config.tie_embeddings else set()
    if description.own:
        ignored |= set(missing_biases(config))
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
    dtypes = {entry.dtype for entry in stored.values()}
    if dtype is None and not own and len(dtypes) > 1:  # one forward cannot mix them; the widest loses nothing
        dtype = functools.reduce(torch.promote_types, dtypes)
    return {name: entry if dtype in (None, entry.dtype) else _converted(entry, dtype) for name, entry in stored.items()}


def _converted(entry: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(entry.shape, dtype, lambda: entry.read().to(dtype))
