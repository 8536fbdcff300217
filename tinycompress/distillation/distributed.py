"""Several processes as one: which one am I, what is shared, and a network that is split over all of them.

FSDP2 (torch.distributed.fsdp.fully_shard) splits every parameter along its first dimension over the processes. The
parameters of a block are whole only while the block computes. Without a process group, every function here does what
is right for a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..files import new_folder


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """How many processes work together; 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group(device: torch.device | str | None = None) -> Iterator[torch.device]:
    """The process group that torchrun's environment describes, for the length of the block. Yields the device to use.

    device: None means CUDA where there is any (one GPU for each process), and the CPU elsewhere. Without torchrun, or
    inside a process group that exists already, no group is made.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if _in_group() or "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def shard(network: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Splits `network` over the processes: each of `blocks` is a unit that is gathered when it computes, and all other
    parameters are one more unit. With one process, the network only moves to `device`."""
    if world_size() == 1:
        network.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        if any(True for _ in block.parameters()):  # a layer may have lost both sublayers
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes (a collective call), or the tensor itself if it was never split."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def true_anywhere(flag: bool, device: torch.device) -> bool:
    """True in every process as soon as `flag` is true in one of them."""
    if world_size() == 1:
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)


def wait_for_all() -> None:
    """Returns once every process has called it; at once where there is one."""
    if _in_group():
        dist.barrier()


@contextmanager
def shared_folder(target: Path) -> Iterator[Path]:
    """`files.new_folder` for all processes together: all write into the folder that the first process makes and
    renames."""
    if world_size() == 1:
        with new_folder(target, overwrite=True) as folder:
            yield folder
        return
    if rank() == 0:
        with new_folder(target, overwrite=True) as folder:
            dist.broadcast_object_list([str(folder)])
            yield folder
            dist.barrier()
    else:
        name: list[str] = [""]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()
    dist.barrier()
