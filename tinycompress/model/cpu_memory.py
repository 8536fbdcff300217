"""Memory that a loop on the CPU fills again and again stays with the process, for whoever asks: `with keep_memory():`.

What a C library returns to the system must be asked for again page by page, which takes longer than writing it several
times (in a virtual machine, whose host takes free pages back, longer still). glibc returns a block above a threshold
(at most 32 MB) as soon as it is freed, and a smaller one when it is the top of its heap.

`keep_memory` changes settings of the whole process (mallopt), so nothing in the library enters it. The command line,
the experiments and the benchmarks that train do; a script that distils on a CPU should too:

    with tinycompress.keep_memory():
        student = Distill(tokens, teacher, Training(steps=500))(student)

On a GPU, or with another C library than glibc, it costs nothing and does next to nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

M_TRIM_THRESHOLD = -1  # mallopt's name for the free bytes at the top of the heap from which glibc returns them
DEFAULT_TRIM = 64 << 20  # what glibc's own rule arrives at once a block of 31 MB was freed
MAPPED = 32 << 20  # bytes from which glibc always maps a block anew
LARGEST_FROM_HEAP = 31 << 20

_free_blocks: dict[int, list[Any]] | None = None  # free blocks by their bytes, while `keep_memory` is entered


@contextlib.contextmanager
def keep_memory() -> Iterator[None]:
    """Until the block is left, freed memory stays with the process and is used again.

    The heap does not shrink, blocks of up to 31 MB come from it, and the larger ones that `empty` and `zeros` give are
    kept for the next of their size. Entered twice, the outer block counts. On leaving, free memory goes back to the
    system; the two thresholds of malloc that have no getter are left at the values that glibc's own rule would have
    arrived at (blocks of up to 31 MB from the heap, 64 MB free at its top).
    """
    global _free_blocks
    if _free_blocks is not None:  # entered already
        yield
        return
    glibc = _glibc()
    torch.empty(
        LARGEST_FROM_HEAP, dtype=torch.uint8
    )  # freed at once: the threshold of mapping follows the largest such
    if glibc is not None:
        glibc.mallopt(M_TRIM_THRESHOLD, -1)
    _free_blocks = {}
    try:
        yield
    finally:
        _free_blocks = None
        if glibc is not None:
            glibc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM)
            glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is one with these settings."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        return library
    return None


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; within `keep_memory`, a large tensor on the CPU gets the memory of a free block of its size."""
    size = math.prod(shape) * dtype.itemsize
    if _free_blocks is None or device.type != "cpu" or size < MAPPED:
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _free_blocks.setdefault(size, [])
    block: Any = blocks.pop() if blocks else torch.empty(size, dtype=torch.uint8).numpy()
    view = memoryview(block)  # it lives as long as the tensor's storage
    weakref.finalize(view, blocks.append, block).atexit = False
    # resized in place, as a view would hold a second reference, and autograd adds in place to a sole one only
    return torch.frombuffer(view, dtype=dtype).resize_(shape)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, from the memory of `empty`."""
    return empty(shape, dtype, device).zero_()
