"""Alternating least squares on every network of the table: monotone, stationary, exact where it can be."""

import pytest
import reference
import torch
from cases import ALL

from decompositions import (
    CP,
    TT,
    LowRank,
    TruncationWarning,
    TTMatrix,
    Tucker,
    als,
    cp_als,
    fill_random,
    norm,
    scale,
    svd,
    to_dense,
    tt_svd,
)
from decompositions.als import Target, _best_core

EVERY = pytest.mark.parametrize("case", ALL, ids=repr)
F64 = torch.float64


def other(net, seed=3):
    """Another network of the same labels and ranks."""
    return fill_random(net, dtype=net.dtype, generator=torch.Generator().manual_seed(seed))


@EVERY
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_errors_fall_and_are_true(case, dtype, rng):
    start = other(case(dtype))
    x = torch.randn(start.shape, dtype=dtype, generator=rng)
    net, fit = als(x, start, max_sweeps=4, improvement=0, with_fit=True)
    assert type(net) is type(start)
    assert (net.legs, net.rows, net.cols, net.ranks) == (start.legs, start.rows, start.cols, start.ranks)
    assert fit.error == pytest.approx(reference.relative(reference.dense(net), x), abs=1e-12)
    assert fit.error == pytest.approx(fit.errors[-1], abs=1e-10)
    assert all(later <= earlier + 1e-9 for earlier, later in zip(fit.errors, fit.errors[1:], strict=False))
    assert fit.error <= 1 + 1e-9


@EVERY
def test_a_core_is_the_best_for_the_others(case, rng):
    """Against a dense least-squares problem: the columns are what each entry of the core adds to W."""
    net = other(case(F64))
    x = torch.randn(net.shape, dtype=F64, generator=rng)
    for k in {0, len(net.cores) // 2, len(net.cores) - 1}:
        entries = []
        for j in range(net.cores[k].numel()):
            unit = torch.zeros(net.cores[k].numel(), dtype=F64)
            unit[j] = 1
            cores = [unit.reshape(core.shape) if i == k else core for i, core in enumerate(net.cores)]
            entries.append(to_dense(net.replace(cores)).flatten())
        design = torch.stack(entries, 1)
        best = design @ torch.linalg.lstsq(design, x.reshape(-1, 1), driver="gelsd").solution
        core, explained = _best_core(x, net, net.cores, k)
        ours = to_dense(net.replace([core if i == k else c for i, c in enumerate(net.cores)]))
        assert reference.relative(ours.reshape(-1, 1), best) < 1e-6
        assert explained == pytest.approx(float(best.square().sum()), rel=1e-7)


@EVERY
def test_a_network_is_its_own_best_approximation(case):
    truth = case(F64)
    fit = als(to_dense(truth), truth, max_sweeps=2, with_fit=True)[1]
    assert fit.error < 1e-9
    assert fit.converged


@pytest.mark.parametrize(
    "truth",
    [
        LowRank.random(row_modes=(9,), col_modes=(8,), rank=3, dtype=F64),
        TT.random(row_modes=(5, 6, 7), rank=3, dtype=F64),
        TTMatrix.random(row_modes=(3, 4), col_modes=(4, 3), rank=2, dtype=F64),
        Tucker.random(row_modes=(5, 6, 7), rank=2, dtype=F64),
    ],
    ids=lambda net: type(net).__name__,
)
def test_recovery_from_another_start(truth):
    net, fit = als(to_dense(truth), other(truth), tol=1e-6, max_sweeps=500, with_fit=True)
    assert fit.error <= 1e-6
    assert fit.converged
    assert norm(net) == pytest.approx(float(norm(truth)), rel=1e-5)


def test_it_improves_tt_svd_and_agrees_with_the_others(rng):
    x = torch.randn(6, 5, 6, 5, dtype=F64, generator=rng)
    first, error = tt_svd(x, rank=3, with_error=True)
    assert als(x, first, with_fit=True)[1].error < error
    matrix = torch.randn(9, 7, dtype=F64, generator=rng)
    start = LowRank.random(row_modes=(9,), col_modes=(7,), rank=2, dtype=F64, generator=rng)
    ours = als(matrix, start, max_sweeps=3000, improvement=1e-14, with_fit=True)[1].error
    assert ours == pytest.approx(svd(matrix, rank=2, with_error=True)[1], rel=1e-5)
    begin = cp_als(x, 3, max_sweeps=1, improvement=0, generator=rng)
    both = als(x, begin, max_sweeps=20, improvement=0, with_fit=True)[1].error
    assert both <= float((to_dense(begin) - x).norm() / x.norm())


@pytest.mark.parametrize("factor", [1e-150, 1e-8, 1e150])
def test_scales_of_tensor_and_start_do_not_matter(factor, rng):
    x = torch.randn(4, 5, 6, dtype=F64, generator=rng)
    start = TT.random(row_modes=(4, 5, 6), rank=2, dtype=F64, generator=rng)
    plain = als(x, start, max_sweeps=5, improvement=0, with_fit=True)[1].errors
    scaled = als(x * factor, scale(start, 1e100), max_sweeps=5, improvement=0)
    assert als(x * factor, start, max_sweeps=5, improvement=0, with_fit=True)[1].errors == pytest.approx(
        plain, abs=1e-7
    )
    assert float((to_dense(scaled) / factor - x).norm() / x.norm()) == pytest.approx(plain[-1], abs=1e-7)


def test_degenerate_input(rng):
    start = CP.random(row_modes=(3, 4, 5), rank=2, dtype=F64, generator=rng)
    assert not to_dense(als(torch.zeros(3, 4, 5, dtype=F64), start)).any()
    flat = start.replace([torch.zeros_like(start.cores[0]), *start.cores[1:]])  # a dead core: its update brings it back
    x = to_dense(CP.random(row_modes=(3, 4, 5), rank=1, dtype=F64, generator=rng))
    assert reference.relative(to_dense(als(x, flat, max_sweeps=300)), x) < 1e-5
    dead = start.replace([torch.zeros_like(core) for core in start.cores])
    assert reference.relative(to_dense(als(x, dead)), x) == pytest.approx(1.0)
    half = als(x.to(torch.bfloat16), start.to(torch.bfloat16), max_sweeps=50)
    assert half.dtype == torch.bfloat16


def test_what_is_said(rng, unchecked):
    x = torch.randn(3, 4, 5, dtype=F64, generator=rng)
    start = CP.random(row_modes=(3, 4, 5), rank=1, dtype=F64, generator=rng)
    seen = []
    als(x, start, max_sweeps=3, improvement=0, progress=lambda done, error: seen.append((done, error)))
    assert [done for done, _ in seen] == [1, 2, 3]
    with pytest.warns(TruncationWarning, match="als: the tolerance was not reached"):
        als(x, start, tol=1e-3)
    with pytest.raises(ValueError, match=r"als: x must have the shape of the network, expected \(3, 4, 5\)"):
        als(x.flatten(), start)
    with pytest.raises(TypeError, match="als: a complex x needs a complex start"):
        als(x.to(torch.complex128), start)
    with pytest.raises(TypeError, match="als: start must be a Network, got Tensor"):
        als(x, x)
    with pytest.raises(ValueError, match="als: entries must be finite"):
        als(x * torch.nan, start)
    with pytest.raises(ValueError, match="als: max_sweeps must be at least 1, got 0"):
        als(x, start, max_sweeps=0)


def test_the_unit_target():
    target = Target("als", torch.tensor([3e200, 4e200], dtype=F64))
    assert target.unit.tolist() == pytest.approx([0.6, 0.8])
    assert target.norm == pytest.approx(5e200)
