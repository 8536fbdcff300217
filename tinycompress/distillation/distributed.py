"""Several processes as one: who am I, what is shared, and a network split over all of them.

FSDP2 (torch.distributed.fsdp.fully_shard) splits every parameter along its first dimension over the processes; a block's
parameters are whole only while it computes. Without a process group every function here is the one-process case.
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
    return dist.get_rank() if _together() else 0


def world() -> int:
    """How many processes work together; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: torch.device | str | None = None) -> Iterator[torch.device]:
    """The process group that torchrun's environment describes, for the length of the block; yields the device to work on.

    device None is CUDA (one GPU a process) where there is any, else the CPU. Without torchrun, or inside a group that is
    there already, nothing is joined.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    if _together() or "TORCHELASTIC_RUN_ID" not in os.environ:
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
    """Splits `network` over the processes: each of `blocks` a unit that is gathered when it computes, the rest one more.
    Nothing to do for one process but to move it to the device."""
    if world() == 1:
        network.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world(),))
    for block in blocks:
        if any(True for _ in block.parameters()):  # a layer may have lost both sublayers
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes (a collective call), or itself if it was never split."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def anywhere(flag: bool, device: torch.device) -> bool:
    """True for all as soon as it is true for one."""
    return bool(summed(torch.tensor(float(flag), device=device)) > 0) if world() > 1 else flag


@contextmanager
def shared_folder(target: Path) -> Iterator[Path]:
    """`files.new_folder` for all processes together: all write into the folder that the first one makes and renames."""
    if world() == 1:
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
