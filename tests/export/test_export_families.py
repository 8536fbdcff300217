"""What the families add to Llama, through every profile: biases, norms of queries and keys, windows, layers without
RoPE. Each graph must pass the whole gate, on texts several times as long as the windows."""

import dataclasses

import pytest
import torch
from conftest import random_graph
from exported import assert_same_everywhere, ids_of, operators, quantized

from tinycompress.export import OrtModel, StaticChoices, cache_scales, export
from tinycompress.export.read import initializers
from tinycompress.graph.config import Config, Layer
from tinycompress.graph.graph import Graph
from tinycompress.graph.rope import Rope

QKV = frozenset({"q_proj", "k_proj", "v_proj"})
WINDOW = 7
PLAIN = Layer(4, 2, 96)
SEEN = dataclasses.replace(PLAIN, window=WINDOW)
STILL = dataclasses.replace(PLAIN, rope=False)
PECULIAR = (
    Layer(4, 2, 96, window=5),
    Layer(2, 1, 64, rope=False),
    Layer(0, 0, 32),
    Layer(4, 4, 0, window=11, rope=False),
    Layer(3, 1, 48),
)
FAMILIES = {
    "qwen2": {"biases": QKV, "layers": (PLAIN, PLAIN)},
    "qwen2, windows in later layers": {"biases": QKV, "layers": (PLAIN, SEEN)},
    "qwen3": {"norm_eps": 1e-6, "qk_norm_eps": 1e-6, "layers": (PLAIN, PLAIN), "head_dim": 32},
    "mistral": {"layers": (SEEN, SEEN)},
    "smollm3": {"layers": (PLAIN, PLAIN, PLAIN, STILL)},
    "all, layers that differ": {"layers": PECULIAR, "biases": QKV, "qk_norm_eps": 1e-5},
    "no RoPE at all": {"layers": (STILL, STILL)},
}
PROFILES = ("ort", "web", "std", "static", "qnn")


def family(name: str, **changes) -> Graph:
    """A random graph of that family, its biases and norms no zeros and ones."""
    fields = {"vocab_size": 128, "hidden_size": 64, "head_dim": 16, "max_position": 64} | FAMILIES[name] | changes
    graph = random_graph(Config(**fields))
    return graph.replace(weights={n: graph.tensor(n) * 5 for n in graph.weights if n.endswith(".bias")})


def without(graph: Graph, what: str) -> Graph:
    """The same weights without what the family adds: logits must differ from the graph's, or the tests test nothing."""
    layers = tuple(
        dataclasses.replace(layer, **{what: {"window": None, "rope": True}[what]}) for layer in graph.config.layers
    )
    return graph.replace(config=dataclasses.replace(graph.config, layers=layers))


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gate_is_green(name, profile, tmp_path):
    graph = family(name)
    manifest = export(graph, tmp_path / "out", profile, static=StaticChoices(rotate=False), progress=False)
    assert manifest["checks"]["passed"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_runtime_itself_and_back(name, tmp_path):
    assert_same_everywhere(family(name), tmp_path / "dense", T=40)
    assert_same_everywhere(quantized(family(name), "w4g16"), tmp_path / "packed", T=40)


def test_packed_products_stay_joined(tmp_path):
    """q, k and v of one grid are one product, also where norms stand between it and the attention."""
    export(quantized(family("qwen3"), "w4g32"), tmp_path / "out", check=False)
    assert operators(tmp_path / "out").count("MatMulNBits") == 2 * 4
    assert "model.layers.0.self_attn.q_norm.weight" in initializers(tmp_path / "out")


@pytest.mark.parametrize("what", ["window", "rope"])
def test_what_the_family_adds_reaches_the_logits(what):
    graph = family("mistral" if what == "window" else "smollm3")
    ids = ids_of(graph, 40)
    assert (graph.module()(ids) - without(graph, what).module()(ids)).abs().max() > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mistral", "qwen2, windows in later layers", "all, layers that differ"])
@pytest.mark.parametrize("window", [1, 2, 39, 40, 41])
def test_the_edge_of_a_window(name, window, tmp_path):
    """A key at the edge is seen and the one behind it is not, in one prefill of 40 and in steps."""
    graph = family(name)
    layers = tuple(dataclasses.replace(layer, window=layer.window and window) for layer in graph.config.layers)
    graph = graph.replace(config=dataclasses.replace(graph.config, layers=layers))
    assert_same_everywhere(graph, tmp_path / "ort", T=40)


@pytest.mark.parametrize("rope", [Rope(type="dynamic", factor=2.0, original_max_position=32)], ids=["dynamic"])
def test_drawn_attention(rope, tmp_path):
    """In standard operators, keys cached as they are: for frequencies that change with the length."""
    graph = family("all, layers that differ", rope=rope)
    assert export(graph, tmp_path / "out", progress=False)["checks"]["passed"]
    assert "GroupQueryAttention" not in operators(tmp_path / "out")
    assert export(family("all, layers that differ", head_dim=8), tmp_path / "8", progress=False)["checks"]["passed"]


def test_int8_cache(tmp_path):
    """Its scales come from every position of the text, also those that have left the window."""
    graph = family("all, layers that differ")
    assert export(graph, tmp_path / "out", kv="int8", progress=False)["checks"]["passed"]


def test_a_window_as_long_as_the_context_costs_nothing(tmp_path):
    graph = family("mistral", layers=(dataclasses.replace(PLAIN, window=64),) * 2)
    export(graph, tmp_path / "out", "std", check=False)
    assert "Less" not in operators(tmp_path / "out")
    assert OrtModel(tmp_path / "out").config == graph.config


def test_a_window_needs_a_newer_runtime(tmp_path):
    """Up to 1.23.2 GroupQueryAttention's window holds one position more than transformers'."""
    versions = {name: export(family(name), tmp_path / name, check=False)["minimum_onnxruntime"] for name in FAMILIES}
    assert versions["mistral"] == versions["qwen2, windows in later layers"] == "1.24.4"
    assert versions["qwen3"] == versions["smollm3"] == "1.20.1"


def test_scales_of_an_int8_cache_know_positions_that_left_the_window():
    """What the first layer caches does not depend on its window."""
    graph = family("mistral")
    layers = (PLAIN, SEEN)
    free = graph.replace(config=dataclasses.replace(graph.config, layers=layers))
    ids = ids_of(graph, 40)
    scales, expected = (cache_scales(g, ids, progress=False) for g in (graph, free))
    first = [name for name in scales if ".0." in name]
    assert len(first) == 2 and all(torch.equal(scales[name], expected[name]) for name in first)
