"""Search for chains: x meets the cores (or small groups of them, multiplied first) one after another, without copies.

A group of cores is absorbed into x by one matrix product. Which groups, in which order, and how every intermediate lies
in memory decide the time; the axes are chosen so that each product reads and writes its operands as they are. All
orders and layouts are searched by uniform cost (Dijkstra), for the few groupings with the fewest FLOPs.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, permutations
from math import log, prod
from typing import NamedTuple

from decompositions.formats.cost import Cost, Rates, copy_seconds, product_cost, rate_at
from decompositions.formats.network import Labels

Groups = tuple[tuple[int, ...], ...]

GROUPINGS = 8
"""Groupings whose layouts are searched; the others have more FLOPs."""

BRANCH = 6
"""Layouts tried for one product: the cheapest ones."""


class Absorption(NamedTuple):
    """One product of a chain: `before` meets group `group`, and `after` is the result, both in memory order."""

    group: int
    before: Labels
    after: Labels
    cost: Cost


class Chain(NamedTuple):
    """A grouping of the cores, the layout of each group's tensor, and the products in their order.

    Labels are bundled: `members` says which labels of the network a name stands for.
    """

    groups: Groups
    layouts: tuple[Labels, ...]
    products: tuple[Absorption, ...]
    seconds: float
    members: Mapping[str, Labels]

    def expand(self, names: Sequence[str]) -> Labels:
        """Labels of the network for bundled ones."""
        return tuple(label for name in names for label in self.members[name])


def groupings(legs: Sequence[Labels], rows: Labels, cols: Labels, sizes: Mapping[str, int]) -> list[Groups]:
    """Ways to multiply cores with each other first: sides are cut in two (or not), cores on equal parts are joined.

    Cores without outside labels stay alone, or join one of their neighbours. The ungrouped network is one of the ways.

    Example:
        >>> legs = [("i", "a"), ("a", "b"), ("j", "b")]
        >>> groupings(legs, ("i",), ("j",), {"i": 8, "j": 8, "a": 2, "b": 2})
        [((0,), (1,), (2,)), ((0, 1), (2,)), ((0,), (1, 2))]
    """
    found: dict[Groups, None] = {}
    dense = prod(sizes[label] for label in (*rows, *cols))
    for row_cut in _cuts(rows, sizes):
        for col_cut in _cuts(cols, sizes):
            part = {label: (0, k < row_cut) for k, label in enumerate(rows)}
            part |= {label: (1, k < col_cut) for k, label in enumerate(cols)}
            marks = [frozenset(part[label] for label in leg if label in part) for leg in legs]
            joined: dict[frozenset[tuple[int, bool]], list[int]] = {}
            for k, mark in enumerate(marks):
                if mark:
                    joined.setdefault(mark, []).append(k)
            inner = _connected([k for k, mark in enumerate(marks) if not mark], legs)
            base = [tuple(members) for members in joined.values()]
            for choice in [base + inner, *_absorb_inner(base, inner, legs)]:
                groups = tuple(sorted(choice))
                small = all(_group_size(group, legs, rows + cols, sizes) <= dense for group in groups)
                if small and (len(groups) > 1 or len(legs) == 1):
                    found.setdefault(groups)
    alone = tuple((k,) for k in range(len(legs)))
    if len(legs) <= 6:
        found.setdefault(alone)
    return list(found)


def _cuts(labels: Labels, sizes: Mapping[str, int]) -> list[int]:
    """Where to cut a side in two: nowhere, and at the three places nearest to equal halves."""
    half = log(prod(sizes[label] for label in labels)) / 2
    inner = sorted(range(1, len(labels)), key=lambda k: abs(log(prod(sizes[label] for label in labels[:k])) - half))
    return [0, *inner[:3]]


def _connected(members: list[int], legs: Sequence[Labels]) -> list[tuple[int, ...]]:
    parts: list[tuple[int, ...]] = []
    left = list(members)
    while left:
        part, frontier = [], [left.pop(0)]
        while frontier:
            k = frontier.pop()
            part.append(k)
            near = [other for other in left if set(legs[other]) & set(legs[k])]
            left = [other for other in left if other not in near]
            frontier.extend(near)
        parts.append(tuple(sorted(part)))
    return parts


def _absorb_inner(
    base: list[tuple[int, ...]], inner: list[tuple[int, ...]], legs: Sequence[Labels]
) -> Iterator[list[tuple[int, ...]]]:
    """Each core without outside labels joined to each of its neighbours."""
    for position, part in enumerate(inner):
        own = {label for k in part for label in legs[k]}
        others = inner[:position] + inner[position + 1 :]
        for k, group in enumerate(base):
            if own & {label for member in group for label in legs[member]}:
                yield [*base[:k], tuple(sorted(group + part)), *base[k + 1 :], *others]


def _group_labels(group: Sequence[int], legs: Sequence[Labels], outside: Labels) -> Labels:
    """Labels of a group's tensor: those that other cores or the outside need."""
    others = {label for k, leg in enumerate(legs) if k not in group for label in leg} | set(outside)
    return tuple(dict.fromkeys(label for k in group for label in legs[k] if label in others))


