"""TT-cross: exact at the true rank, honest where it is not, and within its limits to the entry."""

import math
import time

import pytest
import torch

from cross_approx import as_source, tt_cross
from cross_approx.reading.held_out import train_entries
from cross_approx.reading.reader import Reader
from decompositions import TT, to_dense, tt_svd

F64 = torch.float64


class Counting:
    """A callable that counts what it is asked for."""

    def __init__(self, function):
        self.function, self.count, self.calls = function, 0, 0
        self.seen = set()

    def __call__(self, index):
        assert index.dtype == torch.int64
        assert index.ndim == 2
        self.count += len(index)
        self.calls += 1
        self.seen |= {tuple(row) for row in index.tolist()}
        return self.function(index)


def gather(x):
    return lambda index: x[tuple(index.unbind(1))]


def distance(net, x):
    return float((to_dense(net) - x).norm() / x.norm())


SHAPES = [
    ((7,), 1),
    ((6, 9), 3),
    ((5, 1, 6), 2),
    ((1, 1, 1), 1),
    ((4, 5, 6, 3), 4),
    ((3, 4, 3, 4, 3), 6),
    ((2,) * 10, 5),
]


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_exact_at_the_true_rank(shape, rank, dtype, rng):
    net = TT.random(row_modes=shape, rank=rank, generator=rng, dtype=dtype)
    x = to_dense(net)
    for cap in (rank, None):
        result = tt_cross(x, rank=cap, tol=1e-11, generator=rng)
        assert result.converged, result.reason
        assert distance(result.network, x) <= 1e-10
        assert result.network.ranks == net.ranks
        assert result.network.cores[0].dtype == dtype


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_exact_on_a_large_tensor(scale, rng):
    """No dense tensor: 8^12 entries, compared through inner products of networks."""
    net = TT.random(row_modes=(8,) * 12, rank=5, generator=rng, dtype=F64)
    cores = [net.cores[0][None], *net.cores[1:-1], net.cores[-1][..., None]]
    counting = Counting(lambda index: train_entries(cores, index) * scale)
    result = tt_cross(counting, shape=net.shape, tol=1e-11, generator=rng)
    assert result.converged
    assert result.network.ranks == net.ranks
    index = torch.randint(8, (2000, 12), generator=rng)
    found = [result.network.cores[0][None], *result.network.cores[1:-1], result.network.cores[-1][..., None]]
    exact = train_entries(cores, index) * scale
    assert float((train_entries(found, index) - exact).norm() / exact.norm()) <= 1e-10


@pytest.mark.parametrize("d", [1, 2, 3, 6])
def test_constants_rank_one_and_zero(d, rng):
    shape = (6,) * d
    for function, value in ((lambda i: torch.full((len(i),), 3.0, dtype=F64), 3.0), (lambda i: 0.0 * i[:, 0], 0.0)):
        counting = Counting(function)
        result = tt_cross(counting, shape=shape, tol=1e-12, generator=rng)
        assert result.converged
        assert set(result.network.ranks) <= {1}
        assert torch.equal(to_dense(result.network), torch.full(shape, value)) or d > 1
        assert float((to_dense(result.network) - value).abs().max()) <= 1e-12
        assert counting.count == result.evaluations
    vectors = torch.randn(d, 6, dtype=F64, generator=rng)
    result = tt_cross(lambda i: vectors[torch.arange(d), i].prod(1), shape=shape, tol=1e-12, generator=rng)
    assert set(result.network.ranks) <= {1}
    assert result.converged


def test_known_ranks(rng):
    """A sum of one-variable functions and a sine of a sum have rank 2, 1 / (1 + sum) a small one."""
    shape = (15,) * 8
    for function in (lambda i: i.double().square().sum(1), lambda i: torch.sin(0.1 * i.double().sum(1))):
        result = tt_cross(function, shape=shape, tol=1e-9, generator=rng)
        assert result.converged
        assert set(result.network.ranks) == {2}
        assert result.error <= 1e-9


