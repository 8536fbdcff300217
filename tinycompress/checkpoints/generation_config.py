"""generation_config.json: which ids end a text, and how text is drawn.

As in transformers the file, where there is one, says alone what ends a text: a list there replaces config.json's one
id, and a file without `eos_token_id` has none. Everything else in it is kept as it was read (`Graph.generation`) and
written back, ids included unless the graph's have changed since. Without the file, sampling values that old
config.json files carry are taken in its place.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from ..graph.config import Config
from ..graph.graph import Graph
from ..model.sampling import FILE, LIMITS, NEUTRAL
from .json_fields import token_id, token_ids

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(folder: str | Path) -> dict[str, Any] | None:
    """The contents of a folder's generation_config.json; None where there is none."""
    path = Path(folder) / FILE
    return read_json(path) if path.exists() else None


def generation_of_config(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sampling values in an old config.json; None where it has none."""
    values = {name: data[name] for name in ("do_sample", *LIMITS, *NEUTRAL) if data.get(name) is not None}
    return values or None


def with_ids(config: Config, generation: Mapping[str, Any], where: str) -> Config:
    """The config with the ids of generation_config.json's contents; `where` names the file in errors.

    `eos_token_id` is the file's alone; bos and pad stay the config's where the file has none.
    """
    changed = dataclasses.replace(
        config,
        eos_token_id=token_ids(generation, "eos_token_id", where, None),
        bos_token_id=token_id(generation, "bos_token_id", where, config.bos_token_id),
        pad_token_id=token_id(generation, "pad_token_id", where, config.pad_token_id),
    )
    if generation.get("eos_token_id") is None and config.eos_token_id is not None:
        other = f"not the {config.eos_token_id} of config.json either"
        warnings.warn(f"{where} has no eos_token_id: as in transformers nothing ends a text, {other}", stacklevel=2)
    return changed


def generation_of(graph: Graph) -> dict[str, Any]:
    """The contents of generation_config.json for a graph: what was read, with those ids changed that the config's say
    otherwise."""
    config = graph.config
    if graph.generation is None:
        return {key: _plain(value) for key in TOKEN_IDS if (value := getattr(config, key)) is not None}
    contents = dict(graph.generation)
    read = {
        "eos_token_id": token_ids(contents, "eos_token_id", FILE, None),
        "bos_token_id": token_id(contents, "bos_token_id", FILE, config.bos_token_id),
        "pad_token_id": token_id(contents, "pad_token_id", FILE, config.pad_token_id),
    }
    for key, known in read.items():
        value = getattr(config, key)
        if value == known:
            continue
        contents[key] = _plain(value)
    return contents


def write_generation(graph: Graph, folder: Path) -> None:
    """generation_config.json of a graph."""
    write_json(folder / FILE, generation_of(graph))


def _plain(value: int | tuple[int, ...] | None) -> int | list[int] | None:
    return list(value) if isinstance(value, tuple) else value
