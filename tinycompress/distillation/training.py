"""How a training run goes: its length, its learning rate, its order of windows.

AdamW (Decoupled Weight Decay Regularization, arXiv:1711.05101), learning rate by step s of S with w of warm-up and
floor f:

    lr(s) = lr · min(1, (s + 1) / w) · (f + (1 - f) · (1 + cos(π · max(0, s - w) / (S - w))) / 2)

Windows come in a new permutation each epoch, seeded by (seed, epoch): only the seed decides the order (training_loop.py
runs it). Letters: N windows, T positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Training:
    """How long a run is and how fast it learns. Exactly one of `steps`, `epochs` and `tokens` is given.

    Fields:
        steps: updates of the weights.
        epochs: how often every window is read; a fraction is allowed. Rounded up to a whole step.
        tokens: tokens to read in all. Rounded up to a whole step.
        lr: the highest learning rate; above 0 for a run.
        warmup: steps over which the rate rises; below 1, a share of all steps.
        floor: the share of `lr` that the cosine ends at, between 0 and 1.
        weight_decay: of matrices; norms, biases and the scales of grids do not decay.
        clip: the largest norm of the gradient; 0 does not clip.
        betas: AdamW's two decay rates.
        batch: windows per step, over all processes.
        micro_batch: windows that a process takes at a time; None takes all of its share. Changes nothing but rounding.
        seed: decides the order of the windows and everything else that a run draws.
        precision: of the student's matrix products: "float32", "bfloat16" (autocast), or "auto": bfloat16 on CUDA,
            float32 elsewhere.
        checkpointing: computes activations again in the backward pass: less memory, about a third slower.
        eval_every: steps between measurements on the held-out text; 0 measures only before the first step and after
            the last.
        save_every: steps between saved states, where there is a work folder; 0 saves only the last.
        patience: measurements without a better held-out loss before the run stops; the best weights measured are then
            the result. None: all steps are run, and the last weights are the result.

    Raises InputError for a value out of its range, for another number of budgets than one, and for `patience` without
    `eval_every`.
    """

    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    lr: float = 2e-4
    warmup: float = 0.03
    floor: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    batch: int = 8
    micro_batch: int | None = None
    seed: int = 0
    precision: str = "auto"
    checkpointing: bool = False
    eval_every: int = 0
    save_every: int = 100
    patience: int | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.steps, self.epochs, self.tokens)) != 1:
            raise InputError(
                "Training budget",
                f"steps={self.steps}, epochs={self.epochs}, tokens={self.tokens}",
                "exactly one of the three",
            )
        for name in ("steps", "epochs", "tokens", "batch", "micro_batch", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"Training.{name}", value, "a positive number")
        for name in ("lr", "warmup", "weight_decay", "clip", "eval_every", "save_every"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"Training.{name}", value, "a number of at least 0")
        if not 0 <= self.floor <= 1:
            raise InputError("Training.floor", self.floor, "a share between 0 and 1")
        if self.precision not in PRECISIONS:
            raise InputError("Training.precision", repr(self.precision), " | ".join(PRECISIONS))
        if self.patience and not self.eval_every:
            raise InputError("Training.patience", self.patience, "None, or an eval_every above 0")

    def total_steps(self, windows: int, seq_len: int) -> int:
        """The updates of a run on `windows` windows of `seq_len` tokens."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * windows / self.batch))
        assert self.tokens is not None
        return max(1, math.ceil(self.tokens / (self.batch * seq_len)))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(total, round(self.warmup * total) if self.warmup < 1 else int(self.warmup))
        rise = min(1.0, (step + 1) / warm) if warm else 1.0
        cosine = (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm))) / 2
        return self.lr * rise * (self.floor + (1 - self.floor) * cosine)

    def windows_of(self, step: int, windows: int) -> Tensor:
        """Indices [batch] of a step: the next ones of this epoch's permutation, going on into the next epoch."""
        parts: list[Tensor] = []
        position = step * self.batch
        need = self.batch
        while need:
            epoch, offset = divmod(position, windows)
            order = torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            part = order[offset : offset + need]
            parts.append(part)
            position += len(part)
            need -= len(part)
        return torch.cat(parts)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The context of the student's matrix products."""
        on = self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=on)
