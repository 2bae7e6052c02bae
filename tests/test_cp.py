"""CP by alternating least squares: recovery, starts, honesty where it fails, and tensorly as the other opinion."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlayers
from decompositions import CP, TruncationWarning, cp_als, explain, numel, plan_apply, round, svd, to_dense

F64 = torch.float64


def exact_cp(shape, rank, rng, dtype=F64):
    return CP.random(row_modes=tuple(shape), rank=rank, dtype=dtype, generator=rng)


@pytest.mark.parametrize("start", ["hosvd", "random"])
@pytest.mark.parametrize(("shape", "rank"), [((5, 6, 7), 3), ((4, 5, 3, 4), 2), ((6, 5), 4), ((3, 1, 5), 1)])
def test_exact_recovery(shape, rank, start, rng):
    x = to_dense(exact_cp(shape, rank, rng))
    net, fit = cp_als(x, rank, start=start, restarts=4, tol=1e-6, max_sweeps=2000, with_fit=True, generator=rng)
    assert reference.relative(reference.dense(net), x) <= 1e-6
    assert fit.error == pytest.approx(reference.relative(reference.dense(net), x), rel=1e-6)
    assert net.ranks == ((rank,) if len(shape) > 1 else ())
    assert fit.converged
    assert fit.errors[-1] <= min(fit.errors) + 1e-12


def test_the_terms_of_a_unique_decomposition_are_found(rng):
    """Kruskal: generic factors of three modes are unique up to order and scale, so the terms themselves must agree."""
    truth = exact_cp((6, 7, 8), 3, rng)
    net = cp_als(to_dense(truth), 3, improvement=1e-13, max_sweeps=3000, restarts=3, generator=rng)

    def terms(net):
        return [torch.einsum("i,j,k->ijk", *(factor[:, r] for factor in net.factors)) for r in range(3)]

    for term in terms(truth):
        assert min(float((term - other).norm() / term.norm()) for other in terms(net)) < 1e-6


def test_terms_are_balanced_and_errors_fall(rng):
    x = torch.randn(5, 6, 7, dtype=F64, generator=rng)
    net, fit = cp_als(x, 4, with_fit=True, generator=rng)
    norms = torch.stack([factor.norm(dim=0) for factor in net.factors])
    assert torch.allclose(norms, norms[:1].expand_as(norms), rtol=1e-9)
    assert all(later <= earlier + 1e-9 for earlier, later in zip(fit.errors, fit.errors[1:], strict=False))
    assert fit.error == pytest.approx(fit.errors[-1], rel=1e-5)


def test_order_two_is_the_svd_and_order_one_itself(rng):
    x = reference.graded((8, 6), 1.0, F64, rng)
    ours = cp_als(x, 2, improvement=1e-13, max_sweeps=2000, with_fit=True, generator=rng)[1].error
    assert ours == pytest.approx(svd(x, rank=2, with_error=True)[1], rel=1e-5)
    vector = torch.randn(7, dtype=F64, generator=rng)
    assert torch.equal(to_dense(cp_als(vector, 1)), vector)


def test_restarts_keep_the_best(rng):
    x = torch.randn(4, 4, 4, dtype=F64, generator=rng)
    one = cp_als(x, 3, start="random", with_fit=True, generator=torch.Generator().manual_seed(5))[1]
    many = cp_als(x, 3, start="random", restarts=5, with_fit=True, generator=torch.Generator().manual_seed(5))[1]
    assert len(many.starts) == 6
    assert many.starts[0] == pytest.approx(one.starts[0], rel=1e-9)
    assert many.error == pytest.approx(min(many.starts), rel=1e-5)
    assert many.error <= one.error * (1 + 1e-9)


def test_nonnegative_factors(rng):
    truth = CP([torch.rand(n, 3, dtype=F64, generator=rng) for n in (5, 6, 7)])
    net, fit = cp_als(to_dense(truth), 3, nonnegative=True, restarts=3, max_sweeps=1000, with_fit=True, generator=rng)
    assert all(float(factor.min()) >= 0 for factor in net.factors)
    assert fit.error < 0.02
    mixed = torch.randn(4, 5, 6, dtype=F64, generator=rng)
    assert all(float(factor.min()) >= 0 for factor in cp_als(mixed, 2, nonnegative=True, generator=rng).factors)


def test_a_tolerance_that_is_missed_is_said(rng):
    x = torch.randn(6, 6, 6, dtype=F64, generator=rng)
    with pytest.warns(TruncationWarning, match=r"cp_als: the tolerance was not reached, expected .* <= 0\.01, got 0\."):
        cp_als(x, 2, tol=0.01, generator=rng)
    with pytest.warns(TruncationWarning, match="max_sweeps"):
        fit = cp_als(x, 5, tol=0.01, max_sweeps=2, with_fit=True, generator=rng)[1]
    assert not fit.converged
    assert len(fit.errors) == 2


def test_more_terms_than_the_tensor_has(rng):
    """The normal equations are singular in exact arithmetic: a good answer, never NaN."""
    x = to_dense(exact_cp((4, 4, 4), 1, rng))
    for rank in (2, 5, 9):
        assert reference.relative(reference.dense(cp_als(x, rank, restarts=1, generator=rng)), x) < 1e-6
    ones = torch.ones(3, 3, 3, dtype=F64)
    assert reference.relative(reference.dense(cp_als(ones, 3, generator=rng)), ones) < 1e-6
    zero = cp_als(torch.zeros(3, 4, 5), 2)
    assert not to_dense(zero).any()


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    rank=st.integers(1, 3),
    scale=st.sampled_from([1e-200, 1e-20, 1.0, 1e20, 1e200]),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_nothing_at_any_scale(shape, rank, scale, seed):
    """The best multiple of any tensor is no worse than zero, and least squares in each factor does not leave that."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=F64, generator=generator) * scale
    net = cp_als(x, rank, max_sweeps=20, generator=generator)
    error = float((to_dense(net) / scale - x / scale).norm())
    assert error <= float((x / scale).norm()) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, rng):
    x = to_dense(exact_cp((5, 6, 4), 2, rng, torch.float32)).to(dtype)
    net, fit = cp_als(x, 2, restarts=2, with_fit=True, generator=rng)
    assert net.dtype == dtype
    assert fit.error < 40 * torch.finfo(dtype).eps + 1e-4


