"""Sources agree with the array they stand for, entry by entry; counts are exact; what is wrong is refused by index."""

import base64
import itertools
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_approx import ChunkedSource, ChunkError, as_source
from cross_approx.sources.chunked import ChunkCache, regular, row_chunks
from cross_approx.sources.packing import packing

DTYPES = ["f8", ">f4", "f2", "c16", ">c8", "i8", ">i2", "u1", "u2", "u4", "u8", "?"]


class Grid(ChunkedSource):
    """Chunks of an array in memory; writes down what it is asked for and fails as often as it is told."""

    def __init__(self, array, chunks, fails=(), **options):
        grid = [tuple(sizes) for sizes in chunks] if chunks and not isinstance(chunks[0], int) else None
        grid = regular(array.shape, chunks) if grid is None else grid
        stored = torch.from_numpy(np.empty(0, array.dtype.newbyteorder("="))).dtype
        super().__init__(array.shape, stored, grid, backoff=options.pop("backoff", 0), **options)
        self.array, self.fails, self.asked = array, list(fails), []

    def _read(self, key, region):
        self.asked.append(key)
        if self.fails.count(key):
            self.fails.remove(key)
            raise OSError("disk on fire")
        return np.array(self.array[region])


def random_array(rng, shape, dtype, order):
    kind = np.dtype(dtype).kind
    if kind == "b":
        x = rng.random(shape) < 0.5
    elif kind in "iu":
        x = rng.integers(0 if kind == "u" else -100, 100, shape)
    else:
        x = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if kind == "c" else 0)
    x = np.asarray(x).astype(dtype)
    return {"C": x, "F": np.asarray(x, order="F"), "flip": x[(slice(None, None, -1),) * x.ndim]}[order]


def exact(array):
    return array.astype("c16" if array.dtype.kind == "c" else "f8")


@given(st.data())
def test_sources_agree_entry_by_entry(tmp_path, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    dtype, order = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["C", "F", "flip"]))
    x = random_array(rng, shape, dtype, order)
    mapped = np.memmap(tmp_path / "x.bin", x.dtype, "w+", shape=shape or (1,))
    mapped[...] = x
    budget = data.draw(st.sampled_from([0, 40, 10**6]))
    plain = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
    uneven = [np.diff(np.unique([0, n, *rng.integers(0, n + 1, 2)])).tolist() for n in shape]
    sources = [
        as_source(x),
        as_source(mapped if shape else mapped[0:1].reshape(())),
        as_source(plain),
        as_source(lambda index: plain[index.unbind(1)] if shape else plain.repeat(len(index)), shape=shape),
        as_source(lambda *i: x[i], shape=shape, vectorize=True),
        Grid(x, tuple(int(rng.integers(1, n + 2)) for n in shape), cache_bytes=budget),
        Grid(x, uneven, cache_bytes=budget),
    ]
    count = data.draw(st.integers(0, 12))
    rows = [[int(rng.integers(n)) for n in shape] for _ in range(count)]
    index = torch.tensor(rows, dtype=torch.int64).reshape(count, len(shape))
    truth = exact(x)
    box = []
    for n in shape:
        start, stop = sorted(rng.integers(0, n + 1, 2).tolist())
        box.append(slice(start, stop, int(rng.integers(1, 4))))
    for source in sources:
        before = source.evaluations
        assert source.shape == shape
        values = source.entries(index)
        assert values.dtype == source.dtype == sources[0].dtype
        assert values.tolist() == [truth[tuple(row)] for row in rows]
        slab = source.slab(box)
        assert np.array_equal(slab.numpy().astype(truth.dtype), truth[tuple(box)])
        asked = count + slab.numel()
        for axis in range(len(shape)):
            fibers = source.fibers(index, axis)
            assert fibers.shape == (count, shape[axis])
            for row, fiber in zip(rows, fibers, strict=True):
                assert fiber.tolist() == truth[(*row[:axis], slice(None), *row[axis + 1 :])].tolist()
            asked += fibers.numel()
        assert source.evaluations - before == asked


