"""Run passes in order, with a work folder that remembers: a killed run loses a layer of a pass, or a minute.

After each pass the graph is saved as `work/<step>-<pass>-<key>`, a checkpoint folder like any other. Folders appear in
one step, so one that is there is complete, and its name says what it holds: with k_0 = the fingerprint of the graph,

    k_i = SHA-256(k_{i-1}, pass i)

A rerun takes up behind the last step whose folder is there and whole; a changed pass, or a changed graph, has another
key and so runs again with all that follows. A damaged step (its files have hashes) is named, removed and made again.
Inside a pass, `<step>-<pass>-<key>.unfinished` keeps what it has done so far (checkpoints/unfinished.py), until the
step is saved. Old steps stay until you delete them (work_folder.py). Only one run at a time works in a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.folder_reader import DESCRIPTION
from .checkpoints.unfinished import kept_in
from .errors import InputError
from .files import damage, locked, remove, sweep
from .graph.graph import Graph, Pass
from .progress import tqdm
from .work_folder import described, note_run, step_name, unfinished

ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def run(
    graph: Graph, passes: Sequence[Pass], work: str | Path | None = None, progress: bool = True, fresh: bool = False
) -> Graph:
    """The graph after all `passes`. With `work`, each step is saved there, and steps that are there already are not
    run; `fresh` removes those of these passes first.

    A pass that is not noted in the history by itself is noted here. The saved step, not the one in memory, goes into
    the next pass: its weights are memory-mapped, and a resumed run computes exactly what an unbroken one does.

    Raises InputError for bad passes, and OutputError for a full disk and for a `work` that another run holds.
    """
    with tqdm(total=len(passes), desc="passes", unit="pass", disable=not progress) as bar:
        if work is None:
            for step in passes:
                bar.set_postfix_str(pass_name(step))
                graph = _apply(step, graph)
                bar.update()
            return graph
        with locked(work):
            sweep(Path(work))
            graph = _run_with_folder(graph, passes, Path(work), bar, fresh)
    if progress:
        tqdm.write(described(Path(work)), file=sys.stderr)
    return graph


def _run_with_folder(graph: Graph, passes: Sequence[Pass], work: Path, bar: tqdm, fresh: bool) -> Graph:
    names: list[str] = []
    done = 0
    while done < len(passes):
        steps = _steps(graph, passes[done:], work, done)
        names += [step.folder.name for step in steps]
        if fresh:
            for step in steps:
                remove(step.folder)
                remove(unfinished(step.folder))
        found = _last_whole(steps)
        if found:
            graph = _load(steps[found - 1].folder, graph)
            bar.update(found)
            note_run(work, names)
        for step in steps[found:]:
            bar.set_postfix_str(pass_name(step.by))
            with kept_in(unfinished(step.folder)):
                made = _apply(step.by, graph)
            graph = _saved(made, step.folder, graph)
            note_run(work, names)  # behind the step: a run that saved nothing leaves nothing
            remove(unfinished(step.folder))
            bar.update()
        done += len(steps)
        if done < len(passes):  # nothing says what this pass does, but its result does: what follows can be found
            bar.set_postfix_str(pass_name(passes[done]))
            graph = _apply(passes[done], graph)
            done += 1
            bar.update()
    return graph


@dataclass(frozen=True)
class _Step:
    """A pass whose result can be found again.

    Fields:
        by: the pass.
        folder: where its result is kept.
    """

    by: Pass
    folder: Path


def _steps(graph: Graph, passes: Sequence[Pass], work: Path, done: int) -> list[_Step]:
    """The first of `passes`, behind `done` others, as far as they can be told from others."""
    steps: list[_Step] = []
    key: str | None = _root(graph)
    for number, step in enumerate(passes, done + 1):
        key = _key(key, step) if key else None
        if key is None:
            break
        steps.append(_Step(step, work / step_name(number, pass_name(step), key)))
    return steps


def _last_whole(steps: Sequence[_Step]) -> int:
    """How many steps need not be run, as the last of them is there in one piece. A damaged one is removed."""
    for number in range(len(steps), 0, -1):
        folder = steps[number - 1].folder
        if not folder.is_dir():
            continue
        name = damage(folder, DESCRIPTION)
        if name is None:
            for step in steps[:number]:
                remove(unfinished(step.folder))  # of a run that was killed right behind the step
            return number
        tqdm.write(f"{folder}: {name} is not as it was written; the step is made again", file=sys.stderr)
        shutil.rmtree(folder)
    return 0


def pass_name(step: Pass) -> str:
    """A short name that can stand in a file name."""
    name = getattr(step, "__name__", type(step).__name__)
    return re.sub(r"\W+", "", name) or "step"


def describe(step: Pass) -> str:
    """What the history says of a pass: its repr; of a function, which has none to speak of, its name."""
    text = repr(step)
    return getattr(step, "__qualname__", type(step).__qualname__) if ADDRESS.search(text) else text


def _apply(step: Pass, graph: Graph) -> Graph:
    out = step(graph)
    if not isinstance(out, Graph):
        raise InputError(
            f"pass {describe(step)}",
            f"a result of type {type(out).__name__}",
            "a Graph (a pass is a function from Graph to Graph)",
        )
    if out.history == graph.history:
        out = dataclasses.replace(out, history=(*graph.history, describe(step)))
    return out


def _saved(made: Graph, folder: Path, before: Graph) -> Graph:
    from .checkpoints.checkpoint import save

    save(made, folder)
    return _load(folder, before)


def _load(folder: Path, before: Graph) -> Graph:
    """The graph of a step's folder; its tokenizer is that of the graph before it where the folder has none."""
    from .checkpoints.checkpoint import load

    loaded = load(folder)
    return loaded if loaded.tokenizer else dataclasses.replace(loaded, tokenizer=before.tokenizer)


def _root(graph: Graph) -> str:
    return hashlib.sha256(f"{graph.fingerprint()} {graph.history}".encode()).hexdigest()


def _key(previous: str, step: Pass) -> str | None:
    """The key behind `step`; None for a pass that cannot be told from another (a function: the same name and address
    can belong to other code, or other globals, on the next run), which is therefore run again.

    A repr is not enough for a key: passes keep calibration tokens and teachers out of theirs, and other tokens are
    another result. So the fields of a dataclass count, tensors by their bytes and graphs by their fingerprint. What
    changes no result does not: `progress`, `device` (but for rounding), and a field that says so
    (`field(metadata={"key": False})`). A class counts by its qualified name without its module, so that moving it to
    another file leaves its steps valid.
    """
    digest = hashlib.sha256(previous.encode())
    return digest.hexdigest() if _update(digest, step) else None


def _counts(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a pass can change its result."""
    return field.init and field.name not in ("progress", "device") and field.metadata.get("key", True)


def _is_own(function: FunctionType) -> bool:
    """Whether a function is this library's, defined once, so that its name says what it does."""
    return function.__module__.startswith("tinycompress.") and "<" not in function.__qualname__


def _update(digest: hashlib._Hash, value: object) -> bool:
    """Feeds a value to the digest; False if it holds something that only its address tells apart."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value).view(np.uint8)), str(value.dtype), value.shape
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return True
    if isinstance(value, Graph):
        digest.update(_root(value).encode())
        return True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if _counts(f)]
        return _update(digest, [type(value).__qualname__, *fields])
    if isinstance(value, FunctionType) and _is_own(value):
        value = value.__qualname__
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        return all(_update(digest, item) for item in value)
    text = repr(value)
    digest.update(f"{len(text)} {text}".encode())
    return not ADDRESS.search(text)
