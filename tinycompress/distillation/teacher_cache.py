"""A teacher written to disk once: what it says of every token of a set of windows, in some 36 bytes a token.

  sample   Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs (arXiv:2503.16870). N draws from the
           teacher, t̂ = counts / N: an unbiased estimate, so gradients of KL(t̂ ‖ q) point where those of the full
               teacher do. 50
           draws hit about 12 ids of text; an id and its count take 3 bytes
  topk     the k most probable ids with float16 probabilities; all other tokens are one outcome of mass 1 - Σ

A folder holds index.json and shards of whole windows. A shard is, in this order (little-endian),

    int64 [w + 1]     where each of its w windows begins, counted in entries
    uint8 [w · T]     entries of each position
    entries           sample: (count << bits | id), 3 or 4 bytes;  topk: id in 3 or 4 bytes, then float16

A shard appears whole, under its name, and is noted in the index with its SHA-256 only then; draws are seeded by window:
a run that was killed goes on at the first missing shard and ends with the same bytes. Letters: N windows, T positions,
w windows of a shard, k entries, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..calibration.walk import BATCH_TOKENS
from ..checkpoints.tokenizer import Tokenizer
from ..errors import InputError
from ..graph.graph import Graph
from ..progress import tqdm
from .fused_loss import HiddenTarget, SampledTarget, SparseTarget, TopKTarget
from .sparse_targets import Form
from .teacher import OnlineTeacher, StreamedTeacher
from .teacher_shards import Shard, check_index

FORMAT = 1
INDEX = "index.json"
LOGITS = 1 << 24  # logits of the teacher that exist at a time


def write_cache(
    teacher: Graph,
    tokens: Tensor,
    folder: str | Path,
    kind: str = "sample",
    *,
    draws: int = 50,
    k: int = 50,
    seed: int = 0,
    streamed: bool = False,
    shard_tokens: int = 1 << 16,
    device: torch.device | str | None = None,
) -> TeacherCache:
    """What `teacher` says of `tokens` [N, T], written to `folder`; one that was begun with the same arguments is
    continued.

    kind: "sample" (`draws` of each token's distribution) or "topk" (its `k` largest probabilities). streamed: layer by
    layer, with one block's weights in memory and one pass over the teacher for every `shard_tokens` tokens (whose
    hidden states are in memory). Raises InputError for a folder with something else in it; OutputError for too little
    disk space, before the teacher runs, for a disk that fills up, after which the same call goes on, and for a folder
    that another run writes.
    """
    form = Form(kind, draws if kind == "sample" else k, teacher.config.vocab_size)
    if tokens.dim() != 2 or not tokens.numel() or shard_tokens < 1:
        raise InputError(
            "tokens to cache",
            f"{tuple(tokens.shape)} in shards of {shard_tokens}",
            "windows [N, T], in shards of at least 1 token",
        )
    if seed < 0:
        raise InputError("seed of the cache", seed, "an integer of at least 0")
    folder, (N, T) = Path(folder), tokens.shape
    per_shard = max(1, shard_tokens // T)
    index = {
        "format": FORMAT,
        "kind": form.kind,
        "n": form.n,
        "vocab_size": form.vocab_size,
        "seed": seed,
        "windows": N,
        "seq_len": T,
        "shard_windows": per_shard,
        "teacher": teacher.fingerprint(),
        "tokens": digest(tokens),
        "tokenizer": digest(teacher.tokenizer),
    }
    with files.locked(folder):
        shards = _begin(folder, index)
        shared = tokens.split(per_shard)
        files.check_space(folder, form.expected_bytes(sum(part.numel() for part in shared[len(shards) :])))
        if len(shards) < len(shared):
            ask = StreamedTeacher(teacher, device, progress="layers") if streamed else OnlineTeacher(teacher, device)
            at_once = per_shard if streamed else max(1, BATCH_TOKENS // T)
            with tqdm(
                total=N * T,
                initial=len(shards) * per_shard * T,
                desc="caching the teacher",
                unit="tok",
                unit_scale=True,
                delay=2,
            ) as bar:
                for number in range(len(shards), len(shared)):
                    windows = range(number * per_shard, number * per_shard + len(shared[number]))
                    parts = _windows(ask, shared[number], windows, form, seed, at_once, bar)
                    shards.append(_write_shard(folder / f"shard-{number:05}.bin", list(parts)))
                    files.write_json(folder / INDEX, index | {"shards": shards})
    return open_cache(folder, tokens)


def _begin(folder: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards that are there already, of a cache that was begun with the same settings."""
    files.sweep(folder)
    if (folder / INDEX).exists():
        found = files.read_json(folder / INDEX)
        different = [name for name, value in index.items() if found.get(name) != value]
        if different:
            was, now = ({name: source.get(name) for name in different} for source in (found, index))
            raise InputError("cache folder", f"{folder}, begun with {was}", f"{now}, or another folder")
        check_index(found, str(folder / INDEX))
        complete = list(found["shards"])
        for number, shard in enumerate(complete):
            if _size(files.inside(folder, shard["file"])) != shard["bytes"]:
                complete = complete[:number]  # this one and those behind it are made again
                break
    else:
        files.claim(folder)
        complete = []
    files.write_json(folder / INDEX, index | {"shards": complete})
    return complete


