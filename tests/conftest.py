"""Small graphs, one of them non-uniform, and the real models where they are at hand."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from tinycompress.graph.config import Config, Layer, shapes
from tinycompress.graph.graph import Graph

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # third-party tools import the runtime too
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def random_graph(config: Config, seed: int = 0) -> Graph:
    """Weights wide enough that logits are far from uniform, and norms that are not all ones."""
    generator = torch.Generator().manual_seed(seed)
    norms = {n: torch.rand(s, generator=generator) + 0.5 for n, s in shapes(config).items() if "norm" in n}
    return Graph.random(config, seed, std=0.1).replace(weights=norms)


@pytest.fixture
def tiny() -> Graph:
    """Two equal layers, grouped-query attention, a head of its own."""
    return random_graph(
        Config(vocab_size=128, hidden_size=64, head_dim=16, layers=(Layer(4, 2, 96),) * 2, max_position=64)
    )


@pytest.fixture
def nonuniform() -> Graph:
    """Every layer differs, one has no attention and one no FFN."""
    layers = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))
    return random_graph(Config(vocab_size=128, hidden_size=64, head_dim=16, layers=layers, max_position=64))


@pytest.fixture
def peculiar() -> Graph:
    """Layers that differ in width, and all that families add to Llama: biases, norms of queries and keys, windows
    narrower than the tests' texts, a layer without RoPE."""
    layers = (Layer(4, 2, 96, window=5), Layer(2, 1, 64, rope=False), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))
    config = Config(128, 64, 16, layers, max_position=64, biases=frozenset({"q_proj", "k_proj", "v_proj"}))
    graph = random_graph(dataclasses.replace(config, qk_norm_eps=1e-6))
    biases = {name: graph.tensor(name) * 5 for name in graph.weights if name.endswith(".bias")}
    return graph.replace(weights=biases)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and models that are not part of the repository."""
    folder = Path(os.environ.get("TINYCOMPRESS_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data at {folder} (set TINYCOMPRESS_SHARED)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Graph:
    """SmolLM2-135M-Instruct from the installed package."""
    from tinycompress.checkpoints.checkpoint import load
    from tinycompress.errors import InputError

    try:
        return load("smollm2-135m")
    except InputError as error:
        pytest.skip(str(error))
