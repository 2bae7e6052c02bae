"""The nearest sum of Kronecker products: optimal, for any width, and trained at ranks that training finds."""

from functools import partial
from math import prod

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlayers
from decompositions import KroneckerSum, als, kronecker_svd, numel, round, to_dense, to_matrix

F64 = torch.float64


def arranged(w, rows, cols):
    (m, p), (n, q) = rows, cols
    return w.reshape(m, p, n, q).movedim(2, 1).reshape(m * n, p * q)


@given(
    rows=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cols=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    rank=st.integers(1, 5),
    complex_=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_eckart_young_after_rearrangement(rows, cols, cut, rank, complex_, seed):
    """With padding too: the best sum of r terms for the matrix with zero rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    shape = (max(1, prod(rows) - cut[0]), max(1, prod(cols) - cut[1]))
    w = torch.randn(shape, dtype=torch.complex128 if complex_ else F64, generator=generator)
    net, error = kronecker_svd(w, rows, cols, rank, with_error=True)
    padded = torch.zeros(prod(rows), prod(cols), dtype=w.dtype)
    padded[: shape[0], : shape[1]] = w
    values = torch.linalg.svdvals(arranged(padded, rows, cols))
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-12)
    assert reference.relative(to_matrix(net), padded) == pytest.approx(error, abs=1e-12)
    a, b = (factor.flatten(1) for factor in net.factors)
    for side in (a, b):
        gram = side.conj() @ side.mT
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-10)
        assert torch.allclose(gram.diagonal().real, values[: len(gram)], atol=1e-10)


def test_recovery_of_a_sum_of_krons(rng):
    pairs = [(torch.randn(3, 4, dtype=F64, generator=rng), torch.randn(5, 2, dtype=F64, generator=rng)) for _ in "abc"]
    w = sum(torch.kron(a, b) for a, b in pairs)
    net, error = kronecker_svd(w, (3, 5), (4, 2), tol=1e-10, with_error=True)
    assert net.ranks == (3,)
    assert error < 1e-13
    assert numel(net) == 3 * (12 + 10)
    assert reference.relative(sum(torch.kron(*term) for term in zip(*net.factors, strict=True)), w) < 1e-13


def test_three_factors_by_als(rng):
    truth = KroneckerSum.random(row_modes=(3, 2, 4), col_modes=(2, 4, 3), rank=2, dtype=F64, generator=rng)
    start = KroneckerSum.random(row_modes=(3, 2, 4), col_modes=(2, 4, 3), rank=2, dtype=F64, generator=rng)
    net, fit = als(to_dense(truth), start, tol=1e-6, max_sweeps=1000, with_fit=True)
    assert fit.error <= 1e-6
    terms = [torch.kron(torch.kron(a, b), c) for a, b, c in zip(*net.factors, strict=True)]
    assert reference.relative(sum(terms), to_matrix(truth)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes_and_scales(dtype, rng):
    w = torch.randn(13, 7, generator=rng).to(dtype)
    for factor in (1e-20, 1.0, 1e20):
        net, error = kronecker_svd(w * factor, tol=0.1, with_error=True)
        assert (net.dtype, error <= 0.1) == (dtype, True)


def test_layers_from_dense(rng):
    linear = nn.Linear(12, 20)
    layer = tnlayers.Linear.from_dense(linear, partial(kronecker_svd, tol=1e-6))
    x = torch.randn(5, 12, generator=rng)
    assert torch.allclose(layer(x), linear(x), atol=1e-5)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    image = torch.randn(2, 6, 7, 7, generator=rng)
    whole = tnlayers.Conv2d.from_dense(conv, partial(kronecker_svd, tol=1e-6))
    assert torch.allclose(whole(image), conv(image), atol=1e-5)
    report = tnlayers.tensorize(nn.Sequential(nn.Linear(64, 64)), partial(kronecker_svd, rank=4))
    assert report.rows[0].format == "KroneckerSum"


def test_two_factors_train_at_ranks_that_training_finds():
    truth = KroneckerSum.random(
        row_modes=(3, 4), col_modes=(3, 4), rank=2, std=0.3, generator=torch.Generator().manual_seed(1)
    )
    teacher = to_matrix(truth)
    found = []
    for start in (1, 8):
        torch.manual_seed(0)
        layer = tnlayers.Linear(12, 12, bias=False, network=tnlayers.random_network(KroneckerSum, rank=start, order=2))
        optimizer = tnlayers.RankAdaptive(layer, 0.1, tol=0.03, reserve=1, settle=250, betas=(0.0, None))
        for _ in range(400):
            x = torch.randn(128, 12)
            loss = 0.5 * (layer(x) - x @ teacher.T).square().sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(layer.network.ranks)
        assert reference.relative(to_matrix(layer.network.detach()), teacher) < 1e-3
    assert found == [(2,), (2,)]


def test_three_factors_have_no_gauge(rng):
    net = KroneckerSum.random(row_modes=(2, 2, 2), col_modes=(2, 2, 2), rank=2, generator=rng)
    with pytest.raises(ValueError, match="round: the network must be a tree"):
        round(net, rank=1)
    layer = tnlayers.Linear(8, 8, network=tnlayers.random_network(KroneckerSum, rank=2, order=3))
    with pytest.raises(ValueError, match="RankAdaptive: the model must have a layer whose weight is a tree network"):
        tnlayers.RankAdaptive(layer, 0.01)


def test_refusals(unchecked):
    w = torch.randn(6, 6)
    with pytest.raises(ValueError, match=r"needs two modes a side, got row_modes=\(2, 3, 1\)"):
        kronecker_svd(w, (2, 3, 1), (2, 3, 1))
    with pytest.raises(ValueError, match="the modes must cover the matrix, expected products >= 6 x 6"):
        kronecker_svd(w, (2, 2), (2, 3))
    with pytest.raises(ValueError, match="kronecker_svd: rank must be at least 1, got 0"):
        kronecker_svd(w, rank=0)
    with pytest.raises(ValueError, match="kronecker_svd: entries must be finite"):
        kronecker_svd(w * torch.inf)
    with pytest.raises(ValueError, match="KroneckerSum: row_modes and col_modes pair up"):
        KroneckerSum.skeleton((2, 3), (4,), 1)
    with pytest.raises(ValueError, match="label 'r' must have one size"):
        KroneckerSum([torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)])
