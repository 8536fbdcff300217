"""Matrix products agree with torch's, whichever library computes them."""

import pytest
import torch
import torch.nn.functional as F

from tinycompress.model import matmul as module
from tinycompress.model.matmul import outer, product


@pytest.mark.parametrize("prefer", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (2000, 24), (24,)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_torchs(monkeypatch, prefer, shape, bias):
    """oneDNN runs on every CPU that torch's builds for x86 and ARM run on, so both paths are taken here."""
    monkeypatch.setattr(module, "PREFER_ONEDNN", prefer and torch.backends.mkldnn.is_available())
    g = torch.Generator().manual_seed(0)
    x, w, b = (
        torch.randn(shape, generator=g),
        torch.randn(7, 24, generator=g),
        torch.randn(7, generator=g) if bias else None,
    )
    for min_rows in (1, 1024):
        got = product(x, w, b, min_rows=min_rows)
        assert got.shape == (*shape[:-1], 7) and torch.allclose(got, F.linear(x, w, b), atol=1e-5)
    assert torch.allclose(product(x.double(), w.double()), F.linear(x.double(), w.double()), atol=1e-12)


@pytest.mark.parametrize("prefer", [False, True])
def test_outer(monkeypatch, prefer):
    monkeypatch.setattr(module, "PREFER_ONEDNN", prefer and torch.backends.mkldnn.is_available())
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 6, generator=g), torch.randn(50, 9, generator=g)
    assert torch.allclose(outer(a, b), a.T @ b, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weight"])
def test_gradients_are_torchs(monkeypatch, bias, frozen):
    monkeypatch.setattr(module, "PREFER_ONEDNN", torch.backends.mkldnn.is_available())
    monkeypatch.setattr(module, "MIN_TRAINED", 4)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 5, 6, generator=g), torch.randn(9, 6, generator=g)] + (
        [torch.randn(9, generator=g)] if bias else []
    )
    by = torch.randn(2, 5, 9, generator=g)
    wanted = [t.requires_grad_() for t, name in zip(inputs, ("x", "weight", "bias")) if name != frozen]
    ours = torch.autograd.grad((product(*inputs) * by).sum(), wanted)
    theirs = torch.autograd.grad((F.linear(*inputs) * by).sum(), wanted)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs))
    residual = torch.autograd.grad(
        (product(*inputs).add_(by) * by).sum(), wanted
    )  # written to in place, as the model's branches are
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(residual, theirs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(*inputs).dtype == torch.bfloat16  # autocast sees to its own products


def test_strided_operands(monkeypatch):
    monkeypatch.setattr(module, "PREFER_ONEDNN", torch.backends.mkldnn.is_available())
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 7, generator=g).T
    for x in (
        torch.randn(24, 90, generator=g).T,
        torch.randn(4, 30, 24, generator=g)[:, ::2],
        torch.randn(9, 48, generator=g)[:, 3:27],
    ):
        assert torch.allclose(product(x, w, min_rows=1), F.linear(x, w), atol=1e-5)
