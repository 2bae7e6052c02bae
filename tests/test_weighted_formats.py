"""Networks in the norm of activations: least squares, monotone sweeps, optima where they are known, guarantees."""

import itertools
from functools import partial

import pytest
import torch
from cases import ALL
from hypothesis import given, settings
from hypothesis import strategies as st

from decompositions import (
    TT,
    ActivationFactor,
    KroneckerSum,
    LowRank,
    TruncationWarning,
    TTMatrix,
    fill_random,
    kronecker_svd,
    norm,
    svd,
    to_dense,
    to_matrix,
    ttm_svd,
    tucker2,
    weighted_low_rank,
)
from decompositions.weighted import CalibrationWarning
from decompositions.weighted_als import _corrected, metric_of, weighted_als
from decompositions.weighted_formats import weighted_kronecker, weighted_ttm, weighted_tucker2

F64 = torch.float64
WITH_COLUMNS = [case for case in ALL if case(F64).cols]
EVERY = pytest.mark.parametrize("case", WITH_COLUMNS, ids=repr)
TTM = partial(weighted_ttm, row_modes=(3, 4), col_modes=(4, 3))
KRONECKER = partial(weighted_kronecker, row_modes=(3, 4), col_modes=(4, 3))
PLAIN = {
    "ttm": (TTM, partial(ttm_svd, row_modes=(3, 4), col_modes=(4, 3)), (12, 12)),
    "kronecker": (KRONECKER, partial(kronecker_svd, row_modes=(3, 4), col_modes=(4, 3)), (12, 12)),
    "tucker2": (weighted_tucker2, tucker2, (6, 4, 3)),
    "tucker2-matrix": (weighted_tucker2, tucker2, (7, 12)),
}
RECIPES = pytest.mark.parametrize("name", PLAIN)


def on_data(w, net, x):
    """`‖(W - W') X‖`, from the dense matrices."""
    m, n = len(w), w[0].numel()
    return float(
        ((w.reshape(m, n) - to_dense(net).reshape(-1, to_matrix(net).shape[1])[:m, :n]).to(x.dtype) @ x.mH).norm()
    )


def activations(g, tokens, n, steep=0.0, dtype=F64):
    turned = torch.linalg.qr(torch.randn(n, n, dtype=dtype, generator=g)).Q
    return torch.randn(tokens, n, dtype=dtype, generator=g) * torch.logspace(0, -steep, n, dtype=F64) @ turned


