"""tt_cross against functions made to mislead it, sources that misbehave, and limits at awkward moments."""

import math
import time

import pytest
import torch

from cross_approx import tt_cross
from cross_approx.reading.held_out import HeldOut, train_entries
from cross_approx.reading.reader import Reader, norm, open_source
from decompositions import TT

F64 = torch.float64


def values(result, index):
    cores = result.network.cores
    return train_entries([cores[0][None], *cores[1:-1], cores[-1][..., None]], index)


def sampled(shape, count, rng):
    return torch.stack([torch.randint(n, (count,), generator=rng) for n in shape], 1)


def true_error(result, function, shape, rng):
    index = sampled(shape, 20_000, rng)
    true = function(index)
    return norm(values(result, index) - true) / norm(true)


def noise(index):
    """No structure that a float64 sees."""
    weights = torch.tensor([12.9898, 78.233, 37.719, 11.13, 5.77, 91.7, 45.3, 23.9], dtype=F64)
    return ((index.double() @ weights[: index.shape[1]]).sin() * 43758.5453).frac()


EXACT = {
    "checkerboard": ((16,) * 8, lambda i: 1 - 2.0 * (i.sum(1) % 2).double(), 1),
    "modulo 3": ((16,) * 8, lambda i: ((i.sum(1) % 3) == 0).double(), 3),
    "block diagonal": ((16,) * 6, lambda i: (i < 8).all(1).double() + 2 * (i >= 8).all(1).double(), 2),
    "corner jump": ((32,) * 3, lambda i: 1 + (i > 20).all(1).double(), 2),
    "step of a sum": ((12,) * 4, lambda i: (i.sum(1) > 30).double(), 14),
    "sum of 100": ((4,) * 100, lambda i: i.double().sum(1), 2),
    "a mode of 100,000": ((5, 100_000, 5), lambda i: (1e-4 * i[:, 1].double()).sin() * i[:, 0] + i[:, 2].double(), 2),
    "modes of size 1": ((1, 7, 1, 1, 9, 1, 8, 1), lambda i: i.double().square().sum(1), 2),
    "1e200": ((8,) * 5, lambda i: 1e200 * (1 + i.double().sum(1)), 2),
    "1e-200": ((8,) * 5, lambda i: 1e-200 * (1 + i.double().sum(1)), 2),
    "1e-310": ((8,) * 5, lambda i: 1e-310 * (1 + i.double().sum(1)), 2),
    "1e-200 to 1e200": ((21,) * 5, lambda i: 10.0 ** (4 * (i.double() - 10).sum(1)), 1),
}


@pytest.mark.parametrize("name", EXACT)
def test_low_rank_in_disguise_is_found(name, rng):
    shape, function, rank = EXACT[name]
    # the last step of the sum is one entry in a thousand: of a small tensor all entries are compared
    held_out = 25_000 if math.prod(shape) < 25_000 else 1000
    result = tt_cross(function, shape=shape, tol=1e-9, max_evals=1_000_000, held_out=held_out, generator=rng)
    assert result.converged, result.reason
    assert max(result.network.ranks) == rank
    assert true_error(result, function, shape, rng) <= 1e-8
    assert result.error <= 1e-9


HOPELESS = {
    "noise": ((16,) * 8, noise, 0.5),
    "smooth and noise": ((16,) * 6, lambda i: 1 / (1 + i.double().sum(1)) + 1e-5 * noise(i), 1e-5),
    "a ridge between the points": ((32,) * 5, lambda i: (-((i.double().sum(1) / 31 - 2.5) / 0.02).square()).exp(), 0.1),
    "a thin diagonal": ((400, 400), lambda i: (i[:, 0] == i[:, 1]).double(), 0.1),
}


