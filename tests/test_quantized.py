"""Quantized trains: digits of any axis, known ranks in every order, the count promised, limits in the probe."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_approx import ChunkedSource, Quantization, as_source, qtt_cross
from cross_approx.digits import ORDERS, digit_sizes
from cross_approx.reading.held_out import train_entries
from cross_approx.sources.chunked import regular
from decompositions import TT, to_dense, tt_svd

F64 = torch.float64
SHAPES = [(1,), (2,), (97,), (64,), (1, 1), (1, 360), (17, 2, 1, 12), (31, 8), (60, 45), (23, 29, 6), (2**20, 3**9)]
SMALL = [shape for shape in SHAPES if math.prod(shape) <= 10_000]


class Counting:
    """A function that counts what it is asked for, and refuses indices out of bounds."""

    def __init__(self, function, shape):
        self.function, self.shape, self.count, self.seen = function, torch.tensor(shape), 0, set()

    def __call__(self, index):
        assert index.dtype == torch.int64
        assert bool((index >= 0).all())
        assert bool((index < self.shape).all())
        self.count += len(index)
        self.seen |= {tuple(row) for row in index.tolist()}
        return self.function(index)


def at(result, index):
    """The train's values at indices of the axes."""
    cores = list(result.network.cores)
    cores = [cores[0][None], *cores[1:]]
    cores[-1] = cores[-1][..., None]
    return train_entries(cores, result.quantization.digits(index))


def draw(shape, count, rng):
    return torch.stack([torch.randint(n, (count,), generator=rng) for n in shape], 1)


# --- digits ---


