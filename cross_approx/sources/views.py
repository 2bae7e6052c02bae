"""Sources that are other sources seen through index arithmetic: axes split, merged, permuted, padded."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cross_approx.digits import Quantization
from cross_approx.sources.packing import Packing
from cross_approx.sources.source import Source, as_source
from decompositions.formats.modes import check_axes

Fill = Literal["edge", "zero"]


class View(Source):
    """A source whose entries are those of another one, the base, at indices computed from its own.

    Every request becomes one request of the base (a slab or fibers where the index arithmetic allows, else entries), so
    the base groups it by chunk, caches, counts and refuses; its index stands in the messages. `evaluations`,
    `bytes_read`, `chunks_read` and `hit_rate` are those of the base, whoever asked it. `chunks` is None where axes are
    split or merged: a chunk of the base need not be a box there. Elsewhere `edges` are the base's.

    Args:
        base: the source.
        shape: sizes of the modes of the view.
    """

    def __init__(self, base: Any, shape: Sequence[int]) -> None:
        self.base = base
        super().__init__(shape, Packing(base.dtype), base.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's values, which may be known only once it was asked."""
        dtype: torch.dtype = self.base.dtype
        return dtype

    @property
    def probed(self) -> Tensor | None:
        """What a base that is a function showed of its entry (0, ..., 0), which is that of every view."""
        probed: Tensor | None = getattr(self.base, "probed", None)
        return probed

    @property
    def evaluations(self) -> int:
        """Entries the base was asked for so far."""
        return int(self.base.evaluations)

    @property
    def chunks_read(self) -> int:
        """Chunks the base has read so far."""
        return int(self.base.chunks_read)

    def _count(self, *, entries: int = 0, chunks: int = 0) -> None:
        """The base counts."""

    @property
    def bytes_read(self) -> int:
        """Bytes the base has read so far."""
        return int(self.base.bytes_read)

    @property
    def hit_rate(self) -> float:
        """Of the base's cache."""
        return float(self.base.hit_rate)

    @abstractmethod
    def _index(self, index: Tensor) -> Tensor:
        """The base's indices (B, d) of the view's (B, m)."""

    def _entries(self, index: Tensor) -> Tensor:
        return self._ask(self._index(index))

    def _ask(self, index: Tensor) -> Tensor:
        values: Tensor = self.base.entries(index.to(self.base.device))
        return values

    def _final(self, name: str, values: Tensor, lost: Tensor | None, where: Any) -> Tensor:
        return values  # the base has refused what is missing or not finite


class _Permuted(View):
    def __init__(self, base: Any, axes: tuple[int, ...]) -> None:
        self.axes = axes
        self._back = [axes.index(k) for k in range(len(axes))]
        super().__init__(base, [base.shape[k] for k in axes])
        self.chunks = None if base.chunks is None else tuple(base.chunks[k] for k in axes)

    @property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Those of the base."""
        return tuple(self.base.edges[k] for k in self.axes)

    def streamed(self) -> AbstractContextManager[None]:
        """As the base: its boxes of whole chunks are the view's."""
        streamed: AbstractContextManager[None] = self.base.streamed()
        return streamed

    def _index(self, index: Tensor) -> Tensor:
        return index[:, self._back]

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        values: Tensor = self.base.fibers(self._index(index), self.axes[axis])
        return values

    def _slab(self, ranges: list[range]) -> Tensor:
        values: Tensor = self.base.slab(tuple(_slice(ranges[k]) for k in self._back))
        return values.permute(self.axes)


