"""Sources whose chunks are read by the workers of a dask cluster: entries travel, and sums, but no chunks."""

import copy
import os
import pickle
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from cross_approx.sources.chunked import ChunkCache, ChunkedSource, ChunkError, Key, _Part
from cross_approx.sources.out_of_core import DaskSource, _package
from cross_approx.sources.source import CACHE_BYTES, as_source

Box = tuple[slice, ...]
Sums = dict[str, Tensor]

PATIENCE = 2
"""Seconds between two looks at whether the workers that tasks prefer are alive."""

_CACHE = ChunkCache(0)  # of this process, where it is a worker: (source, chunk) -> chunk
_LOCK = threading.Lock()


class ClusterSource(ChunkedSource):
    """Entries of a store, read by the workers of a `distributed.Client`.

    A request becomes one task a chunk: the worker reads the chunk and answers with the stored numbers asked for. A
    chunk is read once a request; workers keep those that they have read, and get the same ones again while they live.
    The entries are those of the store's own source, bit for bit. A worker that dies loses nothing: the cluster gives
    its tasks to others. While no worker lives a request waits for one, without limit.
    Memory: the request on the client; `cache_bytes` and the chunks in work on every worker.

    Args:
        array: a dask array (persisted or not; its blocks are computed by the cluster, `persist()` keeps them there),
            or what `as_source` takes for a store that every worker can open: the path of a zarr array or of a folder of
            slices, a zarr array, an xarray DataArray.
        client: a connected, synchronous `distributed.Client`.
        cache_bytes: budget of the cache of one worker process; one for all its sources.
        retries: how often a worker tries again to read a chunk.
        **options: of `as_source` otherwise.

    Attributes:
        bytes_received: bytes of the answers so far; `bytes_read` are those that workers took from the store (for a dask
            array: of the blocks computed).

    Raises:
        TypeError: no client, a source that is not read by chunks, one that cannot be sent to workers.

    Example:
        >>> import torch
        >>> import dask.array as dask  # doctest: +SKIP
        >>> from distributed import Client  # doctest: +SKIP
        >>> source = ClusterSource(dask.ones((8, 6), chunks=4), Client())  # doctest: +SKIP
        >>> source.entries(torch.tensor([[0, 0], [7, 5]])), source.bytes_received  # doctest: +SKIP
        (tensor([1., 1.], dtype=torch.float64), 16)
    """

    def __init__(
        self, array: Any, client: Any, *, cache_bytes: int = CACHE_BYTES, retries: int = 3, **options: Any
    ) -> None:
        missing = [name for name in ("submit", "compute", "gather", "scheduler_info") if not hasattr(client, name)]
        if missing or getattr(client, "asynchronous", False):
            raise TypeError(
                f"ClusterSource: expected a synchronous distributed.Client, got {type(client).__name__}; "
                "connect one with distributed.Client(address)"
            )
        base = as_source(array, cache_bytes=0, retries=retries, **options)
        if not isinstance(base, ChunkedSource) or isinstance(base, ClusterSource):
            raise TypeError(
                f"ClusterSource: expected a store that is read by chunks, got {type(array).__name__}; "
                "tensors in memory need no cluster"
            )
        grid = [np.diff(edges).tolist() for edges in base.edges]
        super().__init__(
            base.shape, base.stored_dtype, grid, device=base.device, mask=base.mask, cache_bytes=cache_bytes
        )
        self.packing, self._held, self._retries = base.packing, base._held, retries
        self._base, self._client, self._opened = base, client, None
        # a dask array is computed where the cluster wants; other stores are opened on the workers
        self._array: Any = base._array if isinstance(base, DaskSource) else None
        self._blocks = base._blocks if isinstance(base, DaskSource) else []
        self._token = random.SystemRandom().getrandbits(62)
        self.bytes_received = 0
        if self._array is None:
            try:
                pickle.dumps(base)
            except Exception as error:  # whatever a library raises where its object stays in its process
                raise TypeError(
                    f"ClusterSource: the workers must be able to open the store, got {type(array).__name__} that "
                    f"cannot be sent ({error}); pass its path, a zarr array or a dask array"
                ) from error

    def __reduce__(self) -> Any:
        # on a worker, a source of its own without the cluster
        return _as_it_is, (self._base,)

    def sum_over_boxes(
        self,
        function: Callable[[Inexact[Tensor, "..."], Box], Sums],
        boxes: Sequence[Box] | None = None,
        *,
        group: int = 8,
    ) -> Sums:
        """`sum_b function(x[b], b)` over boxes b, evaluated where the chunks are: only sums travel.

        Groups of `group` consecutive boxes are summed on one worker, then `group` of these sums, and so on: the order
        of the additions depends on nothing but the boxes and `group`. So the result is the same bit for bit whatever
        the number of workers, and if some of them die.
        Cost: one reading of the boxes. Memory: on a worker one box and two results; `group` results where sums meet.

        Args:
            function: takes the values of a box, as `slab` gives them, and its slices; returns named tensors, of the
                same names and shapes for every box. It is sent to the workers, so it must not hold what stays here.
            boxes: those to visit, in this order; every chunk once by default. A box may span several chunks.
            group: how many terms are added in one task, >= 2.

        Returns:
            The sums by name; those of no boxes are empty.

        Raises:
            ChunkError: a chunk could not be read.
            ValueError: a value that is missing or not finite, boxes outside, group < 2; what the function raises.

        Example:
            >>> def square(values, box):
            ...     return {"square": values.square().sum()}
            >>> source.sum_over_boxes(square)["square"]  # doctest: +SKIP
            tensor(48., dtype=torch.float64)
        """
        if isinstance(group, bool) or not isinstance(group, int) or group < 2:
            raise ValueError(f"sum_over_boxes: group must be an integer >= 2, got {group!r}")
        if boxes is None:
            numbers = np.ndindex(*(len(edges) - 1 for edges in self._edges))
            boxes = [self._region(tuple(key)) for key in numbers]
        for box in boxes:
            self._ranges(box)
        if not boxes:
            return {}
        if self._array is None:
            groups = [list(boxes[a : a + group]) for a in range(0, len(boxes), group)]
            level = [self._task("boxes", _sum_boxes, self._remote(), part, function) for part in groups]
        else:
            dask = _package("dask")
            of_box, rules = dask.delayed(_sum_array, pure=False), self._rules(dask)
            terms = [
                of_box(rules, self._array[box].rechunk(-1).to_delayed().item(), box, dask.delayed(function))
                for box in boxes
            ]
            level = self._sums(list(self._client.compute(terms, retries=self._retries)), group)
        while len(level) > 1:
            level = self._sums(level, group)
        answer = level[0].result()
        if "failure" in answer:
            raise ChunkError(*answer["failure"])
        counters = answer["counters"]
        self._count(entries=counters[0], chunks=counters[1])
        self._bytes += counters[2]
        sums: Sums = answer["sums"]
        self.bytes_received += sum(part.numel() * part.element_size() for part in sums.values())
        return {name: part.to(self.device) for name, part in sums.items()}

    def _read(self, key: Key, region: Box) -> Any:
        return self._base._read(key, region)

    def _tensor(self, values: Any) -> Tensor:
        return self._base._tensor(values)

    def _region(self, key: Key) -> Box:
        return tuple(slice(int(e[c]), int(e[c + 1])) for e, c in zip(self._edges, key, strict=True))

    def _task(self, what: str, function: Callable[..., Any], *arguments: Any, **where: Any) -> Any:
        key = f"tnlayers-{what}-{os.urandom(12).hex()}"  # never the same: a task may count what it reads
        return self._client.submit(function, *arguments, pure=False, key=key, **where)

    def _sums(self, level: list[Any], group: int) -> list[Any]:
        return [self._task("sums", _sum_sums, level[a : a + group]) for a in range(0, len(level), group)]

    def _remote(self) -> Any:
        """The store's source on the cluster: made by a task, so that it can be made again."""
        if self._opened is None or self._opened.status in ("lost", "cancelled", "error"):
            self._opened = self._task("source", _as_it_is, self._base)
        return self._opened

    def _rules(self, dask: Any) -> Any:
        """What a block of a dask array has to look like, and how it is unpacked."""
        rules: Any = copy.copy(self._base)
        rules._array = None
        return dask.delayed(rules, name=f"tnlayers-rules-{os.urandom(12).hex()}", pure=False, traverse=False)

    def _gather(self, name: str, shape: tuple[int, ...], parts: list[_Part]) -> Tensor:
        """Fill the request from the answers of the workers."""
        values = torch.full(shape, float("nan"), dtype=self.dtype)
        read = torch.zeros(shape, dtype=torch.bool)
        failed: ChunkError | None = None
        for part, answer in zip(parts, self._answers(name, parts), strict=True):
            self._lookups += 1
            if "failure" in answer:
                failed = failed or ChunkError(*answer["failure"])
                continue
            taken, size = answer["taken"], answer["bytes"]
            self._hits += size == 0
            self._count(chunks=int(size > 0))
            self._bytes += size
            self.bytes_received += taken.nbytes
            values[part.place] = self.packing.unpack(self._tensor(taken))
            read[part.place] = True
        if failed is not None:
            failed.values, failed.read = values.to(self.device), read.to(self.device)
            raise failed
        return values.to(self.device)

    def _answers(self, name: str, parts: list[_Part]) -> list[dict[str, Any]]:
        distributed = _package("distributed")
        ask = self._ask_blocks if self._array is not None else partial(self._ask, name)
        futures, homes = ask(parts, self._workers())
        found: dict[str, dict[str, Any]] = {}
        while True:
            try:
                distributed.wait(futures, timeout=PATIENCE)
                # a finished answer may be lost with its worker before it is fetched: it is made again, and waited for
                whole = [f for f in futures if f.status not in ("error", "cancelled")]
                if all(f.status == "finished" for f in whole):
                    found = dict(zip((f.key for f in whole), self._client.gather(whole), strict=True))
                    break
            except TimeoutError:
                # a task whose home died while no other worker lived is never given to a new one
                alive = self._workers()
                lost = [
                    n
                    for n, f in enumerate(futures)
                    if f.status in ("pending", "lost") and homes[n] not in (None, *alive)
                ]
                for n, future in zip(lost, ask([parts[n] for n in lost], [])[0], strict=True):
                    futures[n], homes[n] = future, None
            except Exception:  # raised by a task that was made again: then its future says so
                if not any(f.status in ("error", "cancelled") for f in futures):
                    raise
        return [
            found[future.key] if future.key in found else self._failure(name, part.key, future)
            for part, future in zip(parts, futures, strict=True)
        ]

    def _failure(self, name: str, key: Key, future: Any) -> dict[str, Any]:
        """A computation of a dask array raised, or the workers that tried it died."""
        region, error = self._region(key), future.exception() if future.status == "error" else "cancelled"
        box = ", ".join(f"{s.start}:{s.stop}" for s in region)
        message = (
            f"{name}: chunk {key} (entries [{box}]) could not be computed by the cluster "
            f"({type(error).__name__}: {error}); what was read is kept, ask again once the cluster is well"
        )
        return {"failure": (message, key, region)}

    def _workers(self) -> list[str]:
        return sorted(self._client.scheduler_info(n_workers=-1)["workers"])

    def _ask(self, name: str, parts: list[_Part], workers: list[str]) -> tuple[list[Any], list[str | None]]:
        """One task a chunk, and the worker that it prefers."""
        counts = [len(edges) - 1 for edges in self._edges]
        futures: list[Any] = []
        homes: list[str | None] = []
        for part in parts:
            # a chunk goes to the same worker again, which may have kept it; to another one where that is gone
            number = int(np.ravel_multi_index(part.key, counts)) if part.key else 0
            homes.append(workers[number % len(workers)] if workers else None)
            where = {"workers": [homes[-1]], "allow_other_workers": True} if workers else {}
            key, budget = (self._token, *part.key), self._cache.budget
            take = _compact(part.take)
            futures.append(self._task(name, _answer, self._remote(), key, budget, name, take, **where))
        return futures, homes

    def _ask_blocks(self, parts: list[_Part], workers: list[str]) -> tuple[list[Any], list[str | None]]:
        dask = _package("dask")
        answer, rules = dask.delayed(_answer_block, pure=False), self._rules(dask)
        tasks = []
        for part in parts:
            block = self._array
            if part.key:
                block = block.blocks[tuple(axis[c] for axis, c in zip(self._blocks, part.key, strict=True))]
            region = self._region(part.key)
            tasks.append(answer(rules, block.to_delayed().item(), region, dask.delayed(_compact(part.take))))
        return list(self._client.compute(tasks, retries=self._retries)), [None] * len(parts)


