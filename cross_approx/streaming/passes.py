"""Passes over a source in boxes of whole chunks: every chunk once a pass, the next box read while one is worked on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, prod, sqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact
from torch import Tensor

from cross_approx.result import CrossResult, Sweep
from cross_approx.sources.chunked import ChunkError
from cross_approx.sources.source import Source, as_source
from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Network
from decompositions.linalg import accumulate_dtype
from decompositions.progress import Progress, reporting

Box = tuple[slice, ...]
Sums = dict[str, Tensor]

BOX_BYTES = 1 << 24
"""Bytes of the values of one box, where its chunks are not larger: long products, and a few boxes fit in memory."""

LEAST = 1e-140
"""Values that are all smaller than this are refused: their squares, or those of errors, vanish."""

PIECE = 1 << 20
"""Entries of a piece of a box that is worked on: in double precision it stays near the processor."""


class PassError(ChunkError):
    """A pass that stopped at a chunk. Everything up to the box that holds it is kept.

    Attributes:
        box: number of the box that could not be read; `read_boxes(..., start=box)` goes on with it.
        state: of a decomposition, what `resume=` takes to go on from there.
        key, region, values, read: the chunk, as in `ChunkError`.

    Example:
        >>> error = PassError("no file", (0, 1), (slice(0, 2), slice(2, 4)), box=7)
        >>> error.key, error.box
        ((0, 1), 7)
    """

    def __init__(
        self,
        message: str,
        key: tuple[int, ...],
        region: Box,
        values: Inexact[Tensor, "..."] | None = None,
        read: Tensor | None = None,
        *,
        box: int = 0,
        state: "PassState | None" = None,
    ) -> None:
        super().__init__(message, key, region, values, read)
        self.box, self.state = box, state


@dataclass
class PassState:
    """What the passes of one decomposition have summed up so far.

    Hand a new one over as `resume=`; where the work is stopped (a chunk that cannot be read, an exception of
    `progress`), the same call with the same object goes on at the box it stopped at. It holds tensors, numbers and
    strings alone.

    Example:
        >>> import torch
        >>> from cross_approx import tucker_gram
        >>> state = PassState()
        >>> result = tucker_gram(torch.ones(4, 4, 4), tol=1e-3, resume=state)
        >>> len(state.done)
        1
    """

    task: tuple[Any, ...] | None = None
    seed: int = 0
    done: list[Sums] = field(default_factory=list)
    sums: Sums | None = None
    box: int = 0
    within: bool = False
    largest: float = 0.0


@dataclass(frozen=True)
class BoxGrid:
    """Boxes of whole chunks that cover a source; those that differ along the `inner` axes alone follow one another.

    Example:
        >>> import torch
        >>> from cross_approx import as_source
        >>> grid = box_grid(as_source(torch.zeros(4, 6)), box_bytes=48)
        >>> len(grid), grid[1]
        (2, (slice(2, 4, None), slice(0, 6, None)))
    """

    axes: tuple[tuple[slice, ...], ...]
    inner: tuple[int, ...] = ()

    def __len__(self) -> int:
        return prod(len(axis) for axis in self.axes)

    def __getitem__(self, number: int) -> Box:
        order = [k for k in range(len(self.axes)) if k not in self.inner] + list(self.inner)
        at = dict(zip(order, np.unravel_index(number, [len(self.axes[k]) for k in order]), strict=True))
        return tuple(axis[at[k]] for k, axis in enumerate(self.axes))

    @property
    def group(self) -> int:
        """How many boxes there are along the inner axes."""
        return prod(len(self.axes[k]) for k in self.inner)

    def extent(self, axis: int) -> int:
        """Longest box along an axis."""
        return max(s.stop - s.start for s in self.axes[axis])


def box_grid(source: Source, box_bytes: int = BOX_BYTES, inner: Sequence[int] = ()) -> BoxGrid:
    """Boxes of whole chunks of at most `box_bytes` (or one chunk), long along the inner axes first, then the last ones.

    Example:
        >>> import torch
        >>> from cross_approx import as_source
        >>> [len(box_grid(as_source(torch.zeros(8, 8)), 64, inner=[k]).axes[k]) for k in (0, 1)]
        [1, 1]
    """
    if box_bytes < 1:
        raise ValueError(f"passes: box_bytes must be at least 1, got {box_bytes}")
    inner = tuple(inner)
    edges = source.edges
    longest = [int(np.diff(edge).max()) for edge in edges]
    room = box_bytes // source.dtype.itemsize
    axes: list[tuple[slice, ...]] = [()] * len(edges)
    for k in [*inner, *(k for k in reversed(range(len(edges))) if k not in inner)]:
        others = prod(longest[j] for j in range(len(edges)) if j != k)
        count = max(1, min(len(edges[k]) - 1, room // max(1, others * longest[k])))
        cuts = [*edges[k][:-1:count].tolist(), int(edges[k][-1])]
        axes[k] = tuple(slice(a, b) for a, b in pairwise(cuts))
        longest[k] = max(b - a for a, b in pairwise(cuts))
    return BoxGrid(tuple(axes), inner)


def read_boxes(
    source: Any,
    *,
    box_bytes: int = BOX_BYTES,
    inner: Sequence[int] = (),
    start: int = 0,
    prefetch: bool | None = None,
    progress: bool | Progress | None = None,
) -> Iterator[tuple[Box, Inexact[Tensor, "..."]]]:
    """All values of a source, once, in boxes of whole chunks: `(slices, values)`.

    Every chunk is read once, unless the source's cache holds it. A source larger than its cache is read past it, for a
    pass would only wash it out. Of views that holds where axes are permuted or padded with zeros; where they are split,
    merged or padded by their last values boxes may share chunks, which are read again unless the cache keeps them.
    Memory: three boxes with `prefetch`, two without.

    Args:
        source: anything `as_source` takes; its `retries` decide how often a chunk is tried again.
        box_bytes: bytes of a box, where its chunks are not larger.
        inner: axes along which boxes are long, and along which they follow one another.
        start: number of the first box; that of a `PassError` goes on where it stopped.
        prefetch: a thread reads the next box meanwhile. None: where there are chunks. The values are the same.
        progress: called with (boxes done, boxes, text) after each; True draws a bar on stderr.

    Raises:
        PassError: a chunk could not be read; boxes before it were yielded.
        ValueError: a value that is missing or not finite.

    Example:
        >>> import torch
        >>> x = torch.arange(12.0).reshape(4, 3)
        >>> sum(float(values.sum()) for _, values in read_boxes(x, box_bytes=24))
        66.0
    """
    reports = reporting("read_boxes", progress)
    opened = as_source(source)
    grid = box_grid(opened, box_bytes, inner)
    if not 0 <= start <= len(grid):
        raise ValueError(f"read_boxes: start must be a box number in 0..{len(grid)}, got {start}")
    with reports as report:
        for number, (box, values) in enumerate(_boxes(opened, grid, start, prefetch), start + 1):
            yield box, values
            report(number, len(grid), f"{number} of {len(grid)} boxes")


def _boxes(source: Source, grid: BoxGrid, start: int, prefetch: bool | None) -> Iterator[tuple[Box, Tensor]]:
    ahead = source.chunks is not None if prefetch is None else prefetch
    with source.streamed():
        if not ahead:
            for number in range(start, len(grid)):
                yield grid[number], _read(source, grid, number)
            return
        with ThreadPoolExecutor(1, "tnlayers-read") as reader:
            coming = reader.submit(_read, source, grid, start) if start < len(grid) else None
            for number in range(start, len(grid)):
                assert coming is not None
                values = coming.result()
                coming = reader.submit(_read, source, grid, number + 1) if number + 1 < len(grid) else None
                yield grid[number], values
                del values  # not kept while the next is waited for


def _read(source: Source, grid: BoxGrid, number: int) -> Tensor:
    try:
        with torch.no_grad():
            return source.slab(grid[number]).detach()
    except ChunkError as error:
        message = f"{error} (box {number} of {len(grid)} of this pass; the boxes before it are done)"
        raise PassError(message, error.key, error.region, error.values, error.read, box=number) from error


class Passes:
    """The passes of one decomposition: where they stand, what they cost, what they found.

    Example:
        >>> import torch
        >>> passes = Passes("doc", torch.ones(4, 3))
        >>> def add(sums, box, values):
        ...     sums["total"] += values.sum()
        >>> passes.sweep("sum", (), lambda grid: {"total": torch.zeros(())}, add)["total"]
        tensor(12.)
    """

    def __init__(
        self,
        name: str,
        source: Any,
        *,
        shape: Sequence[int] | None = None,
        options: tuple[Any, ...] = (),
        seed: int = 0,
        box_bytes: int = BOX_BYTES,
        prefetch: bool | None = None,
        progress: bool | Progress | None = None,
        resume: PassState | None = None,
    ) -> None:
        reporting(name, progress)  # refused before anything is opened
        self.name, self.source = name, as_source(source, shape=shape)
        self.sizes = self.source.shape
        if not self.sizes or 0 in self.sizes:
            raise ValueError(f"{name}: expected an order >= 1 and mode sizes >= 1, got shape {self.sizes}")
        self.box_bytes, self.prefetch, self.progress = box_bytes, prefetch, progress
        self.state = PassState() if resume is None else resume
        task = (name, self.sizes, str(self.source.dtype), self.source.chunks, box_bytes, *options)
        if self.state.task is None:
            self.state.task, self.state.seed = task, seed
        if self.state.task != task:
            raise ValueError(f"{name}: resume must come from the same call, expected {task}, got {self.state.task}")
        if self.state.within:
            raise ValueError(f"{name}: resume was stopped within a box, so its sums are unknown; start with a new one")
        self.work = accumulate_dtype(self.source.dtype)
        self.double = torch.promote_types(self.work, torch.float64)
        self.history: list[Sweep] = []
        self._before = (self.source.evaluations, self.source.bytes_read)

    def grid(self, inner: Sequence[int]) -> BoxGrid:
        """The boxes of a pass."""
        return box_grid(self.source, self.box_bytes, inner)

    def sweep(
        self,
        text: str,
        inner: Sequence[int],
        begin: Callable[[BoxGrid], Sums],
        step: Callable[[Sums, Box, Tensor], None],
    ) -> Sums:
        """One pass: `step(sums, box, values)` on every box, from `sums = begin(grid)` on or from where it stopped."""
        number, state, grid = len(self.history), self.state, self.grid(inner)
        self.history.append(Sweep(number + 1, self.evaluations, float("inf"), 0))
        if number < len(state.done):
            return state.done[number]
        if state.sums is None:
            state.sums, state.box = begin(grid), 0
        with reporting(self.name, self.progress) as report:  # one bar a pass
            try:
                for box, values in _boxes(self.source, grid, state.box, self.prefetch):
                    state.within = True
                    if self.work == self.double:  # squares of numbers of single precision cannot vanish
                        state.largest = max(state.largest, float(torch.linalg.vector_norm(values.flatten(), inf)))
                    step(state.sums, box, values)
                    state.box, state.within = state.box + 1, False
                    report(state.box, len(grid), f"pass {number + 1} ({text}): {state.box} of {len(grid)} boxes")
            except PassError as error:
                error.state = state
                raise
        self.history[-1] = self.history[-1]._replace(evaluations=self.evaluations)
        state.done.append(state.sums)
        state.sums = None
        return state.done[-1]

    @property
    def evaluations(self) -> int:
        """Entries asked for."""
        return self.source.evaluations - self._before[0]

    def note(self, error: float, rank: int) -> None:
        """Complete the history's last line."""
        self.history[-1] = self.history[-1]._replace(error=error, rank=rank)

    def measure(self, net: Network) -> float:
        """`‖A - Â‖^2` by one more pass, entry by entry in double precision: nothing cancels."""
        wide = net.to(self.double)

        def add(sums: Sums, box: Box, values: Tensor) -> None:
            for part, x in pieces(box, values):
                sums["square"] += squared_norm(x.to(self.double) - decode_box(wide, part))

        start = torch.zeros((), dtype=torch.float64, device=self.source.device)
        return float(self.sweep("residual", (), lambda grid: {"square": start}, add)["square"])

    def error_of(self, net: Network, square: float, total: float) -> float:
        """Relative error from `‖A‖^2 - ‖core‖^2`, or measured by a pass where that difference says too little.

        Two sums in double precision agree to about 1e-13, and the cores are rounded to the dtype of the source: a
        difference is trusted while it is well above both.
        """
        cuts = len(net.cores)
        least = max(1e-11, (100 * cuts * torch.finfo(net.dtype).eps) ** 2)
        if square <= least * total:
            square = self.measure(net)
        return sqrt(max(square, 0.0) / total) if total > 0 else sqrt(max(square, 0.0))

    def result(
        self, net: Network, error: float, reason: str, tol: float | None, held_out: int | None = None
    ) -> CrossResult:
        """The result, with `converged = error <= tol`, and without a tolerance true."""
        if 0 < self.state.largest < LEAST:
            raise ValueError(
                f"{self.name}: squares must fit double precision, got values up to {self.state.largest:.3g}; scale it"
            )
        self.note(error, max([1, *net.ranks]))
        return CrossResult(
            network=net,
            evaluations=self.evaluations,
            bytes_read=self.source.bytes_read - self._before[1],
            error=error,
            held_out=prod(self.sizes) if held_out is None else held_out,
            converged=tol is None or error <= tol,
            reason=reason,
            history=tuple(self.history),
        )


