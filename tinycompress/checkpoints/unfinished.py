"""What a pass has done so far, on disk: a killed run goes on inside the pass, not at its start.

`pipeline.run` names a folder for the pass in flight (`kept_in`). Whatever goes through layers, or other units of work,
opens a stage (`open_stage`) and saves at the end of a unit; a pass opens its stages in the same order in every run.
Without such a folder nothing is kept and nothing is spent.

  unfinished.json             {"format", "tinycompress_version", "stages", "files": bytes and SHA-256 of the others,
                              "sha256": of the rest of this file}
  <number>-kept.safetensors   results that were new at the save of that number
  <number>-live.safetensors   what the next unit starts from, such as activations; in place of the last save's

A save counts once the JSON file, replaced in one step, names its files; files that it does not name are removed. Saves
are as rare as a promise allows: a kill costs one unit or `SAVE_EVERY` seconds, whichever is longer.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import files
from ..errors import OutputError
from ..graph.graph import Weight
from ..graph.quant_tensor import Grid, QuantTensor
from .safetensors_file import ALIGNMENT, NAMES, write_tensors

MARK = "unfinished.json"
FORMAT = 1
SAVE_EVERY = 60.0  # seconds
Group = dict[str, Any]  # tensors and packed weights by name; a value is replaced, never changed in place


@dataclass(frozen=True)
class _Stored:
    """A value of a group, and where it lies: what stands of it in unfinished.json."""

    value: Weight
    entry: dict[str, Any]


class Stage:
    """Work that goes on from where an earlier run of it was killed.

    Fields:
        done: units that the earlier run finished and saved; 0 where there was none.
        finished: whether it had finished them all, so that the groups hold the results.
        live: what the next unit starts from, by the names that it was saved under.
    """

    def __init__(self, store: _Store | None = None, name: str = "", groups: Mapping[str, Group] | None = None) -> None:
        self.store = store
        self.name = name
        self.groups = dict(groups or {})
        self.stored: dict[str, dict[str, _Stored]] = {group: {} for group in self.groups}
        self.done = 0
        self.finished = False
        self.live: dict[str, list[Tensor]] = {}
        self.boundary = time.monotonic()

    def save(self, done: int, **live: Sequence[Tensor]) -> None:
        """Says that `done` units are finished. It is written where another unit would end too late for the promise.

        live: tensors that the next unit starts from, at most one list for each name.
        """
        self.done = done
        if self.store is None:
            return
        now = time.monotonic()
        longest = now - self.boundary
        self.boundary = now
        if now + longest >= self.store.saved_at + SAVE_EVERY:
            self.store.write(live)
            self.boundary = time.monotonic()

    def finish(self) -> None:
        """Says that all units are finished: the groups are the result. They are written with a later stage's."""
        self.finished = True
        self.live = {}


_current: ContextVar[_Store | None] = ContextVar("unfinished", default=None)


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """Stages that the block opens are kept in `folder`, which only appears once something is saved; the caller removes
    it when their result is safe. What an earlier run left there is taken up; what is damaged is named and removed."""
    token = _current.set(_Store(folder))
    try:
        yield
    finally:
        _current.reset(token)


def open_stage(name: str, device: torch.device | str | None = None, **groups: Group) -> Stage:
    """The next stage of the pass in flight.

    name: of the stage. device: where values that did not lie on the CPU are put again. groups: the results, filled here
    with those of an earlier run, and looked through at every save for values that are new.
    """
    store = _current.get()
    return Stage() if store is None else store.open(name, device, groups)


