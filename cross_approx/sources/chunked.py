"""Tensors stored in chunks: requests grouped by chunk, each chunk read once, a cache with a budget of bytes."""

import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from cross_approx.sources.packing import over, packing, torch_dtype
from cross_approx.sources.source import CACHE_BYTES, Source

Key = tuple[int, ...]


class ChunkError(RuntimeError):
    """A chunk that could not be read. What the request had read by then is kept, here and in the source's cache.

    Attributes:
        key: number of the chunk along every axis.
        region: the part of the tensor that it holds.
        values: the request's values, NaN where they were not read.
        read: which of them were.

    Example:
        >>> import torch
        >>> error = ChunkError("no file", (0, 1), (slice(0, 2), slice(2, 4)), torch.ones(1), torch.ones(1).bool())
        >>> str(error), error.key
        ('no file', (0, 1))
    """

    def __init__(
        self,
        message: str,
        key: Key,
        region: tuple[slice, ...],
        values: Inexact[Tensor, "..."] | None = None,
        read: Bool[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__(message)
        self.key, self.region, self.values, self.read = key, region, values, read


class ChunkCache:
    """Chunks by their keys, the least recently used dropped first, never more than `budget` bytes.

    Example:
        >>> import numpy as np
        >>> cache = ChunkCache(budget=16)
        >>> for key in range(3):
        ...     cache.put((key,), np.zeros(1))
        >>> list(cache.chunks), cache.size
        ([(1,), (2,)], 16)
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.chunks: OrderedDict[Key, np.ndarray] = OrderedDict()

    def get(self, key: Key) -> np.ndarray | None:
        """The chunk, now the most recently used, or None."""
        if key in self.chunks:
            self.chunks.move_to_end(key)
        return self.chunks.get(key)

    def put(self, key: Key, chunk: np.ndarray) -> None:
        """Keep a chunk whose key is not there yet; one larger than the budget is not kept."""
        if chunk.nbytes > self.budget:
            return
        while self.size + chunk.nbytes > self.budget:
            self.size -= self.chunks.popitem(last=False)[1].nbytes
        self.chunks[key] = chunk
        self.size += chunk.nbytes


@dataclass
class _Part:
    """What one chunk gives to a request: `take(chunk)` goes to `values[place]`."""

    key: Key
    place: Any
    take: Callable[[np.ndarray], Any]


class ChunkedSource(Source):
    """A tensor stored in a grid of chunks; a kind of store writes `_read`.

    Chunks are cached as they are stored; only the entries asked for are unpacked. So memory is at most `cache_bytes`,
    one chunk as the store's reader makes it, and the request.

    Args:
        shape: sizes of the modes.
        stored: torch dtype of the stored numbers.
        grid: of every axis, the sizes of its chunks in order; they add up to the axis.
        device: of the values, the CPU if None.
        mask: source of the same shape, nonzero where an entry is missing.
        cache_bytes: budget of the cache; 0 keeps no chunk.
        retries: how often a failed reading is tried again.
        backoff: seconds before the first of these, doubled each time.
        dtype, scale, offset, fill_value, missing, attributes: as in `packing`.

    Raises:
        ValueError: chunks that do not cover the tensor, budgets below zero.

    Example:
        >>> import numpy as np, torch
        >>> class Squares(ChunkedSource):
        ...     def _read(self, key, region):
        ...         return np.arange(region[0].start, region[0].stop) ** 2.0
        >>> source = Squares((10,), torch.float64, [(4, 4, 2)])
        >>> source.entries(torch.tensor([[9], [5], [8]])).tolist(), source.chunks_read, source.bytes_read
        ([81.0, 25.0, 64.0], 2, 48)
    """

    # dtype of the arrays that `_read` returns, where that is not the stored one (numpy has no bfloat16)
    _held: torch.dtype | None = None
    # whether `_read` takes regions of several chunks, and reads them faster at once than one by one
    _joint = False

    def __init__(
        self,
        shape: Sequence[int],
        stored: torch.dtype,
        grid: Sequence[Sequence[int]],
        *,
        device: torch.device | str | None = None,
        mask: Source | None = None,
        cache_bytes: int = CACHE_BYTES,
        retries: int = 3,
        backoff: int | float = 0.05,
        **packed: Any,
    ) -> None:
        super().__init__(shape, packing("as_source", stored, **packed), torch.device(device or "cpu"), mask)
        for what, number in (("cache_bytes", cache_bytes), ("retries", retries), ("backoff", backoff)):
            if not number >= 0:
                raise ValueError(f"as_source: {what} must be at least 0, got {number}")
        if [sum(sizes) for sizes in grid] != list(self.shape) or any(size < 1 for sizes in grid for size in sizes):
            raise ValueError(f"as_source: chunks must cover the shape {self.shape}, got {[tuple(s) for s in grid]}")
        self.chunks = tuple(max(sizes, default=1) for sizes in grid)
        # the chunk number c of axis k holds edges[k][c] ... edges[k][c + 1] - 1
        self._edges = [np.concatenate(([0], np.cumsum(np.asarray(sizes, dtype=np.int64)))) for sizes in grid]
        if prod(len(sizes) for sizes in grid) >= 2**63:
            raise ValueError("as_source: expected fewer than 2^63 chunks; store the tensor in larger ones")
        self._stored = stored
        self._cache = ChunkCache(cache_bytes)
        self._retries, self._backoff = retries, backoff

    @property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Of every axis, where its chunks begin, and its end: chunk c holds `edges[c] ... edges[c + 1] - 1`."""
        return tuple(self._edges)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the numbers in the store, before they are unpacked."""
        return self._stored

    @contextmanager
    def streamed(self) -> Iterator[None]:
        """Within, a source larger than its cache is read past it, for a pass over everything would only wash it out."""
        cache = self._cache
        if prod(self.shape) * self._stored.itemsize > cache.budget:
            self._cache = ChunkCache(0)
        try:
            yield
        finally:
            self._cache = cache

    @abstractmethod
    def _read(self, key: Key, region: tuple[slice, ...]) -> Any:
        """The chunk as an array of the region's shape; anything raised means that it could not be read."""

    def _tensor(self, values: Any) -> Tensor:
        """Stored numbers that were taken from a chunk, as a tensor, which may share their memory."""
        return over(values)

    def _entries(self, index: Tensor) -> Tensor:
        rows = index.cpu().numpy()
        parts = []
        for key, group in self._grouped(rows):
            take = partial(self._take_entries, rows=rows, group=group, start=self._start(key))
            parts.append(_Part(key, torch.from_numpy(group), take))
        return self._gather("entries", (len(rows),), parts)

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        rows = index.cpu().numpy().copy()
        rows[:, axis] = 0
        edges = self._edges[axis]
        parts = []
        for first, group in self._grouped(rows):
            for c in range(len(edges) - 1):
                key = (*first[:axis], c, *first[axis + 1 :])
                take = partial(self._take_fibers, rows=rows, group=group, start=self._start(key), axis=axis)
                parts.append(_Part(key, (torch.from_numpy(group), slice(int(edges[c]), int(edges[c + 1]))), take))
        return self._gather("fibers", (len(rows), self.shape[axis]), parts)

    def _slab(self, ranges: list[range]) -> Tensor:
        joint = self._box(ranges)
        if joint is not None:
            return self.packing.unpack(self._tensor(joint)).to(self.device)
        axes: list[list[tuple[Any, ...]]] = []  # of every axis: (chunk, where in the chunk, where in the request)
        for edges, indices in zip(self._edges, ranges, strict=True):
            chunks = np.searchsorted(edges, np.asarray(indices), side="right") - 1
            starts = np.flatnonzero(np.diff(chunks, prepend=-1))
            axis: list[tuple[Any, ...]] = []
            for a, b in zip(starts, [*starts[1:], len(indices)], strict=True):
                c = int(chunks[a])
                local = slice(indices[a] - int(edges[c]), indices[b - 1] - int(edges[c]) + 1, indices.step)
                axis.append((c, local, slice(int(a), int(b))))
            axes.append(axis)
        parts = []
        for pieces in product(*axes):
            key, box, place = (tuple(piece[k] for piece in pieces) for k in range(3))
            parts.append(_Part(key, place, partial(_take_box, box=box)))
        return self._gather("slab", tuple(len(indices) for indices in ranges), parts)

    def _box(self, ranges: list[range]) -> np.ndarray | None:
        """Whole chunks read at once past the cache; None where one by one is the way, or names what failed."""
        if not self._joint or self._cache.budget or any(r.step != 1 for r in ranges):
            return None
        ends = [np.searchsorted(edges, (r.start, r.stop)) for edges, r in zip(self._edges, ranges, strict=True)]
        chunks = prod(int(b - a) for a, b in ends)
        whole = all(
            (edges[at] == (r.start, r.stop)).all() for edges, at, r in zip(self._edges, ends, ranges, strict=True)
        )
        if chunks < 2 or not whole:
            return None
        region = tuple(slice(r.start, r.stop) for r in ranges)
        try:
            box = self._sound(self._read((), region), region)
        except MemoryError:
            raise
        except Exception:  # chunk by chunk it is tried again, and the one at fault is named
            return None
        self._lookups += chunks
        self._count(chunks=chunks)
        self._bytes += box.nbytes
        return box

    @staticmethod
    def _take_entries(chunk: np.ndarray, rows: np.ndarray, group: np.ndarray, start: np.ndarray) -> Any:
        local = rows[group] - start
        return chunk[tuple(local.T)] if local.shape[1] else np.broadcast_to(chunk, len(local))

    @staticmethod
    def _take_fibers(chunk: np.ndarray, rows: np.ndarray, group: np.ndarray, start: np.ndarray, axis: int) -> Any:
        local = np.delete(rows[group] - start, axis, 1)
        fibers = np.moveaxis(chunk, axis, -1)
        return fibers[tuple(local.T)] if local.shape[1] else np.broadcast_to(fibers, (len(local), len(fibers)))

    def _start(self, key: Key) -> np.ndarray:
        return np.array([edges[c] for edges, c in zip(self._edges, key, strict=True)], dtype=np.int64)

    def _grouped(self, rows: np.ndarray) -> list[tuple[Key, np.ndarray]]:
        """The chunks that hold the multi-indices, each with the rows that lie in it."""
        flat = np.zeros(len(rows), dtype=np.int64)
        counts = [len(edges) - 1 for edges in self._edges]
        for k, edges in enumerate(self._edges):
            flat = flat * counts[k] + np.searchsorted(edges, rows[:, k], side="right") - 1
        order = np.argsort(flat, kind="stable")
        starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
        groups = np.split(order, starts[1:])
        return [(tuple(int(c) for c in np.unravel_index(flat[group[0]], counts)), group) for group in groups]

    def _gather(self, name: str, shape: tuple[int, ...], parts: list[_Part]) -> Tensor:
        """Fill the request chunk by chunk, those in the cache first: reading others might drop them."""
        values = torch.empty(shape, dtype=self.dtype)
        parts.sort(key=lambda part: part.key not in self._cache.chunks)
        for number, part in enumerate(parts):
            try:
                chunk = self._chunk(name, part.key)
            except ChunkError as error:
                read = torch.zeros(shape, dtype=torch.bool)
                for before in parts[:number]:
                    read[before.place] = True
                error.values = values.masked_fill(~read, float("nan")).to(self.device)
                error.read = read.to(self.device)
                raise
            values[part.place] = self.packing.unpack(self._tensor(part.take(chunk)))
        return values.to(self.device)

    def _chunk(self, name: str, key: Key) -> np.ndarray:
        self._lookups += 1
        chunk = self._cache.get(key)
        if chunk is not None:
            self._hits += 1
            return chunk
        chunk = self._read_again(name, key)
        self._count(chunks=1)
        self._bytes += chunk.nbytes
        self._cache.put(key, chunk)
        return chunk

    def _read_again(self, name: str, key: Key) -> np.ndarray:
        region = tuple(slice(int(e[c]), int(e[c + 1])) for e, c in zip(self._edges, key, strict=True))
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                return self._sound(self._read(key, region), region)
            except MemoryError:
                raise
            except Exception as error:  # stores, codecs and networks raise almost any type
                failure = error
        box = ", ".join(f"{s.start}:{s.stop}" for s in region)
        raise ChunkError(
            f"{name}: chunk {key} (entries [{box}]) could not be read in {self._retries + 1} attempts "
            f"({type(failure).__name__}: {failure}); what was read is kept, ask again once the store is well",
            key,
            region,
        ) from failure

    def _sound(self, chunk: Any, region: tuple[slice, ...]) -> np.ndarray:
        """The chunk as an array of its own memory, refused where it is not what the store announced."""
        if isinstance(chunk, np.ma.MaskedArray):
            raise TypeError("expected plain numbers, got a masked array; fill it and pass mask=")
        array = np.asarray(chunk)
        expected = tuple(s.stop - s.start for s in region)
        if array.shape != expected:
            raise ValueError(f"expected a chunk of shape {expected}, got {array.shape}")
        held = torch_dtype("chunk", array.dtype)
        if held != (self._held or self._stored):
            raise ValueError(f"expected a chunk of {self._held or self._stored}, got {held}")
        owner: Any = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        # a view of something larger, or of a mapped file, would keep all of that alive and uncounted
        return array if owner.base is None and owner.nbytes == array.nbytes else array.copy()


def _take_box(chunk: np.ndarray, box: tuple[Any, ...]) -> Any:
    return chunk[box]


def row_chunks(shape: Sequence[int], itemsize: int, chunk_bytes: int) -> list[tuple[int, ...]]:
    """Grid of contiguous pieces, of at most `chunk_bytes` where one entry fits, of an array in C order.

    Example:
        >>> row_chunks((3, 10), itemsize=4, chunk_bytes=80)
        [(2, 1), (10,)]
    """
    if chunk_bytes < 1:
        raise ValueError(f"as_source: chunk_bytes must be at least 1, got {chunk_bytes}")
    room = max(1, chunk_bytes // itemsize)
    sizes: list[int] = []
    for n in reversed(shape):
        size = max(1, min(n, room))
        # a piece of an axis that is not whole leaves one index of every axis before it
        room = room // size if size == n else 1
        sizes.insert(0, size)
    return regular(shape, sizes)


def regular(shape: Sequence[int], chunks: Sequence[int]) -> list[tuple[int, ...]]:
    """Grid of equal chunks, the last of an axis what is left.

    Example:
        >>> regular((5, 2), (2, 4))
        [(2, 2, 1), (2,)]
    """
    return [
        tuple(min(size, n - k * size) for k in range(ceil(n / size))) for n, size in zip(shape, chunks, strict=True)
    ]
