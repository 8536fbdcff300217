"""Every pass on what families add to Llama: biases, norms of queries and keys, windows, layers without RoPE."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import random_graph
from every_pass import CONFIG, PASSES, TOKENS

import tinycompress as tc

EXACT = {"Rotate", "SmoothQuant"}
FEATURES = {
    "mistral": {"window": 5},
    "qwen2": {"biases": frozenset({"q_proj", "k_proj", "v_proj"})},
    "qwen3": {"qk_norm_eps": 1e-6, "tie_embeddings": True},
    "smollm3": {"rope": False},
}


def model_of(family: str) -> tc.Graph:
    """Two layers as wide as those of the passes' teacher, with what the family adds; biases that matter."""
    features = dict(FEATURES[family])
    last = dataclasses.replace(CONFIG.layers[1], window=features.pop("window", None), rope=features.pop("rope", True))
    config = dataclasses.replace(CONFIG, layers=(dataclasses.replace(CONFIG.layers[0], window=last.window), last))
    graph = random_graph(dataclasses.replace(config, **features))
    return graph.replace(weights={name: graph.tensor(name) * 5 for name in graph.weights if name.endswith(".bias")})


@pytest.mark.parametrize("family", FEATURES)
@pytest.mark.parametrize("name", PASSES)
def test_it_works_and_its_result_is_saved_and_opened(name, family, tmp_path):
    graph = model_of(family)
    out = PASSES[name]()(graph)
    logits = out.module()(TOKENS)
    assert torch.isfinite(logits).all()
    back = tc.load(tc.save(out, tmp_path / "out"))
    assert back.config == out.config and torch.equal(back.module()(TOKENS), logits)
    if name in EXACT:
        assert torch.allclose(logits, graph.module()(TOKENS), atol=1e-4)
    kinds = [(layer.window, layer.rope) for layer in graph.config.layers]
    if name != "Drop":
        assert [(layer.window, layer.rope) for layer in out.config.layers] == kinds
    assert out.config.qk_norm_eps == graph.config.qk_norm_eps and out.config.biases >= graph.config.biases