@EVERY
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_a_core_is_the_best_for_the_others(case, dtype, rng):
    """Against dense weighted least squares, where a column is what an entry of the core adds to W' X."""
    net = case(dtype)
    m, n = to_matrix(net).shape
    w = torch.randn(m, n, dtype=dtype, generator=rng)
    x = activations(rng, n + 9, n, 1.0, dtype)
    metric = metric_of("doc", w, x, 0.0, net.row_modes, net.col_modes)
    for k in {0, len(net.cores) // 2, len(net.cores) - 1}:
        entries = []
        for j in range(net.cores[k].numel()):
            unit = torch.zeros(net.cores[k].numel(), dtype=dtype)
            unit[j] = 1
            cores = [unit.reshape(core.shape) if i == k else core for i, core in enumerate(net.cores)]
            entries.append((to_dense(net.replace(cores)).reshape(m, n) @ x.mH).flatten())
        design = torch.stack(entries, 1)
        wanted = (w @ x.mH).flatten()
        basis = torch.linalg.svd(design, full_matrices=False)
        kept = basis.U[:, 1e-9 * basis.S[0] < basis.S]
        best = float((wanted - kept @ (kept.mH @ wanted)).norm())
        found = on_data(w, _corrected(metric, net, k), x)
        assert best - 1e-9 * float(wanted.norm()) <= found <= best + 1e-5 * float(wanted.norm())  # the proximal term


@EVERY
def test_errors_fall_and_are_true(case, rng):
    start = fill_random(case(F64), dtype=F64, generator=torch.Generator().manual_seed(3))
    m, n = to_matrix(start).shape
    w = torch.randn(m, n, dtype=F64, generator=rng)
    x = activations(rng, 3 * n, n, 2.0)
    errors = [on_data(w, start, x) / float((w @ x.mT).norm())]
    for sweeps in range(1, 5):
        net, error = weighted_als(start, w, x, max_sweeps=sweeps, improvement=0, with_error=True)
        assert type(net) is type(start)
        assert (net.legs, net.rows, net.cols, net.shape) == (start.legs, start.rows, start.cols, start.shape)
        assert error == pytest.approx(on_data(w, net, x) / float((w @ x.mT).norm()), rel=1e-8, abs=1e-11)
        errors.append(error)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[1] < errors[0]


def test_sweeps_of_a_matrix_end_at_its_optimum(rng):
    """Two cores and a matrix: alternating least squares is a power method, and the optimum is known."""
    w, x = torch.randn(9, 8, dtype=F64, generator=rng), activations(rng, 40, 8, 2.0)
    for mu in (0.0, 0.1):
        net = weighted_als(svd(w, rank=3), w, x, mu=mu, max_sweeps=3000, improvement=0)
        best = weighted_low_rank(w, x, rank=3, mu=mu)
        for part, size in ((x, float((w @ x.mT).norm())),):
            assert float(((to_matrix(net) - to_matrix(best)) @ part.mT).norm()) < 1e-5 * size
        objective = [on_data(w, one, x) ** 2 + mu * float((w - to_matrix(one)).norm()) ** 2 for one in (net, best)]
        assert objective[0] == pytest.approx(objective[1], rel=1e-9)


@RECIPES
@given(
    rank=st.integers(1, 6),
    tokens=st.integers(1, 40),
    steep=st.floats(0, 8),
    mu=st.sampled_from([0.0, 1e-6, 0.1, "adaptive"]),
    single=st.booleans(),
    graded=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25)
def test_never_worse_than_the_plain_recipe(name, rank, tokens, steep, mu, single, graded, seed):
    weighted, plain, shape = PLAIN[name]
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, dtype=F64, generator=g)
    if graded:
        w = w * torch.logspace(0, -4, shape[-1], dtype=F64)
    n = w[0].numel()
    x = activations(g, tokens, n, steep)
    dtype = torch.float32 if single else F64
    net, error = weighted(w.to(dtype), x.to(dtype), rank=rank, mu=mu, max_sweeps=4, with_error=True)
    other = plain(w.to(dtype), rank=rank)
    assert net.dtype == dtype
    assert all(a <= b for a, b in zip(net.ranks, other.ranks, strict=True))
    near, size = (1e-5 if single else 1e-9), float((w.flatten(1) @ x.mT).norm())
    if mu != "adaptive":
        objective = [
            (on_data(w, one.to(F64), x) ** 2 + mu * norm_of_difference(w, one) ** 2) ** 0.5 for one in (net, other)
        ]
        assert objective[0] <= objective[1] + near * (size + mu**0.5 * float(w.norm()))
    if mu == 0:
        assert error == pytest.approx(on_data(w, net.to(F64), x) / size, rel=1e-3, abs=near)


def norm_of_difference(w, net):
    return float((w.flatten(1) - to_dense(net.to(F64)).reshape(len(w), -1)).norm())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_kronecker_activations_have_a_known_optimum(rank, rng):
    """`X^H X = C_1 ⊗ C_2`: the best sum of products is an SVD of the rearranged `W (K_1 ⊗ K_2)^H`."""
    w = torch.randn(12, 12, dtype=F64, generator=rng)
    roots = [activations(rng, n, n, 2.0) for n in (4, 3)]
    x = torch.kron(*roots)
    net, error = KRONECKER(w, x, rank=rank, with_error=True)
    arranged = (w @ x.mT).reshape(3, 4, 4, 3).permute(0, 2, 1, 3).reshape(12, 12)
    values = torch.linalg.svdvals(arranged)
    assert error == pytest.approx(float(values[rank:].norm() / values.norm()), rel=1e-6)
    assert isinstance(net, KroneckerSum)
    # a TT-matrix of two cores is the same network
    assert TTM(w, x, rank=rank, with_error=True)[1] == pytest.approx(error, rel=1e-6)


def test_channels_and_positions_apart(rng):
    """With one input rank free and Kronecker activations, Tucker-2 has the optimum of Eckart and Young."""
    kernel = torch.randn(8, 5, 3, dtype=F64, generator=rng)
    x = torch.kron(activations(rng, 5, 5, 2.0), activations(rng, 3, 3, 1.0))
    for rank in ((3, 5), (2, 5)):
        error = weighted_tucker2(kernel, x, rank=rank, with_error=True)[1]
        best = weighted_low_rank(kernel, x, rank=rank[0], with_error=True)[1]
        assert error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["ttm", "tucker2"])
