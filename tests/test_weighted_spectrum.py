"""One factorization for every rank: against the brute-force optimum, in the norm of both sides."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decompositions import ActivationFactor, svd, to_dense, weighted_low_rank
from decompositions.weighted import damped
from decompositions.weighted_spectrum import WeightedSpectrum

F64 = torch.float64


def problem(m=7, n=9, k=30, p=25, seed=0, decay=1.0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, dtype=F64, generator=rng)
    x = torch.randn(k, n, dtype=F64, generator=rng) * torch.logspace(0, -decay, n, dtype=F64)
    g = torch.randn(p, m, dtype=F64, generator=rng) * torch.logspace(0, -decay, m, dtype=F64)
    return weight, x, g


def ridged(g, ridge=0.1):
    m = g.shape[1]
    return torch.cat([g, torch.eye(m, dtype=g.dtype) * math.sqrt(ridge / m) * g.norm()])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("inputs", "outputs"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (5, 5)])
def test_the_error_is_the_tail_and_no_matrix_of_that_rank_is_better(seed, inputs, outputs, shape):
    weight, x, g = problem(*shape, seed=seed)
    held = WeightedSpectrum(weight, x if inputs else None, g if outputs else None)
    left = ridged(g) if outputs else torch.eye(shape[0], dtype=F64)
    right = x if inputs else torch.eye(shape[1], dtype=F64)
    for rank in range(1, 1 + min(shape)):
        net = held.network(rank)
        error = float((left @ (weight - to_dense(net)) @ right.mT).norm())
        tail = float(held.values[rank:].norm())
        size = float(held.values.norm())
        assert abs(error - tail) < 1e-12 * size  # Eckart-Young: the least error of any matrix of this rank
        assert abs(held.error(to_dense(net)) - tail) < 1e-12 * size
        for core in (net.cores[0], net.cores[2]):
            assert torch.allclose(core.mT @ core, torch.eye(rank, dtype=F64), atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_without_gradients_it_is_the_weighted_low_rank(seed):
    weight, x, _ = problem(seed=seed)
    assert torch.allclose(
        to_dense(WeightedSpectrum(weight, x).network(3)), to_dense(weighted_low_rank(weight, x, rank=3)), atol=1e-12
    )


def test_a_diagonal_is_its_matrix():
    weight, x, g = problem()
    diagonal = x.square().sum(0).sqrt()
    one, other = WeightedSpectrum(weight, diagonal, g), WeightedSpectrum(weight, torch.diag(diagonal), g)
    assert torch.allclose(one.values, other.values, atol=1e-12)
    assert torch.allclose(to_dense(one.network(4)), to_dense(other.network(4)), atol=1e-10)
    sizes = g.square().sum(0).sqrt()
    one, other = WeightedSpectrum(weight, x, sizes), WeightedSpectrum(weight, x, torch.diag(sizes))
    assert torch.allclose(one.values, other.values, atol=1e-12)
    assert torch.allclose(to_dense(one.network(4)), to_dense(other.network(4)), atol=1e-10)
    assert abs(one.error(to_dense(one.network(4))) - float(one.values[4:].norm())) < 1e-12 * float(one.values.norm())


def test_mixtures_of_tokens_change_nothing(rng):
    weight, x, g = problem()
    turn = torch.linalg.qr(torch.randn(30, 30, dtype=F64, generator=rng)).Q
    one, other = WeightedSpectrum(weight, x, g), WeightedSpectrum(weight, turn @ x, torch.linalg.qr(g, mode="r").R)
    assert torch.allclose(one.values, other.values, atol=1e-12)
    assert torch.allclose(to_dense(one.network(4)), to_dense(other.network(4)), atol=1e-10)


def test_singular_inputs_and_outputs_are_no_trouble():
    weight, x, g = problem(decay=40.0)
    x[:, 3:] = 0
    g[:, 4:] = 0
    for inputs in (x, torch.zeros_like(x)):
        for outputs in (g, torch.zeros_like(g)):
            held = WeightedSpectrum(weight, inputs, outputs)
            for rank in (1, 3, 7):
                net = held.network(rank)
                assert all(torch.isfinite(core).all() for core in net.cores)
                assert held.error(to_dense(net)) <= float(held.values[rank:].norm()) + 1e-10 * weight.norm() * max(
                    1, x.norm()
                )


def test_float32_is_near_float64():
    weight, x, g = problem(decay=10.0)
    truth = WeightedSpectrum(weight, x, g)
    net = WeightedSpectrum(weight.float(), x.float(), g.float()).network(3)
    assert net.dtype == torch.float32
    assert truth.error(to_dense(net)) < float(truth.values[3:].norm()) + 1e-7 * float(truth.values.norm())


def test_half_weights_are_computed_in_single():
    weight, x, g = problem()
    held = WeightedSpectrum(weight.bfloat16(), x.bfloat16(), g.bfloat16())
    exact = WeightedSpectrum(*(part.bfloat16().double() for part in (weight, x, g)))
    assert torch.allclose(held.values, exact.values, rtol=1e-5)
    assert held.network(2).dtype == torch.bfloat16


def test_it_refuses_factors_that_do_not_fit():
    weight, x, g = problem()
    with pytest.raises(ValueError, match=r"inputs must be \(k, 9\)"):
        WeightedSpectrum(weight, g)
    with pytest.raises(ValueError, match=r"outputs must be \(k, 7\)"):
        WeightedSpectrum(weight, x, x)
    with pytest.raises(ValueError, match="ridge"):
        WeightedSpectrum(weight, x, g, ridge=-1)
    with pytest.raises(ValueError, match="NaN"):
        WeightedSpectrum(weight, x * float("nan"))
    for ridge in (math.inf, math.nan):
        with pytest.raises(ValueError, match="ridge"):
            WeightedSpectrum(weight, x, g, ridge=ridge)
    for rank in (0, 8, True, 2.0):
        with pytest.raises(ValueError, match=r"1\.\.7"):
            WeightedSpectrum(weight, x).network(rank)


@given(
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    rank=st.integers(1, 6),
    lower=st.integers(1, 6),
    tokens=st.integers(0, 15),
    complex_=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_two_sides_are_the_optimum(m, n, rank, lower, tokens, complex_, seed):
    """Complex, with few tokens and gradients; invariant to unitary mixtures of both, and to their units."""
    rng = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if complex_ else F64
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, generator=rng)  # noqa: E731
    w, x, left, rank = draw(m, n), draw(tokens, n), draw(min(lower, m), m), min(rank, m, n)
    held = WeightedSpectrum(w, x, left)
    net, whole = held.network(rank), ridged(left)
    tail = float(torch.linalg.svdvals(whole @ w @ x.mH)[rank:].norm())
    size = float((whole @ w @ x.mH).norm())
    assert float((whole @ (w - to_dense(net)) @ x.mH).norm()) == pytest.approx(tail, abs=1e-9 * size)
    assert float(held.values[rank:].norm()) == pytest.approx(tail, abs=1e-9 * size)
    for _ in range(3):
        assert tail <= float((whole @ (w - draw(m, rank) @ draw(rank, n)) @ x.mH).norm()) * (1 + 1e-9)
    mixed = torch.linalg.qr(draw(len(left), len(left))).Q @ left * 7.0
    turned = torch.linalg.qr(draw(tokens, tokens)).Q @ x if tokens else x
    again = to_dense(WeightedSpectrum(w, turned, mixed).network(rank))
    assert float((whole @ (w - again) @ x.mH).norm()) == pytest.approx(tail, abs=1e-9 * size)


def test_where_one_side_says_nothing(rng):
    w, x = torch.randn(7, 6, dtype=F64, generator=rng), torch.randn(20, 6, dtype=F64, generator=rng)
    one = to_dense(weighted_low_rank(w, x, rank=2))
    orthogonal = torch.linalg.qr(torch.randn(7, 7, dtype=F64, generator=rng)).Q
    for outputs in (orthogonal, torch.zeros(3, 7), torch.ones(7), ActivationFactor(7, dtype=F64).factor):
        assert torch.allclose(to_dense(WeightedSpectrum(w, x, outputs).network(2)), one, atol=1e-10)
    for inputs in (None, torch.zeros(4, 6), torch.zeros(0, 6), torch.zeros(6), torch.ones(6)):
        plain = to_dense(WeightedSpectrum(w, inputs).network(2))
        assert torch.allclose(plain, to_dense(svd(w, rank=2)), atol=1e-10)


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_one_factorization_serves_every_rank(rng, mu):
    """Also the ranks that few tokens do not need."""
    for tokens in (30, 4, 1):
        w, x = torch.randn(9, 6, dtype=F64, generator=rng), torch.randn(tokens, 6, dtype=F64, generator=rng)
        held = WeightedSpectrum(w, damped(x, mu))
        for rank in range(1, 7):
            expected = to_dense(weighted_low_rank(w, x, rank=rank, mu=mu))
            assert torch.allclose(to_dense(held.network(rank)), expected, atol=1e-9)


def test_a_singular_output_side_needs_a_ridge():
    weight, x, g = problem()
    assert torch.isfinite(to_dense(WeightedSpectrum(weight, x, g, ridge=0).network(3))).all()
    g[:, 2] = 0
    with pytest.raises(ValueError, match="give a ridge > 0"):
        WeightedSpectrum(weight, x, g, ridge=0).network(3)


@pytest.mark.parametrize("scales", list(itertools.product((1e-37, 1e-20, 1.0, 1e20, 1e37), repeat=3)))
def test_units_do_not_matter(scales):
    """Single precision, where the products alone would overflow or vanish."""
    weight, x, g = (part / part.abs().max() for part in problem())
    truth = WeightedSpectrum(weight, x, g)
    scaled = [(part * scale).float() for part, scale in zip((weight, x, g), scales, strict=True)]
    held = WeightedSpectrum(*scaled)
    net = to_dense(held.network(3))
    assert float((net.double() / scales[0] - to_dense(truth.network(3))).norm()) < 1e-4
    assert torch.allclose(held.values / math.prod(scales), truth.values, rtol=1e-4)
    assert held.error(net) / math.prod(scales) == pytest.approx(float(truth.values[3:].norm()), rel=1e-3)