def _group_size(group: Sequence[int], legs: Sequence[Labels], outside: Labels, sizes: Mapping[str, int]) -> int:
    return prod(sizes[label] for label in _group_labels(group, legs, outside))


class _Bundles:
    """Labels that always go together are searched as one."""

    def __init__(self, operands: Sequence[Labels], start: Labels, end: Labels, sizes: Mapping[str, int]) -> None:
        owners: dict[str, tuple[int, ...]] = {}
        for label in dict.fromkeys((*start, *end, *(label for labels in operands for label in labels))):
            owners[label] = tuple(k for k, labels in enumerate(operands) if label in labels)
        self.members: dict[str, Labels] = {}
        for side in (start, end):
            run: list[str] = []
            for label in (*side, ""):
                if run and (not label or owners[label] != owners[run[-1]] or (label in start) != (run[-1] in start)):
                    self.members.setdefault(run[0], tuple(run))
                    run = []
                if label:
                    run.append(label)
        by_owner: dict[tuple[int, ...], list[str]] = {}
        for label in owners:
            if label not in start and label not in end:
                by_owner.setdefault(owners[label], []).append(label)
        for bonds in by_owner.values():
            self.members[bonds[0]] = tuple(bonds)
        self.sizes = {name: prod(sizes[label] for label in labels) for name, labels in self.members.items()}

    def bundle(self, labels: Sequence[str]) -> Labels:
        return tuple(label for label in labels if label in self.members)


def layouts_after(before: Labels, core: Labels, needed: frozenset[str]) -> list[Labels]:
    """Memory orders that one product of `before` with `core` can write, `needed` being what later products need.

    Example:
        >>> layouts_after(("b", "a"), ("a", "r"), frozenset("br"))
        [('b', 'r'), ('r', 'b')]
    """
    inside = set(core)
    held = tuple(label for label in before if label in inside and label in needed)
    free = tuple(label for label in before if label not in inside)
    new = tuple(label for label in core if label not in before)
    found: dict[Labels, None] = {}
    for order in permutations(new) if len(new) <= 2 else (new,):
        if held:
            found.setdefault(held + free + order)
            found.setdefault(held + order + free)
            continue
        for start in range(len(free) + 1):
            for stop in range(start, len(free) + 1):
                block, batch = free[start:stop], free[:start] + free[stop:]
                found.setdefault(batch + block + order)
                found.setdefault(batch + order + block)
    return list(found)


def _moves(
    before: Labels, core: Labels, needed: frozenset[str], sizes: Mapping[str, int], itemsize: int, rates: Rates
) -> list[tuple[Cost, Labels]]:
    """Cheapest products of `before` with `core`, whose own layout is free (it is small)."""
    choices = []
    for after in layouts_after(before, core, needed):
        choices.append((product_cost(before, _friendly(core, before, after), after, sizes, itemsize, rates), after))
    choices.sort(key=lambda choice: (choice[0].seconds, choice[1]))
    return choices[:BRANCH]


