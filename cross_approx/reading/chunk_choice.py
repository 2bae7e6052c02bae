"""Which chunks a cross may touch: columns of chunks for its pivots, chunks for a fit, random ones to be held out."""

from collections.abc import Sequence
from functools import singledispatch
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Inexact, Int
from torch import Tensor

from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import Entries
from cross_approx.sources.out_of_core import ZarrSource

HELD_SHARE = 0.025
"""Part of the bytes allowed that random chunks take, where entries are held out, if that is 8 of them at least."""

PIVOT_SHARE = 0.25
"""Part of the bytes allowed that the columns of the pivots may take where the store lacks chunks; the rest is for a
fit."""


@singledispatch
def stored_chunks(source: Any) -> tuple[Bool[Tensor, "..."], int | float | complex] | None:
    """Which chunks of a source exist, and the stored number that stands for the others; None if all may.

    Nothing is read but the list of keys.

    Example:
        >>> stored_chunks(None) is None
        True
    """
    return None


@stored_chunks.register
def _(source: ZarrSource) -> tuple[Tensor, int | float | complex] | None:
    array = source._array
    if getattr(array, "shards", None) is not None or not hasattr(array, "store_path"):
        return None  # a shard holds many chunks, and zarr 2 lists otherwise
    sync = __import__("zarr.core.sync", fromlist=["sync"]).sync
    path = array.store_path.path

    async def listed() -> set[str]:
        return {key async for key in array.store_path.store.list_prefix(f"{path}/" if path else "")}

    keys = sync(listed())
    counts = [len(edges) - 1 for edges in source.edges]
    prefix = f"{path}/" if path else ""
    every = torch.cartesian_prod(*(torch.arange(c) for c in counts)).reshape(-1, len(counts)).tolist()
    stored = torch.tensor([prefix + array.metadata.encode_chunk_key(tuple(key)) in keys for key in every])
    return stored.reshape(counts), array.fill_value.item()


