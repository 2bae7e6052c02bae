"""Crosses of chunked sources touch the chunks they may, and no others."""

import numpy as np
import pytest
import torch

from cross_approx import ZarrSource, permute_axes, tt_cross, tucker_cross
from cross_approx.reading.chunk_choice import ChunkChoice, ChunkHeldOut, KnownSource, stored_chunks
from cross_approx.reading.reader import Reader
from cross_approx.sources.chunked import ChunkedSource, regular
from decompositions import TT, Tucker, st_hosvd, to_dense, tt_svd

F64 = torch.float64


class Chunks(ChunkedSource):
    """An array in memory that is read by chunks, which it remembers."""

    def __init__(self, x, chunks):
        super().__init__(x.shape, torch.from_numpy(x).dtype, regular(x.shape, chunks))
        self.x, self.touched = x, set()

    def _read(self, key, region):
        self.touched.add(key)
        return self.x[region].copy()


def distance(net, x):
    return float((to_dense(net) - x).norm() / x.norm())


def low_rank(kind, shape, rank, rng):
    return to_dense(kind.random(row_modes=shape, rank=rank, generator=rng, dtype=F64))


@pytest.mark.parametrize(("cross", "kind"), [(tucker_cross, Tucker), (tt_cross, TT)])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_exact_within_the_fraction(cross, kind, fraction, rng):
    x = low_rank(kind, (48, 40, 44), 4, rng)
    source = Chunks(x.numpy(), (8, 8, 8))
    result = cross(source, tol=1e-11, chunk_fraction=fraction, generator=rng)
    assert result.converged, result.reason
    assert "random chunks" in result.reason
    assert distance(result.network, x) <= 1e-10
    assert source.bytes_read <= fraction * x.numel() * 8
    assert result.bytes_read == source.bytes_read


@pytest.mark.parametrize(("cross", "kind"), [(tucker_cross, Tucker), (tt_cross, TT)])
def test_cap_equal_to_the_true_rank_stays_exact(cross, kind, rng):
    x = low_rank(kind, (48, 40, 44), 4, rng)
    result = cross(Chunks(x.numpy(), (8, 8, 8)), rank=4, tol=1e-11, chunk_fraction=0.4, generator=rng)
    assert result.converged, result.reason
    assert distance(result.network, x) <= 1e-10


@pytest.mark.parametrize("order", [2, 4])
def test_other_orders(order, rng):
    shape = (40,) * 2 if order == 2 else (16,) * 4
    x = low_rank(Tucker, shape, 2, rng)
    source = Chunks(x.numpy(), (4,) * order)
    result = tucker_cross(source, tol=1e-11, chunk_fraction=0.5, generator=rng)
    assert result.converged
    assert distance(result.network, x) <= 1e-10
    assert source.bytes_read <= 0.5 * x.numel() * 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_choice_keeps_its_fraction(seed, fraction):
    source = Chunks(np.zeros((50, 61, 47), dtype="f4"), (8, 8, 8))
    choice = ChunkChoice("tt_cross", source, fraction, torch.Generator().manual_seed(seed))
    assert 0.5 * fraction < choice.share(choice.chosen | choice.held) <= fraction + 1e-12
    fibers = torch.cartesian_prod(torch.arange(50), choice.allowed[1], choice.allowed[2])
    assert bool(choice.at(choice.chosen, fibers).all())
    assert bool(choice.box(choice.chosen, [torch.arange(50), *choice.allowed[1:]]).all())


def test_refusals():
    source = Chunks(np.zeros((16, 16, 16)), (8, 8, 8))
    for fraction in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"chunk_fraction must be in \(0, 1\]"):
            tt_cross(source, chunk_fraction=fraction)
    with pytest.raises(ValueError, match=r"touch 0\.\d+ of the bytes; ask for more, or store smaller chunks"):
        tucker_cross(source, chunk_fraction=0.3)
    with pytest.raises(ValueError, match="chunk_fraction is for sources with chunks, got"):
        tt_cross(torch.zeros(4, 4, 4), chunk_fraction=0.3)


