"""Truncated SVD: Eckart-Young, orthonormality, the smallest rank, every method, every dtype."""

import warnings
from math import sqrt

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import LowRank, TruncationWarning, apply, round, svd, to_dense, transpose

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128, torch.complex64], ids=str)
METHODS = pytest.mark.parametrize("method", ["auto", "exact", "gram", "randomized"])
SHAPES = pytest.mark.parametrize("shape", [(12, 12), (30, 5), (5, 30), (1, 9), (9, 1), (1, 1)], ids=str)


@st.composite
def spectra(draw, max_decades=12.0):
    """Descending singular values over up to twelve decades, with plateaus and exact zeros."""
    count = draw(st.integers(1, 12))
    exponents = sorted(draw(st.lists(st.floats(0, max_decades), min_size=count, max_size=count)))
    zeros = draw(st.integers(0, 3))
    return [10.0**-e for e in exponents] + [0.0] * zeros


def error_of(net: LowRank, exact: torch.Tensor) -> float:
    return reference.relative(reference.dense(net.to(torch.promote_types(exact.dtype, torch.float64))), exact)


@DTYPES
@METHODS
@SHAPES
def test_gauge_orthonormal_sides_and_descending_diagonal(dtype, method, shape, rng):
    eps = 30 * torch.finfo(dtype).eps
    a = torch.randn(shape, dtype=dtype, generator=rng)
    for rank in (1, 3, 99):
        net = svd(a, rank=rank, method=method, generator=rng)
        k = min(rank, *shape)
        assert net.ranks == (k, k)
        eye = torch.eye(k, dtype=dtype)
        assert float((net.U.mH @ net.U - eye).abs().max()) < eps
        assert float((net.V.mH @ net.V - eye).abs().max()) < eps  # conj(V) is orthonormal where V is
        s = net.S.diagonal()
        assert torch.equal(torch.diag(s), net.S)
        assert float(s.imag.abs().max() if dtype.is_complex else 0) == 0
        assert bool((s.real.diff() <= 0).all())
        assert bool((s.real >= 0).all())


@DTYPES
@pytest.mark.parametrize("method", ["auto", "exact", "gram"])
@SHAPES
def test_eckart_young(dtype, method, shape, rng):
    a = torch.randn(shape, dtype=dtype, generator=rng)
    exact = a.to(torch.promote_types(dtype, torch.float64))
    size = float(torch.linalg.vector_norm(exact))
    values = reference.singular_values(exact, [0])
    for rank in range(1, min(shape) + 1):
        net = svd(a, rank=rank, method=method)
        best = sqrt(sum(values[rank:] ** 2)) / size
        assert error_of(net, exact) == pytest.approx(best, rel=1e-5, abs=30 * torch.finfo(dtype).eps)
        top = torch.from_numpy(values[:rank].copy())
        assert reference.relative(net.S.diagonal().real, top) < 30 * torch.finfo(dtype).eps


@given(spectra(), st.integers(0, 12), st.integers(0, 9), st.booleans(), st.floats(-12, -0.3), st.integers(0, 999))
def test_tolerance_gives_the_smallest_rank(spectrum, tall, wide, complex_, exponent, seed):
    generator, tol = torch.Generator().manual_seed(seed), 10.0**exponent
    dtype = torch.complex128 if complex_ else torch.float64
    a = reference.with_spectrum(len(spectrum) + tall, len(spectrum) + wide, spectrum, dtype, generator)
    net = svd(a, tol=tol)
    rank = net.ranks[0]
    assert error_of(net, a) <= tol
    if rank > 1:  # one less would miss the tolerance (up to what is kept for rounding)
        size = sqrt(sum(s**2 for s in spectrum))
        assert sqrt(sum(s**2 for s in spectrum[rank - 1 :])) > (tol - 1e-14) * size * (1 - 1e-6) - 1e-15 * size
    assert error_of(svd(a.T, tol=tol), a.T) <= tol