class _Split(View):
    def __init__(self, base: Any, axis: int, sizes: tuple[int, ...]) -> None:
        self.axis, self.sizes = axis, sizes
        self._steps = [prod(sizes[k + 1 :]) for k in range(len(sizes))]
        shape = tuple(base.shape)
        super().__init__(base, (*shape[:axis], *sizes, *shape[axis + 1 :]))

    def _index(self, index: Tensor) -> Tensor:
        end = self.axis + len(self.sizes)
        inside = (index[:, self.axis : end] * torch.tensor(self._steps, device=index.device)).sum(1, keepdim=True)
        return torch.cat([index[:, : self.axis], inside, index[:, end:]], 1)

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        end = self.axis + len(self.sizes)
        if self.axis <= axis < end:
            return super()._fibers(index, axis)
        values: Tensor = self.base.fibers(self._index(index), axis if axis < end else axis - len(self.sizes) + 1)
        return values

    def _slab(self, ranges: list[range]) -> Tensor:
        end = self.axis + len(self.sizes)
        inside = np.zeros(1, dtype=np.int64)
        for r, step in zip(ranges[self.axis : end], self._steps, strict=True):
            inside = (inside[:, None] + np.asarray(r) * step).reshape(-1)
        found = _progression(inside)
        if found is None:
            return super()._slab(ranges)
        values: Tensor = self.base.slab(tuple(_slice(r) for r in (*ranges[: self.axis], found, *ranges[end:])))
        return values.reshape([len(r) for r in ranges])


class _Merged(View):
    def __init__(self, base: Any, first: int, last: int) -> None:
        shape = tuple(base.shape)
        self.first, self.last, self.sizes = first, last, shape[first : last + 1]
        super().__init__(base, (*shape[:first], prod(self.sizes), *shape[last + 1 :]))

    def _index(self, index: Tensor) -> Tensor:
        rest = index[:, self.first]
        columns: list[Tensor] = []
        for size in reversed(self.sizes):
            columns.insert(0, rest % size)
            rest = rest // size
        inside = torch.stack(columns, 1)
        return torch.cat([index[:, : self.first], inside, index[:, self.first + 1 :]], 1)

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        if axis == self.first:
            return super()._fibers(index, axis)
        values: Tensor = self.base.fibers(self._index(index), axis if axis < self.first else axis + len(self.sizes) - 1)
        return values

    def _slab(self, ranges: list[range]) -> Tensor:
        """One box of the base where the merged range is one, as where it is the whole axis."""
        inside = np.unravel_index(np.asarray(ranges[self.first]), self.sizes)
        box = [_progression(np.unique(column)) for column in inside]
        lengths = [len(r) for r in box if r is not None]
        if len(lengths) < len(box) or prod(lengths) != len(ranges[self.first]):
            return super()._slab(ranges)
        every = (*ranges[: self.first], *(r for r in box if r is not None), *ranges[self.first + 1 :])
        values: Tensor = self.base.slab(tuple(_slice(r) for r in every))
        return values.reshape([len(r) for r in ranges])


