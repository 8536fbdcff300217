"""What the tests of exports share: tiny graphs, token ids, and a look into the written file."""

import dataclasses

import onnx
import torch
from conftest import random_graph

from tinycompress.export import OrtModel, export, prepare, read
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.quant_tensor import QuantSpec, QuantTensor
from tinycompress.graph.rope import Rope
from tinycompress.graph.topology import feeds
from tinycompress.quantization.grid_search import find_grid, round_to_grid

MIXED = (Layer(4, 2, 96), Layer(2, 1, 64), Layer(0, 0, 32), Layer(4, 4, 0), Layer(3, 1, 48))


YARN = Rope(type="yarn", factor=4.0, original_max_position=32)


def small(**changes) -> Graph:
    fields = dict(
        vocab_size=128,
        hidden_size=64,
        head_dim=16,
        layers=(Layer(4, 2, 96),) * 2,
        max_position=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return random_graph(Config(**(fields | changes)))


def quantized(graph: Graph, text: str, embedding: bool = False, scale: str = "mse") -> Graph:
    """Round to nearest, every linear of the layers; with `embedding` the table and the head too."""
    spec = dataclasses.replace(QuantSpec.parse(text), search=scale)
    names = [
        graph.config.weight_name(reader)
        for feed in feeds(graph.config)
        for reader in feed.readers
        if embedding or reader != "lm_head"
    ]
    changed = {}
    for name in {*names, "model.embed_tokens.weight"} if embedding else names:
        weight = graph.weights[name]
        scales, zeros = find_grid(name, weight, spec)
        changed[name] = QuantTensor.from_ints(round_to_grid(weight, scales, zeros, spec), scales, zeros, spec)
    return graph.replace(weights=changed, by=f"rtn {text}")


def ids_of(graph: Graph, T: int, B: int = 1) -> torch.Tensor:
    return torch.randint(graph.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def assert_same_everywhere(graph: Graph, folder, T: int = 24) -> None:
    """Prefill and every decode step at level 0 within 1e-4 of torch; the folder read back is the graph."""
    manifest = export(graph, folder, check=False)
    model, exported, ids = prepare(graph).module(), OrtModel(folder, accuracy_level=0, threads=1), ids_of(graph, T)
    expected = model(ids)
    assert expected.abs().max() > 0.5  # logits that could differ
    torch.testing.assert_close(exported(ids), expected, atol=1e-4, rtol=0)
    cache = exported.new_cache(1, T)
    spans = [(0, 5), (5, 9), *((i, i + 1) for i in range(9, T))]  # a prompt, a chunk behind it, single tokens
    for start, stop in spans:
        torch.testing.assert_close(exported.step(ids[:, start:stop], cache), expected[:, start:stop], atol=1e-4, rtol=0)
    back = read(folder)
    assert back.fingerprint() == prepare(graph).fingerprint() == manifest["fingerprint"]
    assert back.config == graph.config and back.history == graph.history


DENSE = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "non-uniform": {"layers": MIXED},
    "no attention": {"layers": (Layer(0, 0, 32),) * 2},
    "no layers": {"layers": ()},
    "biases": {"biases": frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})},
    "head_dim apart from hidden": {"head_dim": 32},
    "multi-query": {"layers": (Layer(4, 1, 96), Layer(1, 1, 17))},
}


def proto(folder):
    return onnx.load(folder / "model.onnx", load_external_data=False)


def operators(folder) -> list[str]:
    return [node.op_type for node in proto(folder).graph.node]


LAYERS = (Layer(4, 2, 192), Layer(2, 1, 64), Layer(0, 0, 128), Layer(4, 2, 0))
WIDE = dict(vocab_size=128, hidden_size=128, head_dim=64, layers=LAYERS, max_position=64)  # of no profile too narrow
