"""Low rank in the norm of activations: the optimum, its path in mu, streaming, singular data, refusals."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import ActivationFactor, TruncationWarning, svd, to_matrix, weighted_low_rank
from decompositions.weighted import CalibrationWarning

F64 = torch.float64


def weighted(w, other, x):
    """`‖(W - W') X‖` for X (tokens, n)."""
    return float(((w - other) @ x.mH).norm())


@given(
    m=st.integers(1, 7),
    n=st.integers(1, 7),
    tokens=st.integers(1, 20),
    rank=st.integers(1, 7),
    lower=st.integers(1, 7),
    complex_=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_optimum_is_that_of_eckart_and_young(m, n, tokens, rank, lower, complex_, seed):
    g = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else F64
    w = torch.randn(m, n, dtype=dtype, generator=g)
    x = torch.randn(tokens, min(lower, n), dtype=dtype, generator=g) @ torch.randn(
        min(lower, n), n, dtype=dtype, generator=g
    )
    rank = min(rank, m, n)
    net, error = weighted_low_rank(w, x, rank=rank, with_error=True)
    tail = float(torch.linalg.svdvals(w @ x.mH)[rank:].norm())
    whole = float((w @ x.mH).norm())
    assert weighted(w, to_matrix(net), x) == pytest.approx(tail, abs=1e-10 * whole)
    assert error == pytest.approx(tail / whole, abs=1e-10)
    assert torch.allclose(net.U.mH @ net.U, torch.eye(rank, dtype=dtype), atol=1e-12)
    smaller = weighted_low_rank(w, x, rank=rank, minimum_norm=True)
    assert weighted(w, to_matrix(smaller), x) == pytest.approx(tail, abs=1e-9 * whole)
    assert float(to_matrix(smaller).norm()) <= float(to_matrix(net).norm()) * (1 + 1e-9)


@given(data=st.data(), n=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_chunks_order_merging_and_mixtures_change_nothing(data, n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(data.draw(st.integers(1, 40)), n, dtype=F64, generator=g)
    whole = ActivationFactor(n, dtype=F64)
    whole.update(x)
    parts = [ActivationFactor(n, dtype=F64) for _ in range(2)]
    order = torch.randperm(len(x), generator=g)
    for k, chunk in enumerate(x[order].split(data.draw(st.integers(1, 9)))):
        parts[k % 2].update(chunk)
    parts[0].merge(parts[1])
    assert parts[0].count == whole.count == len(x)
    mixed = ActivationFactor(n, dtype=F64)
    mixed.update(torch.linalg.qr(torch.randn(len(x), len(x), dtype=F64, generator=g)).Q @ x)
    for other in (parts[0], mixed):
        assert torch.allclose(other.factor.mT @ other.factor, x.mT @ x, atol=1e-10)
    assert torch.equal(whole.factor, whole.factor.triu())
    assert whole.factor.shape == (n, n)


def test_masked_tokens_do_not_count(rng):
    x = torch.randn(3, 5, 4, generator=rng)
    mask = torch.rand(3, 5, generator=rng) > 0.4
    held, plain = ActivationFactor(4), ActivationFactor(4)
    held.update(x, mask)
    plain.update(x[mask])
    assert held.count == int(mask.sum())
    assert torch.equal(held.factor, plain.factor)
    assert repr(held) == f"ActivationFactor(4 features, {held.count} tokens)"


def test_the_path_in_mu(rng):
    """The weighted error grows with mu, the plain one falls; the ends are COALA at zero and the plain SVD."""
    w = torch.randn(12, 10, dtype=F64, generator=rng)
    x = torch.randn(30, 10, dtype=F64, generator=rng) * torch.logspace(0, -4, 10, dtype=F64)
    found = [to_matrix(weighted_low_rank(w, x, rank=4, mu=mu)) for mu in (0.0, 1e-6, 1e-3, 1e-1, 10.0, 1e8)]
    on_data = [weighted(w, other, x) for other in found]
    plain = [float((w - other).norm()) for other in found]
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(on_data))
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(plain))
    assert torch.allclose(found[-1], to_matrix(svd(w, rank=4)), atol=1e-6)
    slopes = [float((to_matrix(weighted_low_rank(w, x, rank=4, mu=mu)) - found[0]).norm()) for mu in (1e-9, 1e-11)]
    assert slopes[1] < 0.02 * slopes[0]  # linear in mu
    adaptive = to_matrix(weighted_low_rank(w, x, rank=4, mu="adaptive"))
    first = w - found[0]
    weight = (weighted(w, found[0], x) / float(first.norm())) ** 2
    assert torch.allclose(adaptive, to_matrix(weighted_low_rank(w, x, rank=4, mu=weight)), atol=1e-10)


@pytest.mark.parametrize("tol", [0.3, 0.1, 1e-3])
def test_a_tolerance_is_kept_by_the_least_rank(tol, rng):
    w = torch.randn(20, 15, dtype=F64, generator=rng)
    x = torch.randn(60, 15, dtype=F64, generator=rng) * torch.logspace(0, -3, 15, dtype=F64)
    net, error = weighted_low_rank(w, x, tol=tol, with_error=True)
    (rank, _) = net.ranks
    assert error <= tol
    assert rank == 1 or weighted_low_rank(w, x, rank=rank - 1, with_error=True)[1] > tol
    with pytest.warns(TruncationWarning, match=r"weighted_low_rank: the tolerance was not reached.*the rank binds"):
        weighted_low_rank(w, x, tol=1e-9, rank=2)


def test_single_precision_on_graded_activations(rng):
    """Spectrum 1 to 1e-10 in float32: below 1e-7 of the whole is lost beyond the optimum (by a Gram matrix 1e-2)."""
    m, n, k, rank = 30, 40, 400, 10
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=rng))
    x = torch.linalg.qr(torch.randn(k, n, dtype=F64, generator=rng))[0] * torch.logspace(0, -10, n, dtype=F64) @ q
    w = torch.randn(m, n, dtype=F64, generator=rng)
    held = ActivationFactor(n)
    for chunk in x.float().split(64):
        held.update(chunk)
    found = to_matrix(weighted_low_rank(w.float(), held, rank=rank)).double()
    best = float(torch.linalg.svdvals(w @ x.mT)[rank:].norm())
    assert (weighted(w, found, x) - best) / float((w @ x.mT).norm()) < 1e-7


def test_singular_and_empty_calibration(rng):
    w = torch.randn(6, 5, dtype=F64, generator=rng)
    one = torch.randn(1, 5, dtype=F64, generator=rng)  # a single token: rank 1 is exact on it
    assert weighted_low_rank(w, one, rank=1, with_error=True)[1] < 1e-12
    held = ActivationFactor(5, dtype=F64)
    held.update(one)
    assert weighted_low_rank(w, held, rank=1, with_error=True)[1] < 1e-12
    for empty in (ActivationFactor(5, dtype=F64), torch.zeros(3, 5, dtype=F64)):
        with pytest.warns(CalibrationWarning, match="the plain truncated SVD of the weight was taken"):
            net = weighted_low_rank(w, empty, rank=2)
        assert torch.allclose(to_matrix(net), to_matrix(svd(w, rank=2)), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_types_run_in_single_precision_and_kernels_are_matrices(dtype, rng):
    kernel = torch.randn(8, 3, 2, 2, generator=rng).to(dtype)
    held = ActivationFactor(12, dtype=dtype)
    held.update(torch.randn(40, 12, generator=rng).to(dtype))
    assert held.factor.dtype == torch.float32
    net = weighted_low_rank(kernel, held, rank=8)
    assert net.dtype == dtype
    near = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert float((to_matrix(net.to(torch.float32)) - kernel.flatten(1).float()).norm()) < near * float(
        kernel.float().norm()
    )


def test_refusals(unchecked):
    w, held = torch.randn(4, 3), ActivationFactor(3)
    for features in (0, True, 2.0):
        with pytest.raises(ValueError, match="features must be an int >= 1"):
            ActivationFactor(features)
    with pytest.raises(ValueError, match=r"the last axis must hold the features, expected 3, got shape \(2, 4\)"):
        held.update(torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"the mask must have one entry a token, expected \(2,\), got \(3,\)"):
        held.update(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="activations must be finite"):
        held.update(torch.tensor([[1.0, np.nan, 0.0]]))
    assert held.count == 0
    with pytest.raises(ValueError, match="expected 3 features as here, got 4"):
        held.merge(ActivationFactor(4))
    x = torch.randn(9, 3)
    with pytest.raises(ValueError, match="give a rank or a tol, got neither"):
        weighted_low_rank(w, x)
    for mu in (-1.0, float("nan"), "auto", True):
        with pytest.raises(ValueError, match="mu must be a number >= 0 or 'adaptive'"):
            weighted_low_rank(w, x, rank=1, mu=mu)
    with pytest.raises(ValueError, match=r"expected \(k, 3\), got \(9, 4\)"):
        weighted_low_rank(w, torch.randn(9, 4), rank=1)
    with pytest.raises(ValueError, match="weighted_low_rank: entries must be finite"):
        weighted_low_rank(w * torch.inf, x, rank=1)