class ChunkChoice:
    """The chunks that may be touched, at most `fraction` of the bytes of the tensor, and what each is for.

    Pivots lie in a few columns of chunks of every axis, spread over what is stored: the fibers of a cross then stay in
    the chunks of which all coordinates but one are in the columns. What these leave of the budget goes to random
    chunks (`held`, drawn by volume from the whole tensor, so that entries drawn from them are uniform ones) and to
    further chunks for a fit (`chosen`), those first whose neighbours are stored. A chunk that the store does not have
    is its fill value: it is known without being read, and costs nothing.

    Args:
        source: with `chunks`.
        fraction: of the bytes, 0 < fraction <= 1.
        generator: of the random chunks.

    Raises:
        ValueError: a fraction out of range, or below the smallest cross.

    Example:
        >>> import torch
        >>> from cross_approx import as_source
        >>> class Chunked:
        ...     shape, chunks, dtype, device = (64, 64, 64), (8, 8, 8), torch.float64, torch.device("cpu")
        >>> choice = ChunkChoice("tt_cross", Chunked(), 0.2, torch.Generator().manual_seed(0))
        >>> [len(indices) for indices in choice.allowed], choice.share(choice.chosen | choice.held) <= 0.2
        ([16, 16, 16], True)
    """

    def __init__(self, name: str, source: Any, fraction: int | float, generator: torch.Generator | None) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"{name}: chunk_fraction must be in (0, 1], got {fraction}")
        edges = getattr(source, "edges", None)
        if edges is None:
            edges = [[*range(0, n, c), n] for n, c in zip(source.shape, source.chunks, strict=True)]
        self.lengths = [torch.tensor([b - a for a, b in pairwise(map(int, edge))]) for edge in edges]
        self.number = [torch.arange(len(a)).repeat_interleave(a) for a in self.lengths]  # of the chunk of every index
        self.counts = [len(a) for a in self.lengths]
        found = stored_chunks(source)
        self.stored = torch.ones(self.counts, dtype=torch.bool) if found is None else found[0]
        self.fill = 0.0
        if found is not None:
            fill = source.packing.unpack(torch.tensor([found[1]]).to(source.stored_dtype))[0]
            if source.mask is None and bool(torch.isfinite(fill)):
                self.fill = fill.item()
            else:
                self.stored = torch.ones(self.counts, dtype=torch.bool)
        self._volume = torch.ones(self.counts, dtype=torch.float64)
        for k, lengths in enumerate(self.lengths):
            shape = [-1 if axis == k else 1 for axis in range(len(self.counts))]
            self._volume = self._volume * (lengths.double() / lengths.sum()).reshape(shape)
        self._draw(fraction, generator)
        self._columns(name, fraction)
        self._fill_up(fraction, generator)

    @property
    def reach(self) -> str:
        """What the uniform held-out entries can see, for the reason of a result."""
        return f"; uniform held-out entries are from {len(self.drawn)} random chunks"

    def share(self, chunks: Bool[Tensor, "..."]) -> float:
        """Part of the bytes of the tensor that is read with these chunks."""
        return float(self._volume[chunks & self.stored].sum())

    def at(self, chunks: Bool[Tensor, "..."], index: Int[Tensor, "B d"]) -> Bool[Tensor, "B"]:
        """Whether the entries lie in these chunks."""
        return chunks[tuple(number[index[:, k]] for k, number in enumerate(self.number))]

    def box(self, chunks: Bool[Tensor, "..."], sets: Sequence[Int[Tensor, "_p"]]) -> Bool[Tensor, "..."]:
        """The same at a product of index sets."""
        for k, indices in enumerate(sets):
            chunks = chunks.index_select(k, self.number[k][indices])
        return chunks

    def masses(self) -> list[Tensor]:
        """Of every mode, one at the indices through which slabs for a fit should go.

        Where chunks are missing from the store, most of the others are read, and these are all indices with any of
        them. Else an entry that is not read could be anything, and slabs stay in the columns of the pivots.
        """
        if bool(self.stored.all()):
            return [
                torch.zeros(len(number), dtype=torch.float64).index_fill(0, allowed, 1.0)
                for number, allowed in zip(self.number, self.allowed, strict=True)
            ]
        others = [[axis for axis in range(self.stored.ndim) if axis != k] for k in range(self.stored.ndim)]
        lines = [self.stored.sum(axes) if axes else self.stored for axes in others]
        return [(line > 0).double()[number] for line, number in zip(lines, self.number, strict=True)]

    def snap(self, places: Int[Tensor, "p d"]) -> Int[Tensor, "p d"]:
        """The places with every coordinate moved to the next one where pivots are allowed."""
        columns = []
        for k, allowed in enumerate(self.allowed):
            at = torch.searchsorted(allowed, places[:, k].contiguous()).clamp(max=len(allowed) - 1)
            columns.append(allowed[at])
        return torch.stack(columns, 1)

    def _touched(self, columns: list[Tensor]) -> Tensor:
        """Chunks of which all coordinates but one are in the columns."""
        inside = torch.zeros(self.counts, dtype=torch.long)
        for k, column in enumerate(columns):
            line = torch.zeros(self.counts[k], dtype=torch.long)
            line[column] = 1
            inside += line.reshape([-1 if axis == k else 1 for axis in range(len(self.counts))])
        return inside >= len(columns) - 1

    def _spread(self, k: int, count: int) -> Tensor:
        """Columns of an axis, evenly spread over what is stored."""
        mass = self._volume * self.stored
        mass = mass.movedim(k, 0).reshape(self.counts[k], -1).sum(1) + 1e-9
        marks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        columns = torch.searchsorted(mass.cumsum(0) / mass.sum(), marks).clamp(max=len(mass) - 1).unique()
        rest = torch.ones(len(mass), dtype=torch.bool)
        rest[columns] = False
        others = rest.nonzero()[:, 0]
        others = others[mass[others].argsort(descending=True, stable=True)]
        return torch.cat([columns, others[: count - len(columns)]])

    def _columns(self, name: str, fraction: float) -> None:
        counts = [1] * len(self.counts)
        # a fit stays in the columns too where nothing is known of other chunks
        share = 1.0 if bool(self.stored.all()) else PIVOT_SHARE
        columns = [self._spread(k, 1) for k in range(len(counts))]
        least = self.share(self._touched(columns) | self.held)
        if least > fraction * (1 + 1e-9):  # the volumes of all chunks sum to 1 up to rounding
            raise ValueError(
                f"{name}: chunk_fraction = {fraction} is too small, the fibers through one chunk and "
                f"{len(self.drawn)} random chunks touch {least:.3g} of the bytes; ask for more, or store smaller chunks"
            )
        growing = True
        while growing:
            growing = False
            for k in sorted(range(len(counts)), key=lambda k: counts[k] / self.counts[k]):
                if counts[k] == self.counts[k]:
                    continue
                more = [*columns[:k], self._spread(k, counts[k] + 1), *columns[k + 1 :]]
                if fraction == 1 or self.share(self._touched(more) | self.held) <= share * fraction:
                    columns, growing = more, True
                    counts[k] += 1
                    break
        self.allowed = [torch.isin(self.number[k], column).nonzero()[:, 0] for k, column in enumerate(columns)]
        self.chosen = self._touched(columns)

    def _draw(self, fraction: float, generator: torch.Generator | None) -> None:
        """Chunks drawn with replacement by volume: an entry drawn from a random one of them is uniform.

        How many is settled before: to stop at a budget would favour chunks that cost nothing.
        """
        count = 1 << 10
        price = float((self._volume.square() * self.stored).sum())  # expected, of one draw
        if fraction < 1 and price > 0:
            count = min(count, max(8, int(HELD_SHARE * fraction / price)))
            count = max(1, min(count, int(fraction / 4 / float(self._volume.max()))))
        ends = self._volume.flatten().cumsum(0)
        at = torch.rand(count, generator=generator, dtype=torch.float64) * ends[-1]
        self.drawn = torch.searchsorted(ends, at).clamp(max=len(ends) - 1)
        self.held = torch.zeros(self.counts, dtype=torch.bool)
        self.held.view(-1)[self.drawn] = True

    def _fill_up(self, fraction: float, generator: torch.Generator | None) -> None:
        """More chunks for a fit, as far as the budget goes: inner ones, which hold most, first."""
        score = self.stored.double()
        for k in range(score.ndim):
            pad = torch.zeros_like(score.narrow(k, 0, 1))
            wide, n = torch.cat([pad, score, pad], k), score.shape[k]
            score = wide.narrow(k, 0, n) + wide.narrow(k, 1, n) + wide.narrow(k, 2, n)
        score = score + 1e-3 * torch.rand(score.shape, generator=generator, dtype=torch.float64)
        # held chunks are chosen as often as others: were they fitted to on purpose, the error there would be too small
        open_ = self.stored & ~self.chosen
        order = torch.where(open_, score, -1.0).flatten().argsort(descending=True)[: int(open_.sum())]
        room = fraction - self.share(self.chosen | self.held)
        price = torch.where(self.held, 0.0, self._volume).flatten()[order]
        self.chosen.view(-1)[order[price.cumsum(0) <= room + 1e-12]] = True


