"""Results that need not stay in memory: tensors mapped from a file without a name.

The system reads a page when it is touched and drops it when memory is short, so a pass that goes through a large model
layer by layer holds one layer. The file lies where temporary files do (TMPDIR, which should be a disk) and is gone with
the last tensor mapped from it, or with the process, however it ends.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import OutputError
from ..graph.quant_tensor import QuantTensor

IN_MEMORY = 1 << 30  # bytes of packed weights that are not worth a file


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
    try:
        with tempfile.NamedTemporaryFile(prefix="tinycompress-") as file:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            return torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        place = tempfile.gettempdir()
        message = f"temporary folder {place}, whose disk is full: make room for the packed weights, or set TMPDIR"
        raise OutputError(message) from error