# --- chunks: what is read, what is kept ---


@given(st.data())
def test_counts_are_exact(data):
    """Against a model of the cache: distinct chunks of a request, cached ones first, least recently used dropped."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x = rng.standard_normal((7, 5))
    budget = data.draw(st.sampled_from([0, 48, 100, 10**6]))
    source = Grid(x, (3, 2), cache_bytes=budget)
    hits = lookups = chunks = size = evaluations = 0
    for _ in range(4):
        index = torch.tensor(np.stack([rng.integers(0, 7, 6), rng.integers(0, 5, 6)], 1))
        keys = {(i // 3, j // 2) for i, j in index.tolist()}
        cached = set(source._cache.chunks)
        asked = len(source.asked)
        source.entries(index)
        new = source.asked[asked:]
        assert sorted(new) == sorted(keys - cached)  # each once, and none that was there
        hits, lookups, evaluations = hits + len(keys & cached), lookups + len(keys), evaluations + 6
        chunks += len(new)
        size += sum(8 * min(3, 7 - 3 * a) * min(2, 5 - 2 * b) for a, b in new)
        assert sum(chunk.nbytes for chunk in source._cache.chunks.values()) == source._cache.size <= budget
    assert (source.chunks_read, source.bytes_read, source.evaluations) == (chunks, size, evaluations)
    assert source.hit_rate == hits / lookups


def test_fibers_and_slabs_read_each_chunk_once():
    x = np.random.default_rng(0).standard_normal((9, 8, 7))
    source = Grid(x, (4, 4, 4), cache_bytes=0)
    source.fibers(torch.tensor([[0, 0, 0], [1, 5, 6], [3, 0, 2], [8, 0, 0]]), axis=1)
    keys = {(a, c, b) for a, b in ((0, 0), (0, 1), (2, 0)) for c in (0, 1)}
    assert sorted(source.asked) == sorted(keys)
    source.asked.clear()
    source.slab((slice(3, 5), slice(0, 8, 5), slice(6, 7)))
    assert sorted(source.asked) == sorted(itertools.product((0, 1), (0, 1), (1,)))


def test_least_recently_used_is_dropped():
    cache = ChunkCache(24)
    for key in (0, 1, 2):
        cache.put((key,), np.zeros(1))
    assert cache.get((0,)) is not None
    cache.put((3,), np.zeros(1))
    assert list(cache.chunks) == [(2,), (0,), (3,)]
    cache.put((4,), np.zeros(4))  # larger than the budget: not kept, and nothing dropped for it
    assert list(cache.chunks) == [(2,), (0,), (3,)]


def test_memory_stays_within_cache_and_a_chunk():
    class Made(ChunkedSource):
        def _read(self, key, region):
            return np.full([s.stop - s.start for s in region], key[0], dtype=np.float32)

    source = Made((4096, 64, 64), torch.float32, regular((4096, 64, 64), (16, 64, 64)), cache_bytes=1 << 20)
    tracemalloc.start()
    values = source.fibers(torch.tensor([[0, 1, 2]]), axis=0)
    source.entries(torch.stack([torch.arange(0, 4096, 16), torch.zeros(256), torch.zeros(256)], 1).long())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values[0, ::16].tolist() == list(range(256))
    assert source.bytes_read > 100 << 20
    assert peak <= (1 << 20) + (1 << 18) + (1 << 19)  # cache, chunk, and the request with its groups


def test_views_of_larger_memory_are_copied():
    base = np.zeros((100, 100))

    class Views(ChunkedSource):
        def _read(self, key, region):
            return base[region]

    source = Views((100, 100), torch.float64, regular((100, 100), (10, 10)))
    source.entries(torch.tensor([[0, 0]]))
    assert not np.shares_memory(source._cache.chunks[0, 0], base)


def test_row_chunks_cover_and_fit():
    for shape in [(), (5,), (3, 10), (2, 3, 4), (1, 7, 1), (0, 3)]:
        for room in (1, 8, 60, 10**6):
            grid = row_chunks(shape, 8, room)
            assert [sum(sizes) for sizes in grid] == list(shape)
            assert np.prod([max(sizes, default=1) for sizes in grid]) * 8 <= max(room, 8)


# --- readings that fail ---


def test_a_failing_chunk_is_tried_again(monkeypatch):
    waits = []
    monkeypatch.setattr("cross_approx.sources.chunked.time.sleep", waits.append)
    x = np.arange(6.0)
    source = Grid(x, (2,), fails=[(1,), (1,)], backoff=0.1)
    assert source.entries(torch.tensor([[3], [0]])).tolist() == [3.0, 0.0]
    assert waits == [0.1, 0.2]
    assert (source.chunks_read, source.bytes_read) == (2, 32)  # failures are no readings


def test_a_broken_chunk_is_reported_and_the_rest_kept():
    x = np.arange(6.0)
    source = Grid(x, (2,), fails=[(1,)] * 4, retries=3)
    with pytest.raises(
        ChunkError, match=r"chunk \(1,\) \(entries \[2:4\]\).* 4 attempts \(OSError: disk on fire"
    ) as caught:
        source.entries(torch.tensor([[3], [0], [1]]))
    error = caught.value
    assert (error.key, error.region) == ((1,), (slice(2, 4),))
    assert error.read.tolist() == [False, True, True]
    assert error.values[1:].tolist() == [0.0, 1.0]
    assert error.values[0].isnan()
    assert source.chunks_read == 1
    # the store is well again: only the broken chunk is read
    source.asked.clear()
    assert source.slab((slice(0, 4),)).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert source.asked == [(1,)]


def test_chunks_that_are_not_as_announced(monkeypatch):
    source = Grid(np.arange(6.0), (2,), retries=0)
    for chunk, message in [
        (np.zeros(3), r"shape \(2,\), got \(3,\)"),
        (np.zeros(2, "f4"), "float64, got torch.float32"),
        (np.ma.masked_equal(np.zeros(2), 0), "masked array"),
    ]:
        monkeypatch.setattr(source, "_read", lambda key, region, chunk=chunk: chunk)
        with pytest.raises(ChunkError, match=message):
            source.entries(torch.tensor([[0]]))

    def starved(key, region):
        raise MemoryError

    monkeypatch.setattr(source, "_read", starved)
    with pytest.raises(MemoryError):
        source.entries(torch.tensor([[0]]))


# --- stored numbers ---


@given(st.integers(-(2**15), 2**15 - 1), st.floats(-1e3, 1e3), st.floats(0.001, 100), st.sampled_from([None, -7.5]))
def test_scale_offset_and_fill(number, offset, scale, missing):
    x = np.array([number, 5, -1], dtype=">i2")
    fill = {"fill_value": 5, "missing": 2.0 if missing is None else missing}
    for source in (as_source(x, scale=scale, offset=offset, dtype=torch.float64, **fill),) + tuple(
        Grid(x, (chunk,), scale=scale, offset=offset, dtype=torch.float64, **fill) for chunk in (1, 3)
    ):
        values = source.slab((slice(None),)).tolist()
        assert values == [
            fill["missing"] if number == 5 else float(number) * scale + offset,
            fill["missing"],
            -scale + offset,
        ]


def test_attributes_of_stores():
    cf = {"scale_factor": np.array([0.5]), "add_offset": "1.5", "_FillValue": -9, "missing_value": [-8, 10**6, 0.5]}
    pack = packing("t", torch.int16, attributes=cf, missing=0)
    assert (pack.scale, pack.offset, pack.fills, pack.dtype) == (0.5, 1.5, (-9, -8), torch.float32)
    assert pack.unpack(torch.tensor([-9, -8, 3], dtype=torch.int16)).tolist() == [0.0, 0.0, 3.0]
    assert packing("t", torch.int16, attributes=cf, scale=2, offset=0, fill_value=7).fills == (7,)  # the caller wins
    # zarr 3 writes doubles in base64; float fills are compared as the store rounds them
    text = base64.b64encode(struct.pack("<d", 1e20)).decode()
    pack = packing("t", torch.float32, attributes={"_FillValue": text}, missing=-1)
    assert pack.unpack(torch.tensor([1e20, 2.0])).tolist() == [-1.0, 2.0]
    pack = packing("t", torch.float16, attributes={"_FillValue": float("nan")}, missing=-1)
    assert pack.unpack(torch.tensor([float("nan"), 2.0]).half()).tolist() == [-1.0, 2.0]
    with pytest.raises(ValueError, match="_Unsigned"):
        packing("t", torch.int8, attributes={"_Unsigned": "true"})
    with pytest.raises(ValueError, match="attribute scale_factor must be a number, got 'twice'"):
        packing("t", torch.int8, attributes={"scale_factor": "twice"})


def test_an_integer_fill_does_not_wrap_around():
    x = np.array([-31072, 2], dtype="i2")  # 100000 modulo 2^16
    assert Grid(x, (2,), attributes={"_FillValue": 100000}).entries(torch.tensor([[0]])).tolist() == [-31072.0]
    with pytest.raises(ValueError, match=r"fill_value must be a number of torch\.int16, got 100000"):
        as_source(x, fill_value=100000)
    big = np.array([2**64 - 1, 7], dtype="u8")
    assert as_source(big, fill_value=2**64 - 1, missing=0).slab((slice(None),)).tolist() == [0.0, 7.0]


def test_masks():
    x = np.arange(6.0).reshape(2, 3)
    hidden = np.array([[0, 1, 0], [0, 0, 1]], dtype=bool)
    index = torch.tensor([[0, 0], [0, 1], [1, 2]])
    for mask in (hidden, torch.from_numpy(hidden), lambda i: torch.from_numpy(hidden)[i.unbind(1)]):
        if callable(mask):
            mask = as_source(mask, shape=(2, 3))
        for source in (as_source(x, mask=mask, missing=-1), Grid(x, (1, 2), mask=as_source(mask), missing=-1)):
            assert source.entries(index).tolist() == [0.0, -1.0, -1.0]
            assert source.fibers(index[:1], 1).tolist() == [[0.0, -1.0, 2.0]]
            assert source.slab((slice(1, 2), slice(1, 3))).tolist() == [[4.0, -1.0]]
    masked = np.ma.array(x, mask=hidden)
    assert as_source(masked, missing=9).entries(index).tolist() == [0.0, 9.0, 9.0]
    with pytest.raises(ValueError, match=r"got nan at index \(0, 1\)"):
        as_source(masked).entries(index)
    assert as_source(np.ma.array(x)).entries(index).tolist() == [0.0, 1.0, 5.0]
    with pytest.raises(ValueError, match=r"mask must have the source's shape \(2, 3\), got \(2,\)"):
        as_source(x, mask=np.zeros(2, bool))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_index(bad):
    x = np.zeros((4, 5))
    x[2, 3] = bad
    called = as_source(lambda *i: x[i], shape=(4, 5), vectorize=True)
    for source in (as_source(x), as_source(torch.from_numpy(x)), Grid(x, (3, 2)), called):
        assert source.entries(torch.tensor([[0, 0]])).tolist() == [0.0]
        where = rf"got {bad} at index \(2, 3\) \(1 of "
        with pytest.raises(ValueError, match="entries: .*" + where):
            source.entries(torch.tensor([[0, 0], [2, 3]]))
        with pytest.raises(ValueError, match="fibers: .*" + where):
            source.fibers(torch.tensor([[0, 0], [0, 3]]), axis=0)
        with pytest.raises(ValueError, match="slab: .*" + where):
            source.slab((slice(0, 4, 2), slice(1, 5, 2)))
    assert as_source(np.array([6e4]), dtype=torch.float16).entries(torch.tensor([[0]])).isfinite()
    with pytest.raises(ValueError, match=r"got inf at index \(0,\)"):  # too large for the dtype asked for
        as_source(np.array([1e5]), dtype=torch.float16).entries(torch.tensor([[0]]))


# --- functions ---


def test_a_function_is_called_as_often_as_counted():
    calls = []

    def function(index):
        calls.append(len(index))
        return index.sum(1).double()

    source = as_source(function, shape=(3, 4), dtype=torch.float64, batch=5)
    assert (calls, source.evaluations) == ([], 0)
    source.slab((slice(None), slice(None)))
    assert (calls, source.evaluations) == ([5, 5, 2], 12)
    source.entries(torch.zeros(0, 2, dtype=torch.int64))
    assert calls == [5, 5, 2]
    probed = as_source(function, shape=(3, 4))
    assert (calls[3:], probed.evaluations, probed.bytes_read) == ([1], 1, 8)


def test_dtypes_of_functions():
    assert as_source(lambda i: i.sum(1), shape=(2,)).dtype == torch.float64
    assert as_source(lambda i: i.sum(1).numpy().astype(">f4"), shape=(2,)).dtype == torch.float32
    assert as_source(lambda i: 1.5, shape=(2,), vectorize=True).dtype == torch.float64
    assert as_source(lambda i: torch.tensor(1.5), shape=(2,), vectorize=True).dtype == torch.float32
    assert as_source(lambda i: i[:, 0] * 1j, shape=(2,)).dtype.is_complex
    assert as_source(lambda i: i / 0, shape=(0, 3)).slab((slice(None), slice(None))).shape == (0, 3)  # never called


def test_gradients_flow():
    weight = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 0], [1, 0]])
    source = as_source(lambda i: torch.exp(i.double() @ weight), shape=(2, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda _: source.entries(index), (weight,))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: as_source(x, scale=2.0).entries(index), (x,))
    assert torch.autograd.gradcheck(lambda x: as_source(x).fibers(index, 0), (x,))


# --- values are the caller's ---


def test_values_do_not_share_memory_with_the_tensor():
    x = torch.ones(3)
    source = as_source(x)
    index = torch.tensor([[1]])
    for values in (source.slab((slice(None),)), source.fibers(index, 0), source.entries(index)):
        values.zero_()
    as_source(torch.ones(())).entries(torch.zeros(1, 0).long()).zero_()
    assert x.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.bool])
def test_dtypes_numpy_lacks_or_torch_hardly_has(dtype):
    x = torch.tensor([[0.0, 1.0], [2.0, 0.5]]).to(dtype)
    source = as_source(x)
    assert source.dtype == (dtype if dtype == torch.bfloat16 else torch.float32)
    index = torch.tensor([[1, 1], [1, 0]])
    assert source.entries(index).tolist() == [float(x[1, 1]), float(x[1, 0])]
    assert source.fibers(index[:1], 0).tolist() == [[1.0, float(x[1, 1])]]


# --- refusals ---


@pytest.mark.parametrize("chunked", [False, True])
def test_requests_out_of_bounds(chunked):
    x = np.zeros((3, 4))
    source = Grid(x, (2, 2)) if chunked else as_source(x)
    for index, message in [
        ([[0, 0], [-1, 2]], r"axis 0 must be in 0\.\.2 \(no negative ones\), got \(-1, 2\) in row 1"),
        ([[0, 4]], r"axis 1 must be in 0\.\.3 .* got \(0, 4\) in row 0"),
        ([[0, 0, 0]], r"shape \(B, d = 2\), got \(1, 3\)"),
        ([0, 0], r"shape \(B, d = 2\), got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match="entries: .*" + message):
            source.entries(torch.tensor(index))
    with pytest.raises(TypeError, match=r"integer tensor of indices .* got torch.float32"):
        source.entries(torch.zeros(1, 2))
    with pytest.raises(TypeError, match="got list"):
        source.entries([[0, 0]])
    with pytest.raises(ValueError, match=r"fibers: axis must be in 0\.\.1, got 2"):
        source.fibers(torch.zeros(1, 2).long(), 2)
    assert source.fibers(torch.tensor([[99, 1]]), 0).shape == (1, 3)  # the axis' own column is not looked at
    for first in (slice(-1, 2), slice(2, 1), slice(0, 9), slice(0, 2, -1)):
        with pytest.raises(ValueError, match="slab: axis 0 needs 0 <= start <= stop <= 3"):
            source.slab((first, slice(None)))
    with pytest.raises(ValueError, match=r"one slice an axis \(d = 2\), got 1"):
        source.slab((slice(None),))
    with pytest.raises(TypeError, match=r"slice\(i, i \+ 1\)"):
        source.slab((0, slice(None)))
    assert source.evaluations == 3  # refused requests are not counted


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: as_source({}), TypeError, "got dict"),
        (lambda: as_source(len), TypeError, "a function needs shape="),
        (lambda: as_source(np.zeros(3), vectorize=True), ValueError, "for functions, got ndarray"),
        (lambda: as_source(np.zeros(3), name="x"), ValueError, "name is for files"),
        (lambda: as_source(np.zeros(3), shape=(4,)), ValueError, r"shape must be the source's \(3,\), got \(4,\)"),
        (lambda: as_source(np.array(["a"])), TypeError, "got <U1"),
        (lambda: as_source(np.zeros(2, np.longdouble)), TypeError, "of torch, got"),
        (lambda: as_source(np.zeros(2), dtype=torch.int64), ValueError, "floating or complex dtype, got torch.int64"),
        (lambda: as_source(np.zeros(2, "c16"), dtype=torch.float64), ValueError, "complex dtype, got torch.float64"),
        (lambda: as_source(np.zeros(2), scale=0), ValueError, "scale must not be zero"),
        (lambda: as_source(np.zeros(2), offset=float("nan")), ValueError, "offset must be finite"),
        (lambda: as_source(np.zeros(2), missing=float("nan")), ValueError, "missing must be finite"),
        (lambda: as_source(np.zeros(2, "f2"), missing=1e9), ValueError, "missing must be a finite torch.float16"),
        (lambda: as_source(torch.zeros(2), device="meta"), ValueError, "stays on its device cpu"),
        (lambda: as_source(torch.zeros(2, device="meta")), TypeError, "dense tensor with data"),
        (lambda: as_source(torch.eye(2).to_sparse()), TypeError, "dense tensor with data"),
        (lambda: as_source(as_source(torch.eye(2)), scale=2), ValueError, "a source already"),
        (lambda: as_source(len, shape=(2,), scale=2), ValueError, "are for stores, got a function"),
        (lambda: as_source(len, shape=(2, -1)), ValueError, "sizes >= 0"),
        (lambda: as_source(lambda i: i, shape=(2, 2)), ValueError, r"expected shape \(B = 1,\), got \(1, 2\)"),
        (lambda: as_source(lambda i: 1.0, shape=(2, 2)), TypeError, "tensor or an array, got float"),
        (lambda: Grid(np.zeros(3), ((1, 1),)), ValueError, r"chunks must cover the shape \(3,\)"),
        (lambda: Grid(np.zeros(3), (1,), cache_bytes=-1), ValueError, "cache_bytes must be at least 0, got -1"),
    ],
)
def test_refusals(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_complex_values_of_a_real_function():
    source = as_source(lambda i: i[:, 0] * 1j, shape=(2,), dtype=torch.float64)
    with pytest.raises(TypeError, match=r"values of torch\.float64, got torch\.complex64"):
        source.entries(torch.tensor([[0]]))


def test_a_source_is_returned_as_it_is():
    source = as_source(torch.eye(2))
    assert as_source(source, shape=(2, 2)) is source
