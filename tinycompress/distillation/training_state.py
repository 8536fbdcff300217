"""The state of a training run on disk: weights and optimizer as safetensors shards, the rest as JSON, nothing pickled.

torch.distributed.checkpoint writes and reads the tensors, so that a state saved by one number of processes continues on
another. A folder `step-<n>` appears in one step when it is complete, and only then is the one before it removed: a run
killed at any moment finds a whole state. Its files have hashes, so that a damaged one is named and not gone on from.
Everything random in training is a function of the seed and the step, so there is no state of a random generator to
keep.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files import damage, locked, read_json, record, seal, write_json
from .distributed import rank, shared_folder, wait_for_all, world_size

STATE = "state.json"
STEP = re.compile(r"step-(\d{8})")
FILE_BYTES = 1 << 29  # of whole tensors: the writer holds copies of all that goes into one file


def save_state(work: Path, step: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes work/step-<n> and removes older ones. A collective call: every process hands in its shards."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    target = work / f"step-{step:08}"
    with shared_folder(target) as folder:
        with _plain_errors():
            writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of(tensors), save_distributed=True)
            save(dict(tensors), storage_writer=writer, no_dist=world_size() == 1)
        if rank() == 0:
            write_json(folder / STATE, seal({"step": step, **about, "files": record(folder)}))
    if rank() == 0:
        for old in _states(work):
            if old != target:
                shutil.rmtree(old)


def forget_states(work: Path) -> None:
    """Removes the states of a training run, so that it starts again. A collective call."""
    if rank() == 0:
        with locked(work):
            for state in _states(work):
                shutil.rmtree(state)
    wait_for_all()


def _states(work: Path) -> list[Path]:
    """The folders of states, the oldest first."""
    return sorted(path for path in work.glob("step-*") if STEP.fullmatch(path.name))


def file_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file that each tensor goes to."""
    out: dict[str, int] = {}
    number = 1
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if filled and filled + size > FILE_BYTES:
            number += 1
            filled = 0
        out[name] = number
        filled += size
    return out


def latest_state(work: Path, key: str) -> Path | None:
    """The folder of the newest state; None if there is none, an InputError if it is another run's, or damaged."""
    if not work.is_dir():
        return None
    states = _states(work)
    if not states:
        return None
    newest = states[-1]
    damaged = damage(newest, STATE)
    if damaged is not None:
        accepted = f"the files as they were written, or no {newest}: the run then starts anew"
        raise InputError(str(newest / damaged), "missing, or other bytes than were written", accepted)
    about = read_json(newest / STATE)
    if about.get("key") != key:
        raise InputError(
            f"work folder {work}",
            "the state of a run with another model, data or settings",
            "the same ones, or another folder",
        )
    return newest


def load_state(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fills `tensors` in place, whole or shards, and returns what was saved `about` the state."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    try:
        with _plain_errors():
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world_size() == 1)
    except (RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:  # not the tensors of the run
        raise InputError(str(folder), f"{type(error).__name__}: {error}", "a state of this run") from error
    return read_json(folder / STATE)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """The errors of torch.distributed.checkpoint as what they are of: it wraps them, and not in an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise cause from None


def optimizer_tensors(named: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and AdamW's two moments by name; the moments are made (zero) if the optimizer has not stepped yet."""
    out: dict[str, Tensor] = {}
    for name, parameter in named.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        out |= {
            f"weight.{name}": parameter.detach(),
            f"exp_avg.{name}": state["exp_avg"],
            f"exp_avg_sq.{name}": state["exp_avg_sq"],
        }
    return out


def set_optimizer_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(float(step))
