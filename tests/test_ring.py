"""Tensor rings: the tolerance of TR-SVD, what alternating least squares makes of it, tensorly as the other opinion."""

from math import prod, sqrt

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_linalg import tensors

import tnlayers
from decompositions import TensorRing, TruncationWarning, numel, round, to_dense, tr_als, tr_svd, tt_svd
from decompositions.ring import _share

F64 = torch.float64


def ring(shape, rank, rng, **options):
    return TensorRing.random(row_modes=tuple(shape), rank=rank, dtype=F64, generator=rng, **options)


@given(x=tensors((F64, torch.complex128), max_order=5), exponent=st.floats(-8, -0.3), data=st.data())
def test_any_ring_order_keeps_the_tolerance(x, exponent, data):
    axes = data.draw(st.permutations(range(x.ndim)))
    num_rows = data.draw(st.integers(0, x.ndim))
    net, error = tr_svd(x, tol=10.0**exponent, axes=axes, num_rows=num_rows, with_error=True)
    assert net.axes == tuple(axes)
    assert (net.row_modes, net.col_modes) == (tuple(x.shape[:num_rows]), tuple(x.shape[num_rows:]))
    assert reference.relative(reference.dense(net), x) == pytest.approx(error, rel=1e-6, abs=1e-14)
    assert error <= 10.0**exponent


