"""A pass reads every chunk once, ahead or not; what fails is named, and what was done is kept."""

import numpy as np
import pytest
import torch

from cross_approx import (
    ChunkedSource,
    ChunkError,
    PassError,
    PassState,
    as_source,
    read_boxes,
    tucker_gram,
    tucker_sketch,
)
from cross_approx.sources.chunked import regular
from cross_approx.streaming.passes import Passes, box_grid, decode_box, pieces
from decompositions import TT, Tucker, to_dense


class Grid(ChunkedSource):
    """Chunks of an array, counted; the keys in `broken` fail until they are removed."""

    def __init__(self, array, chunks, **options):
        grid = [tuple(sizes) for sizes in chunks] if not isinstance(chunks[0], int) else regular(array.shape, chunks)
        stored = torch.from_numpy(np.empty(0, array.dtype)).dtype
        super().__init__(array.shape, stored, grid, **{"backoff": 0, "retries": 2, **options})
        self.array, self.asked, self.broken = array, [], set()

    def _read(self, key, region):
        self.asked.append(key)
        if key in self.broken:
            raise OSError("disk on fire")
        return np.array(self.array[region])


def noise(shape, dtype="f8", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((13,), [(5, 5, 3)]), ((9, 7), (4, 7)), ((6, 7, 5), [(1, 3, 2), (7,), (2, 3)]), ((3, 4, 2, 5), (2,) * 4)],
)
@pytest.mark.parametrize("box_bytes", [1, 200, 10**6])
def test_every_chunk_is_read_once(shape, chunks, prefetch, box_bytes):
    x = noise(shape)
    for inner in ((), (0,), (len(shape) - 1,), tuple(range(len(shape)))):
        source = Grid(x, chunks, cache_bytes=0)
        seen = np.full(shape, np.nan)
        for box, values in read_boxes(source, box_bytes=box_bytes, inner=inner, prefetch=prefetch):
            assert np.isnan(seen[box]).all()
            seen[box] = values.numpy()
        assert np.array_equal(seen, x)
        assert len(source.asked) == len(set(source.asked)) == source.chunks_read
        assert source.evaluations == x.size


@pytest.mark.parametrize("box_bytes", [8, 100, 10**5])
def test_boxes_hold_their_budget_and_follow_one_another(box_bytes):
    source = as_source(torch.zeros(6, 5, 4, dtype=torch.float64))
    grid = box_grid(source, box_bytes, inner=(1,))
    assert all(8 * np.prod([s.stop - s.start for s in grid[n]]) <= box_bytes for n in range(len(grid)))
    for start in range(0, len(grid), grid.group):
        group = [grid[n] for n in range(start, start + grid.group)]
        assert len({(box[0].start, box[2].start) for box in group}) == 1
        assert [box[1].start for box in group] == sorted(box[1].start for box in group)


def test_a_pass_leaves_the_cache_alone_unless_everything_fits():
    x = noise((8, 8))
    small = Grid(x, (2, 8), cache_bytes=200)
    small.entries(torch.tensor([[0, 0]]))
    list(read_boxes(small, box_bytes=1))
    assert list(small._cache.chunks) == [(0, 0)]
    assert small.chunks_read == 5
    whole = Grid(x, (2, 8), cache_bytes=10**4)
    for _ in range(2):
        list(read_boxes(whole, box_bytes=1))
    assert whole.chunks_read == 4


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_broken_chunk_is_named_and_the_pass_goes_on_from_it(prefetch):
    x = noise((8, 6))
    source = Grid(x, (2, 3), cache_bytes=0)
    source.broken.add((2, 1))
    seen = []
    with pytest.raises(PassError, match=r"chunk \(2, 1\).*3 attempts.*box 5 of 8") as caught:
        seen.extend(read_boxes(source, box_bytes=1, prefetch=prefetch))
    assert len(seen) == caught.value.box == 5
    assert isinstance(caught.value, ChunkError)
    assert caught.value.region == (slice(4, 6), slice(3, 6))
    source.broken.clear()
    seen += list(read_boxes(source, box_bytes=1, start=caught.value.box, prefetch=prefetch))
    assert sum(float(values.sum()) for _, values in seen) == pytest.approx(x.sum())


@pytest.mark.parametrize("work", [tucker_gram, tucker_sketch])
@pytest.mark.parametrize("lost", [(0, 0, 1), (2, 1, 0), (3, 3, 3)])
def test_a_stopped_decomposition_goes_on_bit_by_bit(work, lost):
    x = noise((16, 12, 20)) + 3
    options = {"memory_bytes": 9000} if work is tucker_gram else {}
    generator = lambda: {"generator": torch.Generator().manual_seed(3)} if work is tucker_sketch else {}  # noqa: E731
    whole = work(Grid(x, (4, 3, 5), cache_bytes=0), rank=3, box_bytes=1, **options, **generator())
    source = Grid(x, (4, 3, 5), cache_bytes=0)
    source.broken.add(lost)
    with pytest.raises(PassError) as caught:
        work(source, rank=3, box_bytes=1, **options, **generator())
    assert caught.value.key == lost
    source.broken.clear()
    before = len(source.asked)
    again = work(source, rank=3, box_bytes=1, resume=caught.value.state, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.network.cores, again.network.cores, strict=True))
    assert again.error == whole.error
    assert len(source.asked) - before < 2 * 64


