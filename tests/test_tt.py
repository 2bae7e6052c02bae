"""TT-SVD of tensors and matrices: quasi-optimality, recovery, chain order, padding, and a cross-check with tensorly."""

from math import prod, sqrt

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linalg import tensors

from decompositions import TT, TTMatrix, apply, balanced_modes, round, svd, to_dense, to_matrix, tt_svd, ttm_svd

DTYPES = (torch.float64, torch.complex128)


def bonds_of(shape) -> list[tuple[list[int], int]]:
    """Leading axes and largest rank of every bond of a chain."""
    return [(list(range(k)), min(prod(shape[:k]), prod(shape[k:]))) for k in range(1, len(shape))]


@given(x=tensors(DTYPES, max_order=6, kinds=("gaussian", "graded", "deficient", "peak")), data=st.data())
def test_quasi_optimality_gauge_and_pythagoras(x, data):
    """`‖X - X̂‖^2` is at most the sum of the bonds' tails, each a lower bound of the best: a factor sqrt(d - 1)."""
    ranks = tuple(data.draw(st.integers(1, most)) for _, most in bonds_of(x.shape))
    net = tt_svd(x, rank=ranks, method="exact")
    value = reference.dense(net)
    size = float(torch.linalg.vector_norm(x))
    error = float(torch.linalg.vector_norm(x - value))
    tails = [reference.tail(x, first, r) for (first, _), r in zip(bonds_of(x.shape), ranks, strict=True)]
    assert error <= sqrt(sum(t**2 for t in tails)) * (1 + 1e-9) + 1e-13 * size
    assert error >= max(tails, default=0.0) * (1 - 1e-9) - 1e-13 * size
    assert abs(float(torch.linalg.vector_norm(value)) ** 2 + error**2 - size**2) <= 1e-12 * size**2
    assert reference.isometry_defect(net, x.ndim - 1) < 1e-12
    assert all(have <= asked for have, asked in zip(net.ranks, ranks, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("method", ["auto", "exact", "gram", "randomized"])
def test_exact_recovery(dtype, method, rng):
    truth = TT.random(row_modes=(4, 5, 2, 6, 3), rank=(3, 5, 4, 2), dtype=dtype, generator=rng)
    x = to_dense(truth)
    net, error = tt_svd(x, rank=(3, 5, 4, 2), method=method, with_error=True, generator=rng)
    assert error < 20 * torch.finfo(dtype).eps
    assert tt_svd(x, tol=1e-5).ranks == (3, 5, 4, 2) == net.ranks
    assert reference.isometry_defect(net.to(torch.promote_types(dtype, torch.float64)), 4) < 50 * torch.finfo(dtype).eps


@given(x=tensors(DTYPES, max_order=5), exponent=st.floats(-8, -0.3), data=st.data())
def test_any_chain_order_keeps_the_tensor(x, exponent, data):
    axes = data.draw(st.permutations(range(x.ndim)))
    num_rows = data.draw(st.integers(0, x.ndim))
    net, error = tt_svd(x, tol=10.0**exponent, axes=axes, num_rows=num_rows, with_error=True)
    assert net.axes == tuple(axes)
    assert (net.row_modes, net.col_modes) == (tuple(x.shape[:num_rows]), tuple(x.shape[num_rows:]))
    assert reference.relative(reference.dense(net), x) == pytest.approx(error, rel=1e-6, abs=1e-14)
    assert error <= 10.0**exponent


def test_convolution_chain(rng):
    kernel = torch.randn(6, 4, 3, 2, dtype=torch.float64, generator=rng)
    net = tt_svd(kernel, axes=(1, 2, 3, 0), num_rows=1)
    assert [tuple(core.shape) for core in net.cores] == [(4, 4), (4, 3, 12), (12, 2, 6), (6, 6)]
    assert reference.relative(to_dense(net), kernel) < 1e-13
    with pytest.raises(ValueError, match=r"tt_svd: axes must be a permutation of 0\.\.3, got \(0, 1, 2\)"):
        tt_svd(kernel, axes=(0, 1, 2))
    with pytest.raises(ValueError, match=r"rank needs one entry per bond, expected 3, got 2 \(rank=\(8, 8\)\)"):
        tt_svd(kernel, rank=(8, 8))
    with pytest.raises(ValueError, match=r"rank of bond 0 must be in 1\.\.4 .* got 5"):
        tt_svd(kernel, rank=(5, 1, 1), axes=(1, 2, 3, 0))
    with pytest.raises(ValueError, match=r"num_rows must be in 0\.\.4 .* got 5"):
        tt_svd(kernel, num_rows=5)


@pytest.mark.parametrize("order", range(1, 9))
def test_every_order(order, rng):
    x = torch.randn((3, 2, 4, 1, 2, 3, 2, 2)[:order], dtype=torch.float64, generator=rng)
    net = tt_svd(x)
    assert reference.relative(reference.dense(net), x) < 1e-13
    assert net.ranks == tuple(most for _, most in bonds_of(x.shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_known_ranks_of_functions(dtype):
    """sin(sum of indices) has rank 2 at every bond, a sum of indices too, a product of indices 1."""
    grid = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in (4, 5, 6, 3)], indexing="ij")
    total = sum(grid)
    tol = max(1e-5, 8 * torch.finfo(dtype).eps)
    assert tt_svd(torch.sin(total).to(dtype), tol=tol).ranks == (2, 2, 2)
    assert tt_svd(total.to(dtype), tol=tol).ranks == (2, 2, 2)
    product = prod((g + 1 for g in grid[1:]), start=grid[0] + 1)
    assert tt_svd(product.to(dtype), tol=tol).ranks == (1, 1, 1)


def test_methods_agree(rng):
    x = reference.graded((6, 7, 8, 5), 3.0, torch.float32, rng)
    errors = {
        method: tt_svd(x, rank=4, method=method, with_error=True, generator=rng)[1]
        for method in ("exact", "auto", "gram", "randomized")
    }
    assert errors["auto"] == pytest.approx(errors["exact"], rel=1e-3, abs=1e-6)
    assert errors["gram"] == pytest.approx(errors["exact"], rel=1e-3, abs=1e-6)
    assert errors["randomized"] <= 1.01 * errors["exact"] + 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 127, 128, 1000])
