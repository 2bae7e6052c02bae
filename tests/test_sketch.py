"""Sketches recover what has the rank, keep the expected factors on what has not, and say their error."""

import numpy as np
import pytest
import torch
from test_gram import chunked, error, low_rank
from test_passes import Grid

from cross_approx import tt_sketch, tucker_sketch
from cross_approx.streaming.sketch import functionals, khatri_rao
from decompositions import TT, Tucker, st_hosvd, to_dense, tt_svd, unfold

SHAPES = [(40,), (24, 30), (14, 20, 11), (8, 9, 6, 7)]
WORKS = [(tucker_sketch, st_hosvd, Tucker), (tt_sketch, tt_svd, TT)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_exact_at_the_true_rank(work, dense, kind, shape, dtype, passes):
    x = low_rank(kind, shape, 2, dtype)
    for seed in range(3):
        result = work(chunked(x), 2, passes=passes, tol=1e-10, generator=seeded(seed), box_bytes=1)
        assert max(result.error, error(result.network, x)) <= 1e-10
        assert result.converged
        assert result.evaluations == x.numel() * len(result.history)
        assert len(result.history) == (1 if passes == 1 else 2 if shape == (40,) and work is tt_sketch else 3)


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_two_passes_know_their_error(work, dense, kind, shape):
    for seed in range(4):
        x = low_rank(kind, shape, 3, noise=0.3, seed=seed)
        result = work(chunked(x), 3, generator=seeded(seed), box_bytes=500)
        assert result.error == pytest.approx(error(result.network, x), rel=1e-9)
        assert result.error <= 1.5 * dense(x, rank=3, with_error=True)[1]
        assert set(result.network.ranks) == {3}
        assert result.reason == "the ranks asked for, with the error of all entries"


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_one_pass_estimates_its_error(work, dense, kind, shape):
    ratios = []
    for seed in range(12):
        x = low_rank(kind, shape, 3, noise=0.3, seed=seed)
        result = work(chunked(x), 3, passes=1, generator=seeded(seed), box_bytes=500)
        reached = error(result.network, x)
        ratios.append(result.error / reached)
        assert reached <= 2.5 * dense(x, rank=3, with_error=True)[1]
        assert result.held_out == 4096
        assert "estimated" in result.reason
    assert min(ratios) > 0.75
    assert max(ratios) < 1.8
    assert 0.95 < sorted(ratios)[6] < 1.3


def test_one_pass_sees_one_wrong_entry():
    """Sampled entries miss it nearly always; the functionals of the residual do not."""
    x = torch.zeros(40, 40, 40, dtype=torch.float64)
    x[0] = 1.0
    x[7, 8, 9] = 30.0
    result = tucker_sketch(x, 1, passes=1, samples=50, oversampling=2, generator=seeded(1))
    assert error(result.network, x) > 0.3
    assert 0.5 < result.error / error(result.network, x) < 2


def tail(x, mode, rank):
    return float(torch.linalg.svdvals(unfold(x, mode))[rank:].square().sum())


def adversary(name, g):
    shape = (16, 18, 20)
    if name == "noise":
        return torch.randn(shape, generator=g, dtype=torch.float64)
    if name == "slow decay":
        return 1 / (1.0 + sum(torch.meshgrid(*(torch.arange(n).double() ** 2 for n in shape), indexing="ij")))
    if name == "spikes":
        k = torch.arange(12)
        return torch.full(shape, 1e-3, dtype=torch.float64).index_put((k, k, k), 2.0 ** -k.double())
    loud = torch.ones(20, dtype=torch.float64)
    loud[0] = 10
    return torch.randn(shape, generator=g, dtype=torch.float64) * loud


@pytest.mark.parametrize("name", ["noise", "slow decay", "spikes", "one slab"])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_expected_error_of_tucker_sketches(name, passes):
    """Before truncation: E ‖A - Â‖² <= (1 + ρ / (k - ρ - 1)) Σ τ² for every ρ < k - 1, twice that in one pass."""
    x = adversary(name, seeded(5))
    width = 7
    bounds = [(1 + r / (width - r - 1)) * sum(tail(x, k, r) for k in range(3)) for r in range(1, width - 1)]
    # the rank asked for is the width less the least oversampling; its own truncation is taken off
    squares, ideal = [], st_hosvd(x, width - 2, with_error=True)[1] ** 2 * float(x.norm()) ** 2
    for seed in range(30):
        result = tucker_sketch(x, width - 2, passes=passes, oversampling=2, generator=seeded(seed), box_bytes=10**5)
        squares.append((error(result.network, x) * float(x.norm())) ** 2)
    assert np.mean(squares) <= passes_factor(passes) * min(bounds) + 3 * ideal


def passes_factor(passes):
    return 2 if passes == 1 else 1


@pytest.mark.parametrize("passes", [1, 2])
def test_matrices_keep_the_bound_of_gaussian_matrices(passes):
    """Order 2: Ω is Gaussian, and with the rank of the sketch nothing is truncated that the bound does not count."""
    x = torch.randn(30, 30, generator=seeded(), dtype=torch.float64) * 0.8 ** torch.arange(30)
    rank, extra = 5, 5
    bound = (1 + rank / (extra - 1)) * 2 * tail(x, 0, rank) * passes_factor(passes)
    squares = []
    for seed in range(60):
        result = tucker_sketch(x, rank + extra, passes=passes, oversampling=2, generator=seeded(seed))
        squares.append((error(result.network, x) * float(x.norm())) ** 2)
    assert np.mean(squares) <= bound


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_prefetch_changes_no_bit_and_boxes_hardly_any(work, dense, kind, passes):
    x = low_rank(kind, (14, 20, 11), 3, noise=0.1)
    results = []
    for prefetch in (False, True):
        source = Grid(x.numpy(), [(3, 7, 4), (20,), (1, 9, 1)], cache_bytes=0)
        results.append(work(source, 3, passes=passes, generator=seeded(), prefetch=prefetch, box_bytes=300))
        assert source.chunks_read == len(source.asked) == 9 * passes
    assert all(torch.equal(a, b) for a, b in zip(*(result.network.cores for result in results), strict=True))
    other = work(x, 3, passes=passes, generator=seeded())
    assert torch.allclose(to_dense(other.network), to_dense(results[0].network), atol=1e-9)


@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_a_tolerance_truncates_and_a_binding_rank_is_named(work, dense, kind):
    x = low_rank(kind, (14, 20, 11), 3, noise=0.02)
    result = work(chunked(x), 6, tol=0.1, generator=seeded())
    assert set(result.network.ranks) == {3}
    assert result.converged
    assert result.error <= 0.1
    assert result.error == pytest.approx(error(result.network, x), rel=1e-9)
    short = work(chunked(x), 2, tol=0.1, generator=seeded())
    assert not short.converged
    assert "misses tol: the rank binds at 0, 1" in short.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_low_precision_and_uneven_modes(work, dense, kind, dtype):
    x = low_rank(kind, (1, 25, 3, 12), 2, torch.float32).to(dtype)
    for passes in (1, 2):
        result = work(x, 2 if work is tucker_sketch else (1, 2, 2), passes=passes, generator=seeded())
        assert result.network.dtype == dtype
        if passes == 2:
            assert result.error == pytest.approx(error(result.network, x), rel=1e-4)


def test_zeros_and_missing_values():
    for work in (tucker_sketch, tt_sketch):
        for passes in (1, 2):
            assert work(torch.zeros(4, 5, 6), 2, passes=passes, tol=0.1, generator=seeded()).error == 0
        x = torch.ones(4, 5, 6, dtype=torch.float64)
        x[1, 2, 3] = float("nan")
        with pytest.raises(ValueError, match=r"finite, got nan at index \(1, 2, 3\)"):
            work(x, 2)
        filled = Grid(x.numpy(), (2, 5, 3), fill_value=float("nan"), missing=1.0)
        assert work(filled, 1, generator=seeded()).error < 1e-10


def test_functionals_and_khatri_rao_products():
    for net in (Tucker.random(row_modes=(5, 4, 6), rank=2), TT.random(row_modes=(5, 4, 6), rank=3)):
        x = to_dense(net)
        index = torch.tensor([[0, 1, 2], [4, 3, 5]])
        assert torch.allclose(functionals(net, index.unbind(1)), x[index.unbind(1)], atol=1e-6)
        vectors = [torch.randn(n, 7) for n in net.shape]
        assert torch.allclose(functionals(net, vectors), torch.einsum("ijk,iz,jz,kz->z", x, *vectors), atol=1e-4)
    z, a, b = torch.randn(3, 4, 5, 6), torch.randn(4, 3), torch.randn(6, 3)
    assert torch.allclose(khatri_rao(z, [a, None, b]), torch.einsum("sijk,is,ks->sj", z, a, b), atol=1e-5)


def test_refusals():
    for work in (tucker_sketch, tt_sketch):
        for options, message in (
            ({"passes": 3}, "passes must be 1 or 2, got 3"),
            ({"oversampling": 1}, "oversampling must be at least 2, got 1"),
            ({"samples": 0}, "samples must be at least 1, got 0"),
            ({"tol": -1}, "tol must be a finite"),
        ):
            with pytest.raises(ValueError, match=message):
                work(torch.ones(4, 4), 2, **options)
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            work(torch.ones(4, 4), 0)
