"""Memory that a loop on the CPU fills again and again stays with the process.

What a C library returns to the system must be asked for again page by page, which takes longer than writing it several
times (in a virtual machine, whose host takes free pages back, longer still). glibc returns blocks above a threshold (32
MB at most) when they are freed, and smaller ones when they are the top of its heap. Elsewhere (GPU, other C libraries)
none of this does anything: torch's own allocators are used.
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

M_TRIM_THRESHOLD, DEFAULT_TRIM = -1, 64 << 20  # of mallopt; what glibc's own rule arrives at after keep_heap
MAPPED = 32 << 20  # bytes from which glibc always maps a block anew

_free: dict[int, list[Any]] | None = None  # blocks by their bytes, while `held` is entered


def keep_heap() -> None:
    """Makes activations reuse the heap: the threshold follows the largest mapped block freed so far, so one such is
    freed."""
    torch.empty(31 << 20, dtype=torch.uint8)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Until it is left, the heap does not shrink, and the large blocks of `empty` and `zeros` are kept for the next of
    their size."""
    global _free
    if _free is not None:  # entered already
        yield
        return
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    glibc = libc if libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    keep_heap()
    _free = {}
    if glibc is not None:
        glibc.mallopt(M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _free = None
        if glibc is not None:
            glibc.mallopt(M_TRIM_THRESHOLD, DEFAULT_TRIM)
            glibc.malloc_trim(0)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty. Within `held`, a large one on the CPU gets the memory of one of its size that is no longer in
    use."""
    size = math.prod(shape) * dtype.itemsize
    if _free is None or device.type != "cpu" or size < MAPPED:
        return torch.empty(shape, dtype=dtype, device=device)
    blocks = _free.setdefault(size, [])
    block: Any = blocks.pop() if blocks else torch.empty(size, dtype=torch.uint8).numpy()
    view = memoryview(block)  # it lives as long as the tensor's storage
    weakref.finalize(view, blocks.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype).resize_(
        shape
    )  # a view would hold a second reference: autograd adds in place to a sole one


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.zeros, from the memory of `empty`."""
    return empty(shape, dtype, device).zero_()
