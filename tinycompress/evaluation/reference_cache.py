"""What a reference answers to a text, kept in a folder: asked once, compared with many models.

Of a torch model its normalised last hidden states are kept, in float32: D numbers a token where logits are V (85 times
as many for SmolLM2), and nothing is lost, for the head makes the same logits of them again, bit for bit. Of a runtime,
whose inside is not seen, the logits themselves, in float32 too.

  NAME.f32    float32 [W, T, width], little-endian
  NAME.json   what it is of, and the SHA-256 of the file; written last

NAME is a hash of the reference's fingerprint, its engine and the tokens: another model or text never reads it. Letters:
W windows, T positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import files
from ..errors import InputError
from .answers import Answers, Head

LARGEST = 16 * 10**9  # bytes of a folder


@dataclass(frozen=True)
class ReferenceCache:
    """A folder with answers of references.

    Fields:
        folder: the place. It is made when something is written.
        key: what the answers are of: any facts that JSON takes.
        shape: W, T and the width of what is kept of a token: D of a torch model, V of a runtime.
        limit: bytes that the files of the folder may have together.
    """

    folder: Path
    key: Mapping[str, Any]
    shape: tuple[int, int, int]
    limit: int = LARGEST

    @property
    def path(self) -> Path:
        """The file of the answers, whether it is there or not."""
        text = files.to_json({"key": dict(self.key), "shape": list(self.shape)}, indent=None)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.f32"

    @property
    def nbytes(self) -> int:
        """Bytes of the answers on disk."""
        return 4 * prod(self.shape)

    @property
    def is_filled(self) -> bool:
        return self._about.is_file()

    @property
    def _about(self) -> Path:
        return self.path.with_suffix(".json")

    @torch.inference_mode()
    def fill(self, make: Callable[[], Answers], progress: bool = True) -> None:
        """Asks the reference that `make` makes and writes what it says, if it is not there yet. An `InputError` where
        the folder would grow over its limit, an `OutputError` for a disk without room: both before it is asked."""
        if self.is_filled:
            return
        kept = sum(path.stat().st_size for path in self.folder.glob("*.f32")) if self.folder.is_dir() else 0
        if kept + self.nbytes > self.limit:
            found = f"{self.nbytes:,} bytes for this reference and {kept:,} that are there"
            raise InputError("reference cache", found, f"{self.limit:,} together (fewer windows, or an empty folder)")
        with files.locked(self.folder):
            files.check_space(self.folder, self.nbytes)
            files.write_bytes(self.path, self._parts(make(), progress))
            about = {"key": dict(self.key), "shape": list(self.shape), "sha256": files.sha256(self.path)}
            files.write_json(self._about, about)

    def answers(self, head: Head | None, vocab_size: int) -> Answers:
        """What was written, out of a memory map. `head` and `vocab_size` are those of the reference (`Answers`). An
        `InputError` for a file that is not as it was written."""
        known = files.read_json(self._about).get("sha256")
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes or files.sha256(self.path) != known:
            raise InputError(
                str(self.path),
                "missing, or other bytes than were written",
                "the file as it was (delete it and its .json, and run again)",
            )
        states = torch.from_numpy(np.memmap(self.path, "<f4", "c", shape=self.shape))
        return Answers(lambda number: iter((states[number],)), head, vocab_size)

    def _parts(self, reference: Answers, progress: bool) -> Iterator[memoryview]:
        windows, length, width = self.shape
        for number in tqdm(range(windows), desc="reference", unit="window", delay=2, disable=not progress):
            rows = 0
            for part in reference.states(number):
                rows += len(part)
                yield _bytes(part)
            if rows != length or part.shape[1] != width:
                raise ValueError(
                    f"{rows} × {part.shape[1]} numbers of a window, where {length} × {width} were foretold"
                )


def _bytes(part: Tensor) -> memoryview:
    array = part.float().cpu().contiguous().numpy().astype("<f4", copy=False)
    return array.reshape(-1).view(np.uint8).data