def test_uniform_held_out_entries_estimate_the_whole():
    """The mean over held-out entries, averaged over choices, is the mean over all: the chunks differ a lot."""
    x = np.arange(64, dtype="f8").reshape(4, 4, 4).repeat(6, 0).repeat(6, 1).repeat(6, 2)
    means = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        source = Chunks(x, (6, 6, 6))
        choice = ChunkChoice("tt_cross", source, 0.6, generator)
        monitor = ChunkHeldOut(Reader("tt_cross", source), 40, generator, choice)
        index = monitor._uniform(40)
        assert bool(choice.at(choice.held, index).all())
        means.append(float(x[tuple(index.T.numpy())].mean()))
    means = torch.tensor(means)
    assert abs(float(means.mean()) - 31.5) <= 4 * float(means.std()) / 200**0.5


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr")


def blob(n):
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=F64),) * 3, indexing="ij")
    radius = sum(a.square() for a in axes).sqrt()
    texture = sum((3 * a + k).sin() * (7 * b * c + k).cos() for k, (a, b, c) in enumerate([axes, axes[::-1]]))
    return torch.where(radius < 0.6, 2 + texture, 0.0)


@pytest.mark.parametrize("version", [2, 3])
def test_chunks_never_written_are_known_and_free(zarr, version):
    x = blob(48).float()
    array = zarr.create_array({}, shape=x.shape, chunks=(8, 8, 8), dtype="f4", zarr_format=version, fill_value=0)
    array[:] = x.numpy()
    source = ZarrSource(array)
    stored, fill = stored_chunks(source)
    blocks = x.reshape(6, 8, 6, 8, 6, 8).abs().amax((1, 3, 5))
    assert torch.equal(stored, blocks > 0)
    assert fill == 0
    choice = ChunkChoice("tt_cross", source, 0.2, torch.Generator().manual_seed(0))
    known = KnownSource(source, choice)
    index = torch.cartesian_prod(*(torch.arange(0, 48, 5),) * 3)
    assert torch.equal(known.entries(index), x[tuple(index.unbind(1))])
    asked = choice.at(choice.stored, index)
    assert source.evaluations == int(asked.sum()) < len(index)


@pytest.mark.parametrize(("cross", "best"), [(tucker_cross, st_hosvd), (tt_cross, tt_svd)])
def test_capped_cross_of_a_blob(zarr, cross, best):
    """Sharp edges, far from low rank: within 1 dB of the SVD from a third of the bytes."""
    x = blob(64).float()
    array = zarr.create_array({}, shape=x.shape, chunks=(4, 4, 4), dtype="f4", fill_value=0)
    array[:] = x.numpy()
    source = ZarrSource(array)
    generator = torch.Generator().manual_seed(0)
    budget = x.numel() // 5
    result = cross(source, rank=8, tol=1e-3, chunk_fraction=0.33, max_evals=budget, generator=generator)
    assert result.reason.startswith("the rank cap binds")
    assert result.evaluations <= budget
    assert source.bytes_read <= 0.33 * x.numel() * 4
    error = distance(result.network, x)
    assert error <= 10 ** (1 / 20) * distance(best(x, rank=8), x)
    assert 0.7 <= result.error / error <= 1.5


def test_a_permuted_store_of_uneven_chunks_is_chosen_from_by_its_chunks(rng):
    """The view's chunks are the base's, not those of the largest size: what may be touched is never passed."""

    class Uneven(Chunks):
        def __init__(self, x):
            ChunkedSource.__init__(self, x.shape, F64, [(3, 8, 5, 8), (8, 2, 8, 6), (6, 8, 8, 2)])
            self.x, self.touched = x, set()

    x = low_rank(TT, (24, 24, 24), 2, rng)
    source = Uneven(x.numpy())
    view = permute_axes(source, (2, 0, 1))
    choice = ChunkChoice("tt_cross", view, 0.6, rng)
    assert [length.tolist() for length in choice.lengths] == [[6, 8, 8, 2], [3, 8, 5, 8], [8, 2, 8, 6]]
    result = tt_cross(view, tol=1e-10, chunk_fraction=0.6, generator=rng)
    assert result.converged, result.reason
    assert distance(result.network, x.permute(2, 0, 1)) <= 1e-9
    assert source.bytes_read <= 0.6 * x.numel() * 8


@pytest.mark.parametrize("shape", [(13, 11, 9), (7, 10, 6), (23, 17, 5)])
def test_the_whole_of_a_store_of_uneven_chunks_may_be_asked_for(shape):
    x = np.random.default_rng(0).random(shape)
    result = tucker_cross(Chunks(x, (5, 4, 3)), rank=2, chunk_fraction=1, generator=torch.Generator().manual_seed(1))
    assert not result.converged
    assert result.error < 1