def test_digit_sizes():
    for n in range(1, 400):
        sizes = digit_sizes(n)
        padded = math.prod(sizes)
        primes = [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
        if all(p <= 13 for p in primes):
            assert padded == n
            assert max(sizes, default=1) <= 13
        else:
            assert max(sizes) <= 7
            smooth = {math.prod(c) for k in range(10) for c in itertools.combinations_with_replacement((2, 3, 5, 7), k)}
            assert padded == min(m for m in smooth if m >= n)
        assert list(sizes) == sorted(sizes, reverse=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_digits_and_index_undo_each_other(shape, order, rng):
    q = Quantization.of(shape, order)
    assert q.shape == shape
    assert q.sizes == tuple(size for _, size in q.modes)
    assert all(n <= padded < 2 * n for n, padded in zip(shape, q.padded, strict=True))
    index = draw(q.padded, 200, rng)
    digits = q.digits(index)
    assert bool((digits < torch.tensor(q.sizes)).all())
    assert torch.equal(q.index(digits), index)
    # most significant first: an axis alone is its mixed-radix number
    for axis in range(len(shape)):
        number = torch.zeros(200, dtype=torch.long)
        for k, (a, size) in enumerate(q.modes):
            number = number * size + digits[:, k] if a == axis else number
        assert torch.equal(number, index[:, axis])


def test_orders():
    assert Quantization.of((4, 6)).modes == ((0, 2), (0, 2), (1, 3), (1, 2))
    assert Quantization.of((4, 6), "F").modes == ((1, 3), (1, 2), (0, 2), (0, 2))
    assert Quantization.of((4, 4, 4), "interleaved").modes == ((0, 2), (1, 2), (2, 2)) * 2
    # the axis in the largest parts is divided next, so that cells stay cubes of the unit cube
    assert Quantization.of((64, 4), "interleaved").modes == ((0, 2), (1, 2)) * 2 + ((0, 2),) * 4
    assert Quantization.of((1, 1), "F").modes == ((0, 1),)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from(ORDERS))
def test_split_and_merge(shape, order):
    q = Quantization.of(shape, order)
    x = torch.arange(math.prod(shape)).reshape(shape)
    folded = q.split(x)
    assert tuple(folded.shape) == q.sizes
    assert torch.equal(q.merge(folded), x)
    every = torch.cartesian_prod(*(torch.arange(n) for n in q.sizes)).reshape(-1, len(q.sizes))
    inside = q.index(every).minimum(torch.tensor(shape) - 1)
    assert torch.equal(folded.flatten(), x[tuple(inside.unbind(1))])


def test_tt_svd_of_split_digits():
    x = torch.sin(torch.arange(1009.0, dtype=F64)[:, None] / 50 + torch.arange(30.0, dtype=F64))
    q = Quantization.of(x.shape, "C")
    net = tt_svd(q.split(x), tol=1e-12)
    torch.testing.assert_close(q.merge(to_dense(net)), x, rtol=0, atol=1e-10)
    assert max(net.ranks) <= 4


# --- known ranks ---

FUNCTIONS = {  # of one linear form t of the index, and the rank
    "exponential": (lambda t: torch.exp(-3 * t), 1),
    "sine": (lambda t: torch.sin(11 * t + 0.3), 2),
    "constant": (lambda t: torch.full_like(t, -2.0), 1),
    "cubic": (lambda t: 4 * t**3 - 3 * t + 1, 4),
    "complex wave": (lambda t: torch.exp(20j * t), 1),
}


def linear(shape):
    weights = torch.tensor([(1 + 0.5 * k) / n for k, n in enumerate(shape)], dtype=F64)
    return lambda index: (index.double() * weights).sum(1)


LAYOUTS = [(shape, order) for shape in [(360, 49), (64, 27, 26), (2**20, 3**9)] for order in ORDERS]


@pytest.mark.parametrize(("shape", "order"), [*LAYOUTS, ((360, 49), "auto")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_at_known_ranks(name, shape, order, rng):
    function, rank = FUNCTIONS[name]
    form = linear(shape)
    counting = Counting(lambda index: function(form(index)), shape)
    result = qtt_cross(counting, shape=shape, order=order, tol=1e-11, generator=rng)
    assert result.converged, result.reason
    assert max(result.network.ranks) <= rank
    assert counting.count == result.evaluations == len(counting.seen)
    index = draw(shape, 2000, rng)
    exact = function(form(index))
    assert float((at(result, index) - exact).norm() / exact.norm()) <= 1e-10


@pytest.mark.parametrize("order", [*ORDERS, "auto"])
@pytest.mark.parametrize("shape", [(97,), (1, 31), (17, 2, 1, 12), (23, 29, 6), (211, 37)])
def test_exact_on_padded_axes(shape, order, rng):
    """Padding may add to the ranks; every real entry is right, and none beyond the bounds is asked for."""
    form = linear(shape)
    for function in (torch.exp, lambda t: torch.sin(9 * t), lambda t: t**3 - t):
        counting = Counting(lambda index, f=function: f(form(index)), shape)
        result = qtt_cross(counting, shape=shape, order=order, tol=1e-11, generator=rng)
        assert result.converged, result.reason
        assert counting.count == result.evaluations == len(counting.seen) <= math.prod(shape)
        every = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
        exact = function(form(every))
        assert float((at(result, every) - exact).norm() / exact.norm()) <= 1e-10
        dense = result.quantization.merge(to_dense(result.network)) if math.prod(shape) < 10_000 else None
        assert dense is None or float((dense.flatten() - exact).norm() / exact.norm()) <= 1e-10


@pytest.mark.parametrize("shape", SMALL)
def test_random_trains_over_digits(shape, rng):
    """A train of known ranks in one order is found exactly through a tensor of the axes."""
    q = Quantization.of(shape, "interleaved")
    net = TT.random(row_modes=q.sizes, rank=2, generator=rng, dtype=F64)
    x = q.merge(to_dense(net))
    result = qtt_cross(x, order=q, tol=1e-10, generator=rng)
    assert result.converged
    assert result.quantization == q
    assert float((q.merge(to_dense(result.network)) - x).norm()) <= 1e-9 * float(x.norm())


# --- the order ---


def test_the_probe_chooses_the_order(rng):
    """A function of |x - y| has small ranks only where the digits of x and y meet; a product has them elsewhere."""
    shape = (512, 512)
    near = qtt_cross(
        lambda i: torch.exp(-0.2 * (i[:, 0] - i[:, 1]).abs().double()), shape=shape, tol=1e-8, generator=rng
    )
    assert near.converged
    assert near.quantization == Quantization.of(shape, "interleaved")
    assert max(near.network.ranks) <= 4

    def product(i):
        x = (i.double() + 0.5) / 512
        return torch.exp(-((x - 0.4) ** 2).sum(1) * 100)

    far = qtt_cross(product, shape=shape, tol=1e-8, generator=rng)
    assert far.converged
    assert far.quantization in (Quantization.of(shape, "C"), Quantization.of(shape, "F"))
    interleaved = qtt_cross(product, shape=shape, order="interleaved", tol=1e-8, generator=rng)
    assert far.evaluations < 0.5 * interleaved.evaluations


def test_c_and_f_are_told_apart(rng):
    """A train that is random in the digits of one order is of full rank in the others."""
    shape = (2**7, 2**7)
    for order in ORDERS:
        q = Quantization.of(shape, order)
        x = q.merge(to_dense(TT.random(row_modes=q.sizes, rank=2, generator=rng, dtype=F64)))
        result = qtt_cross(x, tol=1e-8, generator=rng)
        assert result.quantization == q
        assert result.converged


def test_one_axis_needs_no_probe(rng):
    counting = Counting(lambda i: 1 / (1.0 + i[:, 0].double()), (5000,))
    auto = qtt_cross(counting, shape=(5000,), generator=torch.Generator().manual_seed(0))
    named = qtt_cross(counting, shape=(5000,), order="C", generator=torch.Generator().manual_seed(0))
    assert auto.evaluations == named.evaluations
    assert auto.quantization == named.quantization


# --- limits and honesty ---


def rough(i):
    return 1 / (1 + (i.double() / 40).square().sum(1)).sqrt()


@pytest.mark.parametrize("limit", [1, 150, 400, 900, 1500, 4000])
@pytest.mark.parametrize("order", ["auto", "C"])
def test_max_evals_is_never_exceeded(limit, order, rng):
    shape = (97, 64, 45)
    counting = Counting(rough, shape)
    result = qtt_cross(counting, shape=shape, order=order, tol=1e-13, max_evals=limit, generator=rng)
    assert counting.count == result.evaluations == len(counting.seen) <= limit
    assert not result.converged
    assert f"max_evals = {limit}" in result.reason
    assert result.network.shape == result.quantization.sizes
    if limit >= 900:
        assert result.error < 0.2
    index = draw(shape, 3000, rng)
    if math.isfinite(result.error):
        size = float(rough(index).norm())
        assert float((at(result, index) - rough(index)).norm()) <= 3 * max(result.error, 1e-15) * size + 1e-12


def test_other_limits_progress_and_start(rng):
    shape = (97, 64, 45)
    lines = []
    result = qtt_cross(
        rough,
        shape=shape,
        tol=1e-12,
        max_sweeps=2,
        generator=rng,
        progress=lambda *line: lines.append(line),
        start=torch.tensor([[0, 0, 0], [96, 63, 44]]),
    )
    assert result.reason == "max_sweeps = 2"
    assert [line[:2] for line in lines] == [(1, 2), (2, 2)]
    least = min(line.error for line in result.history)
    assert 0.5 * least <= result.error <= 2 * least  # measured again, on a fresh sample
    capped = qtt_cross(rough, shape=shape, rank=3, tol=1e-9, generator=rng)
    assert max(capped.network.ranks) == 3
    assert not capped.converged
    assert capped.reason == "the rank cap binds"
    assert qtt_cross(rough, shape=shape, max_seconds=1e-9).reason.startswith("max_seconds")
    source = as_source(rough, shape=shape, dtype=F64)
    stopped = qtt_cross(source, max_bytes=1, tol=1e-12, generator=rng)
    assert stopped.evaluations > 0 or "max_bytes" in stopped.reason


def test_chunks_are_read_once_and_bytes_counted(rng):
    grids = torch.meshgrid(*(torch.arange(float(n), dtype=F64) for n in (61, 64)), indexing="ij")
    array = (1 / (1 + grids[0] + 2 * grids[1])).numpy()

    class Grid(ChunkedSource):
        def __init__(self):
            super().__init__(array.shape, F64, regular(array.shape, (16, 16)), backoff=0)
            self.asked = []

        def _read(self, key, region):
            self.asked.append(key)
            return array[region].copy()

    source = Grid()
    result = qtt_cross(source, tol=1e-8, held_out=100, generator=rng)
    assert result.converged
    assert len(set(source.asked)) == len(source.asked) == source.chunks_read
    assert result.evaluations == source.evaluations
    assert result.bytes_read == source.bytes_read == 61 * 64 * 8
    small = qtt_cross(Grid(), tol=1e-8, max_bytes=3000, generator=rng)
    assert "max_bytes" in small.reason


def test_single_precision_stops_at_its_floor(rng):
    result = qtt_cross(lambda i: rough(i).float(), shape=(97, 64), tol=1e-12, generator=rng)
    assert not result.converged
    assert result.network.cores[0].dtype == torch.float32
    assert result.error <= 1e-5
    assert "float32" in result.reason


def test_the_held_out_error_is_about_real_entries(rng):
    """Far more padding than tensor: wild values there would not go unseen in an error that looked at it."""
    q = Quantization((5, 3), ((0, 7), (1, 7), (0, 7), (1, 7)))
    x = torch.randn(5, 3, dtype=F64, generator=rng)
    result = qtt_cross(x, order=q, tol=1e-9, generator=rng)
    assert result.evaluations <= 15
    assert result.held_out == 15
    torch.testing.assert_close(q.merge(to_dense(result.network)), x, rtol=0, atol=1e-8)


def test_refusals(unchecked):
    with pytest.raises(ValueError, match="must be 'auto', 'C', 'F', 'interleaved' or a Quantization, got 'z'"):
        qtt_cross(rough, shape=(4, 4), order="z")
    with pytest.raises(ValueError, match=r"Quantization of shape \(4, 4\), got one of \(4, 5\)"):
        qtt_cross(rough, shape=(4, 4), order=Quantization.of((4, 5)))
    with pytest.raises(ValueError, match=r"expected order= or an int, got rank=\(2, 2, 2\)"):
        qtt_cross(rough, shape=(4, 4), rank=(2, 2, 2))
    with pytest.raises(ValueError, match="qtt_cross: max_sweeps must be positive, got 0"):
        qtt_cross(rough, shape=(4, 4), max_sweeps=0)
    with pytest.raises(ValueError, match=r"qtt_cross: start points .* integers below \(4, 4\)"):
        qtt_cross(rough, shape=(4, 4), start=torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match=r"nan at index \(3, 3\)"):
        qtt_cross(lambda i: 0.0 / (6.0 - i.sum(1)), shape=(4, 4))
    with pytest.raises(ValueError, match=r"1 <= shape\[1\] <= 2, got 3"):
        Quantization((4, 3), ((0, 4), (1, 2)))
    with pytest.raises(ValueError, match=r"axis in 0\.\.1, size >= 1\), got \(2, 2\)"):
        Quantization((4, 3), ((2, 2),))
    with pytest.raises(ValueError, match=r"mode sizes >= 1 .* got shape \(4, 0\)"):
        Quantization.of((4, 0))
    with pytest.raises(ValueError, match="one of C, F, interleaved, got 'auto'"):
        Quantization.of((4,), "auto")
    q = Quantization.of((4, 17))
    with pytest.raises(ValueError, match=r"in range of \(4, 18\), got \(0, 18\)"):
        q.digits(torch.tensor([[0, 1], [0, 18]]))
    with pytest.raises(ValueError, match=r"integers of shape \(B, 5\), got \(1, 2\)"):
        q.index(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"of shape \(4, 17\), got \(4, 18\)"):
        q.split(torch.zeros(4, 18))
    with pytest.raises(ValueError, match=r"of shape \(2, 2, 3, 3, 2\), got \(4, 18\)"):
        q.merge(torch.zeros(4, 18))