def test_the_backend_of_tensorly_is_left_as_it_was(rng):
    tensorly = pytest.importorskip("tensorly")
    tensorly.set_backend("numpy")
    cp_als(torch.randn(3, 4, 5, generator=rng), 2, generator=rng)
    assert tensorly.get_backend() == "numpy"


def test_randomized_start_and_same_seed_same_result(rng):
    x = to_dense(exact_cp((8, 9, 10), 3, rng)) + 0.01 * torch.randn(8, 9, 10, dtype=F64, generator=rng)
    errors = {
        method: cp_als(x, 3, method=method, with_fit=True, restarts=2, generator=torch.Generator().manual_seed(1))[1]
        for method in ("exact", "randomized")
    }
    assert errors["randomized"].error == pytest.approx(errors["exact"].error, rel=1e-2)
    again = cp_als(x, 3, method="randomized", with_fit=True, restarts=2, generator=torch.Generator().manual_seed(1))[1]
    assert again == errors["randomized"]


def test_bad_input_is_refused_by_name(unchecked):
    x = torch.randn(3, 4, 5)
    with pytest.raises(TypeError, match=r"cp_als: expected a real tensor, got torch\.complex64"):
        cp_als(x.to(torch.complex64), 2)
    with pytest.raises(TypeError, match=r"rank must be an int, got 2\.0"):
        cp_als(x, 2.0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        cp_als(x, 0)
    with pytest.raises(ValueError, match=r"start must be one of \('hosvd', 'random'\), got 'svd'"):
        cp_als(x, 2, start="svd")
    with pytest.raises(ValueError, match="entries must be finite, got 1 NaN"):
        cp_als(torch.where(x == x[0, 0, 0], math.nan, x), 2)
    with pytest.raises(ValueError, match="improvement must be a finite number"):
        cp_als(x, 2, improvement=math.nan)
    with pytest.raises(ValueError, match="method must be 'exact' or 'randomized'"):
        cp_als(x, 2, method="gram")
    with pytest.raises(ValueError, match=r"CP: num_rows must be in 0\.\.3 .* got 4"):
        cp_als(x, 2, num_rows=4)
    with pytest.raises(ValueError, match="label 'r' must have one size"):
        CP([torch.zeros(3, 2), torch.zeros(4, 3)])


def test_no_gauge_is_said_by_name(rng):
    net = exact_cp((3, 4, 5), 2, rng)
    with pytest.raises(ValueError, match="round: the network must be a tree"):
        round(net, rank=1)
    with pytest.raises(ValueError, match="RankAdaptive: the model must have a layer whose weight is a tree network"):
        tnlayers.RankAdaptive(tnlayers.Linear(8, 8, network=tnlayers.random_network(CP, rank=2)), 0.01)
    assert "not a tree" in explain(net)


def test_counts_and_the_price_of_a_tenth_of_the_parameters():
    """In eight modes of 1024 x 1024 a tenth of the parameters is a rank above the widths: more FLOPs than dense."""
    small, large = (
        CP.skeleton((8, 4, 8, 4), (8, 4, 8, 4), rank=r).to("meta", torch.float32) for r in (64, 1024 * 1024 // 480)
    )
    assert numel(small) == 64 * 48
    dense = 2 * 128 * 1024 * 1024
    assert plan_apply(small, 128)[0].flops < 0.25 * dense
    assert plan_apply(large, 128)[0].flops > dense


def test_a_layer_trains(rng):
    torch.manual_seed(0)
    truth = to_dense(CP.random(row_modes=(4, 4), col_modes=(4, 4), rank=2)).reshape(16, 16)
    layer = tnlayers.Linear(16, 16, bias=False, network=tnlayers.random_network(CP, rank=6, order=2))
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    losses = []
    for _ in range(300):
        x = torch.randn(64, 16, generator=rng)
        loss = nn.functional.mse_loss(layer(x), x @ truth.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]
