"""What the tests of pruning share: small graphs, calibration ids, a linear and its inputs, what a module is given."""

import torch
from conftest import random_graph

from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph

BOTH = ("ffn", "heads")
MIXED = (Layer(4, 2, 96), Layer(6, 2, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


def small(layers=MIXED, **changes) -> Graph:
    return random_graph(
        Config(**(dict(vocab_size=128, hidden_size=64, head_dim=16, layers=layers, max_position=64) | changes))
    )


def ids(n: int = 6, length: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(128, (n, length), generator=torch.Generator().manual_seed(seed))


def problem(outputs=6, inputs=24, n=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64) @ mix
    return torch.randn(outputs, inputs, generator=g, dtype=torch.float64), x


def seen_by(graph, tokens, name):
    seen = []
    module = graph.module()
    module.get_submodule(name).register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, -2)))
    for window in tokens:  # the forward takes an FFN some rows at a time: one window, one entry
        module(window[None])
    return torch.stack(seen).double()  # (N, T, K)
