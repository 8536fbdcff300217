"""Large blocks are used again within `keep_memory`, never while anything still reads them, and given back
afterwards."""

import subprocess
import sys

import pytest
import torch

from tinycompress.model import cpu_memory

CPU = torch.device("cpu")
SHAPE = (1024, cpu_memory.MAPPED // 4096)  # float32: just what glibc maps


def block(fill: float) -> torch.Tensor:
    return cpu_memory.empty(SHAPE, torch.float32, CPU).fill_(fill)


def test_a_freed_block_is_used_again():
    with cpu_memory.keep_memory():
        first = block(1)
        at, part = first.data_ptr(), first[5:]
        del first
        second = block(2)  # a view still reads the first
        assert second.data_ptr() != at and bool((part == 1).all())
        del part
        third = cpu_memory.zeros(SHAPE, torch.float32, CPU)
        assert third.data_ptr() == at and not third.any() and bool((second == 2).all())


def test_a_block_outlives_the_context():
    with cpu_memory.keep_memory(), cpu_memory.keep_memory():  # entered twice: the outer one counts
        kept = block(3)
    assert cpu_memory._free_blocks is None
    assert bool((kept == 3).all())
    del kept
    assert bool((block(4) == 4).all())


def test_small_blocks_and_other_dtypes():
    with cpu_memory.keep_memory():
        assert cpu_memory.empty((3, 5), torch.int64, CPU).shape == (3, 5)
        large = cpu_memory.zeros((cpu_memory.MAPPED,), torch.uint8, CPU)
        assert large.dtype == torch.uint8 and not large.any()


def test_autograd_adds_in_place_to_a_block():
    """Else a tied embedding would need a third table of its size."""
    with cpu_memory.keep_memory():
        given: list[int] = []

        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.sum()

            @staticmethod
            def backward(ctx, grad):
                out = block(1)
                given.append(out.data_ptr())
                return out

        weight = torch.zeros(SHAPE, requires_grad=True)
        (Once.apply(weight) + Once.apply(weight)).backward()
        assert weight.grad is not None and weight.grad.data_ptr() in given
        assert bool((weight.grad == 2).all())


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_no_page_is_asked_for_twice():
    script = """
import resource, torch
from tinycompress.model import cpu_memory
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work(n):
    large = cpu_memory.empty((64 << 20,), torch.uint8, torch.device("cpu")).fill_(1)
    small = [torch.ones(1 << 20) for _ in range(n)]  # 4 MB each, the last ones at the top of the heap
with cpu_memory.keep_memory():
    for n in (10, 20, 40, 80): work(n)
    before = faults()
    work(80)
    print(faults() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) < 5000  # of 98,000 pages of 4 kB
