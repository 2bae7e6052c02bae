"""Slabs of a tensor, one whole mode times spread index sets of the others: what a capped cross is fitted to."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil, prod

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.reading.chunk_choice import ChunkChoice
from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import Entries
from cross_approx.reading.sampled_fit import ITERATIONS, Block, fit_train, fit_train_core

OVERSAMPLING = 2.5
"""Indices of a mode in the slabs of the others, over its rank, where no limit binds."""

MOST = 1 << 25
"""Entries of all slabs at most: they are held in double precision."""

TRAIN_SWEEPS = 4
"""Of alternating least squares."""

SOFT = 0.1
"""Weight of an unread entry, which counts as zero: what no entry shows should not grow."""


def spread_sets(
    sizes: Sequence[int], ranks: Sequence[int], over: float, masses: Sequence[Inexact[Tensor, "_n"]]
) -> list[Int[Tensor, "_q"]]:
    """Of every mode about `over` times its rank indices, spread evenly over its mass; none where that is zero.

    Example:
        >>> ones = [torch.ones(9), torch.ones(4)]
        >>> [s.tolist() for s in spread_sets((9, 4), (2, 9), 1.5, ones)]
        [[1, 4, 7], [0, 1, 2, 3]]
    """
    sets = []
    for n, r, mass in zip(sizes, ranks, masses, strict=True):
        count = min(int((mass > 0).sum()), ceil(over * r))
        marks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        places = torch.searchsorted(mass.double().cumsum(0) / float(mass.sum()), marks).clamp(max=n - 1).unique()
        rest = torch.ones(n, dtype=torch.bool)
        rest[places] = False
        others = rest.nonzero()[:, 0]
        others = others[mass[others].argsort(descending=True, stable=True)][: count - len(places)]
        sets.append(torch.cat([places, others]).sort().values)
    return sets


def read_slabs(
    reader: Entries,
    ranks: Sequence[int],
    masses: Sequence[Inexact[Tensor, "_n"]],
    choice: ChunkChoice | None,
    held: HeldOut,
) -> list[Block] | None:
    """All slabs in one request; as many indices a mode as `max_evals` allows.

    Held-out entries have the weight zero, so that they say how good a fit is however much was read around them.
    Entries of chunks that were not chosen have the weight `SOFT`; those of chunks that are not stored are known and
    not asked for. None where not even the ranks themselves fit.
    """
    room = float(MOST)
    if reader.max_evals is not None:
        room = min(room, reader.max_evals - reader.evaluations)
    over = OVERSAMPLING if reader.max_evals is None else 2 * OVERSAMPLING
    while True:
        sets = spread_sets(reader.sizes, ranks, over, masses)
        products = [
            [torch.arange(n) if k == m else sets[k] for k, n in enumerate(reader.sizes)] for m in range(len(sets))
        ]
        total = sum(prod(len(s) for s in product) for product in products)
        asked = 0
        if total <= 4 * MOST:
            asks = [_asked(product, choice) for product in products]
            asked = sum(_number(product, ask) for product, ask in zip(products, asks, strict=True))
            asked -= (len(sets) - 1) * _number(sets, _asked(sets, choice))  # what all slabs share is read once
            if total <= MOST and asked <= room:
                break
        over *= 0.985
        if over < 1:
            return None
    parts, lengths = [], []
    for product, ask in zip(products, asks, strict=True):
        index = torch.cartesian_prod(*product).reshape(-1, len(sets))
        parts.append(index if ask is None else index[ask.flatten()])
        lengths.append(len(parts[-1]))
    values = reader.read(torch.cat(parts)).split(lengths)
    blocks = []
    for product, ask, found in zip(products, asks, values, strict=True):
        shape = [len(s) for s in product]
        if choice is None or ask is None:
            blocks.append(_without(Block(tuple(product), found.reshape(shape)), held))
            continue
        empty = choice.box(~choice.stored, product)
        dense = torch.where(empty, choice.fill, 0.0).to(found.dtype)
        dense[ask] = found
        weights = torch.where(ask | empty, 1.0, SOFT).double()
        blocks.append(_without(Block(tuple(product), dense, weights), held))
    return blocks


def _without(block: Block, held: HeldOut) -> Block:
    """The block with nothing known at the held-out entries, unless these are all entries."""
    if held.exhausted or not len(held.index):
        return block
    places, inside = [], torch.ones(len(held.index), dtype=torch.bool)
    for k, (indices, n) in enumerate(zip(block.sets, held.reader.sizes, strict=True)):
        position = torch.full((n,), -1)
        position[indices] = torch.arange(len(indices))
        places.append(position[held.index[:, k]])
        inside &= places[-1] >= 0
    at = tuple(place[inside] for place in places)
    weights = torch.ones(block.values.shape, dtype=torch.float64) if block.weights is None else block.weights.clone()
    weights[at] = 0.0
    return Block(block.sets, block.values.index_put(at, block.values.new_zeros(())), weights)


def _number(product: Sequence[Tensor], ask: Tensor | None) -> int:
    return prod(len(s) for s in product) if ask is None else int(ask.sum())


def _asked(product: Sequence[Tensor], choice: ChunkChoice | None) -> Tensor | None:
    return None if choice is None else choice.box(choice.chosen & choice.stored, product)


def slab_basis(block: Block, mode: int, rank: int, cut: float = 0.0) -> Inexact[Tensor, "n r"]:
    """Dominant left singular vectors of a slab's unfolding at its whole mode, without those below `cut` of its norm."""
    matrix = block.values.movedim(mode, 0).reshape(block.values.shape[mode], -1)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mH)
    shown = int((squares > max(1e-14, cut**2) * squares.clamp(min=0).sum()).sum())
    return vectors.flip(1)[:, : max(1, min(rank, shown))]


def fit_capped_train(
    reader: Entries, ranks: Sequence[int], cores: list[Inexact[Tensor, "_r _n _s"]], choice: ChunkChoice, held: HeldOut
) -> list[Inexact[Tensor, "_r _n _s"]] | None:
    """A train of these ranks fitted to slabs; of order 3 from the slabs' own bases, else from the cores given.

    None where the limits do not let it.
    """
    around = [1, *ranks, 1]
    blocks = read_slabs(reader, [max(pair) for pair in pairwise(around)], choice.masses(), choice, held)
    if blocks is None:
        return None
    cores = [core.to(blocks[0].values.dtype) for core in cores]
    if len(cores) == 3:
        first, last = slab_basis(blocks[0], 0, ranks[0]), slab_basis(blocks[2], 2, ranks[1])
        # rows of a slab's unfolding are the modes, so the last basis is not conjugated
        middle = first.new_zeros(first.shape[1], reader.sizes[1], last.shape[1])
        cores = [first[None], middle, last.mT[..., None]]
        cores[1] = fit_train_core(blocks, cores, 1, 3 * ITERATIONS)
    return fit_train(blocks, cores, TRAIN_SWEEPS)
