"""The gradients written out in elementwise.py equal those that autograd finds, and training and inference compute the
same."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinycompress.graph.graph import Graph
from tinycompress.model.fused_ops import embed, rms_norm, rotate, swiglu


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def rotate_plainly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def norm_plainly(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())


def same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    wanted = [x for x in inputs if x.requires_grad]
    found, expected = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    towards = torch.randn(found.shape, generator=torch.Generator().manual_seed(9), dtype=found.dtype)
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, towards),
        torch.autograd.grad(expected, wanted, towards),
        rtol=1e-11,
        atol=1e-12,
    )


sizes = st.integers(1, 5)


@settings(deadline=None)  # the first call makes threads
@given(sizes, sizes, sizes, sizes)
def test_equal_to_autograd(B: int, H: int, T: int, half: int) -> None:
    angles = random(T, half, seed=1).detach()
    same(rotate, rotate_plainly, random(B, H, T, 2 * half), angles.cos(), angles.sin())
    same(lambda x, w: rms_norm(x, w, 1e-5), norm_plainly, random(B, T, H * half), random(H * half, seed=2))
    same(swiglu, lambda gate, up: F.silu(gate) * up, random(B, T, half), random(B, T, half, seed=3))
    ids = torch.randint(T, (B, H), generator=torch.Generator().manual_seed(4))  # some more than once
    same(lambda w: embed(ids, w), lambda w: F.embedding(ids, w), random(T, half, seed=5))


def test_views_keep_their_gradients() -> None:
    """Heads come as transposed views; a frozen norm weight gets no gradient."""
    angles = random(6, 4, seed=1).detach()
    x, tables = random(2, 6, 3, 8), (angles.cos(), angles.sin())
    same(
        lambda x, c, s: rotate(x.transpose(1, 2), c, s),
        lambda x, c, s: rotate_plainly(x.transpose(1, 2), c, s),
        x,
        *tables,
    )
    same(lambda x, w: rms_norm(x, w, 1e-5), norm_plainly, random(2, 3, 8), random(8, seed=2).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_computes_what_inference_computes(dtype: torch.dtype) -> None:
    angles = torch.arange(6.0)[:, None] * torch.rand(4, generator=torch.Generator().manual_seed(1))
    cos, sin, x, w = (
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        random(2, 3, 6, 8, dtype=dtype),
        random(8, dtype=dtype, seed=2),
    )
    trained = rotate(x, cos, sin), rms_norm(x, w, 1e-5), swiglu(x, x * 2)
    with torch.no_grad():
        inferred = rotate(x, cos, sin), rms_norm(x, w, 1e-5), swiglu(x.clone(), x * 2)
    for ours, theirs in zip(trained, inferred):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.equal(ours, theirs)


def test_wider_tables_widen_the_rotation() -> None:
    """Under autocast heads are bfloat16 and the tables float32: as in a product of the two."""
    x = random(1, 2, 4, 8, dtype=torch.bfloat16)
    angles = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, angles.cos(), angles.sin())
    assert turned.dtype == torch.float32
    turned.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("grad", [True, False])
def test_the_residual_stream_stays_wide_under_autocast(nonuniform: Graph, grad: bool) -> None:
    model = nonuniform.dense(torch.float32).module().requires_grad_(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        x = model.model.embed_tokens(torch.arange(6)[None])
        for block in model.model.layers:
            x = block(x, model.tables(0, 6))
            assert x.dtype == torch.float32
