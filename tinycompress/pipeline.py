"""Run passes in order, with a work folder that remembers: a killed run loses at most the pass in flight.

After each pass the graph is saved as `work/<step>-<pass>-<key>`, a checkpoint folder like any other. Folders appear in
one step, so one that is there is complete, and its name says what it holds: with k_0 = the fingerprint of the graph,

    k_i = SHA-256(k_{i-1}, pass i)

A rerun takes up behind the last step whose folder is there and whole; a changed pass, or a changed graph, has another
key and so runs again with all that follows. A damaged step (its files have hashes) is named, removed and made again.
Old steps stay until you delete them. Only one run at a time works in a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints.folder_reader import DESCRIPTION
from .errors import InputError
from .files import damage, locked, sweep
from .graph.graph import Graph, Pass
from .progress import tqdm

ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def run(graph: Graph, passes: Sequence[Pass], work: str | Path | None = None, progress: bool = True) -> Graph:
    """The graph after all `passes`. With `work`, each step is saved there, and steps that are there already are not
    run.

    A pass that is not noted in the history by itself is noted here. The saved step, not the one in memory, goes into
    the next pass: its weights are memory-mapped, and a resumed run computes exactly what an unbroken one does.

    Raises InputError for bad passes, and OutputError for a full disk and for a `work` that another run holds.
    """
    with tqdm(total=len(passes), desc="passes", unit="pass", disable=not progress) as bar:
        if work is not None:
            return _run_with_folder(graph, passes, Path(work), bar)
        for step in passes:
            bar.set_postfix_str(pass_name(step))
            graph = _apply(step, graph)
            bar.update()
    return graph


def _run_with_folder(graph: Graph, passes: Sequence[Pass], work: Path, bar: tqdm) -> Graph:
    with locked(work):
        sweep(work)
        key = _root(graph)
        done = 0
        while done < len(passes):
            found = _last_whole_step(work, passes, done, key)
            if found is not None:
                done, key, folder = found
                graph = _load(folder, graph)
                bar.update(done - bar.n)
                continue
            step = passes[done]
            bar.set_postfix_str(pass_name(step))
            graph = _apply(step, graph)
            next_key = _key(key, step)
            if next_key is None:  # nothing says what this pass does, but its result does: what follows can be found
                key = _root(graph)
            else:
                key = next_key
                graph = _saved(graph, _folder(work, done, step, key))
            done += 1
            bar.update()
        return graph


def _last_whole_step(work: Path, passes: Sequence[Pass], done: int, key: str) -> tuple[int, str, Path] | None:
    """The furthest step behind `done` that is there in one piece: how many passes are done then, its key and folder."""
    found: list[tuple[int, str, Path]] = []
    for number in range(done, len(passes)):
        next_key = _key(key, passes[number])
        if next_key is None:
            break
        key = next_key
        found.append((number + 1, key, _folder(work, number, passes[number], key)))
    for number, key, folder in reversed(found):
        if not folder.is_dir():
            continue
        name = damage(folder, DESCRIPTION)
        if name is None:
            return number, key, folder
        tqdm.write(f"{folder}: {name} is not as it was written; the step is made again", file=sys.stderr)
        shutil.rmtree(folder)
    return None


def _folder(work: Path, number: int, step: Pass, key: str) -> Path:
    """Where the result of the pass of that number, counted from 0, is kept."""
    return work / f"{number + 1:02}-{pass_name(step)}-{key[:16]}"


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


def _saved(graph: Graph, folder: Path) -> Graph:
    from .checkpoints.checkpoint import save

    save(graph, folder)
    return _load(folder, graph)


def _load(folder: Path | None, graph: Graph) -> Graph:
    """The graph of a step's folder; without a folder, the one at hand."""
    if folder is None:
        return graph
    from .checkpoints.checkpoint import load

    loaded = load(folder)
    return loaded if loaded.tokenizer else dataclasses.replace(loaded, tokenizer=graph.tokenizer)


def _root(graph: Graph) -> str:
    return hashlib.sha256(f"{graph.fingerprint()} {graph.history}".encode()).hexdigest()


def _key(previous: str, step: Pass) -> str | None:
    """The key behind `step`; None for a pass that cannot be told from another (a function: the same name and address
    can belong to other code, or other globals, on the next run), which is therefore run again.

    A repr is not enough for a key: passes keep calibration tokens and teachers out of theirs, and other tokens are
    another result. So the fields of a dataclass count, tensors by their bytes and graphs by their fingerprint. What
    changes no result does not: `progress`, and a field that says so (`field(metadata={"key": False})`). A class counts
    by its qualified name without its module, so that moving it to another file leaves its steps valid.
    """
    digest = hashlib.sha256(previous.encode())
    return digest.hexdigest() if _update(digest, step) else None


def _counts(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a pass can change its result."""
    return field.init and field.name != "progress" and field.metadata.get("key", True)


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
    if isinstance(value, Mapping):
        value = list(value.items())
    if isinstance(value, list | tuple):
        digest.update(f"{len(value)} of".encode())
        return all(_update(digest, item) for item in value)
    text = repr(value)
    digest.update(f"{len(text)} {text}".encode())
    return not ADDRESS.search(text)