def _as_it_is(source: ChunkedSource) -> ChunkedSource:
    return source


def _compact(take: Any) -> Any:
    """The same picture of a chunk with only its own rows of the request."""
    words = getattr(take, "keywords", {})
    if "rows" not in words:
        return take
    rows = (words["rows"][words["group"]] - words["start"]).astype(np.int32)
    return partial(take.func, **{**words, "rows": rows, "group": slice(None), "start": np.int32(0)})


def _answer(base: ChunkedSource, key: Key, budget: int, name: str, take: Callable[[Any], Any]) -> dict[str, Any]:
    """On a worker: what was asked of a chunk. `key` begins with the number of the source."""
    size = 0
    with _LOCK:
        _CACHE.budget = budget
        chunk = _CACHE.get(key)
    if chunk is None:
        try:
            chunk = base._read_again(name, key[1:])
        except ChunkError as error:  # as data: exceptions lose their fields on the way
            return {"failure": (str(error), error.key, error.region)}
        size = chunk.nbytes
        with _LOCK:
            if _CACHE.get(key) is None:
                _CACHE.put(key, chunk)
    return {"taken": np.ascontiguousarray(take(chunk)), "bytes": size}


def _answer_block(rules: ChunkedSource, block: Any, region: Box, take: Callable[[Any], Any]) -> dict[str, Any]:
    chunk = rules._sound(block, region)
    return {"taken": np.ascontiguousarray(take(chunk)), "bytes": chunk.nbytes}