class _Padded(View):
    def __init__(self, base: Any, shape: tuple[int, ...], fill: Fill) -> None:
        self.fill = fill
        super().__init__(base, shape)
        self.chunks = base.chunks
        self._last = torch.tensor(tuple(base.shape)) - 1

    @property
    def edges(self) -> tuple[np.ndarray, ...]:
        """Those of the base; beyond it the last chunk is filled up to the largest size, and others follow."""
        sizes = self.chunks or (1,) * len(self.shape)
        return tuple(
            np.concatenate((edge[:-1], np.arange(edge[-2] + size, n, size), [n]))
            for edge, size, n in zip(self.base.edges, sizes, self.shape, strict=True)
        )

    def streamed(self) -> AbstractContextManager[None]:
        """As the base, if zeros are beyond it; its last values are asked for again and again."""
        streamed: AbstractContextManager[None] = self.base.streamed() if self.fill == "zero" else super().streamed()
        return streamed

    def _index(self, index: Tensor) -> Tensor:
        return index.minimum(self._last.to(index.device))

    def _entries(self, index: Tensor) -> Tensor:
        if self.fill == "edge":
            return super()._entries(index)
        return self._with_zeros(index, (len(index),), super()._entries)

    def _fibers(self, index: Tensor, axis: int) -> Tensor:
        if self.fill == "edge":
            return self._whole_fibers(index, axis)
        others = index.clone()
        others[:, axis] = 0
        shape = (len(index), self.shape[axis])
        return self._with_zeros(others, shape, lambda real: self._whole_fibers(real, axis))

    def _whole_fibers(self, index: Tensor, axis: int) -> Tensor:
        values: Tensor = self.base.fibers(self._index(index), axis)
        n, more = values.shape[1], self.shape[axis] - values.shape[1]
        if self.fill == "zero":
            return torch.nn.functional.pad(values, (0, more))
        return values[:, torch.arange(n + more, device=values.device).clamp_max_(n - 1)]

    def _with_zeros(self, index: Tensor, shape: tuple[int, ...], ask: Callable[[Tensor], Tensor]) -> Tensor:
        """What `ask` says of the rows in bounds, zeros for the others, which are not asked for."""
        real = (index <= self._last.to(index.device)).all(1)
        values = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return values.index_put((real.to(self.device),), ask(index[real])) if bool(real.any()) else values

    def _slab(self, ranges: list[range]) -> Tensor:
        """One box of the base, which the last values of its axes, or zeros, continue."""
        wanted = [np.asarray(r) for r in ranges]
        if self.fill == "edge":
            wanted = [np.minimum(r, n - 1) for r, n in zip(wanted, self.base.shape, strict=True)]
        else:
            wanted = [r[r < n] for r, n in zip(wanted, self.base.shape, strict=True)]
            if any(len(r) == 0 for r in wanted):
                return torch.zeros([len(r) for r in ranges], dtype=self.dtype, device=self.device)
        once = [np.unique(r, return_inverse=True) for r in wanted]
        box = [r for r in (_progression(r) for r, _ in once) if r is not None]
        if len(box) == len(once):
            values: Tensor = self.base.slab(tuple(_slice(r) for r in box))
        else:  # the last value of an axis is none of the steps to it
            grids = torch.meshgrid(*(torch.from_numpy(r) for r, _ in once), indexing="ij")
            index = torch.stack([grid.flatten() for grid in grids], 1)
            values = self._ask(index).reshape(grids[0].shape)
        for axis, (_, back) in enumerate(once):
            if len(back) != values.shape[axis]:
                values = values.index_select(axis, torch.from_numpy(back).to(values.device))
        more = [k for r, w in zip(reversed(ranges), reversed(wanted), strict=True) for k in (0, len(r) - len(w))]
        return torch.nn.functional.pad(values, more) if any(more) else values


def permute_axes(source: Any, axes: Sequence[int]) -> View:
    """`y[i_axes[0], i_axes[1], ...] = x[i_0, i_1, ...]`: axis k of the view is axis `axes[k]` of the source.

    Args:
        source: a source, or what `as_source` takes.
        axes: a permutation of the axes.

    Returns:
        A view: it asks the source, whose chunks, cache, counts and gradients it has.

    Raises:
        ValueError: axes that are no permutation.

    Example:
        >>> import torch
        >>> view = permute_axes(torch.arange(6.0).reshape(2, 3), (1, 0))
        >>> view.shape, view.entries(torch.tensor([[2, 0]]))
        ((3, 2), tensor([2.]))
    """
    base = as_source(source)
    return _Permuted(base, check_axes("permute_axes", axes, len(base.shape)))


def split_axis(source: Any, axis: int, sizes: Sequence[int]) -> View:
    """`y[.., i_1, ..., i_m, ..] = x[.., i, ..]` with `i = (i_1 n_2 + i_2) n_3 + ...`: an axis as m axes, C order.

    Args:
        source: a source, or what `as_source` takes.
        axis: 0 <= axis < d.
        sizes: of the new axes; their product is the size of the axis (pad it first where it is not).

    Returns:
        A view: it asks the source, whose chunks, cache, counts and gradients it has.

    Raises:
        ValueError: no such axis, another product.

    Example:
        >>> import torch
        >>> split_axis(torch.arange(6.0), 0, (2, 3)).entries(torch.tensor([[1, 2]]))
        tensor([5.])
    """
    base = as_source(source)
    d = len(base.shape)
    if not 0 <= axis < d:
        raise ValueError(f"split_axis: axis must be in 0..{d - 1}, got {axis}")
    if len(sizes) == 0 or min(sizes) < 1 or prod(sizes) != base.shape[axis]:
        raise ValueError(
            f"split_axis: expected sizes of product {base.shape[axis]} (axis {axis}), got {tuple(sizes)}; "
            "pad_axes makes an axis longer"
        )
    return _Split(base, axis, tuple(sizes))