@given(spectra(max_decades=7), st.sampled_from((torch.float32, torch.complex64)), st.floats(-6, -0.3), st.data())
def test_tolerance_in_single_precision(spectrum, dtype, exponent, data):
    generator, tol = torch.Generator().manual_seed(data.draw(st.integers(0, 999))), 10.0**exponent
    m, n = (len(spectrum) + data.draw(st.sampled_from((0, 1, 40))) for _ in range(2))
    a = reference.with_spectrum(m, n, spectrum, dtype, generator)
    net = svd(a, tol=tol, method=data.draw(st.sampled_from(("auto", "exact", "gram"))))
    assert error_of(net, a) <= tol
    size = sqrt(sum(s**2 for s in spectrum))
    if net.ranks[0] > 1:
        assert sqrt(sum(s**2 for s in spectrum[net.ranks[0] - 1 :])) > (tol - 2e-6) * size


@DTYPES
def test_a_tail_right_at_the_tolerance(dtype, rng):
    """The budget may be used up to the last digit: rounding must not carry the error over it."""
    for tol in (0.5, 0.1, 1e-2, 1e-3, 1.01e-4, 9.9e-5, 1e-5, 2e-6):
        for slack in (1e-9, 1e-7, 1e-5):
            spectrum = [1.0] * 50 + [tol * sqrt(50 / 100) * (1 - slack)] * 100
            a = reference.with_spectrum(150, 160, spectrum, dtype, rng)
            assert error_of(svd(a, tol=tol), a) <= tol


@pytest.mark.parametrize("shape", [(300, 300), (64, 1500), (1500, 64)], ids=str)
def test_larger_matrices_in_single_precision(shape, rng):
    a = reference.with_spectrum(*shape, [1 / (k + 1) for k in range(64)], torch.float32, rng)
    for tol in (0.3, 1e-2, 1.1e-4, 1e-6):
        for method in ("auto", "exact", "gram"):
            assert error_of(svd(a, tol=tol, method=method), a) <= tol


@METHODS
def test_exact_recovery_and_nothing_beyond_it(method, rng):
    a = torch.randn(40, 3, dtype=torch.float64, generator=rng) @ torch.randn(3, 25, dtype=torch.float64, generator=rng)
    net = svd(a, rank=3, method=method, generator=rng)
    # a Gram matrix squares: its directions are good to eps, values below 1e-8 are noise
    assert error_of(net, a) < 1e-13
    fat = svd(a, rank=20, method=method, generator=rng)
    assert error_of(fat, a) < 1e-13
    assert bool(fat.S.isfinite().all())
    assert svd(a, tol=1e-10).ranks == (3, 3)
    assert svd(a.float(), tol=1e-5).ranks == (3, 3)


def test_randomized_is_near_the_best_and_seeded(rng):
    spectrum = [1 / (k + 1) for k in range(120)]
    a = reference.with_spectrum(200, 120, spectrum, torch.float32, rng)
    best = sqrt(sum(s**2 for s in spectrum[10:]) / sum(s**2 for s in spectrum))
    first, error = svd(a, 10, method="randomized", with_error=True, generator=torch.Generator().manual_seed(1))
    assert best * (1 - 1e-6) <= error <= 1.003 * best
    again = svd(a, 10, method="randomized", generator=torch.Generator().manual_seed(1))
    assert torch.equal(first.U, again.U)
    with pytest.warns(TruncationWarning, match="the rank binds"):
        svd(a, 10, 0.5 * best, method="randomized", generator=rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert svd(a, 40, 2 * best, method="randomized", generator=rng).ranks[0] < 10


def test_a_kernel_is_the_matrix_out_by_everything_else(rng):
    kernel = torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=rng)
    net = svd(kernel, tol=1e-12)
    assert net.shape == (6, 36)
    assert error_of(net, kernel.flatten(1)) < 1e-12


def test_result_is_a_working_network(rng):
    a = torch.randn(7, 5, dtype=torch.complex128, generator=rng)
    net, x = svd(a, rank=3), torch.randn(4, 5, dtype=torch.complex128, generator=rng)
    assert reference.relative(apply(net, x), x @ to_dense(net).T) < 1e-14
    assert reference.relative(to_dense(transpose(net)), to_dense(net).T) < 1e-14
    assert reference.relative(to_dense(round(net, rank=2)), to_dense(svd(a, rank=2))) < 1e-12


@pytest.mark.usefixtures("unchecked")
def test_rank_must_be_one_number():
    with pytest.raises(TypeError, match=r"svd: rank must be an int or None, got \(2, 2\)"):
        svd(torch.ones(3, 4), rank=(2, 2))
    with pytest.raises(ValueError, match=r"svd: expected a tensor of order >= 2, got shape \(3,\)"):
        svd(torch.ones(3))
