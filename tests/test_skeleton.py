"""Skeletons: exact at the true rank, equal to the matrix on the cross, honest about the rest."""

import pytest
import torch

from cross_approx import skeleton
from decompositions import to_dense

F64 = torch.float64


def of_rank(m, n, r, dtype, rng):
    left, right = (torch.randn(size, r, dtype=dtype, generator=rng) for size in (m, n))
    return left @ right.mT


@pytest.mark.parametrize("pivoting", ["rook", "full"])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 5), (1, 7, 1), (7, 1, 1), (300, 200, 12), (6, 6, 6), (50, 4, 4)])
def test_exact_at_the_true_rank(m, n, r, dtype, pivoting, rng):
    a = of_rank(m, n, r, dtype, rng)
    for cap in (r, None):
        result = skeleton(a, tol=1e-11, rank=cap, pivoting=pivoting, generator=rng)
        assert result.converged, result.reason
        assert result.network.ranks[0] == r
        assert float((to_dense(result.network) - a).norm() / a.norm()) <= 1e-10
        rows, columns = result.pivots
        assert len(rows) == len(columns) == r
        assert float(result.network.cores[0].abs().max()) <= 1 + 1e-6  # the pivots are the largest of their columns


@pytest.mark.parametrize("pivoting", ["rook", "full"])
def test_equal_on_the_cross_where_it_is_not_exact(pivoting, rng):
    a = torch.randn(30, 40, dtype=F64, generator=rng)
    result = skeleton(a, tol=1e-3, rank=7, pivoting=pivoting, generator=rng)
    assert result.reason == "the rank cap binds"
    assert not result.converged
    rows, columns = result.pivots
    dense = to_dense(result.network)
    torch.testing.assert_close(dense[rows], a[rows])
    torch.testing.assert_close(dense[:, columns], a[:, columns])
    exact = a[:, columns] @ torch.linalg.solve(a[rows][:, columns], a[rows])
    torch.testing.assert_close(dense, exact)
    true = float((dense - a).norm() / a.norm())
    assert true / 2 <= result.error <= 2 * true


@pytest.mark.parametrize("pivoting", ["rook", "full"])
def test_constants_and_zeros(pivoting, rng):
    for value, pivots in ((2.5, 1), (0.0, 0)):
        result = skeleton(torch.full((20, 30), value, dtype=F64), pivoting=pivoting, generator=rng)
        assert result.converged
        assert result.network.ranks[0] == 1
        assert len(result.pivots[0]) == pivots
        assert float((to_dense(result.network) - value).abs().max()) <= 1e-12


def test_smooth_kernels_and_the_count(rng):
    count = 0

    def kernel(index):
        nonlocal count
        count += len(index)
        x, y = index.double().unbind(1)
        return 1 / (1 + (x / 500 - y / 400 - 1.2).abs())

    result = skeleton(kernel, shape=(500, 400), tol=1e-8, generator=rng)
    assert result.converged
    assert count == result.evaluations < 500 * 400 / 4
    index = torch.cartesian_prod(torch.arange(500), torch.arange(400))
    a = kernel(index).reshape(500, 400)
    assert float((to_dense(result.network) - a).norm() / a.norm()) <= 3e-8


@pytest.mark.parametrize("limit", [1, 100, 1000, 3000])
@pytest.mark.parametrize("pivoting", ["rook", "full"])
def test_max_evals_is_never_exceeded(limit, pivoting, rng):
    count = 0

    def function(index):
        nonlocal count
        count += len(index)
        return torch.sin(index.double().square().prod(1))

    result = skeleton(function, shape=(100, 100), tol=1e-10, max_evals=limit, pivoting=pivoting, generator=rng)
    assert count == result.evaluations <= limit
    assert not result.converged
    assert result.reason == f"max_evals = {limit}"
    assert result.network.shape == (100, 100)


def test_float32_stops_at_its_floor(rng):
    index = torch.cartesian_prod(torch.arange(200), torch.arange(150)).float()
    a = (1 / (1 + index.sum(1))).reshape(200, 150)
    for pivoting in ("rook", "full"):
        result = skeleton(a, tol=1e-10, pivoting=pivoting, generator=rng)
        assert not result.converged
        assert result.error < 1e-5
        assert result.network.cores[0].dtype == torch.float32


def test_a_block_that_random_columns_miss_is_found_by_held_out_entries():
    """Columns 0..9 of 400 live on rows of their own: a walk sees them only when it starts in one of them."""
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for _ in range(20):
        a = torch.zeros(200, 400, dtype=F64)
        a[:100, 10:] = of_rank(100, 390, 3, F64, generator)
        a[100:, :10] = of_rank(100, 10, 2, F64, generator)  # 1.25 % of the entries
        result = skeleton(a, tol=1e-8, generator=generator)
        wrong += result.converged and float((to_dense(result.network) - a).norm() / a.norm()) > 1e-6
    assert wrong == 0  # each is missed with probability (1 - 0.0125)^500 = 0.2 %


def test_refusals(unchecked):
    with pytest.raises(ValueError, match=r"expected a matrix, got shape \(2, 3, 4\)"):
        skeleton(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="pivoting must be 'rook' or 'full', got 'none'"):
        skeleton(torch.zeros(2, 3), pivoting="none")
    with pytest.raises(ValueError, match="max_seconds must be positive"):
        skeleton(torch.zeros(2, 3), max_seconds=0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        skeleton(torch.zeros(2, 3), rank=0)
    bad = torch.ones(4, 5)
    bad[2, 3] = float("inf")
    with pytest.raises(ValueError, match=r"must be finite, got inf at index \(2, 3\)"):
        skeleton(bad, pivoting="full")
