"""Samples of trains: their frequencies, and the probabilities that come with them, against the dense tensor."""

import math

import pytest
import torch

from cross_approx import gather, integrate, sample
from decompositions import CP, TT, LowRank, TTMatrix, Tucker, norm, scale, to_dense

F64 = torch.float64


def positive(shape, rank, rng, dtype=F64):
    net = TT.random(row_modes=shape, rank=rank, dtype=dtype, generator=rng)
    return net.replace([core.abs() for core in net.cores])


def chi_square(index, p):
    """Pearson's statistic over its degrees of freedom, in standard deviations; rare entries are put together."""
    count = len(index)
    flat = torch.zeros(len(index), dtype=torch.long)
    for column, n in zip(index.unbind(1), p.shape, strict=True):
        flat = flat * n + column
    seen = torch.bincount(flat, minlength=p.numel()).double()
    expected = p.flatten() * count
    assert float(seen[expected == 0].sum()) == 0
    rare = expected < 5
    groups = [(seen[~rare], expected[~rare])]
    if bool(rare.any()) and float(expected[rare].sum()) > 5:
        groups.append((seen[rare].sum()[None], expected[rare].sum()[None]))
    statistic = sum(float(((a - b) ** 2 / b).sum()) for a, b in groups)
    freedom = sum(len(a) for a, _ in groups) - 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))


SHAPES = [((7,), 1), ((1,), 1), ((5, 4), 3), ((3, 1, 4), 2), ((2, 3, 2, 3), 3), ((2,) * 7, 4)]


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
@pytest.mark.parametrize("kind", ["squared", "complex", "nonnegative"])
def test_frequencies_and_probabilities(shape, rank, kind, rng):
    if kind == "nonnegative":
        net = positive(shape, rank, rng)
        p = to_dense(net) / to_dense(net).sum()
    else:
        dtype = torch.complex128 if kind == "complex" else F64
        net = TT.random(row_modes=shape, rank=rank, dtype=dtype, generator=rng)
        p = to_dense(net).abs().square() / to_dense(net).abs().square().sum()
    found = sample(net, 20000, kind="nonnegative" if kind == "nonnegative" else "squared", generator=rng)
    assert found.indices.shape == (20000, len(shape))
    torch.testing.assert_close(found.log_prob, p[tuple(found.indices.T)].log(), rtol=1e-8, atol=1e-8)
    assert abs(chi_square(found.indices, p)) < 5


def test_the_test_sees_a_wrong_distribution(rng):
    """The same samples against the probabilities of |W| instead of |W|^2."""
    net = TT.random(row_modes=(5, 4), rank=3, dtype=F64, generator=rng)
    found = sample(net, 20000, generator=rng)
    wrong = to_dense(net).abs() / to_dense(net).abs().sum()
    assert chi_square(found.indices, wrong) > 20


def test_chains_of_all_kinds(rng):
    for net in (
        TT.random(row_modes=(3, 4), col_modes=(2, 2), rank=3, axes=(2, 0, 3, 1), dtype=F64, generator=rng),
        TTMatrix.random(row_modes=(3, 2), col_modes=(2, 4), rank=3, dtype=F64, generator=rng),
        LowRank.random(row_modes=(6,), col_modes=(7,), rank=3, dtype=F64, generator=rng),
    ):
        p = to_dense(net).square() / to_dense(net).square().sum()
        found = sample(net, 20000, generator=rng)
        torch.testing.assert_close(found.log_prob, p[tuple(found.indices.T)].log(), rtol=1e-8, atol=1e-8)
        assert abs(chi_square(found.indices, p)) < 5


def test_zero_probabilities_are_never_drawn(rng):
    net = CP([torch.eye(4, dtype=F64), torch.eye(4, dtype=F64)])  # i = j alone
    for kind in ("squared", "nonnegative"):
        found = sample(net, 1000, kind=kind, generator=rng)
        assert torch.equal(found.indices[:, 0], found.indices[:, 1])
        torch.testing.assert_close(found.log_prob, torch.full((1000,), math.log(0.25), dtype=F64))


def test_a_tensor_that_nobody_can_hold(rng):
    """2^100 entries of a product distribution; log-probabilities are those of gather and norm."""
    net = TT.random(row_modes=(2,) * 100, rank=3, std=1.0, dtype=F64, generator=rng)
    found = sample(net, 50, generator=rng)
    expected = 2 * gather(net, found.indices).abs().log() - 2 * norm(net).log()
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-8, atol=1e-8)
    net = positive((4,) * 40, 3, rng)
    found = sample(net, 50, kind="nonnegative", generator=rng)
    expected = gather(net, found.indices).log() - integrate(net).log()
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-8, atol=1e-8)


def test_a_generator_repeats_and_chunks_do_not_matter(rng, monkeypatch):
    net = TT.random(row_modes=(4, 5, 3), rank=3, dtype=F64, generator=rng)
    a, b = (sample(net, 100, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.indices, b.indices)
    monkeypatch.setattr("cross_approx.calculus.sampling.ENTRIES", 7)
    small = sample(net, 3000, generator=rng)
    p = to_dense(net).square() / to_dense(net).square().sum()
    assert abs(chi_square(small.indices, p)) < 5
    assert sample(net, 0).indices.shape == (0, 3)
    low = sample(scale(net, 1e-30).to(torch.float32), 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(low.indices, a.indices[:10]) or low.indices.shape == (10, 3)


def test_negative_probabilities(rng):
    """A rounding error counts as zero; more is refused, or clipped with its mass said."""
    x = torch.tensor([[0.5, 0.2], [0.4, -0.1]], dtype=F64)
    net = TT([x, torch.eye(2, dtype=F64)])
    with pytest.raises(ValueError, match=r"no negative marginals, got one of 2.0e-01 of the mass"):
        sample(net, 1000, kind="nonnegative", generator=rng)
    with pytest.warns(UserWarning, match=r"taken for zero, on average .* of the mass"):
        found = sample(net, 20000, kind="nonnegative", negative="clip", generator=rng)
    clipped = torch.tensor([[0.7 * 5 / 7, 0.7 * 2 / 7], [0.3, 0.0]], dtype=F64)
    assert abs(chi_square(found.indices, clipped)) < 5
    torch.testing.assert_close(found.log_prob, clipped[tuple(found.indices.T)].log(), rtol=1e-9, atol=1e-9)
    x[1, 1] = -1e-15
    assert sample(TT([x, torch.eye(2, dtype=F64)]), 100, kind="nonnegative", generator=rng).indices.shape == (100, 2)


def test_refusals(unchecked):
    net = TT.random(row_modes=(4, 4), rank=2)
    with pytest.raises(ValueError, match="sample: expected a chain"):
        sample(Tucker.random(row_modes=(4, 4, 4), rank=2), 1)
    with pytest.raises(ValueError, match="the tensor is zero"):
        sample(scale(net, 0.0), 1)
    with pytest.raises(ValueError, match="the tensor is zero"):
        sample(scale(net, 0.0), 1, kind="nonnegative")
    with pytest.raises(ValueError, match="count must be an int >= 0, got -1"):
        sample(net, -1)
    with pytest.raises(ValueError, match="kind must be 'squared' or 'nonnegative'"):
        sample(net, 1, kind="born")
    with pytest.raises(TypeError, match="a non-negative network is real"):
        sample(net.to(torch.complex64), 1, kind="nonnegative")