class _Store:
    """The folder of the pass in flight."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: list[Stage] = []
        self.known: list[dict[str, Any]] = []  # of the stages of an earlier run, as unfinished.json has them
        self.files: dict[str, dict[str, Any]] = {}
        self.number = 0
        self.saved_at = time.monotonic()
        self.works = True
        self._take_up()

    def _take_up(self) -> None:
        if not self.folder.is_dir():
            return
        reason = _reason_to_start_again(self.folder)
        if reason is not None:
            if reason:
                tqdm.write(f"{self.folder}: {reason}; the pass starts again", file=sys.stderr)
            shutil.rmtree(self.folder)
            return
        data = files.read_json(self.folder / MARK)
        self.known = data["stages"]
        self.files = data["files"]
        self.number = data["number"]
        self._remove_others()

    def open(self, name: str, device: torch.device | str | None, groups: Mapping[str, Group]) -> Stage:
        stage = Stage(self, name, groups)
        number = len(self.stages)
        self.stages.append(stage)
        known = self.known[number] if number < len(self.known) else None
        if known is None or known["name"] != name or set(known["groups"]) != set(groups):
            self.known = self.known[:number]
            return stage
        read = _reader(self.folder, device)
        stage.done = known["done"]
        stage.finished = known["finished"]
        for group, entries in known["groups"].items():
            for key, entry in entries.items():
                groups[group][key] = read(entry)
                stage.stored[group][key] = _Stored(groups[group][key], entry)
        for live, entries in known["live"].items():
            stage.live[live] = [read(entry).clone() for entry in entries]  # they are worked on in place
        return stage

    def write(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        """Saves all that the stages have; `live` is of the last one. A full disk ends the saving, not the pass."""
        if not self.works:
            return
        try:
            self._write(live)
        except OutputError as error:
            self.works = False
            message = f"{self.folder.name} is no longer kept up to date, and the pass goes on without: {error}"
            tqdm.write(message, file=sys.stderr)
        self.saved_at = time.monotonic()

    def _write(self, live: Mapping[str, Sequence[Tensor]]) -> None:
        from .. import __version__

        self.number += 1
        kept = _File(f"{self.number:05}-kept.safetensors")
        alive = _File(f"{self.number:05}-live.safetensors")
        stages: list[dict[str, Any]] = []
        for index, stage in enumerate(self.stages):
            groups = {group: _renewed(stage, group, kept, f"{index}/{group}") for group in stage.groups}
            at_end: dict[str, Any] = {}
            if stage is self.stages[-1]:
                for name, tensors in live.items():
                    at_end[name] = [alive.add(f"{index}/{name}/{i}", tensor) for i, tensor in enumerate(tensors)]
            about = {"name": stage.name, "done": stage.done, "finished": stage.finished}
            stages.append(about | {"groups": groups, "live": at_end})
        for file in (kept, alive):
            if file.tensors:
                with files.new_file(self.folder / file.name) as draft:
                    write_tensors(draft, file.tensors)
                path = self.folder / file.name
                self.files[file.name] = {"sha256": files.sha256(path), "bytes": path.stat().st_size}
        self.files = {name: self.files[name] for name in _named(stages)}
        state = {"format": FORMAT, files.VERSION: __version__, "number": self.number, "stages": stages}
        files.write_json(self.folder / MARK, files.seal(state | {"files": self.files}))
        self._remove_others()

    def _remove_others(self) -> None:
        for path in self.folder.iterdir():
            if path.name != MARK and path.name not in self.files:
                path.unlink()


class _File:
    """A file to be written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, value: Weight) -> dict[str, Any]:
        """What unfinished.json says of a value that is put into the file under `name`."""
        entry: dict[str, Any] = {"file": self.name, "name": name, "on_cpu": value.device.type == "cpu"}
        parts = value.tensors() if isinstance(value, QuantTensor) else {"": value}
        if isinstance(value, QuantTensor):
            entry |= {"grid": dataclasses.asdict(value.grid), "shape": list(value.shape)}
        for suffix, tensor in parts.items():
            if tensor.dtype not in NAMES:
                raise OutputError(f"{name}: tensors of {tensor.dtype} cannot be saved")
            self.tensors[name + suffix] = tensor
        return entry


def _renewed(stage: Stage, group: str, file: _File, prefix: str) -> dict[str, Any]:
    """What unfinished.json says of a group now; its new values go into the file."""
    before = stage.stored[group]
    after: dict[str, _Stored] = {}
    for key, value in stage.groups[group].items():
        known = before.get(key)
        if known is not None and known.value is value:
            after[key] = known
        else:
            after[key] = _Stored(value, file.add(f"{prefix}/{key}", value))
    stage.stored[group] = after
    return {key: stored.entry for key, stored in after.items()}


def _named(stages: Sequence[Mapping[str, Any]]) -> set[str]:
    """The files that stages are in."""
    entries = [entry for stage in stages for group in stage["groups"].values() for entry in group.values()]
    entries += [entry for stage in stages for live in stage["live"].values() for entry in live]
    return {entry["file"] for entry in entries}


def _reader(folder: Path, device: torch.device | str | None) -> Callable[[Mapping[str, Any]], Any]:
    """Reads what unfinished.json speaks of: a view of the file's memory map, but for what goes to another device, and
    for what lies where a product might round otherwise."""
    from safetensors import safe_open

    opened: dict[str, Any] = {}

    def read(entry: Mapping[str, Any]) -> Any:
        if entry["file"] not in opened:
            opened[entry["file"]] = safe_open(files.inside(folder, entry["file"]), framework="pt")
        handle = opened[entry["file"]]
        value: Weight
        if "grid" not in entry:
            tensor = handle.get_tensor(entry["name"])
            value = tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor
        else:
            grid = Grid.from_dict(entry["grid"])
            suffixes = (".packed", ".scales") if grid.symmetric else (".packed", ".scales", ".zeros")
            parts = {suffix: handle.get_tensor(entry["name"] + suffix) for suffix in suffixes}
            value = QuantTensor.from_tensors(parts, grid, (entry["shape"][0], entry["shape"][1]))
        return value if entry["on_cpu"] else value.to(device)

    return read


def _reason_to_start_again(folder: Path) -> str | None:
    """Why the state in a folder is of no use, "" where there is none; None where it is whole."""
    from .. import __version__

    if not (folder / MARK).exists():
        return ""
    damaged = files.damage(folder, MARK)
    if damaged is not None:
        return f"{damaged} is not as it was written"
    data = files.read_json(folder / MARK)
    if "sha256" not in data:
        return f"{MARK} is not as it was written"
    if data["format"] != FORMAT or data[files.VERSION] != __version__:
        return "of another version of tinycompress"
    return None
