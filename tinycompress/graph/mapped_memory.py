"""Results that need not stay in memory: tensors mapped from a file without a name.

The system reads a page when it is touched and drops it when memory is short, so a pass that goes through a large model
layer by layer holds one layer. The file lies where temporary files do (TMPDIR, which should be a disk) and is gone with
the last tensor mapped from it, or with the process, however it ends.
"""

from __future__ import annotations

import errno
import math
import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import OutputError
from .graph import Graph, LazyTensor, Weight
from .quant_tensor import QuantTensor

IN_MEMORY = 1 << 30  # bytes of results that are not worth a file


def keeper(sizes: Iterable[tuple[int, int]]) -> Callable[[QuantTensor], QuantTensor]:
    """What to do with each of the packed weights of sizes (numel, bits): nothing, or `spilled` if they are large
    together."""
    return spilled if sum(numel * bits // 8 for numel, bits in sizes) > IN_MEMORY else lambda weight: weight


def spilled(weight: QuantTensor) -> QuantTensor:
    """The same packed weight, on disk; one on a GPU stays there."""
    if weight.device.type != "cpu":
        return weight
    tensors = {suffix: mapped(tensor) for suffix, tensor in weight.tensors().items()}
    return QuantTensor.from_tensors(tensors, weight.grid, weight.shape)


def mapped(tensor: Tensor) -> Tensor:
    """A CPU tensor's bytes in a temporary file, mapped (writing to it changes the memory, not the file)."""
    if not tensor.numel():
        return tensor
    with naming_full_disks(), tempfile.NamedTemporaryFile(prefix="tinycompress-") as file:
        file.write(_bytes(tensor))
        file.flush()
        return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)


def dense_keeper(graph: Graph) -> Callable[[Tensor], Weight | LazyTensor]:
    """What a pass that makes every weight of `graph` anew should do with each: nothing, or `DenseFile.keep` where they
    are large together."""
    size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in graph.weights.entries.values())
    return DenseFile().keep if size > IN_MEMORY else lambda tensor: tensor


class DenseFile:
    """Dense weights in one temporary file. Each is mapped anew when it is read, so that what was read leaves the
    process's memory with the tensor."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="tinycompress-")  # noqa: SIM115 (open as long as a weight needs it)
        weakref.finalize(self, self.file.close)

    def keep(self, tensor: Tensor) -> Weight | LazyTensor:
        """The same weight, on disk; one on a GPU stays there."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        start = -(-self.file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with naming_full_disks():
            self.file.seek(start)
            self.file.write(_bytes(tensor))
            self.file.flush()
        shape = tuple(tensor.shape)
        dtype = tensor.dtype
        length = tensor.nbytes

        def read() -> Tensor:
            memory = mmap.mmap(self.file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
            return torch.frombuffer(memory, dtype=dtype).view(shape)

        return LazyTensor(shape, dtype, read)


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return data


@contextmanager
def naming_full_disks() -> Iterator[None]:
    """An `OutputError` that names the temporary folder where its disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = tempfile.gettempdir()
        message = f"temporary folder {place}, whose disk is full: make room for the weights, or set TMPDIR"
        raise OutputError(message) from error