def test_interpolates_on_the_cross(rng):
    """Leading pivots of the last bond x the last mode (or the mirror image) are reproduced, also at a loose tol."""
    x = 1 / (1 + torch.cartesian_prod(*[torch.arange(9.0, dtype=F64)] * 4).square().sum(1)).reshape(9, 9, 9, 9)
    seen = set()
    for sweeps in (1, 2, 3, 4, 5):
        result = tt_cross(x, tol=1e-3, generator=rng, max_sweeps=sweeps, held_out=10)
        dense = to_dense(result.network)
        widths = [pivots.shape[1] for pivots in result.pivots]
        forward = widths == [1, 2, 3]
        assert forward or widths == [3, 2, 1]
        seen.add(forward)
        rows = result.pivots[-1] if forward else result.pivots[0]
        assert tuple(len(pivots) for pivots in result.pivots) == result.network.ranks
        for row in rows.tolist():
            mine, true = (dense[tuple(row)], x[tuple(row)]) if forward else (dense[(..., *row)], x[(..., *row)])
            torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-12)
    assert seen == {True, False}


def test_the_counts_are_those_made_and_no_entry_is_asked_for_twice(rng):
    counting = Counting(lambda i: 1 / (1 + i.double().square().sum(1)).sqrt())
    result = tt_cross(counting, shape=(16,) * 6, tol=1e-5, generator=rng)
    assert result.converged
    assert counting.count == result.evaluations == len(counting.seen)
    assert result.bytes_read == 8 * result.evaluations
    assert result.history[-1].evaluations <= result.evaluations
    assert result.held_out == 1000