def test_near_the_best_of_many_starts(name, rng):
    weighted, plain, shape = PLAIN[name]
    w = torch.randn(shape, dtype=F64, generator=rng)
    n = w[0].numel()
    x = activations(rng, 40, n, 1.5)
    found = weighted(w, x, rank=2, max_sweeps=200, with_error=True)[1]
    start = plain(w, rank=2)
    best = min(
        weighted_als(
            fill_random(start, dtype=F64, generator=rng), w, x, max_sweeps=60, improvement=1e-5, with_error=True
        )[1]
        for _ in range(25)
    )
    assert found <= 1.05 * best
    assert found < 0.9 * on_data(w, start, x) / float((w.flatten(1) @ x.mT).norm())


@RECIPES
@pytest.mark.parametrize("tol", [0.4, 0.1, 1e-3])
def test_a_tolerance_is_kept(name, tol, rng):
    weighted, plain, shape = PLAIN[name]
    w = torch.randn(shape, dtype=F64, generator=rng)
    x = activations(rng, 60, w[0].numel(), 2.0)
    net, error = weighted(w, x, tol=tol, with_error=True)
    size = float((w.flatten(1) @ x.mT).norm())
    assert error == pytest.approx(on_data(w, net, x) / size, abs=1e-9)
    assert error <= tol
    sizes = [sum(core.numel() for core in one.cores) for one in (net, plain(w, tol=tol))]
    assert sizes[0] <= sizes[1]
    with pytest.warns(TruncationWarning, match="the tolerance was not reached.*the rank binds"):
        capped = weighted(w, x, tol=1e-9, rank=1)
    assert set(capped.ranks) == {1}


def test_what_no_activation_determines_stays(rng):
    w = torch.randn(12, 12, dtype=F64, generator=rng)
    x = torch.zeros(30, 12, dtype=F64)
    x[:, :6] = torch.randn(30, 6, dtype=F64, generator=rng)  # half of the inputs never speak
    start = ttm_svd(w, (3, 4), (2, 6), rank=3)
    net = weighted_als(start, w, x, max_sweeps=5)
    assert on_data(w, net, x) < on_data(w, start, x)
    silent = to_matrix(net)[:, 6:] - to_matrix(start)[:, 6:]
    assert float(silent.norm()) < 3 * float(w.norm())  # the inverse of a zero is nowhere
    one = weighted_als(start, w, x[:, :], mu=1e3, max_sweeps=50)
    assert float((to_matrix(one) - w).norm()) <= 1.01 * float((to_matrix(start) - w).norm())


def test_graded_activations_in_single_precision(rng):
    """Spectrum 1 to 1e-10 in float32, where the optimum is known: a product over column modes.

    Not the 1e-7 of a low rank: here entries may cancel on the data, and sweeps fit the rounding of X a little.
    """
    w = torch.randn(12, 20, dtype=F64, generator=rng)
    roots = [activations(rng, n, n, 5.0) for n in (4, 5)]
    x = torch.kron(*roots)
    for rank in (2, 4):
        net = weighted_kronecker(w.float(), x.float(), row_modes=(3, 4), col_modes=(4, 5), rank=rank)
        arranged = (w @ x.mT).reshape(3, 4, 4, 5).permute(0, 2, 1, 3).reshape(12, 20)
        best = float(torch.linalg.svdvals(arranged)[rank:].norm())
        assert on_data(w, net.to(F64), x) - best < 2e-5 * float((w @ x.mT).norm())
        assert float(to_dense(net).norm()) < 1e6 * float(w.norm())


