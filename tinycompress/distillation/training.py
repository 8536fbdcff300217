"""Training: AdamW with warm-up and a cosine, in an order that only the seed decides, and that a kill cannot change.

AdamW (Decoupled Weight Decay Regularization, arXiv:1711.05101), learning rate by step s of S with w of warm-up and floor f:

    lr(s) = lr · min(1, (s + 1) / w) · (f + (1 - f) · (1 + cos(π · max(0, s - w) / (S - w))) / 2)

Windows come in a new permutation each epoch, seeded by (seed, epoch). A step's gradients are sums over micro-batches and
processes divided by one count of the step, so micro-batch and number of processes change nothing but rounding.
Letters: N windows, T positions, b windows of a micro-batch.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..evaluation.perplexity import CHUNK
from ..model.cpu_memory import held
from .distributed import full_tensor, rank, sum_over_processes, true_anywhere, world_size
from .student import Network
from .training_log import TrainLog, peak_memory_mb
from .training_state import latest_state, load_state, optimizer_tensors, save_state, set_optimizer_step

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Training:
    """How long and how fast. The budget is one of `steps`, `epochs` over the windows, or `tokens` (rounded up to a step).

    batch: windows a step, over all processes; micro_batch: windows a process takes at a time (None: all of its share).
    warmup: steps, or a share of all below 1. floor: the share of lr that the cosine ends at. clip: the largest norm of the
    gradient (0: none). precision: of the student's matrix products; auto is bfloat16 autocast on CUDA, float32 elsewhere.
    eval_every, save_every: steps (0: only at the ends). patience: evaluations without a better held-out loss before the
    run stops; the best weights are then the result (None: the last ones are, after all steps).
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
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"Training.{name}", getattr(self, name), "a number of at least 0")
        if not 0 <= self.floor <= 1:
            raise InputError("Training.floor", self.floor, "a share between 0 and 1")
        if self.precision not in PRECISIONS:
            raise InputError("Training.precision", repr(self.precision), " | ".join(PRECISIONS))
        if self.patience and not self.eval_every:
            raise InputError("Training.patience", self.patience, "None, or an eval_every above 0")

    def total_steps(self, windows: int, seq_len: int) -> int:
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * windows / self.batch))
        assert self.tokens is not None
        return max(1, math.ceil(self.tokens / (self.batch * seq_len)))

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(total, round(self.warmup * total) if self.warmup < 1 else int(self.warmup))
        rise = min(1.0, (step + 1) / warm) if warm else 1.0
        cosine = (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm))) / 2
        return self.lr * rise * (self.floor + (1 - self.floor) * cosine)

    def windows_of(self, step: int, windows: int) -> Tensor:
        """Indices [batch] of a step: the next ones of this epoch's permutation, going on into the next epoch."""
        out: list[Tensor] = []
        at, need = step * self.batch, self.batch
        while need:
            epoch, offset = divmod(at, windows)
            order = torch.randperm(windows, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
            out.append(order[offset : offset + need])
            at, need = at + len(out[-1]), need - len(out[-1])
        return torch.cat(out)

    def autocast(self, device: torch.device) -> torch.autocast:
        on = self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, torch.bfloat16, enabled=on)


# Runs the student on windows [b, T] of the step, whose indices are given: the summed loss over a denominator, a scalar
Objective = Callable[[Tensor, Tensor, int], Tensor]


def train(
    network: Network,
    tokens: Tensor,
    objective: Objective,
    training: Training,
    *,
    held_out: Mapping[str, Tensor] | None = None,
    work: Path | None = None,
    log: Path | None = None,
    key: str = "",
) -> None:
    """Trains the parameters of `network` that want gradients, in place, on windows `tokens` [N, T].

    objective(windows [b, T], indices [b], step) gives the loss of a micro-batch, already divided by the count of the whole step.
    held_out: windows by name, whose perplexities are logged. work: where the state is kept, and found again if `key`
    is the same. A loss that is not finite is an InputError naming the step and its windows, after the state before it has
    been saved. SIGTERM ends the process after the step in progress, saved.
    """
    run = Run(network, tokens, objective, training, dict(held_out or {}), work, key)
    start = run.resume()
    logger = TrainLog(log if rank() == 0 else None, start, run.total, quiet=rank() > 0)
    try:
        with _sigterm() as stop, held():
            run.go(start, logger, stop)
    finally:
        logger.close()
    if run.best is not None:
        run.restore_best()


