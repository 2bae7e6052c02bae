"""Contractions of a batch of queries that share relations: row by row, or a relation at a time; the cheaper one.

Operands carry the label ROW where they are sliced at every row of the batch, and RELATION where at the relations.
*rows* slices both at every row and contracts along the batch. *relations* contracts what hangs on the relations once
for each distinct one, groups the rows by relation, in blocks as long as the largest group, and multiplies block by
block.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from decompositions.formats.cost import rates_for
from decompositions.formats.network import Labels
from decompositions.formats.plan import BATCH, Plan, Step, plan_path, run

ROW, RELATION, PLACE = BATCH, "@relation", "@place"
FREE = 6
"""Operands without rows or relations up to which every side is tried."""


class Groups(NamedTuple):
    """Rows of a batch by relation: row b is at `place[b] = group * longest + its number in the group`.

    Example:
        >>> groups = group_by(torch.tensor([4, 1, 4]))
        >>> groups.distinct.tolist(), groups.longest, groups.place.tolist()
        ([1, 4], 2, [2, 0, 3])
    """

    distinct: Int[Tensor, "D"]
    inverse: Int[Tensor, "B"]
    longest: int
    place: Int[Tensor, "B"]

    def spread(self, x: Tensor) -> Tensor:
        """(B, ...) -> (D, longest, ...), zero where a group is shorter."""
        blocks = x.new_zeros(len(self.distinct) * self.longest, *x.shape[1:])
        return blocks.index_copy(0, self.place, x).unflatten(0, (len(self.distinct), self.longest))

    def collect(self, blocks: Tensor) -> Tensor:
        """(D, longest, ...) -> (B, ...), the inverse of `spread`."""
        return blocks.flatten(0, 1).index_select(0, self.place)

    def multiply(self, x: Tensor, maps: Tensor) -> Tensor:
        """`y[b] = x[b] M[relation of b]` for maps (D, n, m), one batched product of blocks."""
        return self.collect(torch.bmm(self.spread(x), maps))


def group_by(relations: Int[Tensor, "B"]) -> Groups:
    """Group the rows of a (not empty) batch. Cost: two sorts of B numbers; on a device, waits for it."""
    distinct, inverse, counts = relations.unique(return_inverse=True, return_counts=True)
    order = inverse.argsort()
    number = torch.arange(len(relations), device=relations.device) - (counts.cumsum(0) - counts)[inverse[order]]
    longest = int(counts.max())
    return Groups(
        distinct, inverse, longest, torch.empty_like(order).index_copy(0, order, number + inverse[order] * longest)
    )


class Route(NamedTuple):
    """One way to contract a batch; `near` operands hang on relations, `far` ones on rows; fields as of a `Plan`."""

    strategy: str
    near: tuple[int, ...]
    far: tuple[int, ...]
    near_steps: tuple[Step, ...]
    far_steps: tuple[Step, ...]
    last_steps: tuple[Step, ...]
    flops: int
    bytes: int
    forward_seconds: float
    seconds: float
    kept: int = 0


def routes(legs: Sequence[Labels], out: Labels, sizes: dict[str, int], itemsize: int) -> tuple[Route, ...]:
    """All routes considered, best predicted first (forward and backward).

    Args:
        legs: labels of the operands as sliced: ROW or RELATION first where they are.
        out: labels of the result after ROW.
        sizes: of every label; of RELATION the distinct relations, of PLACE the longest group.
        itemsize: bytes of a number.

    Example:
        >>> legs = (("@", "i"), ("@relation", "k"), ("k", "i", "j"))
        >>> sizes = {"@": 128, "@relation": 4, "@place": 40, "k": 30, "i": 200, "j": 200}
        >>> [(route.strategy, route.flops) for route in routes(legs, ("j",), sizes, 4)][0]
        ('relations', 22400000)
    """
    return _routes(tuple(legs), out, tuple(sizes.items()), itemsize)


@lru_cache(maxsize=4096)
def _routes(
    legs: tuple[Labels, ...], out: Labels, table: tuple[tuple[str, int], ...], itemsize: int
) -> tuple[Route, ...]:
    sizes = dict(table)
    by_row = [tuple(ROW if label == RELATION else label for label in leg) for leg in legs]
    read = sum(_size(leg, sizes) for leg in by_row if ROW in leg)
    everything = tuple(range(len(legs)))
    found = [_route("rows", (), everything, (plan_path(by_row, sizes, (ROW, *out), itemsize),), read * itemsize)]
    tied = [k for k, leg in enumerate(legs) if RELATION in leg]
    rows = [k for k, leg in enumerate(legs) if ROW in leg]
    free = [k for k in everything if k not in tied and k not in rows]
    sides = product((True, False), repeat=len(free)) if len(free) <= FREE else [(s,) * len(free) for s in (True, False)]
    for side in sides if tied and rows else ():
        near = tuple(sorted([*tied, *(k for k, s in zip(free, side, strict=True) if s)]))
        far = tuple(k for k in everything if k not in near)
        opened = [_open(mine, other, legs, out) for mine, other in ((near, far), (far, near))]
        grouped = (RELATION, PLACE)
        plans = (
            plan_path([legs[k] for k in near], sizes, (RELATION, *opened[0]), itemsize),
            plan_path([legs[k] for k in far], sizes, (ROW, *opened[1]), itemsize),
            plan_path([(RELATION, *opened[0]), (*grouped, *opened[1])], sizes, (*grouped, *out), itemsize),
        )
        read = sum(_size(legs[k], sizes) for k in (*tied, *rows))
        read += _size((*grouped, *opened[1]), sizes) + _size((ROW, *out), sizes)
        found.append(_route("relations", near, far, plans, read * itemsize))
    return tuple(sorted(found, key=lambda route: route.seconds))


def _route(strategy: str, near: tuple[int, ...], far: tuple[int, ...], plans: tuple[Plan, ...], read: int) -> Route:
    """Add up plans; what is gathered is new memory in forward, and its gradient again in backward."""
    copies = read / rates_for(None).scatter
    forward = sum(plan.forward_seconds for plan in plans)
    steps = ((), plans[0].steps, ()) if len(plans) == 1 else tuple(plan.steps for plan in plans)
    flops, moved = sum(plan.flops for plan in plans), sum(plan.bytes for plan in plans) + read
    return Route(strategy, near, far, *steps, flops, moved, forward + copies, 3 * forward + 2 * copies)


def _size(leg: Labels, sizes: dict[str, int]) -> int:
    return prod(sizes[label] for label in leg)


def _open(mine: Sequence[int], others: Sequence[int], legs: Sequence[Labels], out: Labels) -> Labels:
    """Labels of a side that the other side or the result needs."""
    needed = {label for k in others for label in legs[k]} | set(out)
    own = dict.fromkeys(label for k in mine for label in legs[k] if label not in (ROW, RELATION))
    return tuple(label for label in own if label in needed)


class Sliced(NamedTuple):
    """Operands of a query: cores, and how each is sliced.

    Args:
        legs: labels of the cores, with the labels of the modes that are sliced.
        relation: label of the relation mode.
        heads: labels of the digits of the head, the most significant first; () where a vector stands for the head.
    """

    legs: tuple[Labels, ...]
    relation: str
    heads: Labels = ()

    def sliced(self) -> list[Labels]:
        """Labels of the operands after slicing; one that has both kinds of modes is sliced at rows."""
        made = []
        for leg in self.legs:
            first: Labels = (RELATION,) if self.relation in leg else ()
            first = (ROW,) if any(label in leg for label in self.heads) else first
            made.append(first + tuple(label for label in leg if label != self.relation and label not in self.heads))
        return made

    def operand(self, k: int, core: Tensor, relations: Tensor, digits: dict[str, Tensor]) -> Tensor:
        """Core k at these relations, and at the rows' digits."""
        leg = self.legs[k]
        own = [label for label in (self.relation, *self.heads) if label in leg]
        if not own:
            return core
        index = None
        for label in own:
            digit = relations if label == self.relation else digits[label]
            index = digit if index is None else index * core.shape[leg.index(label)] + digit
        axes = [leg.index(label) for label in own]
        if axes != [0]:
            others = [axis for axis in range(core.ndim) if axis not in axes]
            core = core.permute(*axes, *others)
            core = core.reshape(-1, *core.shape[len(axes) :]) if len(axes) > 1 else core
        assert index is not None
        return core.index_select(0, index)


