"""Perplexity with one block in memory."""

import pytest
import torch

from tinycompress import RTN
from tinycompress.evaluation import perplexity as measuring
from tinycompress.evaluation.perplexity import perplexity, streamed_perplexity


@pytest.mark.parametrize("spec", [None, "w4g16"])
def test_streaming_finds_the_perplexity_of_the_module(nonuniform, spec, monkeypatch):
    """The same windows' losses as from a whole module, for packed weights too, whatever number of logits fits."""
    graph = nonuniform if spec is None else RTN(spec)(nonuniform)
    tokens = torch.randint(0, graph.config.vocab_size, (5, 12), generator=torch.Generator().manual_seed(0))
    whole = perplexity(graph.dense(torch.float32).module(), tokens, progress=False)
    assert torch.allclose(streamed_perplexity(graph, tokens, progress=False).nll, whole.nll, rtol=0, atol=1e-6)
    monkeypatch.setattr(measuring, "LOGITS", 5 * graph.config.vocab_size)
    assert torch.allclose(streamed_perplexity(graph, tokens, progress=False).nll, whole.nll, rtol=0, atol=1e-6)
    assert torch.allclose(perplexity(graph.module(), tokens, progress=False).nll, whole.nll, rtol=0, atol=1e-6)
