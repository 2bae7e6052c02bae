"""Boxes of a compressed grid, decoded alone; and the boxes into which a large one is cut."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Network

Digits = tuple[tuple[int, int], ...]
NUMBERS = 1 << 21
"""Numbers of the largest array while entries are gathered."""


def decode_block(network: Network, shape: Sequence[int], digits: Digits | None, slices: Sequence[slice]) -> Tensor:
    """Values of a box of a grid, `x[slices]`; other entries are not decoded.

    Every core is cut to the indices asked for before the contraction. Of a quantized train, whose labels are digits,
    the smallest dyadic boxes that cover the box are decoded one after the other.

    Args:
        network: outside labels are the axes, or the digits.
        shape: of the grid.
        digits: (axis, size) of every digit, most significant first, or None.
        slices: one an axis, 0 <= start <= stop <= size, step >= 1.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> net = TT([torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])])
        >>> decode_block(net, (4,), ((0, 2), (0, 2)), (slice(1, 4),))
        tensor([1., 2., 3.])
    """
    ranges = [range(*s.indices(n)) for s, n in zip(slices, shape, strict=True)]
    out = torch.empty([len(r) for r in ranges], dtype=network.dtype)
    if out.numel() == 0:
        return out
    if digits is None:
        return to_dense(_cut(network, [torch.tensor(list(r)) for r in ranges]))
    sizes = [[size for axis, size in digits if axis == k] for k in range(len(shape))]
    free = [_free(r, own) for r, own in zip(ranges, sizes, strict=True)]
    spans = [prod(own[len(own) - f :]) for own, f in zip(sizes, free, strict=True)]
    starts = [sorted({i // span for i in r}) for r, span in zip(ranges, spans, strict=True)]
    for corner in product(*starts):
        box = _dyadic(network, digits, sizes, free, corner)
        here, there = [], []
        for k, (r, span) in enumerate(zip(ranges, spans, strict=True)):
            low = corner[k] * span
            first = max(0, -(-(low - r.start) // r.step))
            last = min(len(r), -(-(low + span - r.start) // r.step))
            here.append(slice(first, last))
            there.append(slice(r.start + first * r.step - low, r.start + (last - 1) * r.step - low + 1, r.step))
        out[tuple(here)] = box[tuple(there)]
    return out


def _cut(network: Network, kept: Sequence[Tensor]) -> Network:
    """The network with some indices of every outside label."""
    where = dict(zip(network.outside, kept, strict=True))
    cores = []
    for core, leg in zip(network.cores, network.legs, strict=True):
        for axis, label in enumerate(leg):
            if label in where:
                core = core.index_select(axis, where[label].to(core.device))
        cores.append(core)
    return network.replace(cores)


def _free(indices: range, sizes: Sequence[int]) -> int:
    """How many low digits of an axis a box has so that few boxes cover the range and little else is decoded."""
    extent, span, free = indices[-1] - indices[0] + 1, 1, 0
    while free < len(sizes) and span * sizes[-1 - free] <= max(extent, 1):
        span *= sizes[-1 - free]
        free += 1
    return free


def _dyadic(
    network: Network, digits: Digits, sizes: Sequence[Sequence[int]], free: Sequence[int], corner: Sequence[int]
) -> Tensor:
    """The box whose leading digits are those of `corner` and whose last `free` ones take all values."""
    fixed: list[list[int]] = []
    for own, count, at in zip(sizes, free, corner, strict=True):
        leading = []
        for size in reversed(own[: len(own) - count]):
            leading.append(at % size)
            at //= size
        fixed.append(leading[::-1])
    seen, kept = [0] * len(sizes), []
    places: list[list[int]] = [[] for _ in sizes]  # position of every digit of an axis in the train
    for place, (axis, size) in enumerate(digits):
        number = seen[axis]
        seen[axis] += 1
        places[axis].append(place)
        leading = fixed[axis]
        kept.append(torch.tensor([leading[number]]) if number < len(leading) else torch.arange(size))
    dense = to_dense(_cut(network, kept)).permute([place for own in places for place in own])
    return dense.reshape([prod(own[len(own) - f :]) for own, f in zip(sizes, free, strict=True)])


def boxes(shape: Sequence[int], most: int, chunks: Sequence[int] | None = None) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `most` entries that fill a grid, whole chunks where these are no larger; last axis first.

    Example:
        >>> [box[0] for box in boxes((5, 4), 8)]
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    sizes = [1] * len(shape)
    if chunks is not None and prod(min(c, n) for c, n in zip(chunks, shape, strict=True)) <= most:
        sizes = [min(c, n) for c, n in zip(chunks, shape, strict=True)]
    for k in reversed(range(len(shape))):
        room = most // max(1, prod(sizes))
        sizes[k] = min(shape[k], sizes[k] * max(1, room))
    yield from (
        tuple(slice(at, min(at + size, n)) for at, size, n in zip(corner, sizes, shape, strict=True))
        for corner in product(*(range(0, n, size) for n, size in zip(shape, sizes, strict=True)))
    )


def decode_entries(network: Network, digits: Digits | None, index: Tensor) -> Tensor:
    """Values of a grid at B indices (B, d).

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> net = TT([torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])])
        >>> decode_entries(net, None, torch.tensor([[1, 0], [0, 1]]))
        tensor([2., 1.])
        >>> decode_entries(net, ((0, 2), (0, 2)), torch.tensor([[2]]))
        tensor([2.])
    """
    if digits is not None:
        index = _digits_of(index, digits)
    where = dict(zip(network.outside, index.unbind(1), strict=True))
    sizes = network.sizes
    widest = max(prod(sizes[label] for label in leg if label not in where) for leg in network.legs)
    step = max(1, NUMBERS // widest)
    parts = [
        _some_entries(network, {label: own[at : at + step] for label, own in where.items()})
        for at in range(0, len(index), step)
    ]
    return torch.cat(parts) if parts else network.cores[0].new_zeros(0)


def _digits_of(index: Tensor, digits: Digits) -> Tensor:
    columns, left = [], {axis: index[:, axis] for axis in range(index.shape[1])}
    for axis, size in reversed(digits):
        columns.append(left[axis] % size)
        left[axis] = left[axis] // size
    return torch.stack(columns[::-1], 1)


def _some_entries(network: Network, where: dict[str, Tensor]) -> Tensor:
    symbols = {label: k + 1 for k, label in enumerate(network.bonds)}
    terms: list[Any] = []
    for core, leg in zip(network.cores, network.legs, strict=True):
        own = [axis for axis, label in enumerate(leg) if label in where]
        rest = [axis for axis in range(len(leg)) if axis not in own]
        moved = core.permute(*own, *rest)
        chosen = moved[tuple(where[leg[axis]] for axis in own)] if own else moved
        terms += [chosen, ([0] if own else []) + [symbols[leg[axis]] for axis in rest]]
    return opt_einsum.contract(*terms, [0], optimize="auto")
