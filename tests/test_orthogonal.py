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


def made(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """An input that each map takes."""
    x = torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(7))
    if name in ("cayley", "exponential"):
        return skew(x) / 2
    if name == "inverse_householder":
        return torch.linalg.qr(x).Q
    return exponential(skew(x) / 2) if name.startswith("inverse") else x


MAPS = (skew, cayley, inverse_cayley, exponential, inverse_exponential, householder, inverse_householder)
every = pytest.mark.parametrize("function", MAPS, ids=lambda f: f.__name__)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("batch", [(4,), (3,), (1,), (2, 3), (0,)], ids=str)  # (4,) is as long as the matrices
def test_every_map_takes_batches(function, dtype, batch):
    if dtype.is_complex and function is inverse_householder:
        return
    a = made(function.__name__, *batch, 4, 4, dtype=dtype)
    got = function(a)
    assert got.shape == a.shape
    for one, want in zip(a.reshape(-1, 4, 4), got.reshape(-1, 4, 4), strict=True):
        assert torch.allclose(function(one), want, atol=1e-13)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_single(function, dtype):
    a = made(function.__name__, 5, 5, dtype=torch.float32).to(dtype)
    if not function.__name__.startswith("inverse"):
        assert torch.equal(function(a), function(a.float()).to(dtype))
    want = function(made(function.__name__, 5, 5, dtype=torch.float32))
    assert function(a).dtype == dtype
    assert float((function(a).float() - want).abs().max()) <= 20 * torch.finfo(dtype).eps * max(1.0, want.abs().max())


def test_half_precision_refuses_what_it_can_see():
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="A\\^H = -A"):
            cayley(torch.tensor([[0.0, 1.0], [-0.9, 0.0]], dtype=dtype))
        with pytest.raises(ValueError, match="orthonormal columns"):
            inverse_cayley((1.05 * torch.eye(3)).to(dtype))
        with pytest.raises(ValueError, match="no eigenvalue -1"):
            inverse_exponential(-torch.eye(2, dtype=dtype))


@pytest.mark.parametrize("size", [1e6, 1e10, 1e20, 1e37])
@pytest.mark.parametrize("n", [4, 5])
@maps
def test_large_entries_give_an_orthogonal_matrix_or_a_refusal(pair, n, size):
    """With n odd I - A/2 keeps one small eigenvalue, which rounding loses."""
    a = size * skew(random(n, torch.float32, 1))
    if pair[0] is exponential or n == 5:
        with pytest.raises(ValueError, match=r"too large for torch\.float32"):
            pair[0](a)
    else:
        q = pair[0](a)
        assert torch.allclose(q.T @ q, torch.eye(n), atol=1e-4)


@pytest.mark.parametrize("size", [1e10, 1e20, 1e38])
def test_householder_of_large_entries(size):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).clamp(-2, 2) * size
    x[3, 1] = 1.0  # one that is small beside the others
    want = torch.eye(6, 3, dtype=torch.float64)
    for j in (2, 1, 0):  # one reflection after another
        v = x[:, j].double()
        v[:j], v[j] = 0, 1
        v = v / v.norm()
        want = want - 2 * torch.outer(v, v @ want)
    want = want * torch.where(x.diagonal() < 0, -1.0, 1.0)
    assert torch.allclose(householder(x).double(), want, atol=1e-6)


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
        (lambda: skew(torch.ones(3)), r"skew: expected square matrices, got \(3,\)"),
        (lambda: skew(torch.ones(3, 2)), "skew: expected square"),
        (lambda: cayley(torch.zeros(3)), "expected square"),
        (lambda: cayley(torch.tensor([[0.0, float("inf")], [-float("inf"), 0.0]])), "expected A\\^H = -A"),
        (lambda: householder(torch.tensor([[1.0], [float("inf")]])), "householder: entries must be finite"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@every
@pytest.mark.parametrize("wrong", [torch.eye(2, dtype=torch.int64), torch.eye(2) > 0, [[0.0]], None], ids=str)
def test_wrong_kinds(function, wrong):
    with pytest.raises(TypeError, match=f"{function.__name__}: expected a floating or complex tensor"):
        function(wrong)