@given(x=tensors((F64,), max_order=5), data=st.data())
def test_ranks_are_caps(x, data):
    d = x.ndim
    rank = tuple(data.draw(st.integers(1, max(1, x.numel() // max(x.shape)))) for _ in range(d)) if d > 1 else ()
    net = tr_svd(x, rank=rank)
    assert all(have <= asked for have, asked in zip(net.ranks, rank, strict=True))
    assert float((to_dense(net) - x).norm()) <= float(x.norm()) * (1 + 1e-12)  # projections only


@given(count=st.integers(1, 60), closing=st.integers(1, 60), first=st.integers(1, 60))
def test_columns_are_shared_out_within_the_caps(count, closing, first):
    count = min(count, closing * first)
    a, b = _share(count, closing, first)
    assert count <= a * b
    assert a <= closing
    assert b <= first
    if closing >= count and first >= count:
        assert a + b <= 2 * sqrt(count) + 1


def test_a_ring_may_be_smaller_than_any_train_and_only_sweeps_find_it(rng):
    """TR-SVD splits the columns of its first cut by their order, blind to how they factor."""
    x = to_dense(ring((6, 6, 6, 6), 2, rng))
    train, first = tt_svd(x, tol=1e-10), tr_svd(x, tol=1e-10)
    found, fit = tr_als(x, 2, tol=1e-7, restarts=4, max_sweeps=500, with_fit=True, generator=rng)
    assert fit.error <= 1e-7
    assert train.ranks == (4, 4, 4)
    assert numel(found) < numel(train) < numel(first)


def test_axes_turn_the_ring(rng):
    truth = ring((3, 4, 5), 2, rng, axes=(1, 2, 0))
    turned = to_dense(truth)
    plain = torch.einsum("aib,bjc,ckA->aijkA", *truth.cores)
    assert torch.allclose(turned, torch.einsum("aijka->kij", plain))


@pytest.mark.parametrize(("shape", "rank"), [((6, 7, 8), 2), ((5, 4, 5, 4), (2, 3, 2, 2)), ((7, 6), (2, 1))])
def test_als_recovers_rings(shape, rank, rng):
    x = to_dense(ring(shape, rank, rng))
    net, fit = tr_als(x, rank, tol=1e-6, restarts=6, max_sweeps=1000, with_fit=True, generator=rng)
    assert fit.error <= 1e-6
    assert net.ranks == (rank if isinstance(rank, tuple) else (rank,) * len(shape))


def test_als_never_ends_above_its_start(rng):
    x = torch.randn(5, 6, 5, 4, dtype=F64, generator=rng)
    for rank in (2, 3, (1, 3, 4, 2)):
        start = tr_svd(x, rank, with_error=True)[1]
        net, fit = tr_als(x, rank, with_fit=True, generator=rng)
        assert fit.error <= start * (1 + 1e-9)
        assert fit.error == pytest.approx(reference.relative(reference.dense(net), x), rel=1e-9)


def test_restarts_keep_the_best_and_a_missed_tolerance_is_said(rng):
    x = torch.randn(5, 5, 5, dtype=F64, generator=rng)
    fit = tr_als(x, 2, start="random", restarts=4, with_fit=True, generator=rng)[1]
    assert len(fit.starts) == 5
    assert fit.error == pytest.approx(min(fit.starts), rel=1e-9)
    with pytest.warns(TruncationWarning, match="tr_als: the tolerance was not reached"):
        tr_als(x, 1, tol=1e-3, generator=rng)


def test_against_tensorly(rng):
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import tensor_ring
    from tensorly.tr_tensor import tr_to_tensor

    tensorly.set_backend("numpy")
    x = torch.randn(6, 5, 4, 5, dtype=F64, generator=rng)
    ranks = (2, 3, 3, 3)  # which column of the first cut goes to which pair is a choice; theirs is another. And
    # theirs lists the bond that closes the ring at both ends
    theirs = torch.from_numpy(tr_to_tensor(tensor_ring(x.numpy(), rank=[*ranks, ranks[0]])))
    assert reference.relative(to_dense(tr_svd(x, ranks)), x) == pytest.approx(reference.relative(theirs, x), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, rng):
    wide = torch.promote_types(dtype, torch.float32)
    x = to_dense(TensorRing.random(row_modes=(5, 6, 4), rank=2, dtype=wide, generator=rng)).to(dtype)
    eps = torch.finfo(dtype).eps
    net, error = tr_svd(x, tol=max(1e-5, 8 * eps), with_error=True)
    assert (net.dtype, error <= max(1e-5, 8 * eps)) == (dtype, True)
    assert tr_als(x, 2, restarts=5, max_sweeps=500, with_fit=True, generator=rng)[1].error < 1e-4 + 8 * eps


def test_refusals(rng, unchecked):
    x = torch.randn(3, 4, 5)
    with pytest.raises(ValueError, match=r"tr_svd: axes must be a permutation of 0\.\.2, got \(0, 1\)"):
        tr_svd(x, axes=(0, 1))
    with pytest.raises(ValueError, match="rank needs one entry per bond, expected 3, got 2"):
        tr_als(x, (2, 2))
    with pytest.raises(ValueError, match="tr_als: start must be 'tr_svd' or 'random', got 'svd'"):
        tr_als(x, 2, start="svd")
    with pytest.raises(ValueError, match="TensorRing: axes must be a permutation"):
        TensorRing([torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)], axes=(1, 1))
    with pytest.raises(ValueError, match="label 'b0' must have one size"):
        TensorRing([torch.zeros(2, 3, 2), torch.zeros(2, 3, 3)])
    net = ring((3, 4, 5), 2, rng)
    with pytest.raises(ValueError, match="round: the network must be a tree"):
        round(net, rank=1)
    with pytest.raises(ValueError, match="RankAdaptive: the model must have a layer whose weight is a tree network"):
        tnlayers.RankAdaptive(tnlayers.Linear(8, 8, network=tnlayers.random_network(TensorRing, rank=2)), 0.01)


def test_a_zero_tensor_and_full_ranks():
    assert not to_dense(tr_svd(torch.zeros(3, 4, 5), tol=0.1)).any()
    assert not to_dense(tr_als(torch.zeros(3, 4, 5, dtype=F64), 2)).any()
    x = torch.arange(prod((2, 3, 4)), dtype=F64).reshape(2, 3, 4)
    assert reference.relative(to_dense(tr_svd(x)), x) < 1e-13