def pieces(
    box: Box, values: Inexact[Tensor, "..."], whole: Sequence[int] = (), count: int | None = None
) -> Iterator[tuple[Box, Tensor]]:
    """A box in `count` parts (of about `PIECE` entries, if None), cut along the first axis that is long enough.

    Axes in `whole` are cut where there are no others. The parts are views.

    Example:
        >>> import torch
        >>> [part for part, _ in pieces((slice(4, 6), slice(0, PIECE)), torch.zeros(2, PIECE))]
        [(slice(4, 5, None), slice(0, 1048576, None)), (slice(5, 6, None), slice(0, 1048576, None))]
    """
    count = -(-values.numel() // PIECE) if count is None else count
    free = [k for k in range(values.ndim) if k not in whole] or list(range(values.ndim))
    long = [k for k in free if values.shape[k] >= count] or [max(free, key=lambda k: values.shape[k])]
    axis, start = long[0], box[long[0]].start
    step = max(1, values.shape[axis] // count)
    for first in range(0, values.shape[axis], step):
        last = min(first + step, values.shape[axis])
        part = (*box[:axis], slice(start + first, start + last), *box[axis + 1 :])
        yield part, values.narrow(axis, first, last - first)


def decode_box(net: Network, box: Box) -> Inexact[Tensor, "..."]:
    """Entries of a network in a box, from the parts of the cores that belong to it.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> net = LowRank(torch.eye(3, 2), torch.eye(2), torch.ones(4, 2))
        >>> decode_box(net, (slice(0, 1), slice(1, 3)))
        tensor([[1., 1.]])
    """
    place = dict(zip(net.outside, box, strict=True))
    parts = [
        core[tuple(place.get(label, slice(None)) for label in leg)]
        for core, leg in zip(net.cores, net.legs, strict=True)
    ]
    return to_dense(net.replace(parts))


def squared_norm(x: Inexact[Tensor, "..."]) -> float:
    """`‖x‖^2` of a tensor in double precision."""
    return float(torch.linalg.vector_norm(x)) ** 2