def merge_axes(source: Any, first: int, last: int) -> View:
    """`y[.., i, ..] = x[.., i_first, ..., i_last, ..]` with i running in C order: neighbouring axes as one.

    Args:
        source: a source, or what `as_source` takes.
        first: 0 <= first.
        last: first <= last < d; axes that are not neighbours are brought together by `permute_axes`.

    Returns:
        A view: it asks the source, whose chunks, cache, counts and gradients it has.

    Raises:
        ValueError: no such axes.

    Example:
        >>> import torch
        >>> merge_axes(torch.arange(6.0).reshape(2, 3), 0, 1).entries(torch.tensor([[5]]))
        tensor([5.])
    """
    base = as_source(source)
    d = len(base.shape)
    if not 0 <= first <= last < d:
        raise ValueError(f"merge_axes: expected 0 <= first <= last < d = {d}, got first={first}, last={last}")
    return _Merged(base, first, last)


def merge_tail(base: Any) -> View:
    """All axes but the first as one, of anything that has `shape, dtype, device, entries`."""
    return _Merged(base, 1, len(base.shape) - 1)


def pad_axes(source: Any, shape: Sequence[int], fill: Fill = "zero") -> View:
    """`y[i] = x[i]`, and beyond the end of an axis zero, or the axis's last value. Nothing is asked beyond it.

    Args:
        source: a source, or what `as_source` takes; without empty axes.
        shape: sizes of the view, none smaller than the source's.
        fill: "zero", or "edge" for the last value (a request for which counts as one for that entry).

    Returns:
        A view: it asks the source, whose chunks, cache, counts and gradients it has.

    Raises:
        ValueError: a smaller shape, another fill.

    Example:
        >>> import torch
        >>> pad_axes(torch.tensor([1.0, 2.0]), (4,), "edge").slab((slice(None),))
        tensor([1., 2., 2., 2.])
    """
    base = as_source(source)
    if len(shape) != len(base.shape) or any(m < n or n < 1 for m, n in zip(shape, base.shape, strict=True)):
        raise ValueError(f"pad_axes: expected a shape of at least {base.shape} (no axis empty), got {tuple(shape)}")
    if fill not in ("edge", "zero"):
        raise ValueError(f"pad_axes: fill must be 'edge' or 'zero', got {fill!r}")
    return _Padded(base, tuple(shape), fill)


def split_digits(source: Any, quantization: Quantization) -> View:
    """`y[digits] = x[index]`: the axes as the digits of a quantization, the last value of a padded axis repeated.

    What `Quantization.split` does to a tensor, for a source: its QTT by any algorithm that takes one.

    Args:
        source: a source, or what `as_source` takes.
        quantization: of its shape.

    Returns:
        A view of the shape `quantization.sizes`.

    Raises:
        ValueError: a quantization of another shape.

    Example:
        >>> import torch
        >>> q = Quantization.of((17, 4))
        >>> view = split_digits(torch.arange(68.0).reshape(17, 4), q)
        >>> view.shape, view.entries(q.digits(torch.tensor([[16, 3]])))
        ((3, 3, 2, 2, 2), tensor([67.]))
    """
    base = as_source(source)
    if base.shape != quantization.shape:
        raise ValueError(f"split_digits: expected a quantization of {base.shape}, got one of {quantization.shape}")
    digits = [[k for k, (a, _) in enumerate(quantization.modes) if a == axis] for axis in range(len(base.shape))]
    view = pad_axes(base, quantization.padded, "edge")
    for axis in reversed(range(len(digits))):
        view = split_axis(view, axis, [quantization.modes[k][1] for k in digits[axis]] or [1])
    numbers = [k for number in digits for k in (number or [-1])]  # an axis of size 1 without digits joins the first
    view = permute_axes(view, sorted(range(len(numbers)), key=lambda place: numbers[place]))
    return merge_axes(view, 0, numbers.count(-1)) if -1 in numbers else view


def _progression(values: np.ndarray) -> range | None:
    """Ascending equidistant indices as a range."""
    steps = np.diff(values)
    if len(values) > 1 and (steps[0] < 1 or bool((steps != steps[0]).any())):
        return None
    step = int(steps[0]) if len(values) > 1 else 1
    return range(int(values[0]), int(values[-1]) + 1, step)


def _slice(r: range) -> slice:
    return slice(r.start, r.stop, r.step)