def choose_chunks(
    name: str, source: Any, fraction: int | float | None, generator: torch.Generator | None
) -> ChunkChoice | None:
    """The chunks a cross may touch; None means all."""
    if fraction is None:
        return None
    if getattr(source, "chunks", None) is None:
        raise ValueError(
            f"{name}: chunk_fraction is for sources with chunks, got {type(source).__name__}; leave it out"
        )
    return ChunkChoice(name, source, fraction, generator)


class KnownSource:
    """A source whose chunks that are not stored are answered without being read."""

    def __init__(self, source: Any, choice: ChunkChoice) -> None:
        self.source, self.choice = source, choice
        self.shape, self.chunks = source.shape, source.chunks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def entries(self, index: Int[Tensor, "B d"]) -> Inexact[Tensor, "B"]:
        """Values at the rows of `index`."""
        stored = self.choice.at(self.choice.stored, index.cpu())
        if bool(stored.all()):
            return self.source.entries(index)
        values = torch.full((len(index),), self.choice.fill, dtype=self.source.dtype, device=self.source.device)
        if bool(stored.any()):
            stored = stored.to(index.device)
            values[stored] = self.source.entries(index[stored])
        return values


class ChunkHeldOut(HeldOut):
    """Held-out entries from the chunks that may be read.

    The uniform half is drawn from random chunks (by volume, so that every entry is equally likely before the chunks
    are drawn): with m of them a region made of whole chunks that holds the fraction 3 / m of the tensor is missed with
    probability 5 %, however many entries are drawn. The other half stays near the largest values in chunks chosen.
    """

    def __init__(self, reader: Entries, count: int, generator: torch.Generator | None, choice: ChunkChoice) -> None:
        super().__init__(reader, count, generator)
        self.choice = choice
        self._starts = [lengths.cumsum(0) - lengths for lengths in choice.lengths]

    def anew(self, count: int) -> HeldOut:
        """Another sample from the same chunks, not drawn yet."""
        return ChunkHeldOut(self.reader, count, self.generator, self.choice)

    def _all(self) -> Tensor:
        index = super()._all()
        return index[self.choice.at(self.choice.held, index)]

    def _uniform(self, count: int) -> Tensor:
        drawn = self.choice.drawn
        at = drawn[torch.randint(len(drawn), (count,), generator=self.generator)]
        index = self._within(at)
        for _ in range(8):  # of the same chunk: where entries were used must not decide which chunks are looked at
            used = self.reader.used(index).nonzero()[:, 0]
            index[used] = self._within(at[used])
        return index

    def _within(self, chunks: Tensor) -> Tensor:
        """A uniform entry of each of the chunks."""
        columns = []
        for k, number in enumerate(torch.unravel_index(chunks, self.choice.counts)):
            length = self.choice.lengths[k][number]
            place = torch.rand(len(chunks), generator=self.generator, dtype=torch.float64) * length
            columns.append(self._starts[k][number] + place.long().minimum(length - 1))
        return torch.stack(columns, 1)

    def _around(self, count: int) -> Tensor:
        index = super()._around(count)
        return index[self.choice.at(self.choice.chosen | self.choice.held | ~self.choice.stored, index)]


def monitor_of(reader: Entries, count: int, generator: torch.Generator | None, choice: ChunkChoice | None) -> HeldOut:
    """Held-out entries, in the chunks chosen where there is a choice."""
    return HeldOut(reader, count, generator) if choice is None else ChunkHeldOut(reader, count, generator, choice)