def digits_of(ids: Int[Tensor, "n"], labels: Labels, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Mixed-radix digits of ids, the first label the most significant; a single label takes the id as it is."""
    if len(labels) == 1:
        return {labels[0]: ids}
    digits = {}
    for label, size in zip(reversed(labels), reversed(sizes), strict=True):
        digits[label] = ids % size
        ids = ids // size
    return digits


def contract_rows(
    route: Route,
    sliced: Sliced,
    cores: Sequence[Tensor],
    relations: Int[Tensor, "B"],
    groups: Groups | None,
    digits: dict[str, Tensor],
    extra: Sequence[Tensor] = (),
) -> Tensor:
    """Run a route: the result has the row first, then `out`.

    Args:
        route: one of `routes` for the legs `sliced.sliced()`, followed by those of `extra`.
        sliced: how the cores are sliced.
        cores: whole.
        relations: of the rows.
        groups: of the relations; needed by the strategy "relations".
        digits: of the heads.
        extra: operands that have their rows already, (B, ...).
    """

    def made(members: Sequence[int], at: Any) -> list[Tensor]:
        known = len(cores)
        return [sliced.operand(k, cores[k], at, digits) if k < known else extra[k - known] for k in members]

    if route.strategy == "rows" or groups is None:
        return run(route.far_steps, made(route.far, relations))
    near = run(route.near_steps, made(route.near, groups.distinct))
    far = run(route.far_steps, made(route.far, relations))
    return groups.collect(run(route.last_steps, [near, groups.spread(far)]))
