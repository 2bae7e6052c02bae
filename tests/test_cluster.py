"""A cluster of two processes: the entries of the store, small answers, and the same bits when a worker is killed."""

import os
import pickle
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cross_approx import ChunkError, ClusterSource, as_source, tt_cross
from cross_approx.sources.chunked import ChunkedSource, regular
from cross_approx.sources.cluster import _answer, _compact, _sum_boxes, _sum_sums
from cross_approx.sources.in_memory import ArraySource
from decompositions import to_dense

pytestmark = pytest.mark.dist
SHAPE, CHUNKS = (9, 7, 10), (4, 3, 5)


class Formula(ChunkedSource):
    """Chunks made by a formula; a file makes the process that reads a chunk die, once, or the chunk unreadable."""

    def __init__(self, folder, doomed=None, broken=None, **options):
        super().__init__(SHAPE, torch.float64, regular(SHAPE, CHUNKS), backoff=0, **options)
        self.folder, self.doomed, self.broken = folder, doomed, broken

    def _read(self, key, region):
        (self.folder / f"read-{key}-{os.urandom(4).hex()}").touch()
        if key == self.broken:
            raise OSError("torn")
        die_once(self.folder, key == self.doomed)
        i, j, k = np.ogrid[region]
        return np.sin(1.0 + i + 0.5 * j * j) * (2.0 + k)

    def reads(self):
        return len(list(self.folder.glob("read-*")))


def die_once(folder, here):
    """Kill this process, unless one was killed before: no clean-up, no last word."""
    if here and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def wrapped(source, client, **options):
    """A `ClusterSource` of a source that is there already."""
    cluster = ClusterSource(source, client, **options)
    assert cluster._base is source
    return cluster


@contextmanager
def two_processes():
    distributed = pytest.importorskip("distributed", reason="needs the extra `grids`")
    options = {"threads_per_worker": 1, "processes": True, "dashboard_address": ":0", "memory_limit": 0}
    with distributed.LocalCluster(n_workers=2, **options) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def client():
    with two_processes() as client:
        yield client


@pytest.fixture
def mortal():
    """A cluster of the test's own: what it kills is missed by no other test."""
    with two_processes() as client:
        yield client


@pytest.fixture
def x():
    i, j, k = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
    return np.sin(1.0 + i + 0.5 * j * j) * (2.0 + k)


@pytest.fixture
def index(rng):
    return torch.stack([torch.randint(n, (40,), generator=rng) for n in SHAPE], 1)


def check(source, x, index):
    """The three kinds of request against the array, bit for bit."""
    truth = torch.from_numpy(x)
    assert torch.equal(source.entries(index), truth[index.unbind(1)])
    for axis in range(3):
        rest = [index[:, k] for k in range(3) if k != axis]
        assert torch.equal(source.fibers(index, axis), truth.movedim(axis, -1)[tuple(rest)])
    assert torch.equal(source.slab((slice(1, 9, 3), slice(None), slice(2, 9))), truth[1:9:3, :, 2:9])


def gram(values, box):
    """Gram matrices of the modes, and a sketch of the first unfolding whose columns are numbered."""
    rows = torch.zeros(SHAPE, dtype=values.dtype)
    rows[box] = values
    sums = {f"gram {k}": torch.zeros(n, n, dtype=values.dtype) for k, n in enumerate(SHAPE)}
    sums |= {"square": values.square().sum(), "sketch": rows.reshape(SHAPE[0], -1) @ omega()}
    for k in range(3):
        part = values.movedim(k, 0).flatten(1)
        at = box[k]
        if at.stop - at.start == SHAPE[k]:  # only whole columns have Gram matrices that add up
            sums[f"gram {k}"] = part @ part.T
    return sums


