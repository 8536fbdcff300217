"""Losses of hidden states and attention relations, weights that change over a run."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    error,
    problem,
    rng,
)

from tinycompress.distillation import hidden_losses
from tinycompress.distillation.divergences import Loss
from tinycompress.distillation.fused_loss import fused_loss
from tinycompress.distillation.hidden_losses import HiddenLoss, hidden_loss, layer_pairs, relation_loss
from tinycompress.distillation.schedule import Ramp
from tinycompress.errors import InputError
from tinycompress.graph.config import Config, Layer


def test_hidden_losses_by_the_textbook():
    g = rng()
    s, t, P = (
        torch.randn(7, 4, generator=g),
        torch.randn(7, 6, generator=g),
        torch.randn(6, 4, generator=g, requires_grad=True),
    )
    projected = s @ P.T
    assert torch.allclose(hidden_loss(s, t, "mse", P), F.mse_loss(projected, t))
    cosine = 1 - torch.stack([a @ b / (a.norm() * b.norm()) for a, b in zip(projected, t)])
    assert torch.allclose(hidden_loss(s, t, "cosine", P), cosine.mean())
    valid = torch.tensor([True] * 5 + [False] * 2)
    s[5:] = math.nan
    loss = hidden_loss(s, t, "cosine", P, valid=valid, denominator=10.0)
    assert torch.allclose(loss, cosine[:5].sum() / 10)
    loss.backward()
    assert torch.isfinite(P.grad).all() and P.grad.any()
    with pytest.raises(InputError, match="a projection"):
        hidden_loss(s, t)
    with pytest.raises(InputError, match="accepted: cosine"):
        hidden_loss(s, s, "l1")


def test_relations_by_the_textbook():
    """Loops over batch, heads and queries; other widths; keys of their own."""
    g = rng()
    B, T, heads = 2, 5, 2
    s, sk = (torch.randn(B, T, 8, generator=g, requires_grad=True) for _ in "ab")
    t, tk = (torch.randn(B, T, 12, generator=g) for _ in "ab")
    for student_keys, teacher_keys in ((None, None), (sk, tk)):
        expected = 0.0
        for b in range(B):
            for h in range(heads):
                for i in range(T):
                    logs = []
                    for a, keys, d in ((t, teacher_keys, 6), (s, student_keys, 4)):
                        keys = a if keys is None else keys
                        query = a[b, i, h * d : (h + 1) * d]
                        logs.append((keys[b, : i + 1, h * d : (h + 1) * d] @ query / math.sqrt(d)).log_softmax(-1))
                    expected = expected + (logs[0].exp() * (logs[0] - logs[1])).sum() / (B * heads * T)
        found = relation_loss(s, t, heads, student_keys=student_keys, teacher_keys=teacher_keys)
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(torch.autograd.grad(found, s)[0], torch.autograd.grad(expected, s)[0], atol=1e-6)
    assert relation_loss(s, s, 4).abs() < 1e-7
    with pytest.raises(InputError, match="a multiple of 3 heads"):
        relation_loss(s, t, 3)
    with pytest.raises(InputError, match="keys for both or for neither"):
        relation_loss(s, t, 2, student_keys=sk)


@pytest.mark.parametrize("scores", [1, 60, 1 << 21])  # query by query; some queries; all at once
@pytest.mark.parametrize("own_keys", [False, True])
def test_relations_and_their_gradients_are_the_dense_ones(scores, own_keys, monkeypatch):
    """float64, autograd through whole [T, T] matrices; queries that do not count may hold anything."""
    monkeypatch.setattr(hidden_losses, "SCORES", scores)
    g = rng(2)
    B, T, h, D, D_t = 2, 7, 3, 12, 18
    s, sk, t, tk = (torch.randn(B, T, d, generator=g, dtype=torch.float64) for d in (D, D, D_t, D_t))
    valid = torch.rand(B, T, generator=g) < 0.7

    def logs(a, b):
        a, b = (x.unflatten(-1, (h, -1)).transpose(1, 2) for x in (a, b))
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        return (a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])).masked_fill(~causal, -1e300).log_softmax(-1)

    def run(loss):
        wanted = [x.clone().requires_grad_() for x in (s, sk)]
        value = 3 * loss(*wanted)  # another scale than 1 on the way back
        return value.detach(), *(x for x in torch.autograd.grad(value, wanted, allow_unused=True) if x is not None)

    def oracle(a, b):
        p, q = logs(t, tk if own_keys else t), logs(a, b if own_keys else a)
        return (p.exp() * (p - q)).sum(-1).mean(1)[valid].sum() / 5

    def ours(a, b):
        keys = {"student_keys": b, "teacher_keys": tk} if own_keys else {}
        return relation_loss(a, t, h, valid=valid, denominator=5.0, **keys)

    for a, b in zip(run(ours), run(oracle)):
        assert error(a, b) < 1e-12
    bad = s.masked_fill(~valid[..., None], math.nan)
    if own_keys:
        assert (
            error(
                relation_loss(bad, t, h, valid=valid, denominator=5.0, student_keys=sk, teacher_keys=tk),
                run(oracle)[0] / 3,
            )
            < 1e-12
        )


def test_relations_never_hold_all_heads_at_once(monkeypatch):
    """The largest tensor that any operation makes, beside the dense [B · heads, T, T]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        x.untyped_storage().nbytes()
                        for x in (out if isinstance(out, tuple) else (out,))
                        if isinstance(x, torch.Tensor)
                    ),
                ]
            )
            return out

    monkeypatch.setattr(hidden_losses, "SCORES", 1 << 14)
    B, T, h = 2, 256, 4
    s, t = torch.randn(B, T, 32, requires_grad=True), torch.randn(B, T, 64)
    with Watch():
        relation_loss(s, t, h).backward()
    assert 0 < largest <= 2 * 4 * hidden_losses.SCORES < 4 * B * h * T * T / 10  # a sequence's states are half of that