class Run:
    """The loop's variables: parameters by name, the optimizer, the best weights so far."""

    def __init__(
        self,
        network: Network,
        tokens: Tensor,
        objective: Objective,
        training: Training,
        held_out: dict[str, Tensor],
        work: Path | None,
        key: str,
    ) -> None:
        self.network, self.tokens, self.objective, self.training = network, tokens, objective, training
        self.held_out, self.work, self.key = held_out, work, key
        self.total = training.total_steps(*tokens.shape)
        self.named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named, training)
        self.device = next(iter(self.named.values())).device
        self.best: dict[str, Tensor] | None = None
        self.best_loss, self.waited, self.done = math.inf, 0, False

    def go(self, start: int, log: TrainLog, stop: Callable[[], bool]) -> None:
        if start == 0 and self.held_out:
            first = self.evaluate()
            log.line(step=0, perplexity=first)
            self.judge(first)
        for step in range(start, self.total):
            if self.done:
                return
            began = time.perf_counter()
            loss, norm = self.step(step)
            speed = self.training.batch * self.tokens.shape[1] / (time.perf_counter() - began)
            line: dict[str, Any] = {
                "step": step + 1,
                "loss": loss,
                "lr": self.training.rate(step, self.total),
                "grad_norm": norm,
            }
            line |= {"tokens": (step + 1) * self.training.batch * self.tokens.shape[1], "tokens_per_second": speed}
            line["peak_memory_mb"] = peak_memory_mb(self.device)
            last = step + 1 == self.total
            if self.held_out and (last or _due(step + 1, self.training.eval_every)):
                line["perplexity"] = self.evaluate()
                self.judge(line["perplexity"])
            log.step(**line)
            asked = true_anywhere(stop(), self.device)
            if self.work and (last or asked or self.done or _due(step + 1, self.training.save_every)):
                self.save(step + 1)
            if asked:
                raise _Stopped

    def step(self, step: int) -> tuple[float, float]:
        """One update: the loss (a mean) and the gradient's norm before clipping."""
        index = self.training.windows_of(step, len(self.tokens))
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(step, self.total)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        mine = index[rank() :: world_size()]
        for some in mine.split(self.training.micro_batch or len(mine)):
            part = self.objective(self.tokens[some.to(self.tokens.device)].to(self.device), some, step)
            (part * world_size()).backward()  # sharded gradients are means over the processes; these are sums
            loss += part.detach().double()
        parameters = list(self.named.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value, size = sum_over_processes(loss).item(), full_tensor(norm).item()
        if not (math.isfinite(value) and math.isfinite(size)):
            self._refuse(step, index, value, size)
        if (
            self.training.clip and size > self.training.clip
        ):  # asked first: on a CPU a product with 1 reads and writes all gradients
            nn.utils.clip_grads_with_norm_(parameters, self.training.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, size

    def _refuse(self, step: int, index: Tensor, loss: float, norm: float) -> None:
        kept = "no work folder was given, so nothing is kept"
        if self.work:
            self.save(step)
            kept = f"the state after step {step} is in {self.work}"
        raise InputError(
            f"loss of step {step + 1}, windows {index.tolist()}",
            f"{loss} (norm of the gradient {norm})",
            f"finite numbers: look at those windows, or lower lr; {kept}",
        )

    def evaluate(self) -> dict[str, float]:
        return {
            name: math.exp(held_out_nll(self.network, windows, self.device).mean().item())
            for name, windows in self.held_out.items()
        }

    def judge(self, perplexity: Mapping[str, float]) -> None:
        """Notes the best mean held-out loss, and when there has been none for `patience` evaluations."""
        if self.training.patience is None:
            return
        loss = sum(map(math.log, perplexity.values())) / len(perplexity)
        self.waited = 0 if loss < self.best_loss else self.waited + 1
        if loss < self.best_loss:
            self.best_loss, self.best = loss, {name: p.detach().clone() for name, p in self.named.items()}
        self.done = self.waited >= self.training.patience

    def restore_best(self) -> None:
        assert self.best is not None
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(self.best[name])

    def tensors(self) -> dict[str, Tensor]:
        out = optimizer_tensors(self.named, self.optimizer)
        return out | {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}

    def save(self, step: int) -> None:
        assert self.work is not None
        about = {
            "key": self.key,
            "best": self.best is not None,
            "best_loss": self.best_loss if self.best else None,
            "waited": self.waited,
        }
        save_state(self.work, step, self.tensors(), about | {"done": self.done})

    def resume(self) -> int:
        """The step to go on from."""
        folder = latest_state(self.work, self.key) if self.work else None
        if folder is None:
            return 0
        from ..files import read_json

        if read_json(folder / "state.json")["best"]:
            self.best = {name: torch.empty_like(p.detach()) for name, p in self.named.items()}
        about = load_state(folder, self.tensors())
        set_optimizer_step(self.optimizer, about["step"])
        self.waited, self.done = about["waited"], about["done"]
        self.best_loss = math.inf if about["best_loss"] is None else about["best_loss"]
        return about["step"]


def adamw(named: Mapping[str, nn.Parameter], training: Training) -> torch.optim.AdamW:
    """Matrices decay; norms, biases and the scales of grids do not."""
    if not named:
        raise InputError("trainable parameters", "none", "at least one (LoRA targets that the model has)")
    decay = [p for name, p in named.items() if p.dim() > 1 and not name.endswith("scales_delta")]
    rest = [p for name, p in named.items() if p.dim() <= 1 or name.endswith("scales_delta")]
    groups = [{"params": decay, "weight_decay": training.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.lr, betas=training.betas, fused=True)


@torch.no_grad()
def held_out_nll(network: Network, windows: Tensor, device: torch.device) -> Tensor:
    """Mean NLL of each window [N, T], float64 [N], in float32; the windows are shared out among the processes."""
    out = torch.zeros(len(windows), dtype=torch.float64, device=device)
    rounds = -(
        -len(windows) // world_size()
    )  # every process computes as often as any other: a sharded forward is collective
    for i in range(rounds):
        at = i * world_size() + rank()
        ids = windows[min(at, len(windows) - 1)][None].to(device)

        def nll(hidden: Tensor, head: Tensor, _: list[Tensor], ids: Tensor = ids) -> Tensor:
            pairs = zip(hidden[0, :-1].split(CHUNK), ids[0, 1:].split(CHUNK))
            return torch.stack(
                [F.cross_entropy(F.linear(h, head).float(), t, reduction="sum").double() for h, t in pairs]
            ).sum()

        value = network(ids, nll) / (ids.shape[1] - 1)
        if at < len(windows):
            out[at] = value
    return sum_over_processes(out).cpu()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Stopped(Exception):
    """SIGTERM was asked for, and the state is saved."""


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Yields "was SIGTERM received?"; the signal itself is delivered when the block is left."""
    received: list[int] = []
    stopped = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    except _Stopped:
        stopped = True  # it may have been another process that was asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if received or stopped:
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM)  # behind a handler that returned: the training is not finished
