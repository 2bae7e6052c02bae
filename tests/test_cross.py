"""Dominant submatrices: the entrywise guarantee, against brute force, on hard matrices."""

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_approx import maxvol, rect_maxvol


@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 3), st.floats(0.01, 0.5))
def test_coefficients_are_bounded(r, more, kind, tau):
    n = r + more
    a = torch.randn(n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(100 * n + r))
    if kind == 1:
        a = a * 10.0 ** -torch.linspace(0, 10, n).double()[:, None]  # rows over ten decades
    if kind == 2:
        a = torch.vander(torch.linspace(-1, 1, n, dtype=torch.float64), r)
    if kind == 3:
        a = a.to(torch.complex128) * torch.exp(1j * torch.arange(n))[:, None]
    rows = maxvol(a, tau)
    assert len(set(rows.tolist())) == r
    q = torch.linalg.qr(a).Q
    coefficients = torch.linalg.solve(q[rows], q, left=False)
    assert float(coefficients.abs().max()) <= 1 + tau + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_volume_against_brute_force(seed):
    a = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    best = max(float(torch.linalg.det(a[list(rows)]).abs()) for rows in combinations(range(9), 3))
    found = float(torch.linalg.det(a[maxvol(a, 0.01)]).abs())
    assert found >= best * 1.01**-3 * 3**-1.5


def test_deficient_zero_and_half_precision_matrices():
    assert sorted(maxvol(torch.zeros(4, 2)).tolist()) != [0, 0]
    deficient = torch.ones(6, 1) @ torch.ones(1, 3)
    assert len(set(maxvol(deficient).tolist())) == 3
    assert len(set(maxvol(torch.randn(20, 4).bfloat16()).tolist())) == 4


def test_refusals():
    with pytest.raises(ValueError, match=r"n >= r, got shape \(2, 3\)"):
        maxvol(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 NaN"):
        maxvol(torch.tensor([[float("nan")], [1.0]]))
    with pytest.raises(ValueError, match="tau"):
        maxvol(torch.eye(2), tau=0)


@given(st.integers(1, 6), st.integers(0, 60), st.floats(0.7, 2.0), st.booleans())
def test_rectangular_maxvol_bounds_every_row(r, more, tau, is_complex):
    n = r + more
    a = torch.randn(n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    a = a * torch.exp(1j * torch.arange(n))[:, None] if is_complex else a
    rows = rect_maxvol(a, tau)
    chosen = rows.tolist()
    assert r <= len(set(chosen)) == len(chosen) <= n
    norms = torch.linalg.vector_norm(a @ torch.linalg.pinv(a[rows]), dim=1)
    norms[rows] = 0
    assert float(norms.max()) <= tau + 1e-9


def test_rectangular_maxvol_counts_and_refusals():
    a = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(rect_maxvol(a, 1e-3, max_rows=9)) == 9
    assert len(rect_maxvol(a, 100, min_rows=7)) == 7
    assert rect_maxvol(a, 1e9).tolist() == maxvol(a).tolist()
    with pytest.raises(ValueError, match="expected 4 <= min_rows <= max_rows <= 30"):
        rect_maxvol(a, max_rows=3)
    with pytest.raises(ValueError, match="tau must be positive, got 0"):
        rect_maxvol(a, 0)


def test_tall_matrices_take_rounds_of_many_rows():
    a = torch.randn(20_000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scaled in (a, a * 10.0 ** -torch.linspace(0, 12, 20).double()):  # nearly dependent in float64, not in QR
        rows = maxvol(scaled, 0.01)
        assert float(torch.linalg.solve(scaled[rows], scaled, left=False).abs().max()) <= 1.01 + 1e-3


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 3), st.floats(0.01, 0.5))
def test_a_batch_keeps_the_same_bounds(b, r, more, kind, tau):
    n = r + more
    a = torch.randn(b, n, r, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * n + b))
    if kind == 1:
        a = a * 10.0 ** -torch.linspace(0, 10, n).double()[:, None]
    if kind == 2:
        a[0] = torch.vander(torch.linspace(-1, 1, n, dtype=torch.float64), r)
    if kind == 3:
        a = a.to(torch.complex128) * torch.exp(1j * torch.arange(n))[:, None]
    q = torch.linalg.qr(a).Q
    for i, rows in enumerate(maxvol(a, tau)):
        assert len(set(rows.tolist())) == r
        assert float(torch.linalg.solve(q[i, rows], q[i], left=False).abs().max()) <= 1 + tau + 1e-9
    together = rect_maxvol(a, 1.0)
    for i, rows in enumerate(together):
        assert len(set(rows.tolist())) == together.shape[1]
        norms = torch.linalg.vector_norm(q[i] @ torch.linalg.pinv(q[i, rows]), dim=1)
        norms[rows] = 0
        assert float(norms.max()) <= 1 + 1e-9


def test_shapes_of_batches():
    a = torch.randn(2, 3, 12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert maxvol(a).shape == (2, 3, 4)
    assert rect_maxvol(a, 1e-3, max_rows=7).shape == (2, 3, 7)
    assert rect_maxvol(a, 100, min_rows=5).shape == (2, 3, 5)
    assert maxvol(torch.zeros(2, 5, 3)).sort(1).values.unique(dim=1).shape == (2, 3)  # filled in, distinct
    with pytest.raises(ValueError, match=r"n >= r, got shape \(2, 2, 3\)"):
        maxvol(torch.zeros(2, 2, 3))
