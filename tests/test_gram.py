"""Gram passes give what decompositions in memory give, within the bounds that they promise, and say their error."""

import numpy as np
import pytest
import torch
from test_passes import Grid

from cross_approx import tt_gram, tucker_gram
from cross_approx.streaming.frames import Chain, Star
from decompositions import TT, Tucker, st_hosvd, to_dense, tt_svd, unfold

SHAPES = [(40,), (24, 30), (14, 20, 11), (8, 9, 6, 7)]
WORKS = [(tucker_gram, st_hosvd, Tucker), (tt_gram, tt_svd, TT)]
STREAMED = {2: 5000, 3: 6500, 4: 9600}  # bytes of memory by order: too few for the tensor, enough for Gram matrices


def low_rank(kind, shape, rank, dtype=torch.float64, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = to_dense(kind.random(row_modes=shape, rank=rank if len(shape) > 1 else 1, generator=generator, dtype=dtype))
    return x + noise * torch.randn(shape, generator=generator, dtype=dtype)


def chunked(x, chunk=5, **options):
    return Grid(x.numpy(), tuple(min(chunk, n) for n in x.shape), cache_bytes=0, **options)


def error(net, x):
    double = torch.promote_types(x.dtype, torch.float64)
    return float((to_dense(net.to(double)) - x.to(double)).norm() / x.to(double).norm())


def optimum(work, x, rank):
    """Largest tail of an unfolding: no tensor of that rank is nearer."""
    d = x.ndim
    if work is tucker_gram:
        groups = [(k,) for k in range(d)]
    else:
        groups = [tuple(range(k)) for k in range(1, d)]
    tails = [torch.linalg.svdvals(unfold(x, group))[rank:].norm() for group in groups]
    return float(max(tails, default=torch.tensor(0.0)) / x.norm())


@pytest.mark.parametrize("memory", [None, "streamed"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_quasi_optimal_and_the_error_is_the_error(work, dense, kind, shape, memory):
    if memory and len(shape) == 1:
        pytest.skip("a vector is its own core")
    options = {"memory_bytes": STREAMED[len(shape)]} if memory else {}
    for seed in range(3):
        x = low_rank(kind, shape, 3, noise=0.3, seed=seed)
        result = work(chunked(x), rank=3, box_bytes=1, **options)
        cuts = len(shape) if work is tucker_gram else max(1, len(shape) - 1)
        reached = error(result.network, x)
        assert result.error == pytest.approx(reached, rel=1e-9, abs=1e-12)
        assert reached <= cuts**0.5 * optimum(work, x, 3) * (1 + 1e-9) + 1e-12
        near = dense(x, rank=3, with_error=True)[1]
        assert reached <= near * 1.1 + 1e-12
        assert (len(result.history) > 1) == bool(memory)
        assert result.converged
        assert result.reason == "the ranks asked for"


@pytest.mark.parametrize("memory", [None, "streamed"])
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_exact_at_the_true_rank(work, dense, kind, shape, memory, dtype):
    options = {"memory_bytes": STREAMED[len(shape)] * dtype.itemsize // 8} if memory else {}
    x = low_rank(kind, shape, 2, dtype)
    for asked in ({"rank": 2}, {"tol": 1e-10}):
        result = work(chunked(x), box_bytes=1, **asked, **options)
        assert set(result.network.ranks) == {2}
        assert max(result.error, error(result.network, x)) <= 1e-10
        assert result.converged


@pytest.mark.parametrize("memory", [None, "streamed"])
@pytest.mark.parametrize("tol", [0.6, 0.2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex64])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_a_tolerance_is_kept(work, dense, kind, tol, dtype, memory):
    shape = (18, 20, 22)
    generator = torch.Generator().manual_seed(1)
    decay = 0.5 ** torch.arange(22.0)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    for n in shape:
        turn = decay[:n, None].to(dtype) * torch.randn(n, n, generator=generator, dtype=dtype)
        x = torch.tensordot(x, turn, ([0], [0]))
    options = {"memory_bytes": 20_000} if memory else {}
    result = work(chunked(x, 6), tol=tol, box_bytes=1, **options)
    assert result.error <= tol
    assert result.converged
    assert result.error == pytest.approx(error(result.network, x), rel=1e-4)
    assert result.reason == "the error of all entries meets tol"
    assert sum(result.network.ranks) <= 1.3 * sum(dense(x, tol=tol).ranks) + 1


@pytest.mark.parametrize("memory", [None, 8000])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_a_binding_rank_is_named(work, dense, kind, memory):
    x = low_rank(kind, (14, 20, 11), 4, noise=0.01)
    result = work(chunked(x), tol=0.05, rank=2, memory_bytes=memory or 10**6, box_bytes=1)
    assert not result.converged
    assert result.error > 0.05
    assert result.error == pytest.approx(error(result.network, x), rel=1e-9)
    assert result.reason.startswith("the rank cap binds at 0, 1")


@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_prefetch_changes_no_bit_and_every_pass_reads_every_chunk_once(work, dense, kind):
    x = low_rank(kind, (14, 20, 11), 3, noise=0.1)
    results = []
    for prefetch in (False, True):
        source = Grid(x.numpy(), [(3, 7, 4), (20,), (1, 9, 1)], cache_bytes=0)
        results.append(work(source, rank=3, memory_bytes=14000, prefetch=prefetch, box_bytes=300))
        passes = len(results[-1].history)
        assert passes >= 2
        assert source.chunks_read == len(source.asked) == 9 * passes
        assert results[-1].evaluations == x.numel() * passes
        assert results[-1].bytes_read == x.numel() * passes * 8
    assert all(torch.equal(a, b) for a, b in zip(*(result.network.cores for result in results), strict=True))


@pytest.mark.parametrize("value", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize(("work", "dense", "kind"), WORKS)
def test_single_precision_of_any_size(work, dense, kind, value):
    x = low_rank(kind, (16, 18, 20), 2, torch.float32, 0.1) * value
    result = work(chunked(x), rank=2, memory_bytes=6000, box_bytes=1)
    assert result.error == pytest.approx(error(result.network, x), rel=1e-4)
    assert result.error <= 1.1 * dense(x.double(), rank=2, with_error=True)[1]


def test_a_single_precision_gram_matrix_is_repeated_where_its_noise_matters():
    x = low_rank(Tucker, (16, 18, 20), 2, torch.float32)
    result = tucker_gram(chunked(x), rank=2, memory_bytes=8000, box_bytes=1)
    assert result.error < 5e-7
    assert len(result.history) == 4  # the pass repeated, the projection, the residual that the difference cannot show
    noisy = tucker_gram(
        chunked(low_rank(Tucker, (16, 18, 20), 2, torch.float32, 0.5)), rank=2, memory_bytes=8000, box_bytes=1
    )
    assert len(noisy.history) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_says_what_rounding_costs(dtype):
    x = low_rank(Tucker, (10, 9, 8), 2, torch.float32).to(dtype)
    result = tucker_gram(x, rank=2)
    assert result.network.dtype == dtype
    assert result.error == pytest.approx(error(result.network, x), rel=1e-6)


def test_slices_and_zeros():
    x = low_rank(Tucker, (6, 20, 22), 3, noise=0.1)
    source = Grid(x.numpy(), (1, 20, 22), cache_bytes=0)
    result = tucker_gram(source, rank=3, memory_bytes=6000)
    assert result.error == pytest.approx(error(result.network, x), rel=1e-9)
    for work in (tucker_gram, tt_gram):
        nothing = work(torch.zeros(4, 5, 6), tol=0.1)
        assert nothing.error == 0
        assert nothing.converged
        assert set(nothing.network.ranks) == {1}


@pytest.mark.parametrize(("frame", "shape"), [(Star, (4, 5, 6)), (Chain, (4, 5, 6))])
def test_frames_project_boxes_as_they_project_the_whole(frame, shape):
    x = torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    built = frame(shape, [3, 3, 3])
    for mode in (0, 2):
        u = torch.linalg.qr(torch.randn(shape[mode], 2, dtype=x.dtype, generator=torch.Generator().manual_seed(mode))).Q
        built.add(mode, u)
    whole = built.project(x, tuple(slice(0, n) for n in shape))
    parts = sum(
        built.project(x[a, :, c], (a, slice(0, 5), c))
        for a in (slice(0, 1), slice(1, 4))
        for c in (slice(0, 4), slice(4, 6))
    )
    assert torch.allclose(parts, whole)
    assert float(whole.norm()) <= float(x.norm())


def test_refusals():
    x = torch.ones(30, 30, 30)
    for work in (tucker_gram, tt_gram):
        for options, message in (
            ({}, "expected tol, rank or both, got neither"),
            ({"tol": -1.0}, "tol must be a finite relative error"),
            ({"rank": (2, 2, 2, 2)}, "rank needs one entry per"),
            ({"rank": 2, "memory_bytes": 0}, "memory_bytes must be at least 1"),
            ({"rank": 2, "memory_bytes": 100}, r"expected at least 7200 after 0 cuts, got 100"),
        ):
            with pytest.raises(ValueError, match=message):
                work(x, **options)
        with pytest.raises(ValueError, match=r"finite, got nan at index \(0, 1\)"):
            work(torch.tensor([[1.0, np.nan]]), rank=1)


@pytest.mark.parametrize("gram", [tucker_gram, tt_gram])
def test_squares_that_vanish_are_refused_and_half_precision_is_the_reason(gram):
    x = torch.rand(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"squares must fit double precision, got values up to 9.*e-201; scale it"):
        gram(1e-200 * x, rank=1)
    assert gram(1e-120 * x, rank=1).error == pytest.approx(gram(x, rank=1).error, rel=1e-6)
    assert gram(0 * x, rank=1).error == 0
    limited = gram(x.half(), tol=1e-5)
    assert not limited.converged
    assert limited.reason == "torch.float16 resolves no less"
    assert gram(x, rank=1, tol=1e-5).reason.startswith("the rank cap binds")
