"""The dense linear algebra under the decompositions, and the frame they share: checks, error budget, honesty."""

import re
import warnings
from math import sqrt

import numpy as np
import pytest
import reference
import torch
from cases import DECOMPOSITIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from decompositions import TruncationWarning, fold, positive_qr, unfold
from decompositions.linalg import (
    check_ranks,
    direct_sum,
    gram,
    gram_is_safe,
    is_tight,
    relative_error,
    safe_svd,
    truncation_rank,
    usable_tol,
)
from decompositions.randomized import randomized_basis

EVERY = pytest.mark.parametrize("decompose", DECOMPOSITIONS, ids=repr)
KINDS = ("gaussian", "graded", "deficient", "zero", "peak", "constant")


@st.composite
def tensors(draw, dtypes, max_order=8, max_size=400, kinds=KINDS):
    """Tensors of any order and layout: graded over twelve decades, rank-deficient, zero, one peak, mode sizes 1."""
    order = draw(st.integers(1, max_order))
    shape, room = [], max_size
    for _ in range(order):
        shape.append(draw(st.integers(1, max(1, min(9, room)))))
        room //= shape[-1]
    kind, dtype = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    double = torch.complex128 if dtype.is_complex else torch.float64
    if kind == "gaussian":
        x = torch.randn(shape, dtype=double, generator=generator)
    elif kind == "graded":
        x = reference.graded(shape, draw(st.floats(0, 12)) / order, double, generator)
    elif kind == "deficient":
        x = torch.zeros(shape, dtype=double)
        for _ in range(2):
            term = torch.ones((), dtype=double)
            for n in shape:
                term = term[..., None] * torch.randn(n, dtype=double, generator=generator)
            x = x + term
    else:
        x = torch.full(shape, 3.0 if kind == "constant" else 0.0, dtype=double)
        if kind == "peak":
            x[tuple(n // 2 for n in shape)] = -2.0
    x = x.to(dtype)
    layout = draw(st.sampled_from(("plain", "strided", "transposed")))
    if layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    if layout == "transposed":
        x = x.permute(*range(order)[::-1]).contiguous().permute(*range(order)[::-1])
    return x


def measured(decompose, x, *args, **options):
    """The network, its true error in double precision, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = decompose(x, *args, **options)
    exact = net.to(torch.promote_types(x.dtype, torch.float64))
    return net, reference.relative(reference.dense(exact), decompose.target(x, net)), caught


def stated(message: Warning) -> float:
    assert isinstance(message, TruncationWarning)
    found = re.search(r"got ([0-9.e+-]+) \(", str(message))
    assert found is not None
    return float(found[1])


# --- the frame of every decomposition ---


@EVERY
@given(x=tensors((torch.float64, torch.complex128)), exponent=st.floats(-13, -0.3), data=st.data())
def test_tolerance_in_double_precision(decompose, x, exponent, data):
    if x.ndim < decompose.min_order:
        x = x[None]
    method = data.draw(st.sampled_from(("auto", "exact")))
    net, error, caught = measured(decompose, x, tol=10.0**exponent, method=method)
    assert not caught
    assert error <= 10.0**exponent
    assert net.dtype == x.dtype


@EVERY
@given(x=tensors((torch.float32, torch.complex64), max_order=5), exponent=st.floats(-6, -0.3), data=st.data())
def test_tolerance_in_single_precision_down_to_1e_6(decompose, x, exponent, data):
    if x.ndim < decompose.min_order:
        x = x[None]
    method = data.draw(st.sampled_from(("auto", "exact", "gram")))
    _, error, caught = measured(decompose, x, tol=10.0**exponent, method=method)
    assert not caught
    assert error <= 10.0**exponent


@EVERY
@settings(max_examples=25)
@given(
    x=tensors((torch.float32, torch.bfloat16, torch.float16), max_order=4),
    exponent=st.floats(-9, -0.3),
    scale=st.sampled_from((1.0, 1e-6, 30.0)),
)
def test_below_what_the_dtype_holds_the_error_is_stated(decompose, x, exponent, scale):
    """No silent miss: either the tolerance holds, or a TruncationWarning states the true error."""
    x = x * scale
    if x.ndim < decompose.min_order:
        x = x[None]
    _, error, caught = measured(decompose, x, tol=10.0**exponent)
    assert bool(caught) == (error > 10.0**exponent)
    if caught:
        assert stated(caught[0].message) == pytest.approx(error, rel=0.01)


@EVERY
@given(x=tensors((torch.float64, torch.float32, torch.complex128)), rank=st.integers(1, 9), data=st.data())
def test_with_error_is_the_true_error_for_every_method(decompose, x, rank, data):
    if x.ndim < decompose.min_order:
        x = x[None]
    method = data.draw(st.sampled_from(decompose.methods))
    net, error = decompose(x, rank=rank, method=method, with_error=True)
    exact = net.to(torch.promote_types(x.dtype, torch.float64))
    truth = reference.relative(reference.dense(exact), decompose.target(x, net))
    assert error == pytest.approx(truth, rel=1e-6, abs=1e-14)
    assert all(r <= rank for r in net.ranks)


@EVERY
def test_gram_in_double_precision_is_honest(decompose, rng):
    """A Gram matrix cannot see below 1e-8 in float64; asked for by name, it says so where it matters."""
    x = reference.with_spectrum(30, 30, [10.0**-k for k in range(13)], torch.float64, rng)
    for exponent in (-4, -7, -9, -11):
        _, error, caught = measured(decompose, x, tol=10.0**exponent, method="gram")
        assert bool(caught) == (error > 10.0**exponent)
    _, error, caught = measured(decompose, x, tol=1e-11)
    assert error <= 1e-11
    assert not caught


@EVERY
@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e37, 1e-36])
def test_scales_at_the_edge_of_single_precision(decompose, factor, rng):
    x = reference.graded((6, 5, 4), 2.0, torch.float32, rng)
    x = x / x.abs().max() * factor
    for options in ({"tol": 0.1}, {"tol": 1e-3}, {"rank": 2}):
        plain = measured(decompose, x / factor, **options)
        net, error, caught = measured(decompose, x, **options)
        assert not caught
        assert error <= options.get("tol", 1.001 * plain[1])
        assert net.ranks == plain[0].ranks
        assert error == pytest.approx(plain[1], rel=1e-3, abs=1e-6)


@EVERY
@pytest.mark.parametrize("factor", [1e200, 1e-200])
@pytest.mark.parametrize("method", ["exact", "gram"])
def test_scales_at_the_edge_of_double_precision(decompose, factor, method, rng):
    x = reference.graded((6, 5, 4), 2.0, torch.float64, rng)
    net, error, caught = measured(decompose, x * factor, tol=1e-3, method=method)
    assert not caught
    assert error <= 1e-3
    assert net.ranks == decompose(x, tol=1e-3, method=method).ranks


@EVERY
def test_the_rank_binds_and_says_so(decompose, rng):
    x = torch.randn(8, 8, 8, generator=rng, dtype=torch.float64)
    net, error, caught = measured(decompose, x, rank=2, tol=1e-3)
    assert "the rank binds" in str(caught[0].message)
    assert stated(caught[0].message) == pytest.approx(error, rel=0.01)
    assert all(r <= 2 for r in net.ranks)
    _, error, caught = measured(decompose, x, rank=2, tol=0.999)
    assert not caught
    assert error <= 0.999


@EVERY
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1, 1), (7, 1), (1, 7), (2, 1, 5)], ids=str)
def test_one_element_modes_and_orders(decompose, shape, rng):
    x = torch.randn(shape, dtype=torch.float64, generator=rng)
    x = x[None] if x.ndim < decompose.min_order else x
    for options in ({}, {"tol": 1e-12}, {"rank": 99}):
        assert measured(decompose, x, **options)[1] < 1e-14
    zero = decompose(torch.zeros_like(x), tol=0.1)
    assert set(zero.ranks) <= {1}
    assert not reference.dense(zero).any()


@EVERY
def test_input_is_neither_changed_nor_tracked(decompose, rng):
    x = torch.randn(6, 5, 4, generator=rng, requires_grad=True)
    before = x.detach().clone()
    net = decompose(x, tol=0.1)
    assert torch.equal(x, before)
    assert not any(core.requires_grad for core in net.cores)
    full = decompose(x)  # nothing to cut: the cores may not be views of the input either
    for core in full.cores:
        core.zero_()
    assert torch.equal(x, before)


@EVERY
def test_autocast_and_default_dtype_change_nothing(decompose, rng):
    x = reference.graded((6, 5, 4), 2.0, torch.float32, rng)
    plain = decompose(x, tol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        cast, error = decompose(x, tol=1e-3, with_error=True)
    assert error <= 1e-3
    torch.set_default_dtype(torch.float64)
    try:
        wide = decompose(x, tol=1e-3)
    finally:
        torch.set_default_dtype(torch.float32)
    for other in (cast, wide):
        assert all(torch.equal(a, b) for a, b in zip(plain.cores, other.cores, strict=True))


@EVERY
@pytest.mark.usefixtures("unchecked")
def test_the_warning_points_at_the_caller(decompose, rng):
    _, _, caught = measured(decompose, torch.randn(8, 8, 8, generator=rng), rank=1, tol=1e-3)
    assert caught[0].filename.endswith(("test_linalg.py", "cases.py"))


@EVERY
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(decompose, bad):
    x = torch.ones(20, 21, 22)
    x[3, 4, 5] = bad
    count = "1 NaN and 0 infinite" if bad != bad else "0 NaN and 1 infinite"
    for method in decompose.methods:
        with pytest.raises(ValueError, match=f"entries must be finite, got {count} of 9240"):
            decompose(x, rank=2, method=method)


@EVERY
@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3, 4, dtype=torch.int64), {}, TypeError, r"got torch.int64; convert it with x.to\(torch.float32\)"),
        (torch.ones(3, 4, dtype=torch.bool), {}, TypeError, "got torch.bool"),
        ([[1.0]], {}, TypeError, "expected a torch.Tensor, got list"),
        (np.ones((2, 2)), {}, TypeError, "expected a torch.Tensor, got ndarray"),
        (torch.ones(3, 0), {}, ValueError, r"every mode size must be at least 1, got shape \(3, 0\)"),
        (torch.ones(()), {}, ValueError, r"order >= \d, got shape \(\)"),
        (torch.ones(3, 4), {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        (torch.ones(3, 4), {"rank": -2}, ValueError, "rank must be at least 1, got -2"),
        (torch.ones(3, 4), {"rank": 1.5}, TypeError, "rank must be an int.* got 1.5"),
        (torch.ones(3, 4), {"rank": True}, TypeError, "rank must be an int.* got True"),
        (torch.ones(3, 4), {"tol": -1e-3}, ValueError, "tol must be a finite relative error >= 0, got -0.001"),
        (torch.ones(3, 4), {"tol": float("inf")}, ValueError, "got inf"),
        (torch.ones(3, 4), {"tol": float("nan")}, ValueError, "got nan"),
        (torch.ones(3, 4), {"tol": "1e-3"}, ValueError, "got '1e-3'"),
        (torch.ones(3, 4), {"method": "lanczos"}, ValueError, "method must be one of .* got 'lanczos'"),
        (torch.ones(3, 4), {"method": "randomized"}, ValueError, "needs a rank, got rank=None; use method='auto'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(decompose, x, options, error, message):
    name = decompose.id.partition("-")[0]
    with pytest.raises(error, match=rf"^{name}: .*{message}"):
        decompose(x, **options)


def test_cores_that_do_not_fit_a_half_type_are_refused():
    x = torch.full((300, 300), 6e4).to(torch.float16)  # norm 1.8e7, largest float16 6.5e4
    for decompose in DECOMPOSITIONS:
        if decompose.balanced:
            assert decompose(x, tol=0.1, with_error=True)[1] <= 0.1
            continue
        with pytest.raises(
            ValueError, match=r"cores do not fit torch.float16, got a tensor of norm 1.8e\+07; decompose"
        ):
            decompose(x, tol=0.1)


# --- the pieces ---


@given(tensors((torch.float64,), max_order=5), st.data())
def test_unfold_and_fold(x, data):
    modes = data.draw(st.lists(st.integers(0, x.ndim - 1), unique=True, max_size=x.ndim))
    matrix = unfold(x, modes)
    assert torch.equal(matrix, torch.from_numpy(reference.unfolding(x, modes)))
    assert torch.equal(fold(matrix, modes, x.shape), x)
    assert torch.equal(unfold(x, x.ndim - 1), unfold(x, [x.ndim - 1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (1, 3), (3, 1), (2, 5, 3)], ids=str)
def test_positive_qr(dtype, shape, rng):
    a = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64, generator=rng).to(dtype)
    a[..., -1] = a[..., 0]  # rank-deficient where there is more than one column
    q, r = positive_qr(a)
    eps = 20 * torch.finfo(dtype).eps
    wide = torch.promote_types(dtype, torch.float64)
    q, r, a = q.to(wide), r.to(wide), a.to(wide)
    k = min(shape[-2:])
    assert q.shape[-1] == r.shape[-2] == k
    assert reference.relative(q @ r, a) < eps
    assert float((q.mH @ q - torch.eye(k, dtype=wide)).abs().max()) < eps
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    assert bool((diagonal.real >= 0).all())
    assert float(diagonal.imag.abs().max() if dtype.is_complex else 0) < eps
    assert not bool(r.tril(-1).any())


def test_positive_qr_is_unique_and_differentiable(rng):
    a = torch.randn(6, 4, dtype=torch.float64, generator=rng)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=rng)).Q
    assert reference.relative(positive_qr(turn @ a)[1], positive_qr(a)[1]) < 1e-13
    assert torch.autograd.gradcheck(positive_qr, a.requires_grad_())
    q, r = positive_qr(torch.zeros(4, 2))
    assert torch.equal(q.T @ q, torch.eye(2))
    assert not r.any()


def test_safe_svd_falls_back_to_double_precision(rng, monkeypatch):
    a = reference.graded((40, 30), 6.0, torch.float32, rng)
    plain, calls = torch.linalg.svd, []

    def failing(matrix, full_matrices=True):
        calls.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    u, s, vh = safe_svd(a)
    assert calls == [torch.float32, torch.float64]
    assert {u.dtype, s.dtype, vh.dtype} == {torch.float32}
    assert reference.relative((u * s) @ vh, a) < 1e-6


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.floats(0, 1e6), st.integers(1, 12))
def test_truncation_rank_is_the_smallest_that_fits(values, budget, cap):
    squares = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k = truncation_rank(squares, budget, cap)
    sums = [float(squares[j:].flip(0).cumsum(0)[-1]) if j < len(squares) else 0.0 for j in range(len(squares) + 1)]
    smallest = next(j for j, lost in enumerate(sums) if lost <= budget)
    assert k == max(1, min(smallest, cap))


def test_truncation_rank_sums_from_the_small_end():
    squares = torch.tensor([1.0] + [1e-17] * 1000, dtype=torch.float64)
    assert truncation_rank(squares, 0.9999e-14, 2000) == 2
    assert truncation_rank(squares, 1.0001e-14, 2000) == 1
    assert truncation_rank(torch.tensor([1.0, -1e-18]), 0.0, 2) == 1  # noise of a Gram matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64], ids=str)
def test_gram_accumulates_in_double_precision(dtype, rng):
    a = torch.randn(3, 70_000, dtype=dtype, generator=rng)  # several blocks
    double = torch.promote_types(dtype, torch.float64)
    assert gram(a).dtype == double
    for b in (a, a[:, ::2]):
        assert reference.relative(gram(b), b.to(double) @ b.to(double).mH) < 1e-13  # two orders of 70,000 terms


def test_gram_is_used_only_where_it_is_safe():
    assert gram_is_safe(torch.float32, 1e-7)
    assert gram_is_safe(torch.float64, 1e-3)
    assert not gram_is_safe(torch.float64, 1e-9)
    assert not gram_is_safe(torch.float64, None)


def test_tolerances_leave_room_for_rounding():
    eps = torch.finfo(torch.float32).eps
    assert usable_tol(1e-2, torch.float32, 3) == 1e-2 - 16 * eps
    assert usable_tol(1e-9, torch.float32, 3) == pytest.approx(1e-10)
    assert is_tight(1e-7, torch.float32, 1)
    assert not is_tight(1e-4, torch.float32, 1)
    assert is_tight(0.5, torch.bfloat16, 1)


def test_direct_sum_is_block_diagonal_and_shared_elsewhere(rng):
    a, b = torch.randn(2, 3, 4, generator=rng), torch.randn(5, 3, 1, generator=rng)
    total = direct_sum(a, b, [0, 2])
    assert total.shape == (7, 3, 5)
    assert torch.equal(total[:2, :, :4], a)
    assert torch.equal(total[2:, :, 4:], b)
    assert not total[:2, :, 4:].any()
    assert not total[2:, :, :4].any()


def test_check_ranks():
    assert check_ranks("f", None, [4, 5]) == [4, 5]
    assert check_ranks("f", 7, [4, 9]) == [4, 7]
    assert check_ranks("f", (2, 3), [4, 5]) == [2, 3]
    with pytest.raises(ValueError, match=r"f: rank needs one entry per mode, expected 2, got 3 \(rank=\(1, 2, 3\)\)"):
        check_ranks("f", (1, 2, 3), [4, 5], "mode")
    with pytest.raises(ValueError, match=r"f: rank of bond 1 must be in 1\.\.5 .* got 6; an int rank is a cap"):
        check_ranks("f", (1, 6), [4, 5])


def test_relative_error_of_zero_is_absolute():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    assert relative_error(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_randomized_basis_is_near_the_best(dtype, rng):
    spectrum = [1 / (k + 1) for k in range(60)]
    a = reference.with_spectrum(80, 60, spectrum, dtype, rng)
    best = sqrt(sum(s**2 for s in spectrum[10:]))
    q = randomized_basis(a, 10, generator=rng)
    assert q.shape == (80, 26)
    assert float((q.mH @ q - torch.eye(26, dtype=dtype)).abs().max()) < 10 * torch.finfo(dtype).eps
    u, _, _ = torch.linalg.svd(q.mH @ a, full_matrices=False)
    u = (q @ u)[:, :10]
    assert float(torch.linalg.norm(a - u @ (u.mH @ a))) < 1.003 * best
    again = [randomized_basis(a, 10, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_randomized_basis_of_degenerate_matrices(rng):
    assert torch.equal(randomized_basis(torch.zeros(3, 50), 2), torch.eye(3))
    for a in (torch.zeros(50, 40), torch.ones(50, 40), torch.randn(50, 1, generator=rng) * torch.ones(40)):
        q = randomized_basis(a, 3, generator=rng)
        assert float(torch.linalg.norm(a - q @ (q.T @ a))) <= 1e-5 * float(torch.linalg.norm(a))
