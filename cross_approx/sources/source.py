"""Tensors that are asked for some of their entries."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.sources.packing import Packing

CACHE_BYTES = 1 << 28
CHUNK_BYTES = 1 << 22


class Source(ABC):
    """A tensor known by its entries: `entries(index)`, `fibers(index, axis)`, `slab(slices)`.

    Every request is checked before any work, counted, and refused with the index of the first value that is not
    finite. A kind of source writes `_entries` and, where it can do better than entry by entry, `_fibers` and `_slab`.

    Attributes:
        shape: sizes of the modes.
        device: where the values are.
        chunks: sizes of the largest chunk that is read at once; None where entries are read one by one.
        mask: a source of the same shape, nonzero where an entry is missing, or None.
        packing: how stored numbers become values.

    Example:
        >>> import torch
        >>> from cross_approx.sources.source import as_source
        >>> source = as_source(torch.arange(6.0).reshape(2, 3))
        >>> source.entries(torch.tensor([[0, 1], [1, 2]])), source.fibers(torch.tensor([[1, 0]]), axis=1)
        (tensor([1., 5.]), tensor([[3., 4., 5.]]))
        >>> source.evaluations
        5
    """

    chunks: tuple[int, ...] | None = None

    def __init__(
        self, shape: Sequence[int], packing: Packing, device: torch.device, mask: "Source | None" = None
    ) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.packing = packing
        self.device = device
        self.mask = mask
        self._evaluations = self._chunks_read = self._bytes = self._hits = self._lookups = 0
        if mask is not None and mask.shape != self.shape:
            raise ValueError(f"as_source: the mask must have the source's shape {self.shape}, got {mask.shape}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, floating or complex."""
        return self.packing.dtype

    @property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Of every axis, where its chunks begin, and its end: chunk c holds `edges[c] ... edges[c + 1] - 1`.

        Without `chunks` every index is one.
        """
        chunks = self.chunks or (1,) * len(self.shape)
        return tuple(np.append(np.arange(0, n, c), n) for n, c in zip(self.shape, chunks, strict=True))

    def streamed(self) -> AbstractContextManager[None]:
        """Around a pass over everything in boxes of whole chunks: a cache it would only wash out is left alone.

        Nothing by default: without a cache, or where boxes share chunks and need it.
        """
        return nullcontext()

    @property
    def evaluations(self) -> int:
        """Entries asked for so far, repeated ones counted again."""
        return self._evaluations

    @property
    def chunks_read(self) -> int:
        """Chunks read so far (a chunk that was dropped and is read again counts again)."""
        return self._chunks_read

    def _count(self, *, entries: int = 0, chunks: int = 0) -> None:
        """Entries that were asked for, chunks that were read."""
        self._evaluations += entries
        self._chunks_read += chunks

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the store as they are stored, whole chunks where there are chunks; with the mask's.

        Of a function: the bytes of its values.
        """
        return self._bytes + (self.mask.bytes_read if self.mask else 0)

    @property
    def hit_rate(self) -> float:
        """Part of the chunks that requests needed and found in the cache; 0 before any."""
        return self._hits / self._lookups if self._lookups else 0.0

    def entries(self, index: Int[Tensor, "B d"]) -> Inexact[Tensor, "B"]:
        """Values at B multi-indices.

        Each chunk is read at most once. Cost: O(B (d + log B)) beside the chunks. Memory: the cache's budget, one
        chunk, and a few arrays of the size of `index`.

        Args:
            index: (B, d) integers, 0 <= index[:, k] < shape[k].

        Returns:
            (B,) values of `dtype` on `device`.

        Raises:
            ValueError: an index out of bounds, a value that is missing or not finite.
            TypeError: an index that is no integer tensor.
            ChunkError: a chunk could not be read; it holds the values of the others.
        """
        index = self._checked("entries", index)
        self._count(entries=len(index))
        if len(index) == 0:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        values = self._entries(index)
        lost = None if self.mask is None else self.mask.entries(index)
        return self._final("entries", values, lost, lambda at: index[at[0]].tolist())

    def fibers(self, index: Int[Tensor, "B d"], axis: int) -> Inexact[Tensor, "B n"]:
        """Values along an axis through B multi-indices: row b is `x[index[b, 0], ..., :, ..., index[b, d - 1]]`.

        Args:
            index: (B, d) integers as in `entries`; the column of the axis is not looked at.
            axis: 0 <= axis < d.

        Returns:
            (B, shape[axis]) values; the grouping, the memory and the refusals are those of `entries`.

        Raises:
            ValueError: an index or axis out of bounds, a value that is missing or not finite.
        """
        if isinstance(axis, bool) or not isinstance(axis, Integral) or not 0 <= axis < len(self.shape):
            raise ValueError(f"fibers: axis must be in 0..{len(self.shape) - 1}, got {axis}")
        axis = int(axis)
        index = self._checked("fibers", index, skip=axis)
        shape = (len(index), self.shape[axis])
        self._count(entries=prod(shape))
        if prod(shape) == 0:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        values = self._fibers(index, axis)
        lost = None if self.mask is None else self.mask.fibers(index, axis)

        def where(at: Sequence[int]) -> list[int]:
            row = index[at[0]].tolist()
            return [*row[:axis], at[1], *row[axis + 1 :]]

        return self._final("fibers", values, lost, where)

    def slab(self, slices: Sequence[slice]) -> Inexact[Tensor, "..."]:
        """Values of a box, `x[slices]`.

        Args:
            slices: one slice an axis, 0 <= start <= stop <= shape[k], step >= 1; parts left out mean the whole axis.

        Returns:
            The values, of order d; the grouping, the memory and the refusals are those of `entries`.

        Raises:
            ValueError: another number of slices, slices out of bounds, a value that is missing or not finite.
            TypeError: something else than slices.
        """
        ranges = self._ranges(slices)
        shape = tuple(len(r) for r in ranges)
        self._count(entries=prod(shape))
        if prod(shape) == 0:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        values = self._slab(ranges)
        lost = None if self.mask is None else self.mask.slab(slices)
        return self._final("slab", values, lost, lambda at: [r[i] for r, i in zip(ranges, at, strict=True)])

    @abstractmethod
    def _entries(self, index: Tensor) -> Tensor: ...

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        n = self.shape[axis]
        every = index.repeat_interleave(n, 0)
        every[:, axis] = torch.arange(n, device=index.device).repeat(len(index))
        return self._entries(every).reshape(len(index), n)

    def _slab(self, ranges: list[range]) -> Tensor:
        grids = (
            torch.meshgrid(*(torch.arange(r.start, r.stop, r.step) for r in ranges), indexing="ij") if ranges else ()
        )
        index = torch.stack([grid.flatten() for grid in grids], 1) if grids else torch.zeros(1, 0, dtype=torch.int64)
        return self._entries(index).reshape([len(r) for r in ranges])

    def _checked(self, name: str, index: Tensor, skip: int | None = None) -> Tensor:
        d = len(self.shape)
        if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
            kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"{name}: expected an integer tensor of indices (int64), got {kind}; convert it")
        if index.ndim != 2 or index.shape[1] != d:
            raise ValueError(f"{name}: expected an index of shape (B, d = {d}), got {tuple(index.shape)}")
        index = index.detach().to(torch.int64)
        for k, n in enumerate(self.shape):
            column = index[:, k]
            if k == skip or len(column) == 0:
                continue
            low, high = (int(value) for value in torch.aminmax(column))
            if low < 0 or high >= n:
                row = int(((column < 0) | (column >= n)).int().argmax())
                raise ValueError(
                    f"{name}: indices of axis {k} must be in 0..{n - 1} (no negative ones), "
                    f"got {tuple(index[row].tolist())} in row {row}"
                )
        return index

    def _ranges(self, slices: Sequence[slice]) -> list[range]:
        if not isinstance(slices, tuple | list) or not all(isinstance(s, slice) for s in slices):
            raise TypeError(f"slab: expected a tuple of slices, got {slices!r}; write slice(i, i + 1) for one index")
        if len(slices) != len(self.shape):
            raise ValueError(f"slab: expected one slice an axis (d = {len(self.shape)}), got {len(slices)}")
        ranges = []
        for k, (s, n) in enumerate(zip(slices, self.shape, strict=True)):
            start, stop, step = s.start or 0, n if s.stop is None else s.stop, 1 if s.step is None else s.step
            if not 0 <= start <= stop <= n or step < 1:
                raise ValueError(
                    f"slab: axis {k} needs 0 <= start <= stop <= {n} and step >= 1, got {start}:{stop}:{step}"
                )
            ranges.append(range(start, stop, step))
        return ranges

    def _final(
        self, name: str, values: Tensor, lost: Tensor | None, where: Callable[[Sequence[int]], list[int]]
    ) -> Tensor:
        """The values with masked ones marked; the first that is not finite is refused with its index."""
        if lost is not None:
            values = values.masked_fill(lost.to(values.device) != 0, self.packing.mark)
        if bool(torch.isfinite(values.detach().sum())):  # one pass; a sum may overflow, so no other answer is final
            return values
        bad = ~torch.isfinite(values.detach())
        if bad.any():
            at = torch.unravel_index(bad.flatten().int().argmax(), bad.shape)
            position = [int(i) for i in at]
            raise ValueError(
                f"{name}: values must be finite, got {values.detach()[at].item()} at index {tuple(where(position))} "
                f"({int(bad.sum())} of {bad.numel()} asked for are missing or not finite); "
                "fill_value= and mask= name missing entries, missing= gives them a value"
            )
        return values


