"""The training loop: AdamW, logs, early stop, and a state on disk that a kill cannot change.

A step's gradients are sums over micro-batches and processes, divided by one count of the whole step, so that
micro-batch and number of processes change nothing but rounding. Letters: N windows, T positions, b windows of a
micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..evaluation.perplexity import CHUNK
from ..files import locked, read_json, sweep
from .distributed import full_tensor, rank, sum_over_processes, true_anywhere, world_size
from .stopping import Stopped
from .student import Network
from .training import Training
from .training_log import TrainLog, peak_memory_mb
from .training_state import latest_state, load_state, optimizer_tensors, save_state, set_optimizer_step

# The loss of windows [b, T] at their indices [b] in a step: a scalar, already divided by the count of the whole step
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
    stop: Callable[[], bool] | None = None,
    progress: bool = True,
) -> None:
    """Trains the parameters of `network` that want gradients, in place, on windows `tokens` [N, T].

    objective: gives the loss of a micro-batch (see `Objective`).
    held_out: windows by name, whose perplexities are logged.
    work: the folder of the state; a state that is there is taken up if `key` is the same.
    log: the folder of train.jsonl.
    stop: asked after every step on every process; where it is true on one, the state is saved (with a work folder) and
        `Stopped` is raised. None: never.
    progress: show a progress bar.

    Raises InputError for a loss that is not finite, naming the step and its windows, after the state before it was
    saved; OutputError for a full disk, or a `work` that another run holds; `Stopped` as above. On a CPU, enter
    `tinycompress.keep_memory` around it: large blocks are then used again.
    """
    run = Run(network, tokens, objective, training, dict(held_out or {}), work, key)
    first_process = rank() == 0
    with locked(work if first_process else None):
        if work is not None and first_process:
            sweep(work)
        start = run.resume()
        logger = TrainLog(log if first_process else None, start, run.total, quiet=not (progress and first_process))
        with closing(logger):
            run.go(start, logger, stop)
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
        self.network = network
        self.tokens = tokens
        self.objective = objective
        self.training = training
        self.held_out = held_out
        self.work = work
        self.key = key
        self.total = training.total_steps(*tokens.shape)
        self.named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.named, training)
        self.device = next(iter(self.named.values())).device
        self.best: dict[str, Tensor] | None = None
        self.best_loss = math.inf
        self.waited = 0  # measurements since the best one
        self.done = False  # patience is at its end

    def go(self, start: int, log: TrainLog, stop: Callable[[], bool] | None = None) -> None:
        if start == 0 and self.held_out:
            first = self.evaluate()
            log.line(step=0, perplexity=first)
            self.judge(first)
        tokens_per_step = self.training.batch * self.tokens.shape[1]
        for step in range(start, self.total):
            if self.done:
                return
            began = time.perf_counter()
            loss, norm = self.step(step)
            line: dict[str, Any] = {
                "step": step + 1,
                "loss": loss,
                "lr": self.training.rate(step, self.total),
                "grad_norm": norm,
                "tokens": (step + 1) * tokens_per_step,
                "tokens_per_second": tokens_per_step / (time.perf_counter() - began),
                "peak_memory_mb": peak_memory_mb(self.device),
            }
            last = step + 1 == self.total
            if self.held_out and (last or _due(step + 1, self.training.eval_every)):
                line["perplexity"] = self.evaluate()
                self.judge(line["perplexity"])
            log.step(**line)
            asked = stop is not None and true_anywhere(stop(), self.device)
            if self.work and (last or asked or self.done or _due(step + 1, self.training.save_every)):
                self.save(step + 1)
            if asked:
                raise Stopped(step + 1, self.work)

    def step(self, step: int) -> tuple[float, float]:
        """One update: the loss (a mean) and the gradient's norm before clipping."""
        index = self.training.windows_of(step, len(self.tokens))
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(step, self.total)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        share = index[rank() :: world_size()]
        for micro in share.split(self.training.micro_batch or len(share)):
            windows = self.tokens[micro.to(self.tokens.device)].to(self.device)
            part = self.objective(windows, micro, step)
            (part * world_size()).backward()  # sharded gradients are means over the processes; these are sums
            loss += part.detach().double()
        parameters = list(self.named.values())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = sum_over_processes(loss).item()
        size = full_tensor(norm).item()
        if not (math.isfinite(value) and math.isfinite(size)):
            self._refuse(step, index, value, size)
        if self.training.clip and size > self.training.clip:  # a product with 1 would read and write all gradients
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
        """Perplexity of every held-out text, by its name."""
        return {
            name: math.exp(held_out_nll(self.network, windows, self.device).mean().item())
            for name, windows in self.held_out.items()
        }

    def judge(self, perplexity: Mapping[str, float]) -> None:
        """Notes the best mean held-out loss, and when there has been none for `patience` evaluations."""
        if self.training.patience is None:
            return
        loss = sum(map(math.log, perplexity.values())) / len(perplexity)
        if loss < self.best_loss:
            self.waited = 0
            self.best_loss = loss
            self.best = {name: p.detach().clone() for name, p in self.named.items()}
        else:
            self.waited += 1
        self.done = self.waited >= self.training.patience

    def restore_best(self) -> None:
        assert self.best is not None
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(self.best[name])

    def tensors(self) -> dict[str, Tensor]:
        """Everything of the state that is a tensor, by the name under which it is saved."""
        out = optimizer_tensors(self.named, self.optimizer)
        return out | {f"best.{name}": tensor for name, tensor in (self.best or {}).items()}

    def save(self, step: int) -> None:
        assert self.work is not None
        about = {
            "key": self.key,
            "best": self.best is not None,
            "best_loss": self.best_loss if self.best else None,
            "waited": self.waited,
            "done": self.done,
        }
        save_state(self.work, step, self.tensors(), about)

    def resume(self) -> int:
        """The step to go on from."""
        folder = latest_state(self.work, self.key) if self.work else None
        if folder is None:
            return 0
        if read_json(folder / "state.json")["best"]:
            self.best = {name: torch.empty_like(p.detach()) for name, p in self.named.items()}
        about = load_state(folder, self.tensors())
        set_optimizer_step(self.optimizer, about["step"])
        self.waited = about["waited"]
        self.done = about["done"]
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
    rounds = math.ceil(len(windows) / world_size())  # the same for every process: a sharded forward is collective
    for i in range(rounds):
        number = i * world_size() + rank()
        ids = windows[min(number, len(windows) - 1)][None].to(device)

        def nll(hidden: Tensor, head: Tensor, _: list[Tensor], ids: Tensor = ids) -> Tensor:
            pairs = zip(hidden[0, :-1].split(CHUNK), ids[0, 1:].split(CHUNK))
            sums = [F.cross_entropy(F.linear(h, head).float(), t, reduction="sum").double() for h, t in pairs]
            return torch.stack(sums).sum()

        value = network(ids, nll) / (ids.shape[1] - 1)
        if number < len(windows):
            out[number] = value
    return sum_over_processes(out).cpu()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
