"""Cayley, exponential and Householder maps: orthonormal to rounding, inverses both ways, derivatives, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions.geometry.orthogonal import (
    cayley,
    exponential,
    householder,
    inverse_cayley,
    inverse_exponential,
    inverse_householder,
    skew,
)

SQUARE = {"cayley": (cayley, inverse_cayley), "exponential": (exponential, inverse_exponential)}
maps = pytest.mark.parametrize("pair", SQUARE.values(), ids=SQUARE.keys())


def random(n: int, dtype: torch.dtype, seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, n, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@maps
@given(n=st.integers(1, 8), seed=st.integers(0, 99), size=st.floats(-6, 0.4), complex_=st.booleans())
def test_inverse_both_ways(pair, n, seed, size, complex_):
    forward, inverse = pair
    dtype = torch.complex128 if complex_ else torch.float64
    a = skew(random(n, dtype, seed))
    a = a * (10.0**size / max(1.0, float(torch.linalg.matrix_norm(a, 2))))
    q = forward(a)
    assert torch.allclose(q.mH @ q, torch.eye(n, dtype=dtype), atol=1e-13)
    assert torch.allclose(inverse(q), a, atol=1e-12)
    assert torch.allclose(forward(inverse(q)), q, atol=1e-12)


@maps
def test_near_the_identity_they_agree_to_second_order(pair):
    forward, _ = pair
    a = skew(random(6, torch.float64, 3))
    errors = [float((forward(h * a) - torch.eye(6) - h * a - h * h * a @ a / 2).norm()) for h in (1e-2, 5e-3)]
    assert errors[0] / errors[1] > 7.5


@maps
def test_batches_and_derivatives(pair):
    forward, _ = pair
    a = skew(random(4, torch.float64, 5, 3))
    assert torch.allclose(forward(a)[1], forward(a[1]))
    assert torch.autograd.gradcheck(lambda x: forward(skew(x)), (random(4, torch.float64, 6).requires_grad_(),))


@given(n=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_householder_both_ways(n, k, seed):
    k = min(n, k)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, dtype=torch.float64, generator=generator)
    q = householder(x)
    assert torch.allclose(q.T @ q, torch.eye(k, dtype=torch.float64), atol=1e-13)
    assert torch.allclose(householder(inverse_householder(q)), q, atol=1e-12)
    other = torch.linalg.qr(x).Q
    assert torch.allclose(householder(inverse_householder(other)), other, atol=1e-12)


@pytest.mark.parametrize("matrix", [torch.eye(4), -torch.eye(4), torch.eye(4).flip(0), torch.eye(5)[:, :2]])
def test_householder_of_special_matrices(matrix):
    q = matrix.double()
    x = inverse_householder(q)
    assert torch.allclose(householder(x), q, atol=1e-14)
    assert float(x.abs().max()) <= 1 + 1e-12  # nothing cancels: entries below the diagonal are at most 1
    assert torch.allclose(inverse_householder(torch.stack([q, q]))[1], x)


def test_householder_derivative():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(householder, (x,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cayley(torch.ones(2, 2)), "expected A\\^H = -A"),
        (lambda: cayley(torch.full((2, 2), float("nan"))), "expected A\\^H = -A"),
        (lambda: exponential(torch.ones(2, 3)), "expected square"),
        (lambda: inverse_cayley(-torch.eye(3)), "no eigenvalue -1"),
        (lambda: inverse_exponential(torch.diag(torch.tensor([1.0, -1.0, -1.0]))), "no eigenvalue -1"),
        (lambda: inverse_cayley(2 * torch.eye(3)), "orthonormal columns"),
        (lambda: inverse_exponential(torch.ones(2, 3)), "square matrices"),
        (lambda: householder(torch.ones(2, 3)), "tall matrices"),
        (lambda: inverse_householder(torch.ones(3, 2)), "orthonormal columns"),
        (lambda: inverse_householder(torch.eye(2, dtype=torch.complex64)), "a real matrix"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