def omega():
    return torch.randn(70, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# --- requests ---


def test_requests_are_those_of_the_store(client, tmp_path, x, index):
    source = wrapped(Formula(tmp_path), client)
    assert (source.shape, source.dtype, source.chunks) == (SHAPE, torch.float64, CHUNKS)
    check(source, x, index)
    assert source.evaluations == 40 + 40 * sum(SHAPE) + 3 * 7 * 7


def test_only_the_entries_asked_for_travel_and_workers_keep_chunks(client, tmp_path, x):
    formula = Formula(tmp_path)
    source = wrapped(formula, client)
    index = torch.tensor([[0, 0, 0], [1, 1, 1], [8, 6, 9], [0, 0, 1]])
    for request in (1, 2):
        assert torch.equal(source.entries(index), torch.from_numpy(x)[index.unbind(1)])
        assert source.bytes_received == request * 4 * 8
        assert source.chunks_read == formula.reads() == 2
        assert source.bytes_read == 8 * (4 * 3 * 5 + 1 * 1 * 5)
    assert source.hit_rate == 0.5
    none = wrapped(Formula(tmp_path), client, cache_bytes=0)
    for _ in range(2):
        none.entries(index)
    assert (none.chunks_read, none.hit_rate) == (4, 0.0)


def test_a_task_holds_only_its_own_rows(tmp_path, rng):
    source = Formula(tmp_path)
    taken = []
    source._gather = lambda name, shape, parts: taken.extend(parts) or torch.zeros(shape, dtype=torch.float64)
    index = torch.stack([torch.randint(n, (5000,), generator=rng) for n in SHAPE], 1)
    source.entries(index)
    source.fibers(index, 1)
    sizes = [len(pickle.dumps(_compact(part.take))) for part in taken]
    rows = [len(part.take.keywords["group"]) for part in taken]
    assert all(size < 12 * count + 1000 for size, count in zip(sizes, rows, strict=True))
    chunk = rng.initial_seed() % 7 + np.arange(60.0).reshape(CHUNKS)
    for part in taken[:3]:
        assert np.array_equal(part.take(chunk), _compact(part.take)(chunk))


@pytest.mark.parametrize("persisted", [False, True])
def test_dask_arrays(client, x, index, persisted):
    da = pytest.importorskip("dask.array")
    array = da.from_array(x, chunks=CHUNKS) * 2.0 / 2.0
    source = ClusterSource(array.persist() if persisted else array, client)
    check(source, x, index)
    before = source.bytes_received
    source.entries(index)
    assert source.bytes_received - before == 40 * 8
    sums = source.sum_over_boxes(gram, [(slice(0, 9), slice(a, a + 1), slice(0, 10)) for a in range(7)])
    assert torch.allclose(sums["gram 0"], torch.from_numpy(np.einsum("ajk,bjk->ab", x, x)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["zarr", "folder"])
def test_stores_on_disk_with_packed_numbers(client, tmp_path, index, kind, rng):
    stored = torch.randint(-100, 100, SHAPE, generator=rng, dtype=torch.int16)
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        path = tmp_path / "x.zarr"
        array = zarr.create_array(path, shape=SHAPE, chunks=CHUNKS, dtype="i2")
        array[:] = stored.numpy()
    else:
        path = tmp_path
        for k in range(SHAPE[0]):
            torch.save(stored[k].clone(), path / f"{k}.pt")
    options = {"scale": 0.5, "offset": 3.0, "dtype": torch.float64, "fill_value": 7, "missing": 0.0}
    source, alone = ClusterSource(path, client, **options), as_source(path, **options)
    everything = (slice(None),) * 3
    assert torch.equal(source.slab(everything), alone.slab(everything))
    check(source, alone.slab(everything).numpy(), index)
    total = source.sum_over_boxes(lambda values, box: {"sum": values.sum()})["sum"]
    assert total.item() == pytest.approx(alone.slab(everything).sum().item(), rel=1e-12)


def test_masks_are_seen_here_and_there(client, tmp_path, x):
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2, 3, 4] = True
    source = wrapped(Formula(tmp_path, mask=ArraySource(mask)), client)
    with pytest.raises(ValueError, match=r"at index \(2, 3, 4\)"):
        source.entries(torch.tensor([[1, 1, 1], [2, 3, 4]]))
    with pytest.raises(ValueError, match=r"at index \(2, 3, 4\)"):
        source.sum_over_boxes(gram)


def test_cross_on_a_cluster_is_the_cross_at_home(client, tmp_path, x):
    home, away = (
        tt_cross(source, tol=1e-10, generator=torch.Generator().manual_seed(3))
        for source in (Formula(tmp_path), wrapped(Formula(tmp_path), client))
    )
    assert away.converged
    assert away.evaluations == home.evaluations
    assert all(torch.equal(a, b) for a, b in zip(away.network.cores, home.network.cores, strict=True))
    assert np.allclose(to_dense(away.network).numpy(), x, atol=1e-10)


# --- sums where the chunks are ---


def test_sums_over_boxes(client, tmp_path, x):
    source = wrapped(Formula(tmp_path), client)
    truth = torch.from_numpy(x)
    sums = source.sum_over_boxes(gram)
    assert sums["square"].item() == pytest.approx(truth.square().sum().item(), rel=1e-13)
    assert torch.allclose(sums["sketch"], truth.flatten(1) @ omega(), rtol=1e-12)
    assert source.bytes_received == sum(8 * part.numel() for part in sums.values())
    assert source.evaluations == truth.numel()
    assert source.chunks_read == 3 * 3 * 2
    assert source.bytes_read == 8 * truth.numel()
    # boxes that span whole columns of a mode
    for k in range(3):
        others = [range(0, n, 4) if j != k else range(1) for j, n in enumerate(SHAPE)]
        boxes = [
            tuple(
                slice(0, SHAPE[j]) if j == k else slice(a, min(a + 4, SHAPE[j])) for j, a in enumerate((p, q, r))
            )
            for p in others[0] for q in others[1] for r in others[2]
        ]  # fmt: skip
        unfolded = truth.movedim(k, 0).flatten(1)
        assert torch.allclose(source.sum_over_boxes(gram, boxes)[f"gram {k}"], unfolded @ unfolded.T, rtol=1e-12)
    assert source.sum_over_boxes(gram, []) == {}


def test_the_order_of_summation_is_that_of_the_boxes(client, tmp_path):
    """Against the same tree of additions made here, bit for bit, with groups that do not fill up."""
    formula = Formula(tmp_path)
    source = wrapped(formula, client)
    boxes = [source._region(key) for key in np.ndindex(3, 3, 2)]
    for group in (2, 4, 50):
        level = [_sum_boxes(formula, boxes[a : a + group], gram) for a in range(0, len(boxes), group)]
        while len(level) > 1:
            level = [_sum_sums(level[a : a + group]) for a in range(0, len(level), group)]
        sums = source.sum_over_boxes(gram, group=group)
        assert all(torch.equal(sums[name], part) for name, part in level[0]["sums"].items())


# --- workers that die, chunks that fail ---


def test_a_killed_worker_loses_no_entry(mortal, tmp_path, x, index):
    source = wrapped(Formula(tmp_path, doomed=(1, 1, 0)), mortal)
    check(source, x, index)
    assert (tmp_path / "killed").exists()
    check(source, x, index)


def test_a_killed_worker_changes_no_bit_of_a_sum(mortal, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    calm = wrapped(Formula(tmp_path / "a"), mortal).sum_over_boxes(gram, group=3)
    source = wrapped(Formula(tmp_path / "b", doomed=(2, 1, 1)), mortal)
    sums = source.sum_over_boxes(gram, group=3)
    assert (tmp_path / "b" / "killed").exists()
    assert all(torch.equal(sums[name], part) for name, part in calm.items())
    assert source.evaluations == 9 * 7 * 10


@pytest.mark.parametrize("persisted", [False, True])
def test_a_worker_killed_by_a_block_of_a_dask_array(mortal, tmp_path, x, index, persisted):
    da = pytest.importorskip("dask.array")

    def block(part, block_info=None):
        die_once(tmp_path, block_info[0]["chunk-location"] == (1, 0, 1))
        return part

    array = da.from_array(x, chunks=CHUNKS).map_blocks(block, dtype=x.dtype, meta=np.zeros((0, 0, 0)))
    source = ClusterSource(array.persist() if persisted else array, mortal)
    check(source, x, index)
    total = source.sum_over_boxes(lambda values, box: {"sum": values.sum()})["sum"]
    assert total.item() == pytest.approx(x.sum(), rel=1e-12)
    assert (tmp_path / "killed").exists()


def test_all_workers_killed_between_requests(mortal, tmp_path, x, index):
    """Kept chunks and the store's opened source die with them, and are made again."""
    source = wrapped(Formula(tmp_path), mortal)
    check(source, x, index)
    for pid in mortal.run(os.getpid).values():
        os.kill(pid, signal.SIGKILL)
    check(source, x, index)
    assert source.sum_over_boxes(gram)["square"].item() == pytest.approx(np.square(x).sum(), rel=1e-13)


def test_a_worker_killed_after_it_answered(mortal, tmp_path, x, index, monkeypatch):
    """Answers that were finished and still on a worker that dies are made again, not reported as failures."""
    distributed = pytest.importorskip("distributed")
    wait, killed = distributed.wait, []

    def wait_and_kill(futures, **options):
        result = wait(futures, **options)
        if not killed:
            killed.extend(mortal.run(os.getpid).values())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 30
            while all(future.status == "finished" for future in futures) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert any(future.status != "finished" for future in futures)
        return result

    monkeypatch.setattr(distributed, "wait", wait_and_kill)
    source = wrapped(Formula(tmp_path), mortal)
    assert torch.equal(source.entries(index), torch.from_numpy(x)[index.unbind(1)])
    assert len(killed) == 2


def test_a_chunk_that_cannot_be_read_is_named_and_the_rest_kept(client, tmp_path, x):
    formula = Formula(tmp_path, broken=(2, 2, 1), retries=1)
    source = wrapped(formula, client)
    index = torch.tensor([[0, 0, 0], [8, 6, 9], [1, 1, 1]])
    with pytest.raises(ChunkError, match=r"entries: chunk \(2, 2, 1\) .* 2 attempts \(OSError: torn\)") as caught:
        source.entries(index)
    assert caught.value.key == (2, 2, 1)
    assert caught.value.region == (slice(8, 9), slice(6, 7), slice(5, 10))
    assert caught.value.read.tolist() == [True, False, True]
    assert torch.equal(caught.value.values[::2], torch.from_numpy(x)[index[::2].unbind(1)])
    with pytest.raises(ChunkError, match="torn"):
        source.sum_over_boxes(gram, group=2)


def test_a_block_that_raises_is_named(client, x):
    da = pytest.importorskip("dask.array")

    def block(part, block_info=None):
        if block_info[0]["chunk-location"] == (0, 0, 1):
            raise OSError("torn block")
        return part

    array = da.from_array(x, chunks=CHUNKS).map_blocks(block, dtype=x.dtype, meta=np.zeros((0, 0, 0)))
    source = ClusterSource(array, client, retries=0)
    with pytest.raises(ChunkError, match=r"chunk \(0, 0, 1\) .*OSError: torn block") as caught:
        source.entries(torch.tensor([[0, 0, 9], [0, 0, 0]]))
    assert caught.value.read.tolist() == [False, True]


# --- refusals ---


def test_refusals(client, tmp_path, x):
    with pytest.raises(TypeError, match=r"expected a synchronous distributed\.Client, got str"):
        ClusterSource(Formula(tmp_path), "tcp://nowhere:8786")
    with pytest.raises(TypeError, match="read by chunks, got ndarray"):
        ClusterSource(x, client)
    unsendable = Formula(tmp_path)
    unsendable.handle = lambda: None
    with pytest.raises(TypeError, match="the workers must be able to open the store, got Formula"):
        ClusterSource(unsendable, client)
    source = wrapped(Formula(tmp_path), client)
    with pytest.raises(ValueError, match="group must be an integer >= 2, got 1"):
        source.sum_over_boxes(gram, group=1)
    with pytest.raises(ValueError, match="axis 0 needs 0 <= start <= stop <= 9"):
        source.sum_over_boxes(gram, [(slice(0, 10), slice(0, 1), slice(0, 1))])
    with pytest.raises(ValueError, match="same names and shapes"):
        source.sum_over_boxes(lambda values, box: {"values": values})


def test_a_source_that_is_sent_is_the_store_without_the_cluster(client, tmp_path, x, index):
    source = pickle.loads(pickle.dumps(wrapped(Formula(tmp_path), client)))
    assert isinstance(source, Formula)
    check(source, x, index)


def test_an_answer_without_a_cluster(tmp_path):
    """What a worker does, here: read once, keep, answer."""
    formula = Formula(tmp_path)
    for size in (60 * 8, 0):
        answer = _answer(formula, (12345, 0, 0, 0), 1 << 20, "entries", lambda chunk: chunk[0, 0, :2])
        assert answer["bytes"] == size
        assert answer["taken"].shape == (2,)
