"""The index and the shards of a teacher's cache, checked before anything is made of them: they may come from others.

The hash of a shard only says that it is the one that the index means; whoever wrote one wrote both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import files
from ..checkpoints.json_fields import integer
from ..errors import InputError
from .sparse_targets import Form

NUMBERS = {"n": 1, "vocab_size": 1, "seed": 0, "windows": 1, "seq_len": 1, "shard_windows": 1}  # and the least of each
OTHERS = ("kind", "teacher", "tokens", "tokenizer", "shards")
LINE = {"file": str, "bytes": int, "sha256": str}  # of a shard


def check_index(index: Mapping[str, Any], where: str) -> None:
    """An `InputError` for an index.json that `write_cache` has not written; `where` names it."""
    if missing := [name for name in (*NUMBERS, *OTHERS) if name not in index]:
        raise InputError(where, f"no {', '.join(missing)}", "the index that write_cache writes")
    for name, low in NUMBERS.items():
        integer(index, name, where, low=low)
    shards = index["shards"]
    if not isinstance(shards, list) or not all(map(_is_line, shards)):
        raise InputError(f"shards in {where}", repr(shards)[:80], f"a list of objects with {', '.join(LINE)}")


def _is_line(line: Any) -> bool:
    return isinstance(line, dict) and all(isinstance(line.get(name), kind) for name, kind in LINE.items())


@dataclass(frozen=True, eq=False)
class Shard:
    """One file of a cache, as a memory map.

    Fields:
        path: the file.
        form: what is kept of each token.
        begins: int64 [w + 1], where each window begins, counted in entries.
        counts: uint8 [w, T], entries of each position.
        entries: uint8 [e, width].
    """

    path: Path
    form: Form
    begins: np.ndarray
    counts: np.ndarray
    entries: np.ndarray

    @staticmethod
    def open(folder: Path, line: Mapping[str, Any], windows: int, T: int, form: Form) -> Shard:
        """The shard of that line of the index; an `InputError` for other bytes than were written."""
        path = files.inside(folder, line["file"])
        head = 8 * (windows + 1)
        counts = windows * T
        size = path.stat().st_size
        if size < head + counts or (size - head - counts) % form.width:
            accepted = f"{windows} windows of {T} positions, as the index says"
            raise InputError(str(path), f"{size:,} bytes", accepted)
        data = np.memmap(path, np.uint8, "r")
        if hashlib.sha256(data.data).hexdigest() != line["sha256"]:
            accepted = "the shard as it was (delete it and write the cache again)"
            raise InputError(str(path), "other bytes than were written (its SHA-256 differs)", accepted)
        begins = data[:head].view("<i8")
        shard = Shard(
            path,
            form,
            begins,
            data[head : head + counts].reshape(windows, T),
            data[head + counts :].reshape(-1, form.width),
        )
        lengths = shard.counts.sum(1, dtype=np.int64)
        if begins[0] != 0 or begins[-1] != len(shard.entries) or not np.array_equal(np.diff(begins), lengths):
            raise InputError(str(path), "windows that are not as long as their entries", "the shard as it was written")
        return shard

    def window(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [T, k] and probabilities float32 [T, k] of window `i`; an `InputError` for what no teacher says."""
        ids, probs = self.form.decode(self.counts[i], self.entries[self.begins[i] : self.begins[i + 1]])
        if ids.size and ids.max() >= self.form.vocab_size:
            raise InputError(str(self.path), f"token {ids.max()}", f"ids below {self.form.vocab_size}")
        if not np.isfinite(probs).all() or probs.min(initial=0) < 0 or probs.max(initial=0) > 1:
            raise InputError(str(self.path), "a probability that is none", "numbers in 0 … 1")
        return ids, probs
