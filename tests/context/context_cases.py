"""What the tests of longer contexts share: small graphs and token ids."""

import torch
from conftest import random_graph

from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph

MIXED = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


def ids_of(graph: Graph, *shape: int) -> torch.Tensor:
    return torch.randint(graph.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def small(**changes) -> Graph:
    fields = dict(
        vocab_size=128,
        hidden_size=64,
        head_dim=16,
        layers=(Layer(4, 2, 96),) * 2,
        max_position=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_graph(Config(**(fields | changes)))