def _sum_boxes(base: ChunkedSource, boxes: list[Box], function: Callable[[Tensor, Box], Sums]) -> dict[str, Any]:
    """On a worker: the sum over some boxes, in their order."""
    source = copy.copy(base)  # with counters of its own: a worker may have several threads
    source._evaluations = source._chunks_read = source._bytes = 0
    total: Sums | None = None
    for box in boxes:
        try:
            values = source.slab(box)
        except ChunkError as error:
            return {"failure": (str(error), error.key, error.region)}
        total = _added(total, function(values, box))
    return {"sums": total, "counters": (source.evaluations, source.chunks_read, source._bytes)}


def _sum_array(rules: ChunkedSource, block: Any, box: Box, function: Callable[[Tensor, Box], Sums]) -> dict[str, Any]:
    """On a worker: the function of one box of a dask array."""
    ranges = rules._ranges(box)
    chunk = rules._sound(block, tuple(slice(0, len(r)) for r in ranges))
    values = rules.packing.unpack(rules._tensor(chunk).clone()).to(rules.device)  # the block is dask's own
    lost = None if rules.mask is None else rules.mask.slab(box)
    values = rules._final("slab", values, lost, lambda at: [r[i] for r, i in zip(ranges, at, strict=True)])
    return {"sums": _added(None, function(values, box)), "counters": (values.numel(), 1, chunk.nbytes)}


def _sum_sums(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """On a worker: the sum of sums, in their order."""
    total: Sums | None = None
    counters = (0, 0, 0)
    for part in parts:
        if "failure" in part:
            return part
        total = _added(total, part["sums"])
        one, two = counters, part["counters"]
        counters = (one[0] + two[0], one[1] + two[1], one[2] + two[2])
    return {"sums": total, "counters": counters}


def _added(total: Sums | None, more: Sums) -> Sums:
    if total is None:
        return {name: part.clone() for name, part in more.items()}
    if {name: part.shape for name, part in more.items()} != {name: part.shape for name, part in total.items()}:
        raise ValueError(
            "sum_over_boxes: the function must return the same names and shapes for every box, "
            f"got {[(name, tuple(part.shape)) for name, part in more.items()]} after "
            f"{[(name, tuple(part.shape)) for name, part in total.items()]}"
        )
    for name, part in more.items():
        total[name] += part
    return total
