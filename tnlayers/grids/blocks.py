"""Boxes of a compressed grid, decoded alone; and the boxes into which a large one is cut."""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

from cross_approx import Quantization, gather, subtensor
from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Network


def decode_block(
    network: Network, shape: Sequence[int], quantization: Quantization | None, slices: Sequence[slice]
) -> Tensor:
    """Values of a box of a grid, `x[slices]`; other entries are not decoded.

    Every core is cut to the indices asked for before the contraction. Of a quantized train, whose labels are digits,
    dyadic boxes that cover the box are decoded one after the other.

    Args:
        network: outside labels are the axes, or the digits.
        shape: of the grid.
        quantization: of the digits, or None.
        slices: one an axis, 0 <= start <= stop <= size, step >= 1.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> net = TT([torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])])
        >>> decode_block(net, (4,), Quantization((4,), ((0, 2), (0, 2))), (slice(1, 4),))
        tensor([1., 2., 3.])
    """
    ranges = [range(*s.indices(n)) for s, n in zip(slices, shape, strict=True)]
    out = torch.empty([len(r) for r in ranges], dtype=network.dtype)
    if out.numel() == 0:
        return out
    if quantization is None:
        return _dense(subtensor(network, tuple(slices)))
    sizes = [[size for axis, size in quantization.modes if axis == k] for k in range(len(shape))]
    free = [_free(r, own) for r, own in zip(ranges, sizes, strict=True)]
    spans = [prod(own[len(own) - f :]) for own, f in zip(sizes, free, strict=True)]
    starts = [sorted({i // span for i in r}) for r, span in zip(ranges, spans, strict=True)]
    for corner in product(*starts):
        box = _dyadic(network, quantization, sizes, free, corner)
        here, there = [], []
        for k, (r, span) in enumerate(zip(ranges, spans, strict=True)):
            low = corner[k] * span
            first = max(0, -(-(low - r.start) // r.step))
            last = min(len(r), -(-(low + span - r.start) // r.step))
            here.append(slice(first, last))
            there.append(slice(r.start + first * r.step - low, r.start + (last - 1) * r.step - low + 1, r.step))
        out[tuple(here)] = box[tuple(there)]
    return out


def _dense(part: Network | Tensor) -> Tensor:
    return part if isinstance(part, Tensor) else to_dense(part)


def _free(indices: range, sizes: Sequence[int]) -> int:
    """How many low digits of an axis a box has so that few boxes cover the range and little else is decoded."""
    extent, span, free = indices[-1] - indices[0] + 1, 1, 0
    while free < len(sizes) and span * sizes[-1 - free] <= max(extent, 1):
        span *= sizes[-1 - free]
        free += 1
    return free


def _dyadic(
    network: Network,
    quantization: Quantization,
    sizes: Sequence[Sequence[int]],
    free: Sequence[int],
    corner: Sequence[int],
) -> Tensor:
    """The box whose leading digits are those of `corner` and whose last `free` ones take all values."""
    seen = [0] * len(sizes)
    key: list[int | slice] = []
    places: list[list[int]] = [[] for _ in sizes]  # of every axis: its free digits among all free digits
    count = 0
    for axis, size in quantization.modes:
        number, own = seen[axis], sizes[axis]
        fixed = len(own) - free[axis]
        seen[axis] += 1
        if number < fixed:
            key.append(corner[axis] // prod(own[number + 1 : fixed]) % size)
            continue
        key.append(slice(None))
        places[axis].append(count)
        count += 1
    dense = _dense(subtensor(network, tuple(key))).permute([place for own in places for place in own])
    return dense.reshape([prod(own[len(own) - f :]) for own, f in zip(sizes, free, strict=True)])


def decode_entries(network: Network, quantization: Quantization | None, index: Tensor) -> Tensor:
    """Values of a grid at B indices (B, d).

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> net = TT([torch.eye(2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])])
        >>> decode_entries(net, Quantization((4,), ((0, 2), (0, 2))), torch.tensor([[2]]))
        tensor([2.])
    """
    return gather(network, index if quantization is None else quantization.digits(index))


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
        sizes[k] = max(1, min(shape[k], sizes[k] * max(1, room)))
    yield from (
        tuple(slice(at, min(at + size, n)) for at, size, n in zip(corner, sizes, shape, strict=True))
        for corner in product(*(range(0, n, size) for n, size in zip(shape, sizes, strict=True)))
    )