def test_a_convolution_on_its_patches(rng):
    """Features of a factor are those of unfold: the weighted error is the error of the convolution's output."""
    kernel = torch.randn(6, 4, 3, 2, dtype=F64, generator=rng)
    images = torch.randn(5, 4, 8, 7, dtype=F64, generator=rng).cumsum(2).cumsum(3)
    held = ActivationFactor(24, dtype=F64)
    held.update(torch.nn.functional.unfold(images, (3, 2)).mT)
    net, error = weighted_tucker2(kernel, held, rank=(3, 2), with_error=True)
    convolve = partial(torch.nn.functional.conv2d, images)
    exact = convolve(kernel)
    assert error == pytest.approx(float((exact - convolve(to_dense(net))).norm() / exact.norm()), rel=1e-6)
    plain = to_dense(tucker2(kernel, rank=(3, 2)))
    assert error < 0.9 * float((exact - convolve(plain)).norm() / exact.norm())
    assert torch.allclose(net.factors[0].mT @ net.factors[0], torch.eye(3, dtype=F64), atol=1e-9)
    train = weighted_ttm(kernel, held, row_modes=(2, 3), col_modes=(4, 6), rank=4)
    assert (train.row_modes, train.col_modes) == ((2, 3), (4, 6))


def test_padding_kernels_and_other_formats(rng):
    w, x = torch.randn(7, 11, dtype=F64, generator=rng), activations(rng, 50, 11, 1.0)
    net, error = weighted_ttm(w, x, rank=3, order=2, with_error=True)
    assert net.row_modes[0] * net.row_modes[1] >= 7
    assert on_data(w, net, x) <= error * float((w @ x.mT).norm()) + 1e-9
    three = fill_random(TTMatrix.skeleton((2, 2, 2), (2, 2, 3), 2), dtype=F64, generator=rng)
    errors = [weighted_als(three, w, x, max_sweeps=k, improvement=0, with_error=True)[1] for k in (1, 30)]
    assert errors[1] < errors[0] < 1
    chain = TT.random(row_modes=(7,), col_modes=(11,), rank=4, dtype=F64, generator=rng)
    found = weighted_als(chain, w, x, max_sweeps=3000, improvement=0, with_error=True)[1]
    assert found == pytest.approx(weighted_low_rank(w, x, rank=4, with_error=True)[1], rel=1e-6)


@RECIPES
def test_empty_calibration_falls_back(name, rng):
    weighted, plain, shape = PLAIN[name]
    w = torch.randn(shape, dtype=F64, generator=rng)
    n = w[0].numel()
    with pytest.warns(CalibrationWarning, match="no activations, or all of them zero: the plain error was taken"):
        net = weighted(w, ActivationFactor(n, dtype=F64), rank=2)
    assert norm_of_difference(w, net) <= norm_of_difference(w, plain(w, rank=2)) * (1 + 1e-9)
    one = torch.randn(1, n, dtype=F64, generator=rng)
    assert on_data(w, weighted(w, one, rank=2), one) <= on_data(w, plain(w, rank=2), one)
    zero = weighted(torch.zeros_like(w), one, rank=1)
    assert float(norm(zero)) == 0


def test_refusals(unchecked):
    w, x = torch.randn(12, 12), torch.randn(20, 12)
    start = ttm_svd(w, (3, 4), (4, 3), rank=2)
    with pytest.raises(TypeError, match="weighted_als: start must be a Network, got Tensor"):
        weighted_als(w, w, x)
    with pytest.raises(ValueError, match="weighted_als: the network must have columns"):
        weighted_als(TT.random(row_modes=(3, 4), rank=1), w, x)
    with pytest.raises(ValueError, match="mu must be a number >= 0, got 'adaptive'"):
        weighted_als(start, w, x, mu="adaptive")
    with pytest.raises(ValueError, match="max_sweeps must be at least 1, got 0"):
        weighted_als(start, w, x, max_sweeps=0)
    with pytest.raises(ValueError, match="the modes must cover the matrix, expected products >= 13 x 12"):
        weighted_als(start, torch.randn(13, 12), x)
    for name, (weighted, _, _) in PLAIN.items():
        called = weighted.func.__name__ if isinstance(weighted, partial) else "weighted_tucker2"
        with pytest.raises(ValueError, match=f"{called}: give a rank or a tol, got neither"):
            weighted(w, x)
        with pytest.raises(ValueError, match=f"{called}: mu must be a number >= 0 or 'adaptive', got -1"):
            weighted(w, x, rank=1, mu=-1)
        with pytest.raises(ValueError, match=rf"{called}: .*expected \(k, 12\), got \(20, 7\)"):
            weighted(w, x[:, :7], rank=1)
        with pytest.raises(ValueError, match=f"{called}: entries must be finite"):
            weighted(w * torch.nan, x, rank=1)
        assert name
    assert isinstance(weighted_als(svd(w, rank=1), w, x), LowRank)