@pytest.mark.parametrize("name", HOPELESS)
def test_what_has_no_small_rank_ends_soon_and_is_not_called_converged(name, rng):
    shape, function, least = HOPELESS[name]
    result = tt_cross(function, shape=shape, tol=1e-8, max_evals=600_000, generator=rng)
    assert not result.converged
    assert "noise floor" not in result.reason  # of the dtype: 1e-16
    assert result.error > least
    true = true_error(result, function, shape, rng)
    assert 0.5 * true < result.error < 2 * true
    if name == "noise":
        assert "did not lower its error" in result.reason


@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.15), (torch.complex64, 1e-5)]
)
def test_every_dtype_stops_at_its_floor(dtype, floor, rng):
    def function(i):
        return (1 / (1 + i.to(torch.promote_types(dtype, torch.float32)).sum(1))).to(dtype)

    result = tt_cross(function, shape=(12,) * 6, tol=1e-9, generator=rng)
    assert result.network.cores[0].dtype == dtype
    assert result.reason.startswith(f"the noise floor of {dtype}")
    assert 1e-9 < result.error < floor
    assert max(result.network.ranks) <= 9
    assert result.evaluations < 20_000
    loose = tt_cross(function, shape=(12,) * 6, tol=floor, generator=rng)
    assert loose.converged


@pytest.mark.parametrize("tol", [0, 1e-15])
def test_a_tolerance_below_rounding_ends_at_the_floor(tol, rng):
    result = tt_cross(lambda i: 1 / (1 + i.double().sum(1)), shape=(12,) * 6, tol=tol, generator=rng)
    assert result.reason == "the noise floor of torch.float64: more sweeps do not lower the error"
    assert result.error < 1e-13
    assert max(result.network.ranks) < 25


def test_zeros_everywhere_are_said(rng):
    result = tt_cross(lambda i: torch.zeros(len(i)), shape=(5,) * 4, generator=rng)
    assert result.converged
    assert result.reason == "the held-out error meets tol; every entry read is zero"


def third_call(then):
    calls = []

    def function(i):
        calls.append(len(i))
        return then(i) if len(calls) == 3 else 1 / (1 + i.double().sum(1))

    return function


@pytest.mark.parametrize(
    ("then", "error", "message"),
    [
        (lambda i: torch.ones(len(i) + 1, dtype=F64), ValueError, r"shape \(B = \d+,\), got \(\d+,\)"),
        (lambda i: torch.ones(len(i), 1, dtype=F64), ValueError, r"shape \(B = \d+,\), got \(\d+, 1\)"),
        (lambda i: None, TypeError, "got NoneType"),
        (
            lambda i: torch.ones(len(i), dtype=torch.complex128),
            TypeError,
            r"values of torch.float64, got torch.complex128",
        ),
        (lambda i: torch.full((len(i),), math.inf, dtype=F64), ValueError, r"must be finite, got inf at index \("),
        (lambda i: {}["missing chunk"], KeyError, "missing chunk"),
    ],
)
def test_a_source_that_fails_late_is_reported(then, error, message, rng, unchecked):
    with pytest.raises(error, match=message):
        tt_cross(third_call(then), shape=(8,) * 5, generator=rng)


def test_an_interrupt_goes_through(rng):
    def stop(i):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tt_cross(third_call(stop), shape=(8,) * 5, generator=rng)


def test_a_function_may_write_into_its_argument_and_need_gradients(rng):
    scale = torch.ones((), dtype=F64, requires_grad=True)

    def function(i):
        found = scale / (1 + i.double().sum(1))
        i.fill_(-1)
        return found

    result = tt_cross(function, shape=(8,) * 5, generator=rng)
    assert result.converged
    assert true_error(result, lambda i: 1 / (1 + i.double().sum(1)), (8,) * 5, rng) <= 3e-6
    assert not result.network.cores[0].requires_grad