def _windows(
    ask: OnlineTeacher | StreamedTeacher,
    tokens: Tensor,
    numbers: Sequence[int],
    form: Form,
    seed: int,
    at_once: int,
    bar: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts and entries of each window [T], in order. Which windows share a forward depends on the shard alone."""
    T = tokens.shape[1]
    rows = max(1, LOGITS // form.vocab_size)
    for start in range(0, len(tokens), at_once):
        some = tokens[start : start + at_once]
        target = ask(some)
        for i in range(len(some)):
            # not torch's generator, whose CPU seeds are cut to 32 bits
            random = np.random.default_rng((seed, numbers[start + i])).random(
                (T, form.n if form.kind == "sample" else 0)
            )
            uniforms = torch.from_numpy(random)
            window: HiddenTarget = target.rows(slice(i * T, (i + 1) * T))
            parts = []
            for at in range(0, T, rows):
                logits = window.rows(slice(at, at + rows)).logits()
                if not torch.isfinite(logits.sum()):
                    raise InputError(
                        f"teacher on window {numbers[start + i]}",
                        "NaN or infinite logits",
                        "a teacher that computes finite ones",
                    )
                parts.append(form.encode(logits, uniforms[at : at + rows]))
            yield np.concatenate([c for c, _ in parts]), np.concatenate([e for _, e in parts])
            bar.update(T)


def _write_shard(path: Path, windows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """Writes a shard and returns its line of the index."""
    begins = np.cumsum([0, *(len(entries) for _, entries in windows)]).astype("<i8")
    parts = [
        begins.tobytes(),
        *(counts.tobytes() for counts, _ in windows),
        *(entries.tobytes() for _, entries in windows),
    ]
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    files.write_bytes(path, parts)
    return {"file": path.name, "bytes": sum(map(len, parts)), "sha256": sha.hexdigest()}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def digest(of: Tensor | Tokenizer | None) -> str | None:
    """SHA-256 of token windows (whatever their integer type) or of a tokenizer; None of none."""
    if of is None:
        return None
    if isinstance(of, Tensor):
        return hashlib.sha256(
            f"{tuple(of.shape)}".encode() + of.cpu().long().contiguous().numpy().tobytes()
        ).hexdigest()
    return hashlib.sha256(of.backend.to_str().encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """A finished cache. `target` is what the losses take.

    Fields:
        folder: where it lies.
        form: what is kept of each token.
        windows: N.
        seq_len: T.
        index: the content of index.json.
        opened: memory maps of the shards that were read, by number.
    """

    folder: Path
    form: Form
    windows: int
    seq_len: int
    index: dict[str, Any] = field(repr=False)
    opened: dict[int, Shard] = field(default_factory=dict, init=False, repr=False)

    @property
    def vocab_size(self) -> int:
        return self.form.vocab_size

    @property
    def fingerprint(self) -> str:
        """Equal for equal contents: it covers the teacher, the tokens, the settings and every shard's checksum."""
        return hashlib.sha256(json.dumps(self.index, sort_keys=True).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.index["shards"])

    def target(self, window_indices: Tensor | Sequence[int]) -> SparseTarget:
        """The teacher on some windows, [len(window_indices) · T] rows, on the CPU. A damaged shard is an InputError."""
        read = [self._window(i) for i in torch.as_tensor(window_indices).flatten().tolist()]
        widest = max(ids.shape[1] for ids, _ in read)
        ids, probs = (
            np.concatenate([np.pad(part, ((0, 0), (0, widest - part.shape[1]))) for part in parts])
            for parts in zip(*read)
        )
        kind = SampledTarget if self.form.kind == "sample" else TopKTarget
        return kind(torch.from_numpy(ids), torch.from_numpy(probs))

    def _window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= number < self.windows:
            raise InputError("window of the cache", number, f"0 … {self.windows - 1}")
        shard, within = divmod(number, self.index["shard_windows"])
        if shard not in self.opened:
            count = min(self.index["shard_windows"], self.windows - shard * self.index["shard_windows"])
            self.opened[shard] = Shard.open(self.folder, self.index["shards"][shard], count, self.seq_len, self.form)
        return self.opened[shard].window(within)


def open_cache(
    folder: str | Path, tokens: Tensor | None = None, tokenizer: Tokenizer | None = None, teacher: Graph | None = None
) -> TeacherCache:
    """A cache for reading. What is given of `tokens` [N, T], `tokenizer` and `teacher` must be what it was made with,
    and every shard must be there in its length (contents are checked when first read); else an InputError says what is
    not."""
    folder = Path(folder)
    index = files.read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise InputError(str(folder / INDEX), f"format {index.get('format')}", f"format {FORMAT}, of a teacher cache")
    check_index(index, str(folder / INDEX))
    given = {"tokens": tokens, "tokenizer": tokenizer}
    for name, value in given.items():
        if value is not None and digest(value) != index[name]:
            raise InputError(
                f"cache {folder}",
                f"one made for other {name}" if name == "tokens" else f"one made with another {name}",
                f"the very {name} it was made with",
            )
    if teacher is not None and teacher.fingerprint() != index["teacher"]:
        raise InputError(
            f"cache {folder}", "one made by another teacher", "this teacher's (write it anew, into another folder)"
        )
    wanted = -(-index["windows"] // index["shard_windows"])
    if len(index["shards"]) < wanted:
        found = f"{len(index['shards'])} of {wanted} shards"
        raise InputError(
            f"cache {folder}", found, "a finished one (the command that began it goes on where it was stopped)"
        )
    for shard in index["shards"]:
        path = files.inside(folder, shard["file"])
        if (size := _size(path)) != shard["bytes"]:
            found = "no such file" if size < 0 else f"{size:,} bytes"
            raise InputError(
                str(path), found, f"{shard['bytes']:,} bytes, as the index says (write_cache makes it again)"
            )
    return TeacherCache(
        folder, Form(index["kind"], index["n"], index["vocab_size"]), index["windows"], index["seq_len"], index
    )