def test_which_relation_heads():
    student = Config(vocab_size=8, hidden_size=8, head_dim=4, layers=(Layer(6, 2, 8), Layer(0, 0, 8)))
    teacher = Config(vocab_size=8, hidden_size=8, head_dim=2, layers=(Layer(8, 4, 8), Layer(8, 4, 8), Layer(0, 0, 8)))
    loss = HiddenLoss("relation")
    assert loss.pairs(student, teacher) == ((0, 1),) and loss.relation_heads(student, teacher, (0, 1)) == 2
    assert (
        HiddenLoss("relation", heads=8).relation_heads(student, teacher, (0, 0)) == 8
    )  # heads of width 1 of k; MiniLMv2's are free
    for bad, message in (
        (HiddenLoss("attention", heads=8), "a divisor of all widths, and for attention of the numbers of heads"),
        (HiddenLoss("relation", heads=3), "HiddenLoss.heads: found 3 at layers"),
        (HiddenLoss("relation", layers=((1, 1),)), "layers with attention"),
    ):
        with pytest.raises(InputError, match=message):
            bad.pairs(student, teacher)
    with pytest.raises(InputError, match=r"HiddenLoss\.heads"):
        HiddenLoss("cosine", heads=2)


def test_a_ramp_goes_from_start_to_end():
    assert [Ramp(1, 0).at(t) for t in (0, 0.25, 1)] == [1, 0.75, 0]
    late = Ramp(0.2, 1.0, "cosine", 0.5, 0.9)
    assert late.at(0.4) == 0.2 and late.at(0.95) == 1 and late.at(0.7) == pytest.approx(0.6) and late.at(0.6) < 0.4
    weights = [Loss("kl", Ramp(1, 0)).at(step, 5).weight for step in range(5)]
    assert weights == [1, 0.75, 0.5, 0.25, 0] and Loss("kl", 0.3).at(7, 9) == Loss("kl", 0.3)
    for make, message in (
        (lambda: Ramp(-1, 0), "Ramp.start"),
        (lambda: Ramp(1, math.inf), "Ramp.end"),
        (lambda: Ramp(1, 0, "step"), "linear"),
        (lambda: Ramp(1, 0, begin=0.5, finish=0.5), "0 ≤ begin < finish ≤ 1"),
        (lambda: fused_loss(*problem()[:2], [Loss("ce", Ramp(1, 0))], labels=problem()[2]), "Loss.weight: found Ramp"),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_layers_are_mapped_evenly_and_end_together():
    assert layer_pairs(3, 6) == ((0, 1), (1, 3), (2, 5))
    assert layer_pairs(4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert layer_pairs(22, 32, last=2) == ((20, 29), (21, 31))
    with pytest.raises(InputError, match="at most the teacher's depth"):
        layer_pairs(5, 4)