@pytest.mark.parametrize("limit", [1, 50, 250, 500, 3000, 10_000])
def test_max_evals_is_never_exceeded(limit, rng):
    counting = Counting(lambda i: 1 / (1 + i.double().square().sum(1)).sqrt())
    result = tt_cross(counting, shape=(16,) * 6, tol=1e-12, max_evals=limit, generator=rng)
    assert counting.count == result.evaluations <= limit
    assert not result.converged
    assert f"max_evals = {limit}" in result.reason
    assert result.network.shape == (16,) * 6
    if limit >= 3000:
        assert result.error < 0.5
        assert result.held_out >= min(1000, limit // 4) - 3  # a fresh sample, not the one that guided the search
        least = min(line.error for line in result.history)
        assert least / 2 < result.error < 2 * least


def test_time_bytes_and_sweeps_end_it(rng):
    def function(i):
        return 1 / (1 + i.double().square().sum(1)).sqrt()

    arguments = {"shape": (16,) * 6, "tol": 1e-13, "generator": rng}
    result = tt_cross(function, max_bytes=40_000, **arguments)
    assert result.reason == "max_bytes = 40000"
    assert not result.converged
    result = tt_cross(lambda i: (time.sleep(0.05), function(i))[1], max_seconds=0.12, **arguments)
    assert result.reason.startswith("max_seconds = 0.12")
    seen = []
    result = tt_cross(function, max_sweeps=3, progress=lambda *line: seen.append(line), **arguments)
    assert result.reason == "max_sweeps = 3"
    assert [line[:2] for line in seen] == [(1, 3), (2, 3), (3, 3)]
    assert len(result.history) == 3
    result = tt_cross(function, rank=3, **arguments)
    assert result.reason == "the rank cap binds"
    assert set(result.network.ranks) == {3}
    assert 1e-4 < result.error < 1e-1


def test_float32_stops_at_its_floor(rng):
    counting = Counting(lambda i: 1 / (1 + i.float().square().sum(1)).sqrt())
    result = tt_cross(counting, shape=(16,) * 6, tol=1e-9, generator=rng)
    assert not result.converged
    assert result.reason.startswith("the noise floor of torch.float32")
    assert result.error < 1e-5
    assert result.network.cores[0].dtype == torch.float32
    assert counting.count < 500_000
    easy = tt_cross(counting, shape=(16,) * 6, tol=1e-4, generator=rng)
    assert easy.converged


def true_error(result, function, shape):
    index = torch.cartesian_prod(*(torch.arange(n) for n in shape))
    x = function(index).reshape(shape).double()
    return float((to_dense(result.network).double() - x).norm() / x.norm())


HARD = {
    "oscillating": lambda i: torch.cos(0.05 * i.double().square().sum(1)),
    "jump": lambda i: (i.double().sum(1) > 30).double(),
    "ball": lambda i: ((i.double() - 8).square().sum(1) < 40).double() + 0.1,
    "kink": lambda i: (i.double() - 7.5).sum(1).abs().sqrt(),
    "product of parities": lambda i: 1.0 - 2.0 * ((i.prod(1) % 3) == 0).double(),
    "two scales": lambda i: torch.exp(-i.double().sum(1)) + 1e-3 * torch.cos(i.double().square().sum(1)),
    "noise": lambda i: torch.sin(1e5 * (i.double() * torch.tensor([1.0, 17.0, 289.0, 4913.0])).sum(1).square()),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("seed", range(3))
def test_converged_is_not_said_of_what_a_sample_of_this_size_sees(name, seed):
    """One uniform entry off by tol sqrt(k) rms breaks the tolerance, so few entries of the tensor may be that wrong."""
    shape, function = (16,) * 4, HARD[name]
    generator = torch.Generator().manual_seed(seed)
    x = function(torch.cartesian_prod(*(torch.arange(n) for n in shape))).double()
    for tol, cap in ((1e-2, 4), (1e-6, 12), (1e-2, None), (1e-6, None)):
        result = tt_cross(function, shape=shape, tol=tol, rank=cap, generator=generator, max_evals=150_000)
        if result.converged:
            k = result.held_out / 2
            errors = (to_dense(result.network).flatten() - x).abs()
            wrong = float((errors > 1.1 * tol * math.sqrt(k) * float(x.square().mean().sqrt())).double().mean())
            assert wrong <= 9 / k  # missed with probability e^-9
        else:
            assert result.error > tol


def test_smooth_functions_are_right_wherever_one_looks(rng):
    for name in ("oscillating", "two scales"):
        result = tt_cross(HARD[name], shape=(16,) * 4, tol=1e-6, generator=rng)
        assert result.converged
        assert true_error(result, HARD[name], (16,) * 4) <= 3e-6


def test_a_capped_rank_is_near_the_best_of_that_rank(rng):
    x = 1 / (1 + torch.cartesian_prod(*[torch.arange(16)] * 4).double().square().sum(1)).sqrt().reshape((16,) * 4)
    for rank in (1, 2, 3, 5, (2, 5, 3)):
        result = tt_cross(x, rank=rank, tol=1e-12, generator=rng)
        _, best = tt_svd(x, rank=rank, with_error=True)
        assert result.reason == "the rank cap binds"
        assert max(result.network.ranks) <= (rank if isinstance(rank, int) else 5)
        assert distance(result.network, x) <= 1.5 * best


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_one_peak(dtype, rng):
    """Given a start point on it the peak is found and exact; found or not, a peak that a sample sees is not denied."""
    shape, peak = (12,) * 4, torch.tensor([[3, 1, 4, 7]])

    def function(i):
        return (i == peak).all(1).to(dtype)

    result = tt_cross(function, shape=shape, start=peak, generator=rng)
    assert result.converged
    assert true_error(result, function, shape) <= 1e-6
    assert set(result.network.ranks) == {1}
    small = tt_cross(function, shape=shape, held_out=20_736, generator=rng)  # half of the entries are looked at
    if float(small.network.cores[0].abs().max()) == 0:
        assert small.held_out >= 10_000
    wide = tt_cross(lambda i: (i // 3 == peak // 3).all(1).to(dtype), shape=shape, generator=rng)  # 81 of 20736
    assert wide.converged
    assert true_error(wide, lambda i: (i // 3 == peak // 3).all(1).to(dtype), shape) <= 1e-6


def test_a_small_tensor_that_was_read_whole_is_compared_whole(rng):
    x = torch.randn(3, 4, dtype=F64, generator=rng)
    counting = Counting(gather(x))
    result = tt_cross(counting, shape=(3, 4), tol=1e-12, generator=rng)
    assert result.converged
    assert counting.count == 12
    assert distance(result.network, x) <= 1e-12


def test_seeds_reproduce(rng):
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return tt_cross(lambda i: 1 / (1.0 + i.double().sum(1)), shape=(9,) * 5, generator=generator)

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first.network.cores, again.network.cores, strict=True))
    assert first.evaluations == again.evaluations
    assert first.evaluations != other.evaluations or first.error != other.error


def test_many_modes_where_no_integer_numbers_the_entries(rng):
    """2^100 entries: keys are hashes."""
    counting = Counting(lambda i: torch.exp2(-(i.double() * torch.linspace(0.1, 1, 100, dtype=F64)).sum(1)))
    result = tt_cross(counting, shape=(2,) * 100, tol=1e-10, generator=rng)
    assert result.converged
    assert set(result.network.ranks) == {1}
    assert counting.count == len(counting.seen)


def test_values_that_are_not_finite_are_refused_with_their_index(rng):
    def function(i):
        values = i.double().sum(1)
        values[(i == 2).all(1)] = float("nan")
        return values

    start = torch.tensor([[2, 2, 2]])
    with pytest.raises(ValueError, match=r"must be finite, got nan at index \(2, 2, 2\)"):
        tt_cross(function, shape=(4, 4, 4), start=start, generator=rng)


def test_refusals(unchecked):
    def function(i):
        return i.double().sum(1)

    with pytest.raises(ValueError, match=r"needs its mode sizes.*got None"):
        tt_cross(function)
    with pytest.raises(TypeError, match=r"a tensor, an array, a function .* got int"):
        tt_cross(3)
    with pytest.raises(ValueError, match=r"shape must be that of the source, expected \(2, 3\), got \(3, 2\)"):
        tt_cross(torch.zeros(2, 3), shape=(3, 2))
    with pytest.raises(ValueError, match=r"mode sizes >= 1.*got shape \(2, 0\)"):
        tt_cross(function, shape=(2, 0))
    with pytest.raises(ValueError, match="max_evals must be positive, got 0"):
        tt_cross(function, shape=(2, 3), max_evals=0)
    with pytest.raises(ValueError, match="tol must be a finite"):
        tt_cross(function, shape=(2, 3), tol=-1)
    with pytest.raises(ValueError, match=r"expected \(p, 2\) integers below \(2, 3\)"):
        tt_cross(function, shape=(2, 3), start=torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"start must be a number of points"):
        tt_cross(function, shape=(2, 3), start=0)
    with pytest.raises(ValueError, match=r"one value an index, expected shape \(B = 1,\), got \(1, 2\)"):
        tt_cross(lambda i: i.double(), shape=(8, 8))
    with pytest.raises(ValueError, match=r"rank of bond 0 must be in 1\.\.2"):
        tt_cross(function, shape=(2, 3), rank=(5,))


def test_the_probe_of_a_function_counts_once(rng):
    """Its dtype is seen at the entry (0, 0, 0), which is not asked for again."""
    asked = []

    def function(index):
        asked.extend(map(tuple, index.tolist()))
        return 1 / (1.0 + index.sum(1).double())

    result = tt_cross(function, shape=(3, 4, 3), tol=1e-13, generator=rng)
    assert result.evaluations == len(asked) == len(set(asked))
    assert result.bytes_read == 8 * len(asked)
    assert (0, 0, 0) in asked


def test_a_probe_that_is_not_finite_is_refused_only_where_it_is_read(rng):
    def function(index):
        return torch.where((index == 0).all(1), torch.inf, index.sum(1).double())

    reader = Reader("doc", as_source(function, shape=(4, 4)))
    assert reader.read(torch.tensor([[1, 2]])).tolist() == [3.0]
    with pytest.raises(ValueError, match=r"must be finite, got inf at index \(0, 0\)"):
        reader.read(torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match=r"must be finite, got inf at index \(0, 0\)"):
        tt_cross(function, shape=(4, 4), generator=rng)