def test_progress_may_stop_a_pass():
    x, state, calls = noise((8, 8, 8)), PassState(), []

    def stop(done, boxes, text):
        calls.append((done, boxes, text))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tucker_gram(x, rank=2, box_bytes=512, resume=state, progress=stop)
    assert calls[-1] == (3, 8, "pass 1 (projection): 3 of 8 boxes")
    result = tucker_gram(x, rank=2, box_bytes=512, resume=state)
    assert all(
        torch.equal(a, b)
        for a, b in zip(result.network.cores, tucker_gram(x, rank=2, box_bytes=512).network.cores, strict=True)
    )
    with pytest.raises(ValueError, match="resume must come from the same call"):
        tucker_gram(x, rank=3, box_bytes=512, resume=state)
    with pytest.raises(ValueError, match="stopped within a box"):
        tucker_gram(x, rank=2, resume=PassState(within=True))


def test_missing_values_are_refused_by_index_or_replaced():
    x = noise((6, 5, 4))
    x[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match=r"finite, got nan at index \(3, 2, 1\)"):
        list(read_boxes(Grid(x, (2, 5, 4)), box_bytes=1))
    hidden = np.isnan(x)
    plain = np.where(hidden, 0.0, x)
    masked = as_source(Grid(plain, (2, 5, 4), mask=as_source(hidden), missing=0.0))
    assert np.array_equal(np.concatenate([v.numpy() for _, v in read_boxes(masked, box_bytes=1)]), plain)
    result = tucker_gram(Grid(x, (2, 5, 4), fill_value=float("nan"), missing=0.0), tol=1e-9)
    assert np.allclose(to_dense(result.network).numpy(), plain, atol=1e-8)


def test_a_finite_sum_that_overflows_is_no_missing_value():
    x = torch.full((4, 4), 3e38)
    assert torch.equal(as_source(x).slab((slice(None), slice(None))), x)


@pytest.mark.parametrize("net", [Tucker.random(row_modes=(5, 4, 6), rank=2), TT.random(row_modes=(5, 4, 6), rank=3)])
def test_boxes_of_a_network(net):
    box = (slice(1, 4), slice(0, 4), slice(5, 6))
    assert torch.allclose(decode_box(net, box), to_dense(net)[box], atol=1e-6)


def test_refusals():
    for call, message in (
        (lambda: list(read_boxes(torch.ones(3), box_bytes=0)), "box_bytes must be at least 1, got 0"),
        (lambda: list(read_boxes(torch.ones(3), start=9)), r"box number in 0..1, got 9"),
        (lambda: Passes("doc", torch.ones(0, 3)), r"mode sizes >= 1, got shape \(0, 3\)"),
        (lambda: Passes("doc", torch.tensor(1.0)), r"order >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Joint(Grid):
    """Takes boxes of several chunks, as zarr does."""

    _joint = True

    def _read(self, key, region):
        self.asked.append(key)
        starts = [np.searchsorted(edges, (s.start, s.stop)) for edges, s in zip(self.edges, region, strict=True)]
        for lost in self.broken:
            if all(a <= c < b for (a, b), c in zip(starts, lost, strict=True)):
                raise OSError("disk on fire")
        return np.array(self.array[region])


def test_boxes_read_at_once_are_those_read_chunk_by_chunk():
    x = noise((7, 9, 8), "f4")
    one, joint = Grid(x, (2, 3, 4), cache_bytes=0), Joint(x, (2, 3, 4), cache_bytes=0)
    for box in ((slice(0, 4), slice(3, 9), slice(0, 8)), (slice(6, 7), slice(0, 9), slice(4, 8))):
        assert torch.equal(one.slab(box), joint.slab(box))
    assert (one.chunks_read, one.bytes_read, one.evaluations) == (11, 4 * 228, 228)
    assert (joint.chunks_read, joint.bytes_read, joint.evaluations) == (11, 4 * 228, 228)
    assert (len(one.asked), len(joint.asked)) == (11, 2)
    for box in ((slice(1, 4), slice(0, 9), slice(0, 8)), (slice(0, 4, 2), slice(0, 9), slice(0, 8))):
        assert torch.equal(one.slab(box), joint.slab(box))  # parts of chunks, strides: one by one
    assert len(joint.asked) == 2 + 12 + 12
    joint.broken.add((1, 2, 0))
    with pytest.raises(PassError, match=r"chunk \(1, 2, 0\).*3 attempts.*box 0 of 1") as caught:
        list(read_boxes(joint))
    read = caught.value.read.numpy()
    assert 0 < read.sum() < x.size
    assert np.array_equal(caught.value.values.numpy()[read], x[read])
    assert np.isnan(caught.value.values.numpy()[~read]).all()
    kept = Joint(x, (2, 3, 4), cache_bytes=10**5)
    list(read_boxes(kept))
    assert len(kept._cache.chunks) == 4 * 3 * 2


def test_values_are_never_the_memory_of_a_cached_chunk():
    source = Grid(noise((4, 4)), (4, 4))
    for _ in range(2):
        source.slab((slice(0, 4), slice(0, 4))).zero_()
        source.entries(torch.tensor([[1, 2]])).zero_()
    assert np.array_equal(source.slab((slice(0, 4), slice(0, 4))).numpy(), source.array)


@pytest.mark.parametrize("whole", [(), (1,), (0, 1, 2)])
def test_pieces_cover_a_box_once(whole):
    values, box = torch.randn(3, 20, 7), (slice(1, 4), slice(5, 25), slice(0, 7))
    for count in (1, 2, 3, 5, 8, 50):
        seen = torch.zeros(4, 25, 7)
        for part, x in pieces(box, values, whole, count):
            seen[part] += x
        assert torch.equal(seen[box], values)
        assert float(seen.abs().sum()) == pytest.approx(float(values.abs().sum()))