@pytest.mark.parametrize("limit", [1, 7, 260, 1000, 2000, 4000, 20_000])
def test_the_last_check_fits_into_max_evals(limit, rng):
    asked = []

    def function(i):
        asked.append(i.clone())
        return 1 / (1 + i.double().square().sum(1)).sqrt()

    result = tt_cross(function, shape=(16,) * 6, tol=1e-11, max_evals=limit, generator=rng)
    index = torch.cat(asked) if asked else torch.zeros(0, 6)
    assert len(index) == len(index.unique(dim=0)) == result.evaluations <= limit
    assert f"max_evals = {limit}" in result.reason
    if math.isfinite(result.error):
        assert result.held_out >= min(1000, limit // 4) - 3
        true = true_error(result, lambda i: 1 / (1 + i.double().square().sum(1)).sqrt(), (16,) * 6, rng)
        assert 0.3 * true < result.error < 5 * true  # the half near large values may be worse
    else:
        assert "the network is zero" in result.reason


def test_too_few_evaluations_for_the_whole_check_do_not_count_as_converged(rng):
    result = tt_cross(lambda i: i.double().sum(1), shape=(8,) * 4, tol=1e-8, max_evals=700, generator=rng)
    assert result.reason == "max_evals = 700: tol is met, on fewer held-out entries than asked for"
    assert not result.converged
    assert 300 <= result.held_out < 1000
    assert result.error <= 1e-8
    assert result.evaluations <= 700


def test_every_end_states_an_error_of_a_sample_that_guided_nothing(rng):
    def function(i):
        return 1 / (1 + i.double().square().sum(1)).sqrt()

    for limits in ({"max_sweeps": 3}, {"rank": 3}, {"max_evals": 20_000}):
        result = tt_cross(function, shape=(16,) * 6, tol=1e-12, generator=rng, **limits)
        assert not result.converged
        assert result.held_out == 1000
    result = tt_cross(function, shape=(16,) * 6, tol=1e-12, max_bytes=40_000, generator=rng)
    assert 0 < result.held_out <= 200  # nothing more can be read


def test_batches_are_made_to_fit_a_limit_of_time(rng):
    """0.1 ms an entry: batches of a whole bond would take seconds each."""
    longest = []

    def function(i):
        longest.append(len(i))
        time.sleep(1e-4 * len(i))
        return 1 / (1 + i.double().square().sum(1)).sqrt()

    result = tt_cross(function, shape=(400,) * 4, tol=1e-12, max_seconds=0.5, generator=rng)
    assert result.reason.startswith("max_seconds = 0.5")
    assert max(longest) < 20_000
    assert len(longest) < 500


def test_counts_are_integers(unchecked):
    def function(i):
        return i.double().sum(1)

    for name in ("max_evals", "max_bytes", "max_sweeps", "held_out"):
        with pytest.raises(TypeError, match=f"tt_cross: {name} is a count, expected an integer, got 2.5"):
            tt_cross(function, shape=(4, 4), **{name: 2.5})
        with pytest.raises(TypeError, match="expected an integer, got True"):
            tt_cross(function, shape=(4, 4), **{name: True})


def test_fewer_entries_than_whole_columns(rng):
    """What the nested columns explain is not read: rank 2 on 32^20 within two columns a bond and a few rows more."""
    result = tt_cross(lambda i: i.double().sum(1), shape=(32,) * 20, tol=1e-9, generator=rng, start=1)
    assert result.converged
    assert set(result.network.ranks) == {2}
    assert result.evaluations < 2 * 20 * 32 * 2 * 2 + 2500


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_norms_of_any_scale(scale):
    x = torch.tensor([3.0, -4.0], dtype=F64) * scale
    assert norm(x) == pytest.approx(5 * scale)
    assert norm(x * 0) == 0
    assert norm(x[:0]) == 0
    net = TT((torch.ones(4, 1, dtype=F64), torch.full((1, 4), scale, dtype=F64)))
    reader = Reader("test", open_source("test", lambda i: torch.full((len(i),), scale, dtype=F64), (4, 4)))
    held = HeldOut(reader, 4, None)
    held.refresh()
    cores = [net.cores[0][None], 1.5 * net.cores[1][..., None]]
    assert held.relative(held.errors(cores)) == pytest.approx(0.5)