def _friendly(core: Labels, before: Labels, after: Labels) -> Labels:
    """A layout of the core that its product reads without a copy: common batch labels, new ones, summed ones."""
    held = tuple(label for label in after if label in core and label in before)
    new = tuple(label for label in after if label in core and label not in before)
    summed = tuple(label for label in before if label in core and label not in after)
    return held + new + summed


def search_chains(
    legs: Sequence[Labels],
    rows: Labels,
    start: Labels,
    end: Labels,
    sizes: Mapping[str, int],
    itemsize: int,
    rates: Rates,
) -> list[Chain]:
    """Best chain of every promising grouping, cheapest first; `start` and `end` are the memory orders of x and y."""
    cols = tuple(label for label in start if label not in end)
    ranked = []
    for groups in groupings(legs, rows, cols, sizes):
        operands = [_group_labels(group, legs, (*rows, *start)) for group in groups]
        bundles = _Bundles(operands, start, end, sizes)
        names = [bundles.bundle(labels) for labels in operands]
        least = _least_seconds(bundles.bundle(start), names, bundles.bundle(end), bundles.sizes, rates)
        if least is not None:
            ranked.append((least, groups, bundles, names))
    ranked.sort(key=lambda entry: entry[:2])
    best: list[Chain] = []
    bound = float("inf")
    for least, groups, bundles, names in ranked[:GROUPINGS]:
        if least > 2 * bound:
            break
        found = _dijkstra(
            bundles.bundle(start), names, bundles.bundle(end), bundles.sizes, itemsize, rates, 1.5 * bound
        )
        if found is None:
            continue
        seconds, products = found
        bound = min(bound, seconds)
        layouts = list(names)
        for p in products:  # a product of cores is written in the layout that its use wants
            if len(groups[p.group]) > 1:
                layouts[p.group] = _friendly(names[p.group], p.before, p.after)
        best.append(Chain(groups, tuple(layouts), products, seconds, bundles.members))
    return sorted(best, key=lambda chain: (chain.seconds, chain.groups))


def _needed(names: Sequence[Labels], left: Sequence[int], end: Labels) -> frozenset[str]:
    return frozenset(label for k in left for label in names[k]) | frozenset(end)


def _touching(order: Sequence[str], names: Sequence[Labels], left: Sequence[int]) -> list[int]:
    return [k for k in left if set(names[k]) & set(order)] or list(left)


def _least_seconds(
    start: Labels, names: Sequence[Labels], end: Labels, sizes: Mapping[str, int], rates: Rates
) -> float | None:
    """Cheapest order of absorption when only FLOPs and calls count: a lower bound for the ranking of groupings."""
    peak = rates.depth[-1][1]
    best: dict[tuple[frozenset[str], tuple[int, ...]], float] = {}
    heap = [(0.0, 0, frozenset(start), tuple(range(len(names))))]
    ticket = count(1)
    for _ in range(20000):
        if not heap:
            return None
        seconds, _, held, left = heapq.heappop(heap)
        if not left:
            return seconds
        if best.get((held, left), float("inf")) < seconds:
            continue
        for k in _touching(tuple(held), names, left):
            rest = tuple(j for j in left if j != k)
            involved = held | set(names[k])
            after = involved & _needed(names, rest, end) | (involved & set(end))
            smallest = min(prod(sizes[x] for x in held & set(names[k])), prod(sizes[x] for x in involved))
            flops = 2 * prod(sizes[label] for label in involved)
            total = seconds + rates.call + flops / max(peak / 8, rate_at(rates.depth, max(1, smallest)))
            key = (after, rest)
            if total < best.get(key, float("inf")):
                best[key] = total
                heapq.heappush(heap, (total, next(ticket), after, rest))
    return None


