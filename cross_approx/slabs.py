"""Slabs of a tensor, one whole mode times spread index sets of the others: what a capped cross is fitted to."""

from collections.abc import Sequence
from math import ceil, prod

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.chunk_choice import ChunkChoice
from cross_approx.reader import Reader
from cross_approx.sampled_fit import Block

OVERSAMPLING = 2.5
"""Indices of a mode in the slabs of the others, over its rank, where no limit binds."""

MOST = 1 << 25
"""Entries of all slabs at most: they are held in double precision."""

SOFT = 0.1
"""Weight of an unread entry, which counts as zero: what no entry shows should not grow."""


def spread_sets(
    sizes: Sequence[int], ranks: Sequence[int], over: float, masses: Sequence[Inexact[Tensor, "_n"]]
) -> list[Int[Tensor, "_q"]]:
    """Of every mode about `over` times its rank indices, spread evenly over its mass.

    Example:
        >>> ones = [torch.ones(9), torch.ones(4)]
        >>> [s.tolist() for s in spread_sets((9, 4), (2, 9), 1.5, ones)]
        [[1, 4, 7], [0, 1, 2, 3]]
    """
    sets = []
    for n, r, mass in zip(sizes, ranks, masses, strict=True):
        count = min(n, ceil(over * r))
        mass = mass.double() + 0.02 * mass.double().mean() + 1e-300
        marks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        places = torch.searchsorted(mass.cumsum(0) / mass.sum(), marks).clamp(max=n - 1).unique()
        rest = torch.ones(n, dtype=torch.bool)
        rest[places] = False
        others = rest.nonzero()[:, 0]
        others = others[mass[others].argsort(descending=True, stable=True)][: count - len(places)]
        sets.append(torch.cat([places, others]).sort().values)
    return sets


def read_slabs(
    reader: Reader,
    ranks: Sequence[int],
    masses: Sequence[Inexact[Tensor, "_n"]],
    choice: ChunkChoice | None,
    spare: int,
) -> list[Block] | None:
    """All slabs in one request; as many indices a mode as `max_evals` allows, `spare` entries left over.

    Entries of chunks that were not chosen have the weight `SOFT`; those of chunks that are not stored are known and
    not asked for. None where not even the ranks themselves fit.
    """
    room = float(MOST)
    if reader.max_evals is not None:
        room = min(room, reader.max_evals - reader.evaluations - spare)
    over = OVERSAMPLING if reader.max_evals is None else 3.0
    while True:
        sets = spread_sets(reader.sizes, ranks, over, masses)
        products = [
            [torch.arange(n) if k == m else sets[k] for k, n in enumerate(reader.sizes)] for m in range(len(sets))
        ]
        total = sum(prod(len(s) for s in product) for product in products)
        asked = 0
        if total <= 4 * MOST:
            asks = [_asked(product, choice) for product in products]
            asked = sum(
                total_of(product) if ask is None else int(ask.sum())
                for product, ask in zip(products, asks, strict=True)
            )
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
            blocks.append(Block(tuple(product), found.reshape(shape)))
            continue
        empty = choice.box(~choice.stored, product)
        dense = torch.where(empty, choice.fill, 0.0).to(found.dtype)
        dense[ask] = found
        blocks.append(Block(tuple(product), dense, torch.where(ask | empty, 1.0, SOFT).double()))
    return blocks


def total_of(product: Sequence[Tensor]) -> int:
    """Entries of a product of index sets."""
    return prod(len(s) for s in product)


def _asked(product: Sequence[Tensor], choice: ChunkChoice | None) -> Tensor | None:
    return None if choice is None else choice.box(choice.chosen & choice.stored, product)


def slab_basis(block: Block, mode: int, rank: int) -> Inexact[Tensor, "n r"]:
    """Dominant left singular vectors of a slab's unfolding at its whole mode."""
    matrix = block.values.movedim(mode, 0).reshape(block.values.shape[mode], -1)
    values, vectors = torch.linalg.eigh(matrix @ matrix.mH)
    return vectors[:, values.argsort(descending=True)[:rank]]
