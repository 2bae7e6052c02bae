"""Low rank in the norm of activations: the optimum, its path in mu, streaming, singular data, refusals."""

import itertools

import numpy as np
import pytest
import torch
from calibration_memory import measure
from hypothesis import given
from hypothesis import strategies as st

from decompositions import ActivationFactor, TruncationWarning, svd, to_matrix, weighted_low_rank
from decompositions.weighted import (
    CalibrationWarning,
    regularization_bound,
)

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


@given(data=st.data(), n=st.integers(1, 40), seed=st.integers(0, 10**6), single=st.booleans())
def test_the_division_into_chunks_changes_no_bit(data, n, seed, single):
    """Nor does a stop between two chunks: the state goes on where it was, and saving it has no effect."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if single else F64
    x = torch.randn(data.draw(st.integers(0, 9000 if n > 20 else 300)), n, dtype=dtype, generator=g)
    whole = ActivationFactor(n, dtype=dtype)
    whole.update(x)
    chunked, resumed = ActivationFactor(n, dtype=dtype), ActivationFactor(n, dtype=dtype)
    for chunk in x.split(data.draw(st.integers(50, 4000))):
        chunked.update(chunk)
        resumed.update(chunk)
        if data.draw(st.booleans()):
            resumed = ActivationFactor.from_state(resumed.state())
    assert torch.equal(whole.factor, chunked.factor)
    assert torch.equal(chunked.factor, resumed.factor)
    assert torch.equal(chunked.total, resumed.total)
    assert chunked.count == resumed.count == len(x)
    assert torch.equal(ActivationFactor.from_state(whole.state()).factor, whole.factor)
    sums = x.double().sum(0)
    assert torch.allclose(whole.total, sums, atol=1e-9)
    assert torch.allclose(whole.mean, sums / max(len(x), 1), atol=1e-9)
    near = 1e-5 if single else 1e-12
    gram, norms = x.double().mT @ x.double(), x.double().norm(dim=0)
    difference = whole.factor.double().mT @ whole.factor.double() - gram
    assert bool((difference.abs() <= near * norms[:, None] * norms + 1e-300).all())  # column by column


def test_a_state_is_what_safetensors_takes_and_is_checked(rng):
    held = ActivationFactor(3)
    held.update(torch.randn(5, 3, generator=rng))
    state = held.state()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "triangle": (0, 3),
        "pending": (5, 3),
        "total": (3,),
        "count": (),
    }
    assert all(value.is_contiguous() for value in state.values())
    _ = held.factor
    assert [tuple(held.state()[key].shape) for key in ("triangle", "pending")] == [(3, 3), (0, 3)]
    held.update(torch.ones(1, 3))
    assert int(state["count"]) == 5  # a copy
    assert int(held.state()["count"]) == 6
    with pytest.raises(ValueError, match=r"the state lacks \['count'\]"):
        ActivationFactor.from_state({key: value for key, value in state.items() if key != "count"})
    for wrong in ({"total": torch.zeros(4)}, {"triangle": torch.zeros(4, 3)}, {"count": torch.tensor(-1)}):
        with pytest.raises(ValueError, match="from_state: expected triangle"):
            ActivationFactor.from_state({**state, **wrong})


def test_means_are_merged(rng):
    x = torch.randn(20, 4, generator=rng)
    one, two, first = ActivationFactor(4), ActivationFactor(4), ActivationFactor(4, dtype=F64)
    one.update(x[:3])
    two.update(x[3:].to(torch.bfloat16))
    first.merge(one)
    first.merge(two)
    first.merge(first)
    seen = torch.cat([x[:3], x[3:].to(torch.bfloat16).float()]).double()
    assert first.count == 40
    assert torch.allclose(first.mean, seen.mean(0), atol=1e-12)
    assert torch.allclose(first.factor.mT @ first.factor, 2 * seen.mT @ seen, rtol=1e-5, atol=1e-4)
    assert one.count == 3


def test_padding_may_hold_anything_and_other_layouts_are_read_in_place(rng):
    x = torch.randn(4, 6, 5, generator=rng)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    dirty = x.clone()
    dirty[~mask] = torch.nan
    held, turned, plain = ActivationFactor(5), ActivationFactor(5), ActivationFactor(5)
    held.update(dirty, mask)
    turned.update(x.permute(1, 0, 2), mask.T)
    plain.update(x[:, :4])
    assert torch.equal(held.factor, plain.factor)
    assert torch.allclose(turned.factor.abs(), plain.factor.abs(), atol=1e-5)
    with pytest.raises(ValueError, match="activations must be finite"):
        plain.update(torch.full((1, 5), 1e300, dtype=F64))  # finite, but not in the dtype of the factor
    assert plain.count == 16


def test_memory_does_not_grow_with_tokens():
    """N = 1024 in a process of its own: 4 n^2 numbers and two chunks, of which the caller holds one."""
    found = measure(1024, 6144, 512)
    assert found["extra"] <= 4 * found["square"] + found["chunk"]
    assert found["extra"] > found["square"]  # or nothing was measured


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


def whitened(w, x, rank, eigen):
    """What public code does in float32: the Gram matrix, its root, and the inverse of that."""
    gram, eps = x.mT @ x, 1e-9
    if eigen:
        values, vectors = torch.linalg.eigh(gram)
        root = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        scale, inverse = vectors * root, (vectors / root).mT
    else:
        scale, failed = torch.linalg.cholesky_ex(gram)
        while int(failed):
            scale, failed = torch.linalg.cholesky_ex(gram + eps * torch.eye(len(gram)))
            eps *= 2
        inverse = torch.linalg.inv(scale)
    u, s, vh = torch.linalg.svd(w @ scale, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ inverse


def test_single_precision_on_graded_activations(rng):
    """Spectrum 1 to 1e-10 in float32: the optimum to 1e-7 of itself, where Gram matrices lose 1e-4 and more."""
    m, n, k, rank = 30, 40, 400, 10
    grams = []
    for _ in range(8):
        q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=rng))
        x = torch.linalg.qr(torch.randn(k, n, dtype=F64, generator=rng))[0] * torch.logspace(0, -10, n, dtype=F64) @ q
        w = torch.randn(m, n, dtype=F64, generator=rng)
        held = ActivationFactor(n)
        for chunk in x.float().split(64):
            held.update(chunk)
        best = float(torch.linalg.svdvals(w @ x.mT)[rank:].norm())

        def excess(found, w=w, x=x, best=best):
            return weighted(w, found.double(), x) / best - 1

        assert excess(to_matrix(weighted_low_rank(w.float(), held, rank=rank))) < 1e-7
        exact = weighted_low_rank(w.float().double(), x, rank=rank)
        gap = to_matrix(weighted_low_rank(w.float(), held, rank=rank)).double() - to_matrix(exact)
        assert float((gap @ x.mT).norm()) < 1e-6 * float((w @ x.mT).norm())
        grams.append([excess(whitened(w.float(), x.float(), rank, eigen)) for eigen in (False, True)])
    cholesky, eigen = np.median(np.array(grams), 0)
    assert cholesky > 1e-5  # what a Gram matrix costs
    assert eigen > 1e-3


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    rank=st.integers(1, 6),
    steep=st.floats(0, 6),
    mu=st.floats(1e-9, 10),
    close=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_bound_of_what_mu_may_change(m, n, rank, steep, mu, close, seed):
    g = torch.Generator().manual_seed(seed)
    rank = min(rank, m, n)
    w = torch.randn(m, n, dtype=F64, generator=g) * torch.logspace(0, -steep / 3, n, dtype=F64)
    x = torch.randn(12, n, dtype=F64, generator=g) * torch.logspace(0, -steep, n, dtype=F64)
    if close and rank < min(m, n):  # two singular values next to one another
        u, s, vh = torch.linalg.svd(w @ torch.linalg.qr(x).R.mH)
        s[rank] = s[rank - 1] * 0.999
        width = len(s)
        w = torch.linalg.solve(torch.linalg.qr(x).R, ((u[:, :width] * s) @ vh[:width]).mH).mH
    bound = regularization_bound(w, x, rank, mu)
    change = to_matrix(weighted_low_rank(w, x, rank=rank, mu=mu)) - to_matrix(weighted_low_rank(w, x, rank=rank))
    assert float(change.norm()) <= bound * (1 + 1e-6) + 1e-7 * float(w.norm())
    assert regularization_bound(w, x, rank, 0) == 0


def test_the_bound_is_linear_and_knows_when_it_says_nothing(rng):
    w, x = torch.randn(6, 5, dtype=F64, generator=rng), torch.randn(30, 5, dtype=F64, generator=rng)
    one, tenth = (regularization_bound(w, x, 2, mu) for mu in (1e-3, 1e-4))
    assert one == pytest.approx(10 * tenth)
    change = to_matrix(weighted_low_rank(w, x, rank=2, mu=1e-3)) - to_matrix(weighted_low_rank(w, x, rank=2))
    assert 0 < float(change.norm()) < one < 1e4 * float(change.norm())  # a bound, and not an absurd one
    assert regularization_bound(torch.eye(4, dtype=F64), torch.eye(4, dtype=F64), 2, 0.1) == float("inf")
    assert regularization_bound(w, x[:1], 2, 0.1) == float("inf")  # one direction of data: the second is anyone's


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


def test_refusals_of_the_bound(unchecked):
    w, x = torch.randn(7, 6), torch.randn(20, 6)
    with pytest.raises(ValueError, match="regularization_bound: mu must be a number >= 0, got 'adaptive'"):
        regularization_bound(w, x, 2, "adaptive")