def _dijkstra(
    start: Labels,
    names: Sequence[Labels],
    end: Labels,
    sizes: Mapping[str, int],
    itemsize: int,
    rates: Rates,
    bound: float,
) -> tuple[float, tuple[Absorption, ...]] | None:
    """Cheapest sequence of products from x's layout to y's, or None where none is below the bound."""
    ticket = count(1)
    heap: list[tuple[float, int, Labels, tuple[int, ...], tuple[Absorption, ...]]]
    heap = [(0.0, 0, start, tuple(range(len(names))), ())]
    seen: set[tuple[Labels, tuple[int, ...]]] = set()
    finished: set[tuple[Absorption, ...]] = set()
    for _ in range(3000):
        if not heap or heap[0][0] > bound:
            return None
        seconds, _, order, left, trail = heapq.heappop(heap)
        if not left:
            if trail in finished:
                return seconds, trail
            finished.add(trail)
            last = copy_seconds(order, end, sizes, itemsize, rates)
            if last == 0:
                return seconds, trail
            heapq.heappush(heap, (seconds + last, next(ticket), order, left, trail))
            continue
        if (order, left) in seen:
            continue
        seen.add((order, left))
        for k in _touching(order, names, left):
            rest = tuple(j for j in left if j != k)
            for cost, after in _moves(order, names[k], _needed(names, rest, end), sizes, itemsize, rates):
                step = Absorption(k, order, after, cost)
                heapq.heappush(heap, (seconds + cost.seconds, next(ticket), after, rest, (*trail, step)))
    return None


class Return(NamedTuple):
    """Backward of one product: layouts of the gradients of `before` and of the group's tensor.

    `core` is the layout of the core's gradient as the product writes it; its first `summed` labels are summed after.
    """

    before: Labels
    core: Labels
    summed: int
    cost: float


def search_backward(
    chain: Chain, end: Labels, label_sizes: Mapping[str, int], itemsize: int, rates: Rates
) -> list[Return]:
    """Cheapest layouts of all gradients of a chain, last product first, for a gradient of y that lies like y."""
    end = tuple(label for label in end if label in chain.members)
    sizes = {name: prod(label_sizes[label] for label in labels) for name, labels in chain.members.items()}
    states: dict[Labels, tuple[float, list[Return]]] = {end: (0.0, [])}
    for product in reversed(chain.products):
        core = chain.layouts[product.group]
        needed = frozenset(product.before)
        following: dict[Labels, tuple[float, list[Return]]] = {}
        for order, (seconds, trail) in states.items():
            weight_cost, weight_order, summed = core_gradient(product.before, order, core, sizes, itemsize, rates)
            for cost, before in _moves(order, core, needed, sizes, itemsize, rates):
                total = seconds + cost.seconds + weight_cost
                if before not in following or total < following[before][0]:
                    step = Return(before, weight_order, summed, cost.seconds + weight_cost)
                    following[before] = (total, [*trail, step])
        cheapest = sorted(following.items(), key=lambda entry: (entry[1][0], entry[0]))[:BRANCH]
        states = dict(cheapest)
    start = chain.products[0].before if chain.products else end
    best = min(
        states.items(),
        key=lambda entry: (entry[1][0] + copy_seconds(entry[0], start, sizes, itemsize, rates), entry[0]),
    )
    return best[1][1]


def core_gradient(
    before: Labels, gradient: Labels, core: Labels, sizes: Mapping[str, int], itemsize: int, rates: Rates
) -> tuple[float, Labels, int]:
    """Best product of x's side and the gradient that gives the core's gradient; some labels may be summed after it."""
    inside = set(core)
    free = tuple(label for label in before if label not in inside)
    held = tuple(label for label in before if label in inside and label in gradient)
    own = tuple(label for label in before if label in inside and label not in gradient)
    new = tuple(label for label in gradient if label in inside and label not in before)
    best: tuple[float, Labels, int] | None = None
    for start in range(len(free)):
        for stop in range(start + 1, len(free) + 1):
            batch = free[:start] + free[stop:]
            for out in (batch + held + own + new, batch + held + new + own):
                seconds = product_cost(before, gradient, out, sizes, itemsize, rates).seconds
                if batch:
                    seconds += rates.call + itemsize * prod(sizes[label] for label in out) / rates.stream
                if best is None or (seconds, out) < best[:2]:
                    best = (seconds, out, len(batch))
    if best is None:  # nothing is summed: an outer product
        out = held + own + new
        return product_cost(before, gradient, out, sizes, itemsize, rates).seconds, out, 0
    return best