def as_source(
    x: Any,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    name: str | None = None,
    vectorize: bool = False,
    batch: int | None = None,
    scale: int | float | None = None,
    offset: int | float | None = None,
    fill_value: int | float | None = None,
    missing: int | float | None = None,
    mask: Any = None,
    cf: bool = True,
    cache_bytes: int = CACHE_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    retries: int = 3,
    backoff: int | float = 0.05,
) -> Source:
    """A source of entries from anything that has them.

    Values are `stored * scale + offset` (CF conventions). Memory of a store read by chunks: at most `cache_bytes`, one
    chunk, and the request.

    Args:
        x: a torch tensor; a numpy array, masked array or memmap; a function (see `FunctionSource`); an array of zarr,
            dask, xarray or h5py; a tensor opened with `safetensors.safe_open(...).get_slice`; a path: a zarr array, a
            folder of slices (.npy or .pt), a .npy or .safetensors file; a `Source`, returned as it is.
        shape: of a function. For the others it is checked.
        dtype: of the values, floating or complex. None keeps that of the store, and turns integers and bool into
            float32 (up to 16 bits) or float64.
        device: of the values. None: the CPU, or the tensor's device (a tensor is never moved).
        name: of the tensor in a .safetensors file.
        vectorize: the function takes d Python integers and returns one number.
        batch: at most so many indices in one call of the function.
        scale, offset, fill_value: override the store's attributes `scale_factor`, `add_offset`, `_FillValue`.
        missing: value of missing entries (fill values, masked ones). None refuses them when they are read.
        mask: source of the same shape (anything this function takes), nonzero where an entry is missing; its cache is
            its own, so pass a `Source` to choose its budget.
        cf: whether the attributes of the store are looked at.
        cache_bytes: budget of the cache of chunks; 0 keeps none.
        chunk_bytes: size of the pieces in which a store without chunks is read.
        retries: how often the reading of a chunk is tried again.
        backoff: seconds before the first of these, doubled each time.

    Raises:
        TypeError: nothing this function knows; entries that are no numbers; a function without `shape=`.
        ValueError: options that do not fit.
        ImportError: a package that is missing.

    Example:
        >>> import torch
        >>> source = as_source(torch.tensor([[1, 2], [3, -9]]), scale=0.5, fill_value=-9, missing=0.0)
        >>> source.slab((slice(None), slice(None))).tolist()
        [[0.5, 1.0], [1.5, 0.0]]
    """
    from cross_approx.sources.in_memory import ArraySource, FunctionSource, TensorSource  # it imports this module

    stored: dict[str, Any] = {"scale": scale, "offset": offset, "fill_value": fill_value, "missing": missing}
    is_function = callable(x)
    if not is_function and (vectorize or batch is not None):
        raise ValueError(f"as_source: vectorize and batch are for functions, got {type(x).__name__}; leave them out")
    if name is not None and not isinstance(x, str | os.PathLike):
        raise ValueError(f"as_source: name is for files that hold several tensors, got {type(x).__name__}")
    if isinstance(x, Source):
        if any(option is not None for option in (dtype, device, mask, *stored.values())):
            raise ValueError("as_source: this is a source already, expected no options; give them where it is made")
        return _shaped(x, shape)
    if is_function:
        if shape is None:
            raise TypeError("as_source: a function needs shape=, got none; pass the sizes of its modes")
        if any(option is not None for option in (mask, *stored.values())):
            raise ValueError("as_source: scale, offset, fill_value, missing, mask are for stores, got a function")
        return FunctionSource(x, shape, dtype=dtype, device=device, vectorize=vectorize, batch=batch)
    hidden = None if mask is None else as_source(mask, missing=None)
    common: dict[str, Any] = {"dtype": dtype, "mask": hidden, **stored}
    if isinstance(x, Tensor):
        asked = x.device if device is None else torch.device(device)
        if asked.type != x.device.type or asked.index not in (None, x.device.index):
            raise ValueError(f"as_source: a tensor stays on its device {x.device}, got device={device}; move it first")
        return _shaped(TensorSource(x, **common), shape)
    common["device"] = device
    if isinstance(x, np.ndarray):
        return _shaped(ArraySource(x, **common), shape)
    from cross_approx.sources import out_of_core  # it imports this module

    if isinstance(x, str | os.PathLike) and str(x).endswith(".npy") and os.path.isfile(x):
        return _shaped(ArraySource(np.load(x, mmap_mode="r", allow_pickle=False), **common), shape)
    common |= {"cache_bytes": cache_bytes, "retries": retries, "backoff": backoff}
    return _shaped(out_of_core.open_store(x, name=name, cf=cf, chunk_bytes=chunk_bytes, **common), shape)


def _shaped(source: Source, shape: Sequence[int] | None) -> Source:
    if shape is not None and tuple(shape) != source.shape:
        raise ValueError(f"as_source: shape must be the source's {source.shape}, got {tuple(shape)}; leave it out")
    return source
