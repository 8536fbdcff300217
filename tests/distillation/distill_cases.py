"""What the tests of distillation share: a short training, windows, a perturbed student, comparisons."""

from __future__ import annotations

import torch

from tinycompress.distillation.training import Training
from tinycompress.evaluation.divergence import divergence
from tinycompress.graph.graph import Graph

FAST = Training(steps=3, lr=1e-2, batch=4)


def windows(graph, n=12, length=16, seed=0):
    return torch.randint(graph.config.vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


def perturbed(graph, scale=0.3):
    """A student that is clearly not its teacher."""
    generator = torch.Generator().manual_seed(9)
    return graph.replace(
        weights={
            n: w * (1 + scale * torch.randn(w.shape, generator=generator))
            for n, w in graph.weights.items()
            if n.endswith("proj.weight")
        }
    )


def same(a, b):
    return all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)


def kl(teacher, student, tokens):
    return divergence(teacher.module(), student.dense().module(), tokens).mean_kl


def distance(a: Graph, b: Graph) -> float:
    """Of all weights: AdamW moves a weight whose gradient is all rounding as far as any other, so single ones may
    differ."""
    return sum((w - b.weights[name]).double().square().sum().item() for name, w in a.weights.items()) ** 0.5
