"""TT-matrix cross: exact at the true rank, any width, kernels, nothing asked of the padding."""

import math
from functools import partial

import pytest
import torch

from cross_approx import as_source, ttm_cross
from decompositions import TTMatrix, to_dense, ttm_svd

F64 = torch.float64


class Counting:
    """A matrix that counts what it is asked for, and refuses indices out of bounds."""

    def __init__(self, x):
        self.x, self.count, self.seen = x, 0, set()

    def __call__(self, index):
        assert bool((index >= 0).all())
        assert bool((index < torch.tensor(self.x.shape)).all())
        self.count += len(index)
        self.seen |= {tuple(row) for row in index.tolist()}
        return self.x[tuple(index.unbind(1))]


def matrix(net, m, n):
    """The network without its padding."""
    return to_dense(net).reshape(math.prod(net.row_modes), math.prod(net.col_modes))[:m, :n]


def distance(net, x):
    x = x.flatten(1)
    return float((matrix(net, *x.shape) - x).norm() / x.norm())


@pytest.mark.parametrize(
    ("rows", "cols", "rank"),
    [
        ((4, 5, 3), (3, 4, 5), 3),
        ((2, 2, 2, 2, 2), (3, 3, 3, 3, 3), 4),
        ((6, 7), (5, 4), 5),
        ((30,), (20,), 1),
        ((1, 8), (9, 1), 1),
    ],
)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_exact_at_the_true_rank(rows, cols, rank, dtype, rng):
    net = TTMatrix.random(row_modes=rows, col_modes=cols, rank=rank, generator=rng, dtype=dtype)
    x = matrix(net, math.prod(rows), math.prod(cols))
    result = ttm_cross(x, row_modes=rows, col_modes=cols, tol=1e-11, generator=rng)
    assert result.converged, result.reason
    assert isinstance(result.network, TTMatrix)
    assert (result.network.row_modes, result.network.col_modes) == (rows, cols)
    assert result.network.ranks == net.ranks
    assert result.network.cores[0].dtype == dtype
    assert distance(result.network, x) <= 1e-10


@pytest.mark.parametrize("shape", [(13, 7), (31, 37), (97, 64), (1, 11), (11, 1), (1, 1), (101, 2)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_any_width_with_the_modes_of_ttm_svd(shape, order, rng):
    """Primes too: a low-rank smooth matrix to 1e-10, in the modes that ttm_svd chooses."""
    i, j = torch.meshgrid(*(torch.arange(float(n), dtype=F64) for n in shape), indexing="ij")
    x = torch.cos(0.3 * i - 0.2 * j) + 0.01 * i
    counting = Counting(x)
    result = ttm_cross(counting, shape=shape, order=order, tol=1e-11, generator=rng)
    reference = ttm_svd(x, order=order, tol=1e-11)
    assert result.network.shape == reference.shape
    assert result.converged, result.reason
    assert distance(result.network, x) <= 1e-10
    assert counting.count == result.evaluations == len(counting.seen) <= x.numel()


def test_padded_ranks_are_those_of_ttm_svd(rng):
    i, j = torch.meshgrid(torch.arange(397.0, dtype=F64), torch.arange(499.0, dtype=F64), indexing="ij")
    x = 1 / (1 + i + 2 * j)
    result = ttm_cross(x, tol=1e-6, generator=rng)
    reference = ttm_svd(x, tol=1e-6)
    assert result.converged
    assert distance(result.network, x) <= 3e-6
    assert max(result.network.ranks) <= max(reference.ranks) + 3
    assert result.evaluations < x.numel() // 4


@pytest.mark.parametrize("modes", [{}, {"col_modes": (4, 9), "row_modes": (8, 1)}, {"order": 1}])
@pytest.mark.parametrize("kind", ["tensor", "source", "function"])
def test_kernels_are_matrices_as_for_ttm_svd(modes, kind, rng):
    grids = torch.meshgrid(*(torch.arange(float(n), dtype=F64) for n in (8, 4, 3, 3)), indexing="ij")
    x = torch.exp(-0.1 * (grids[0] + 2 * grids[1] - grids[2] * 3 - grids[3])) + grids[1]
    counting = Counting(x)
    source = {"tensor": x, "source": as_source(x), "function": counting}[kind]
    shape = {"shape": x.shape} if kind == "function" else {}
    result = ttm_cross(source, **shape, **modes, tol=1e-11, generator=rng)
    reference = ttm_svd(x, **modes, tol=1e-11)
    assert result.network.shape == reference.shape
    assert result.converged
    assert distance(result.network, x) <= 1e-10
    if kind == "function":
        assert counting.count == result.evaluations == len(counting.seen)


@pytest.mark.parametrize("limit", [1, 100, 500, 3000])
def test_limits_return_the_best_so_far(limit, rng):
    x = torch.randn(61, 67, dtype=F64, generator=rng)
    counting = Counting(x)
    result = ttm_cross(counting, shape=x.shape, tol=1e-8, max_evals=limit, generator=rng)
    assert counting.count == result.evaluations == len(counting.seen) <= limit
    assert f"max_evals = {limit}" in result.reason
    assert not result.converged
    assert result.network.shape == ttm_svd(x, rank=1).shape
    capped = ttm_cross(x, rank=2, tol=1e-8, generator=rng)
    assert max(capped.network.ranks) <= 2
    assert not capped.converged


def test_a_recipe(rng):
    recipe = partial(ttm_cross, tol=1e-3, row_modes=(8, 8), col_modes=(6, 8))
    i = torch.arange(64.0)[:, None]
    weight = torch.nn.Parameter(1 / (1 + i + torch.arange(48.0)))
    result = recipe(weight)
    assert result.network.cores[0].dtype == torch.float32
    assert not result.network.cores[0].requires_grad
    assert distance(result.network, weight.detach()) <= 3e-3
    started = recipe(weight, start=torch.tensor([[0, 0], [63, 47]]))
    assert started.converged


def test_refusals(rng):
    x = torch.ones(6, 8)
    with pytest.raises(ValueError, match=r"expected a matrix .* got shape \(6,\)"):
        ttm_cross(torch.ones(6))
    with pytest.raises(ValueError, match=r"products >= 6 x 8, got row_modes=\(2, 2\) \(4\)"):
        ttm_cross(x, row_modes=(2, 2), col_modes=(2, 4))
    with pytest.raises(ValueError, match=r"equal lengths, got \(6,\) and \(2, 4\)"):
        ttm_cross(x, row_modes=(6,), col_modes=(2, 4))
    with pytest.raises(ValueError, match="ttm_cross: max_evals must be positive, got 0"):
        ttm_cross(x, max_evals=0)
    with pytest.raises(ValueError, match=r"ttm_cross: start points .* integers below \(6, 8\)"):
        ttm_cross(x, start=torch.tensor([[6, 0]]))
    with pytest.raises(ValueError, match="ttm_cross: a callable"):
        ttm_cross(lambda i: i)
    x[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"ttm_cross: .*inf at index \(3, 5\)"):
        ttm_cross(x, order=1)
