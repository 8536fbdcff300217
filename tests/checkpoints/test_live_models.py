"""Live models of transformers: they become graphs and come of graphs without a copy."""

import dataclasses

import pytest
import torch
from checkpoint_cases import IDS, ROPES, SMALL
from conftest import random_graph

from tinycompress.checkpoints.checkpoint import load
from tinycompress.errors import InputError
from tinycompress.graph.graph import Graph


def test_live_models_share_memory(tiny):
    model = tiny.to_hf()
    assert model.lm_head.weight.data_ptr() == tiny.weights["lm_head.weight"].data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, tiny.module()(IDS), atol=1e-4, rtol=0)
    back = Graph.from_hf(model)
    assert back.weights["lm_head.weight"].data_ptr() == tiny.weights["lm_head.weight"].data_ptr()
    assert back.fingerprint() == dataclasses.replace(tiny, config=back.config).fingerprint()


def test_live_model_of_a_tied_partly_biased_graph():
    graph = random_graph(
        dataclasses.replace(SMALL, tie_embeddings=True, biases=frozenset({"v_proj"}), rope=ROPES["llama3"][0])
    )
    model = graph.to_hf()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, graph.module()(IDS), atol=1e-4, rtol=0)


def test_load_takes_a_live_model(tiny):
    model = tiny.to_hf()
    graph = load(model)
    assert graph.fingerprint() == Graph.from_hf(model).fingerprint()
    assert graph.weights["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()
    half = load(model, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.weights["lm_head.weight"], model.lm_head.weight.bfloat16())


def test_load_refuses_other_objects():
    for source in (3, None, torch.nn.Linear(2, 2)):
        with pytest.raises(InputError, match="a live transformers Llama"):
            load(source)
