"""What a training run tells: a progress bar, JSON lines, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import OutputError
from ..files import to_json, write_text
from ..progress import tqdm


class TrainLog:
    """`train.jsonl` in `folder`, one object a step: step, loss, lr, grad_norm, tokens, tokens_per_second,
    peak_memory_mb, and perplexity by held-out set where it was measured. A run that continues behind step `start` drops
    later lines."""

    def __init__(self, folder: Path | None, start: int, total: int, quiet: bool = False) -> None:
        self.bar = tqdm(total=total, initial=start, desc="distill", unit="step", delay=2, disable=quiet)
        self.perplexities: dict[str, float] = {}
        self.file = None
        self.board = None
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "train.jsonl"
        if path.exists():
            lines = path.read_text().splitlines() if start else []
            write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= start))
        self.file = path.open("a", encoding="utf-8")
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=start or None)
        else:
            tqdm.write(f"{path}: JSON lines only (for TensorBoard: pip install 'tinycompress[train]')", file=sys.stderr)

    def step(self, **values: Any) -> None:
        """One step's line."""
        self.perplexities = values.get("perplexity") or self.perplexities
        shown = {"loss": f"{values['loss']:.4f}", "tok/s": f"{values['tokens_per_second']:.0f}"}
        self.bar.set_postfix(shown | {name: f"{value:.2f}" for name, value in self.perplexities.items()}, refresh=False)
        self.bar.update()
        self.line(**values)

    def line(self, **values: Any) -> None:
        """A line without a step of the bar: the perplexities before the first one."""
        try:
            self._write(values)
        except OSError as error:  # a full disk
            self._abandon()
            raise OutputError(f"log of the training, in {self.folder}: {error.strerror or error}") from error

    def _write(self, values: dict[str, Any]) -> None:
        if self.file:
            self.file.write(to_json(values, indent=None) + "\n")
            self.file.flush()
        if self.board:
            flat = {k: v for k, v in values.items() if isinstance(v, float)} | {
                f"perplexity/{k}": v for k, v in values.get("perplexity", {}).items()
            }
            for name, value in flat.items():
                self.board.add_scalar(name, value, values["step"])

    def _abandon(self) -> None:
        """Lets go of files that cannot be written; closing them would try again."""
        if self.file:
            with suppress(OSError):
                self.file.close()
        self.file = None
        self.board = None

    def close(self) -> None:
        """Ends the bar and the files; what they hold is on the disk."""
        self.bar.close()
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
        if self.board:
            self.board.close()


def _step(line: str) -> float:
    """The step of a line; a line that a kill cut short is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far: of the GPU, or of the whole process on the CPU; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, kibibytes on Linux
