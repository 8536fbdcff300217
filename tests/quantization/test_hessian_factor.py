"""The factor of the inverse against its definition, and the orders of columns."""

import pytest
import torch

from tinycompress.errors import InputError
from tinycompress.quantization import hessian_factor
from tinycompress.quantization.hessian_factor import (
    column_order,
    damped_factor,
    invert_lower,
    lower_times,
    turned_around,
    upper_times,
)


def test_damping_escalates_and_then_says_which_hessian():
    rank_one = torch.ones(16, 16, dtype=torch.float64)
    damped, U, perm = damped_factor(rank_one, 16, "act", 1e-12, "here")
    assert torch.allclose(U.T @ U @ damped[perm][:, perm], torch.eye(16, dtype=torch.float64), atol=1e-3)
    indefinite = torch.eye(8, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 1e9
    with pytest.raises(InputError, match="here"):
        damped_factor(indefinite, 8, "act", 0.01, "here")


@pytest.mark.parametrize("K", [5, 256, 700])
def test_the_factor_is_that_of_the_inverse(K):
    x = torch.randn(2 * K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    damped, U, perm = damped_factor(x.T @ x, 1, "act", 0.01, "w")
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[perm][:, perm]), upper=True)
    assert torch.allclose(U, expected, rtol=1e-9, atol=1e-12) and torch.equal(U, U.triu())


def test_gar_keeps_groups_together_and_orders_both():
    d = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 4.0])
    assert column_order(d, 2, "gar").tolist() == [4, 5, 1, 0, 3, 2]


@pytest.mark.parametrize("K", [1, 5, 600, 1025])
def test_triangles_are_multiplied_without_their_zeros(K, monkeypatch):
    """By halves as by the whole matrix, also where a half is odd; a matrix turns around in its place."""
    matrix = torch.randn(K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    x = torch.randn(K, 3, dtype=torch.float64)
    assert torch.allclose(lower_times(matrix.tril(), x), matrix.tril() @ x, rtol=0, atol=1e-10)
    assert torch.allclose(upper_times(matrix.triu(), x), matrix.triu() @ x, rtol=0, atol=1e-10)
    lower = matrix.tril() + 10 * K * torch.eye(K)
    assert torch.allclose(invert_lower(lower.clone()) @ lower, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-10)
    monkeypatch.setattr(hessian_factor, "PART", 7)
    assert torch.equal(turned_around(matrix.clone()), matrix.flip(0, 1))