@pytest.mark.parametrize("base", [2, 3])
def test_vectors_of_any_length_fold_to_quantized_trains(n, base):
    """Exponentials have rank 1, waves rank 2, before the zeros that fill the last power."""
    t = torch.arange(n, dtype=torch.float64)
    x = torch.exp(-t / 50) + torch.sin(t)
    net, error = tt_svd(x, tol=1e-12, modes=base, with_error=True)
    assert set(net.shape) == {base}
    assert base ** (net.order - 1) < n <= base**net.order or net.order == 1
    dense = reference.dense(net).flatten()
    assert reference.relative(dense[:n], x) <= 1e-11
    assert float(dense[n:].norm()) <= 1e-11 * float(x.norm())
    assert error <= 1e-12
    if n == base**net.order:
        assert max(net.ranks, default=1) <= 3


def test_axes_fold_each_on_its_own_and_interleave(rng):
    x = torch.randn(5, 8, dtype=torch.float64, generator=rng)
    net = tt_svd(x, tol=1e-13, modes=2, axes=(0, 3, 1, 4, 2, 5), num_rows=3)
    assert net.shape == (2,) * 6
    padded = torch.zeros(8, 8, dtype=torch.float64)
    padded[:5] = x
    assert reference.relative(reference.dense(net).reshape(8, 8), padded) < 1e-12
    folded = tt_svd(x, tol=1e-13, modes=(3, 4, 4))
    assert reference.relative(reference.dense(folded).flatten()[:40], x.flatten()) < 1e-12
    for modes in ((3, 4), (-5, -8), 1, 0):
        with pytest.raises(ValueError, match=r"tt_svd: (the modes must hold the tensor|modes of one size)"):
            tt_svd(x, modes=modes)


def test_against_tensorly(rng):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_train

    tensorly.set_backend("numpy")
    x = reference.graded((5, 6, 4, 3), 2.0, torch.float64, rng)
    for ranks in ((5, 4, 3), (3, 12, 3), (5, 12, 2)):  # one bond is cut: the best approximation is unique
        theirs = torch.from_numpy(tensorly.tt_to_tensor(tensor_train(x.numpy(), rank=[1, *ranks, 1])))
        assert reference.relative(reference.dense(tt_svd(x, rank=ranks)), theirs) < 1e-11
    theirs = torch.from_numpy(tensorly.tt_to_tensor(tensor_train(x.numpy(), rank=[1, 3, 4, 2, 1])))
    ours = tt_svd(x, rank=(3, 4, 2), with_error=True)[1]  # cut in another order
    assert ours == pytest.approx(reference.relative(theirs, x), rel=0.02)


def test_rounding_a_fat_train_is_tt_svd(rng):
    """Two roads to the same ranks: the gauge's rounding of the exact train, and TT-SVD of the tensor."""
    x = reference.graded((5, 6, 4, 3), 2.0, torch.float64, rng)
    for tol in (0.3, 1e-2, 1e-4):
        assert round(tt_svd(x), tol=tol, center=3).shape == x.shape
        a, b = reference.dense(round(tt_svd(x), rank=2, center=0)), reference.dense(tt_svd(x, rank=2))
        tails = sqrt(sum(reference.tail(x, first, 2) ** 2 for first, _ in bonds_of(x.shape)))
        assert float(torch.linalg.vector_norm(a - b)) <= 2 * tails


# --- matrices ---


