"""One thread: the graphs are tiny, and threads that wait for one another take longer than the work."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of two runtimes that wait for each other cost more than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
