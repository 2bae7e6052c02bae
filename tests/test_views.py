"""Views of sources: the tensor they stand for, the base's chunks, counts, refusals and gradients."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cross_approx import (
    ChunkedSource,
    Quantization,
    Source,
    as_source,
    merge_axes,
    pad_axes,
    permute_axes,
    read_boxes,
    split_axis,
    split_digits,
)
from cross_approx.sources.chunked import regular

F64 = torch.float64


class Grid(ChunkedSource):
    """Chunks of an array in memory; writes down which are read."""

    def __init__(self, array, chunks, **options):
        super().__init__(array.shape, torch.float64, regular(array.shape, chunks), backoff=0, **options)
        self.array, self.asked = array, []

    def _read(self, key, region):
        self.asked.append(key)
        return np.array(self.array[region])


class Seen:
    """A function that writes down every index it is asked for, and refuses those out of bounds."""

    def __init__(self, x):
        self.x, self.asked = x, []

    def __call__(self, index):
        assert bool((index >= 0).all())
        assert bool((index < torch.tensor(self.x.shape)).all())
        self.asked += [tuple(row) for row in index.tolist()]
        return self.x[tuple(index.unbind(1))]


def padded(x, shape, fill):
    """By numpy."""
    widths = [(0, m - n) for m, n in zip(shape, x.shape, strict=True)]
    mode = {"edge": "edge", "zero": "constant"}[fill]
    return torch.from_numpy(np.pad(x.numpy(), widths, mode=mode))


X = torch.arange(4 * 6 * 5, dtype=F64).reshape(4, 6, 5).sin()
VIEWS = {
    "permuted": (lambda s: permute_axes(s, (2, 0, 1)), X.permute(2, 0, 1)),
    "split first": (lambda s: split_axis(s, 0, (2, 1, 2)), X.reshape(2, 1, 2, 6, 5)),
    "split middle": (lambda s: split_axis(s, 1, (3, 2)), X.reshape(4, 3, 2, 5)),
    "split last": (lambda s: split_axis(s, 2, (5,)), X),
    "merged first": (lambda s: merge_axes(s, 0, 1), X.reshape(24, 5)),
    "merged last": (lambda s: merge_axes(s, 1, 2), X.reshape(4, 30)),
    "merged all": (lambda s: merge_axes(s, 0, 2), X.reshape(120)),
    "merged one": (lambda s: merge_axes(s, 1, 1), X),
    "padded zero": (lambda s: pad_axes(s, (4, 9, 7)), padded(X, (4, 9, 7), "zero")),
    "padded edge": (lambda s: pad_axes(s, (5, 6, 9), "edge"), padded(X, (5, 6, 9), "edge")),
    "digits": (
        lambda s: permute_axes(
            split_axis(split_axis(pad_axes(s, (4, 6, 8), "edge"), 2, (2, 4)), 0, (2, 2)), (0, 3, 1, 4, 2)
        ),
        padded(X, (4, 6, 8), "edge").reshape(2, 2, 6, 2, 4).permute(0, 3, 1, 4, 2),
    ),
    "matrix of pairs": (
        lambda s: merge_axes(permute_axes(split_axis(merge_axes(s, 1, 2), 1, (6, 5)), (1, 0, 2)), 0, 1),
        X.permute(1, 0, 2).reshape(24, 5),
    ),
}
BASES = {
    "tensor": lambda: as_source(X),
    "chunks": lambda: Grid(X.numpy(), (3, 2, 4)),
    "no cache": lambda: Grid(X.numpy(), (2, 6, 3), cache_bytes=0),
    "function": lambda: as_source(lambda i: X[tuple(i.unbind(1))], shape=X.shape, dtype=F64),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_the_tensor_it_stands_for(view, base, rng):
    make, x = VIEWS[view]
    source = make(BASES[base]())
    assert source.shape == tuple(x.shape)
    assert source.dtype == F64
    index = torch.stack([torch.randint(n, (50,), generator=rng) for n in x.shape], 1)
    assert torch.equal(source.entries(index), x[tuple(index.unbind(1))])
    for axis in range(x.ndim):
        rest = index.clone()
        rest[:, axis] = -7  # not looked at
        fibers = x.movedim(axis, -1)[tuple(index[:, [k for k in range(x.ndim) if k != axis]].unbind(1))]
        assert torch.equal(source.fibers(rest, axis), fibers.reshape(50, -1) if x.ndim > 1 else x.expand(50, -1))
    assert torch.equal(source.slab((slice(None),) * x.ndim), x)


@given(st.data())
def test_slabs(data):
    make, x = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))]
    source = make(BASES[data.draw(st.sampled_from(sorted(BASES)))]())
    box = []
    for n in x.shape:
        start = data.draw(st.integers(0, n))
        box.append(slice(start, data.draw(st.integers(start, n)), data.draw(st.integers(1, 4))))
    assert torch.equal(source.slab(tuple(box)), x[tuple(box)])


def test_the_base_is_asked_once_and_counts():
    """A fiber and a slab of a view cost what they cost the base, chunk by chunk."""
    base = Grid(X.numpy(), (2, 3, 5))
    view = permute_axes(split_axis(base, 1, (3, 2)), (3, 0, 1, 2))
    assert view.evaluations == 0
    view.slab((slice(0, 5), slice(0, 2), slice(0, 1), slice(0, 2)))  # rows 0..1 of axis 1: one chunk
    assert base.asked == [(0, 0, 0)]
    assert view.evaluations == base.evaluations == 20
    assert view.bytes_read == base.bytes_read == 2 * 3 * 5 * 8
    view.entries(torch.tensor([[0, 0, 0, 1], [4, 1, 1, 0]]))  # the second is index 2 of axis 1: the same chunk
    assert base.asked == [(0, 0, 0)]
    assert view.hit_rate == base.hit_rate == 0.5
    assert view.evaluations == base.evaluations == 22
    assert view.chunks_read == base.chunks_read == 1
    view.fibers(torch.tensor([[0, 3, 2, 1]]), 0)
    assert base.asked == [(0, 0, 0), (1, 1, 0)]
    assert view.evaluations == 27


@pytest.mark.parametrize("fill", ["edge", "zero"])
def test_nothing_is_asked_beyond_the_bounds(fill):
    seen = Seen(X)
    view = pad_axes(as_source(seen, shape=X.shape, dtype=F64), (7, 6, 8), fill)
    assert torch.equal(view.slab((slice(None),) * 3), padded(X, (7, 6, 8), fill))
    assert sorted(seen.asked) == list(itertools.product(*map(range, X.shape)))  # each once
    seen.asked.clear()
    assert torch.equal(
        view.slab((slice(4, 7), slice(1, 2), slice(0, 8, 3))), padded(X, (7, 6, 8), fill)[4:7, 1:2, 0:8:3]
    )
    assert len(seen.asked) == (3 if fill == "edge" else 0)  # columns 0, 3 and 4, which stands for 6
    seen.asked.clear()
    outside = torch.tensor([[4, 0, 0], [0, 0, 0], [6, 5, 7]])
    view.entries(outside)
    view.fibers(outside, 0)
    assert len(seen.asked) == (3 + 12 if fill == "edge" else 1 + 8)
    assert view.evaluations == 120 + (3 if fill == "edge" else 0) + len(seen.asked)


@pytest.mark.parametrize("view", VIEWS)
def test_gradients_flow(view):
    make, x = VIEWS[view]
    y = X.clone().requires_grad_()
    source = make(as_source(y))
    index = torch.stack([torch.arange(20) * 7 % n for n in x.shape], 1)
    total = source.entries(index).sum() + source.fibers(index[:3], 0).square().sum()
    (total + source.slab((slice(1, None),) * x.ndim).cos().sum()).backward()

    # the same through a map of positions
    z = X.clone().requires_grad_()
    places = make(as_source(torch.arange(1.0, X.numel() + 1).reshape(X.shape).double())).slab((slice(None),) * x.ndim)
    dense = torch.cat([z.new_zeros(1), z.flatten()])[places.long()]
    first = dense.movedim(0, -1)[tuple(index[:3, 1:].unbind(1))] if x.ndim > 1 else dense.expand(3, -1)
    total = dense[tuple(index.unbind(1))].sum() + first.square().sum()
    (total + dense[(slice(1, None),) * x.ndim].cos().sum()).backward()
    torch.testing.assert_close(y.grad, z.grad)


@pytest.mark.parametrize("shape", [(17, 12), (1, 23, 1, 4), (1,), (1, 1), (5, 1), (29,)])
@pytest.mark.parametrize("order", ["C", "F", "interleaved"])
def test_split_digits_is_the_split_tensor(shape, order, rng):
    q = Quantization.of(shape, order)
    x = torch.randn(shape, dtype=F64, generator=rng)
    seen = Seen(x)
    view = split_digits(as_source(seen, shape=shape, dtype=F64), q)
    assert view.shape == q.sizes
    assert torch.equal(view.slab((slice(None),) * len(q.sizes)), q.split(x))
    assert len(seen.asked) == view.evaluations
    index = torch.stack([torch.randint(n, (40,), generator=rng) for n in shape], 1)
    assert torch.equal(view.entries(q.digits(index)), x[tuple(index.unbind(1))])
    every = torch.stack([torch.randint(n, (40,), generator=rng) for n in q.sizes], 1)
    assert torch.equal(view.fibers(every, 0)[range(40), every[:, 0]], q.split(x)[tuple(every.unbind(1))])


def test_chunks_of_permuted_and_padded_axes_are_those_of_the_base():
    base = Grid(X.numpy(), (3, 2, 4))
    assert permute_axes(base, (2, 0, 1)).chunks == (4, 3, 2)
    assert pad_axes(base, (9, 9, 9)).chunks == (3, 2, 4)
    assert split_axis(base, 0, (2, 2)).chunks is None


class Uneven(Grid):
    """Chunks of different sizes; writes down in which thread they are read."""

    def __init__(self, **options):
        sizes = [(1, 3), (2, 2, 1, 1), (5,)]
        ChunkedSource.__init__(self, X.shape, F64, sizes, backoff=0, **options)
        self.array, self.asked, self.threads = X.numpy(), [], set()

    def _read(self, key, region):
        self.threads.add(threading.current_thread().name.rpartition("_")[0])
        return super()._read(key, region)


WHOLE = {  # views whose chunks are those of the base
    "permuted": (lambda s: permute_axes(s, (2, 0, 1)), X.permute(2, 0, 1)),
    "padded zero": (lambda s: pad_axes(s, (9, 7, 23)), padded(X, (9, 7, 23), "zero")),
    "permuted of padded": (
        lambda s: permute_axes(pad_axes(s, (4, 13, 5)), (1, 2, 0)),
        padded(X, (4, 13, 5), "zero").permute(1, 2, 0),
    ),
    "padded of permuted": (
        lambda s: pad_axes(permute_axes(s, (1, 2, 0)), (6, 8, 4)),
        padded(X.permute(1, 2, 0), (6, 8, 4), "zero"),
    ),
}


@pytest.mark.parametrize("prefetch", [None, False, True])
@pytest.mark.parametrize("cache_bytes", [0, 100, 10**6])
@pytest.mark.parametrize("box_bytes", [1, 300, 10**6])
@pytest.mark.parametrize("view", WHOLE)
def test_a_pass_over_a_view_reads_every_chunk_once(view, box_bytes, cache_bytes, prefetch):
    make, x = WHOLE[view]
    base = Uneven(cache_bytes=cache_bytes)
    seen = torch.full(x.shape, torch.nan, dtype=F64)
    for box, values in read_boxes(make(base), box_bytes=box_bytes, prefetch=prefetch):
        assert seen[box].isnan().all()
        seen[box] = values
    assert torch.equal(seen, x)
    assert len(base.asked) == len(set(base.asked)) == 2 * 4
    assert base.chunks_read == 2 * 4
    assert base.threads == ({"tnlayers-read"} if prefetch is not False else {""})


@pytest.mark.parametrize("view", VIEWS)
def test_a_pass_over_any_view_is_the_tensor_and_leaves_the_cache_as_it_was(view):
    make, x = VIEWS[view]
    base = Uneven(cache_bytes=10**6)
    cache = base._cache
    seen = torch.full(x.shape, torch.nan, dtype=F64)
    for box, values in read_boxes(make(base), box_bytes=64):
        seen[box] = values
    assert torch.equal(seen, x)
    assert base._cache is cache
    assert base.chunks_read == 2 * 4


def test_edges_of_views():
    base = Uneven()

    def edges(source):
        return [edge.tolist() for edge in source.edges]

    assert edges(permute_axes(base, (2, 0, 1))) == [[0, 5], [0, 1, 4], [0, 2, 4, 5, 6]]
    assert edges(pad_axes(base, (4, 6, 5))) == edges(base)
    # the last chunk is filled up to the largest size, then others follow
    assert edges(pad_axes(base, (9, 7, 23))) == [[0, 1, 4, 7, 9], [0, 2, 4, 5, 7], [0, 5, 10, 15, 20, 23]]
    assert edges(split_axis(base, 0, (2, 2)))[:2] == [[0, 1, 2], [0, 1, 2]]
    assert edges(as_source(torch.zeros(2, 0))) == [[0, 1, 2], [0]]
    view = permute_axes(base, (2, 0, 1))
    view.chunks = None  # what a source of its own that says no more than its chunks has
    assert [len(edge) - 1 for edge in Source.edges.fget(view)] == list(view.shape)
    view.chunks = (5, 3, 2)
    assert [edge.tolist() for edge in Source.edges.fget(view)] == [[0, 5], [0, 3, 4], [0, 2, 4, 6]]


def test_counts_of_a_view_cannot_be_set(rng):
    """The base counts, however deep; nothing pretends to take a number."""
    base = as_source(X)
    view = merge_axes(permute_axes(base, (1, 0, 2)), 0, 1)
    view.entries(torch.randint(5, (7, 2), generator=rng))
    base.entries(torch.zeros(4, 3, dtype=torch.long))
    assert view.evaluations == view.base.evaluations == base.evaluations == 11
    for source in (view, base):
        for name in ("evaluations", "chunks_read", "dtype"):
            with pytest.raises(AttributeError):
                setattr(source, name, 3)
    assert base.evaluations == 11


def test_masks_and_other_dtypes_carry_over():
    packed = torch.tensor([[1, 2, -9], [3, 4, 5]], dtype=torch.int16)
    source = as_source(packed, scale=0.5, fill_value=-9)
    view = merge_axes(permute_axes(source, (1, 0)), 0, 1)
    assert view.dtype == torch.float32
    assert view.entries(torch.tensor([[0], [1]])).tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match=r"missing or not finite.*index \(0, 2\)|index \(0, 2\).*missing"):
        view.entries(torch.tensor([[4]]))
    z = torch.tensor([1 + 2j, 3j], dtype=torch.complex128)
    assert torch.equal(pad_axes(z, (3,)).slab((slice(None),)), torch.tensor([1 + 2j, 3j, 0]).to(z))
    empty = permute_axes(torch.zeros(0, 3), (1, 0))
    assert empty.slab((slice(None), slice(None))).shape == (3, 0)
    assert permute_axes(X, (2, 1, 0)).entries(torch.zeros(0, 3, dtype=torch.long)).shape == (0,)


def test_refusals(unchecked):
    with pytest.raises(ValueError, match=r"permutation of 0\.\.2.*\(0, 1, 1\)"):
        permute_axes(X, (0, 1, 1))
    with pytest.raises(ValueError, match=r"axis must be in 0\.\.2, got 3"):
        split_axis(X, 3, (2, 2))
    with pytest.raises(ValueError, match=r"product 6 \(axis 1\), got \(4, 2\); pad_axes"):
        split_axis(X, 1, (4, 2))
    with pytest.raises(ValueError, match="got first=2, last=1"):
        merge_axes(X, 2, 1)
    with pytest.raises(ValueError, match=r"at least \(4, 6, 5\) .* got \(4, 5, 5\)"):
        pad_axes(X, (4, 5, 5))
    with pytest.raises(ValueError, match="'edge' or 'zero', got 'wrap'"):
        pad_axes(X, (4, 6, 6), "wrap")
    with pytest.raises(ValueError, match=r"quantization of \(4, 6, 5\), got one of \(4, 6\)"):
        split_digits(X, Quantization.of((4, 6)))
    view = split_axis(X, 1, (3, 2))
    with pytest.raises(ValueError, match=r"indices of axis 1 must be in 0\.\.2"):
        view.entries(torch.tensor([[0, 3, 0, 0]]))
    x = X.clone()
    x[1, 5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"nan at index \(1, 5, 2\)"):
        split_axis(x, 1, (3, 2)).slab((slice(None),) * 4)