@pytest.mark.parametrize(
    ("shape", "row_modes", "col_modes"),
    [
        ((12, 30), (3, 4), (5, 6)),
        ((12, 30), (2, 3, 2), (5, 1, 6)),
        ((13, 7), (4, 4), (2, 4)),  # primes, padded
        ((1, 1), (1, 1), (1, 1)),
        ((5, 64), (1, 5, 1), (4, 4, 4)),
        ((17, 3), None, None),
        ((31, 37), None, (7, 6)),
        ((31, 37), (4, 8), None),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_ttm_svd_of_any_width(shape, row_modes, col_modes, dtype, rng):
    weight = torch.randn(shape, dtype=dtype, generator=rng)
    net, error = ttm_svd(weight, row_modes, col_modes, with_error=True)
    matrix = to_matrix(net)
    m, n = shape
    assert error < 50 * torch.finfo(dtype).eps
    assert reference.relative(matrix[:m, :n], weight) < 50 * torch.finfo(dtype).eps
    assert float(matrix[m:].abs().sum() + matrix[:, n:].abs().sum()) < 1e-3 * torch.finfo(dtype).eps ** 0.5 * m * n
    assert len(net.row_modes) == len(net.col_modes)
    if row_modes:
        assert net.row_modes == row_modes
    if col_modes:
        assert net.col_modes == col_modes
    x = torch.randn(2, n, dtype=dtype, generator=rng)
    padded = torch.nn.functional.pad(x, (0, prod(net.col_modes) - n)).unflatten(-1, net.col_modes)
    y = apply(net, padded).flatten(1)[:, :m]
    assert reference.relative(y, x @ weight.T) < 100 * torch.finfo(dtype).eps


@given(m=st.integers(1, 40), n=st.integers(1, 40), order=st.integers(1, 4), exponent=st.floats(-6, -0.3))
def test_ttm_svd_keeps_the_tolerance_of_the_unpadded_part(m, n, order, exponent):
    generator = torch.Generator().manual_seed(41 * m + n)
    weight = reference.graded((m, n), 4.0, torch.float32, generator)
    net, error = ttm_svd(weight, tol=10.0**exponent, order=order, with_error=True)
    assert (net.row_modes, net.col_modes) == (balanced_modes(m, order), balanced_modes(n, order))
    part = to_matrix(net.to(torch.float64))[:m, :n]
    assert reference.relative(part, weight) <= error * (1 + 1e-9) <= 10.0**exponent * (1 + 1e-9)


def test_a_kronecker_product_has_rank_one(rng):
    factors = [torch.randn(s, dtype=torch.float64, generator=rng) for s in ((2, 3), (4, 2), (3, 5))]
    weight = torch.from_numpy(reference.kron(factors))
    net = ttm_svd(weight, (2, 4, 3), (3, 2, 5), tol=1e-10)
    assert net.ranks == (1, 1)
    assert reference.relative(to_matrix(net), weight) < 1e-13
    terms = weight + torch.from_numpy(reference.kron([torch.randn_like(f) for f in factors]))
    assert ttm_svd(terms, (2, 4, 3), (3, 2, 5), tol=1e-10).ranks == (2, 2)


def test_one_pair_of_modes_is_the_matrix_itself(rng):
    weight = torch.randn(5, 7, dtype=torch.float64, generator=rng)
    net = ttm_svd(weight, (5,), (7,))
    assert len(net.cores) == 1
    assert torch.equal(net.cores[0], weight)
    two = ttm_svd(weight, (5, 1), (1, 7), rank=2)  # rows in one core, columns in the other: a matrix of rank 2
    assert reference.relative(to_matrix(two), to_dense(svd(weight, rank=2))) < 1e-12


def test_a_kernel_is_out_by_in_and_window(rng):
    kernel = torch.randn(8, 6, 3, 3, dtype=torch.float64, generator=rng)
    net = ttm_svd(kernel, order=2)
    assert (net.row_modes, net.col_modes) == ((2, 4, 1, 1), (2, 3, 3, 3))
    assert reference.relative(to_matrix(net), kernel.flatten(1)) < 1e-13
    assert isinstance(net, TTMatrix)


def test_ttm_refusals():
    with pytest.raises(ValueError, match=r"expected products >= 12 x 30, got row_modes=\(3, 3\) \(9\)"):
        ttm_svd(torch.ones(12, 30), (3, 3), (5, 6))
    with pytest.raises(ValueError, match=r"equal lengths, got \(3, 4\) and \(30,\); fill with ones"):
        ttm_svd(torch.ones(12, 30), (3, 4), (30,))
    with pytest.raises(ValueError, match=r"order >= 2, got shape \(12,\)"):
        ttm_svd(torch.ones(12))
    with pytest.raises(ValueError, match=r"rank of bond 0 must be in 1\.\.15 .* got 16"):
        ttm_svd(torch.ones(12, 30), (3, 4), (5, 6), rank=(16,))
    with pytest.raises(ValueError, match="at least 1, got width=12, order=0"):
        ttm_svd(torch.ones(12, 30), order=0)
