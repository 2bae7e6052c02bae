"""What happens to the outside legs of a network: entries picked, linear maps applied, legs contracted away.

A map of one mode of the dense tensor is the same map of the core that carries it, whatever the format.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import singledispatch
from math import prod

import opt_einsum
import torch
from torch import Tensor

from decompositions.formats.contract import contract
from decompositions.formats.cp import CP
from decompositions.formats.network import Labels, Network, tree_edges
from decompositions.formats.plan import plan_path, run
from decompositions.formats.tensor_ring import TensorRing
from decompositions.formats.tree import Tree
from decompositions.formats.tt import TT
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.formats.tucker import Tucker

Action = Callable[[Tensor, int], Tensor]
"""Maps a core along one of its axes, linearly; the axis stays, or is gone."""


def pick(net: Network, picks: Mapping[int, int | Tensor]) -> Network | Tensor:
    """Entries of some dense axes: an int removes its axis, an index tensor keeps it in that order."""
    cores, legs = list(net.cores), list(net.legs)
    gone = set()
    for axis, which in picks.items():
        label = net.outside[axis]
        for k, leg in enumerate(legs):  # every core that carries it: entries of a product are products of entries
            if label in leg:
                at = leg.index(label)
                if isinstance(which, Tensor):
                    cores[k] = cores[k].index_select(at, which.to(cores[k].device))
                else:
                    cores[k], legs[k] = cores[k].select(at, which), leg[:at] + leg[at + 1 :]
        if not isinstance(which, Tensor):
            gone.add(label)
    return _close(net, cores, legs, gone) if gone else net.replace(cores)


def transform(net: Network, actions: Mapping[int, Action]) -> Network:
    """A linear map of each of the dense axes named."""
    whole = with_own_legs(net, actions)
    cores = list(whole.cores)
    for axis, action in actions.items():
        k, at = _owner(whole, axis)
        cores[k] = action(cores[k], at)
    return whole.replace(cores)


def contract_away(net: Network, actions: Mapping[int, Action]) -> Network | Tensor:
    """A linear functional of each of the dense axes named, which are gone."""
    whole = with_own_legs(net, actions)
    cores, legs = list(whole.cores), list(whole.legs)
    for axis, action in actions.items():
        label = whole.outside[axis]
        k = next(k for k, leg in enumerate(legs) if label in leg)
        at = legs[k].index(label)
        cores[k], legs[k] = action(cores[k], at), legs[k][:at] + legs[k][at + 1 :]
    return _close(whole, cores, legs, {whole.outside[axis] for axis in actions})


def _owner(net: Network, axis: int) -> tuple[int, int]:
    label = net.outside[axis]
    return next((k, leg.index(label)) for k, leg in enumerate(net.legs) if label in leg)


def with_own_legs(net: Network, axes: Iterable[int]) -> Network:
    """The network with one owner for each of these labels: where several share one, an identity takes it over."""
    cores, legs, rename = list(net.cores), list(net.legs), {}
    for axis in axes:
        label = net.outside[axis]
        if sum(label in leg for leg in net.legs) > 1:
            rename[label] = f"{label}'"
            while any(rename[label] in leg for leg in legs):
                rename[label] += "'"
            cores.append(torch.eye(net.sizes[label], dtype=net.dtype, device=net.device))
            legs.append((rename[label], label))
    if not rename:
        return net
    rows, cols = (tuple(rename.get(label, label) for label in side) for side in (net.rows, net.cols))
    return Network(tuple(cores), tuple(legs), rows, cols)


def _close(net: Network, cores: list[Tensor], legs: list[Labels], gone: set[str]) -> Network | Tensor:
    """The network without some outside labels; cores left without any are absorbed, as far as ranks do not grow."""
    rows, cols = (tuple(label for label in side if label not in gone) for side in (net.rows, net.cols))
    outside = {*rows, *cols}
    if not outside:
        sizes = {x: n for leg, core in zip(legs, cores, strict=True) for x, n in zip(leg, core.shape, strict=True)}
        if len(cores) == 1:
            return cores[0]
        return run(plan_path(legs, sizes, (), net.dtype.itemsize).steps, cores)
    touched = [len(leg) < len(before) for leg, before in zip(legs, net.legs, strict=True)]
    while len(cores) > 1:
        free = [
            k
            for k, leg in enumerate(legs)
            if not outside.intersection(leg) and (len(leg) < 2 or (touched[k] and len(leg) == 2))
        ]
        if not free:
            break
        a = free[0]
        others = [k for k in range(len(cores)) if k != a]
        partners = [k for k in others if set(legs[a]) & set(legs[k])] or others
        made = {b: _merged_labels(legs, a, b, outside) for b in partners}
        sizes = dict(zip(legs[a], cores[a].shape, strict=True))

        def size(b: int, made: dict[int, Labels] = made, sizes: dict[str, int] = sizes) -> int:
            own = {**sizes, **dict(zip(legs[b], cores[b].shape, strict=True))}
            return prod(own[label] for label in made[b])

        b = min(partners, key=size)
        cores[b], legs[b] = _contract(cores[a], legs[a], cores[b], legs[b], made[b]), made[b]
        if a < b:  # parents of a tree stand before their children
            cores[a], legs[a], touched[a] = cores[b], legs[b], touched[b]
        del cores[max(a, b)], legs[max(a, b)], touched[max(a, b)]
    return _retyped(net, cores, legs, rows, cols)


def _merged_labels(legs: list[Labels], a: int, b: int, outside: set[str]) -> Labels:
    """Labels of the product of two cores: those of b, with those of a where the bond between them was."""
    alive = outside.union(*(leg for k, leg in enumerate(legs) if k not in (a, b)))
    new = [label for label in legs[a] if label in alive and label not in legs[b]]
    out: list[str] = []
    for label in legs[b]:
        if label in alive:
            out.append(label)
        else:
            out += new
            new = []
    return (*out, *new)


def _contract(x: Tensor, x_leg: Labels, y: Tensor, y_leg: Labels, out: Labels) -> Tensor:
    letter = {label: opt_einsum.get_symbol(k) for k, label in enumerate(dict.fromkeys((*x_leg, *y_leg)))}
    left, right, result = ("".join(letter[label] for label in leg) for leg in (x_leg, y_leg, out))
    return x * y if not left else contract(f"{left},{right}->{result}", x, y)


@singledispatch
def _retyped(net: Network, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    """What is left, in the format of `net` where it is one still: a network of the base class in general."""
    return Network(tuple(cores), tuple(legs), rows, cols)


def _axes(legs: list[Labels], outside: Labels) -> list[int]:
    """The dense axis of each core that carries one."""
    return [next(outside.index(label) for label in leg if label in outside) for leg in legs]


@_retyped.register
def _(net: TT, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    return TT(cores, len(rows), _axes(legs, rows + cols))


@_retyped.register
def _(net: TTMatrix, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    if all(len(set(leg) & {*rows, *cols}) == 1 for leg in legs):
        return TT(cores, len(rows), _axes(legs, rows + cols))
    return Network(tuple(cores), tuple(legs), rows, cols)


@_retyped.register
def _(net: TensorRing, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    return TensorRing(cores, len(rows), _axes(legs, rows + cols))


@_retyped.register
def _(net: CP, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    axes = _axes(legs, rows + cols)
    return CP([cores[axes.index(axis)] for axis in range(len(axes))], len(rows))


@_retyped.register
def _(net: Tucker, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    outside = rows + cols
    factor = {leg[1]: k for k, leg in enumerate(legs) if k and len(leg) == 2 and leg[0] in outside}
    if len(factor) + 1 < len(cores) or not factor.keys() <= set(legs[0]):
        return Network(tuple(cores), tuple(legs), rows, cols)  # the core itself went into a factor
    axes = [outside.index(legs[factor[label]][0] if label in factor else label) for label in legs[0]]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    modes = [mode for mode, at in enumerate(order) if legs[0][at] in factor]
    factors = [cores[factor[legs[0][order[mode]]]] for mode in modes]
    return Tucker(cores[0].permute(order), factors, modes, len(rows))


@_retyped.register
def _(net: Tree, cores: list[Tensor], legs: list[Labels], rows: Labels, cols: Labels) -> Network:
    outside = rows + cols
    edges = tree_edges(tuple(legs), rows, cols, 0)
    order = [0, *(edge.child for edge in edges)]
    above = {edge.child: edge.bond for edge in edges}
    below = {(edge.parent, edge.bond): edge.child for edge in edges}
    made: dict[int, tuple] = {}
    for k in reversed(order):
        entries = [label for label in legs[k] if label != above.get(k)]
        made[k] = tuple(outside.index(label) if label in outside else made[below[k, label]] for label in entries)
    arranged = [cores[k].movedim(legs[k].index(above[k]), 0) if k in above else cores[k] for k in order]
    return Tree(arranged, made[0], len(rows))
