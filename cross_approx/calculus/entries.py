"""Many entries of a network at once, or weighted means of neighbouring ones: what `gather` and `interpolate` share."""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from decompositions.formats.contract import contract
from decompositions.formats.network import Labels, Network, tree_edges
from decompositions.formats.plan import bucket, plan_path, run
from decompositions.linalg import accumulate_dtype

ENTRIES = 1 << 21
"""Numbers that one chunk of the batch may hold at a time: 16 MiB in float64."""

BATCH = "*"


class Corner(NamedTuple):
    """One index a row of the batch, and its weight there; None is the weight 1."""

    at: Tensor
    weight: Tensor | None


def check_index(name: str, index: Tensor, shape: Sequence[int]) -> Tensor:
    """A (B, d) index in int64, refused where it does not fit the shape."""
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"{name}: index must be an integer tensor, got {got}; convert it")
    if index.ndim != 2 or index.shape[1] != len(shape):
        raise ValueError(f"{name}: expected an index of shape (B, d = {len(shape)}), got {tuple(index.shape)}")
    index = index.detach().long()
    sizes = torch.tensor(list(shape), device=index.device)
    bad = ((index < 0) | (index >= sizes)).any(1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"{name}: indices must be in range of the shape {tuple(shape)} (no negative ones), "
            f"got {tuple(index[row].tolist())} in row {row}"
        )
    return index


def values_at(net: Network, corners: Sequence[Sequence[Corner]], count: int) -> Tensor:
    """`sum over corners of prod weights * W[corners]`, a value a row of the batch.

    Cost for a tree: O(B) times the sizes of the cores without their outside legs, for a train O(B d r^2), each corner
    of a core once. Chunks of the batch keep the memory at `ENTRIES` numbers (gradients keep what they need).
    """
    if count == 0:
        return net.cores[0].new_zeros(0)
    work = net.to(accumulate_dtype(net.dtype))
    outside = set(net.outside)
    tree = net.is_tree
    widths = []  # numbers a row: a selected core, or what is left of another one after its first child
    for leg, core in zip(net.legs, net.cores, strict=True):
        ranks = [n for label, n in zip(leg, core.shape, strict=True) if label not in outside]
        widths.append(prod(ranks) // (1 if outside.intersection(leg) else max(ranks, default=1)))
    step = max(1, ENTRIES // (max(widths) if tree else 4 * sum(widths)))
    tables = [_table(core, leg, outside) for core, leg in zip(work.cores, net.legs, strict=True)]
    parts = []
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        chunk = [[Corner(c.at[rows], None if c.weight is None else c.weight[rows]) for c in axis] for axis in corners]
        parts.append(_tree_values(work, tables, chunk) if tree else _path_values(work, tables, chunk))
    return torch.cat(parts).to(net.dtype)


def _table(core: Tensor, leg: Labels, outside: set[str]) -> Tensor:
    """The core as (outside legs together, bonds...), or as it is where it has no outside leg."""
    order = [at for at, label in enumerate(leg) if label in outside]
    rest = [at for at in range(len(leg)) if at not in order]
    return core.permute(*order, *rest).flatten(0, len(order) - 1) if order else core


def _places(net: Network, k: int, corners: list[list[Corner]]) -> list[Corner]:
    """Rows of the table of core k that the batch needs, with their weights; none where it has no outside leg."""
    own = [label for label in net.legs[k] if label in net.outside]
    sizes, found = net.sizes, []
    for choice in product(*(corners[net.outside.index(label)] for label in own)) if own else ():
        at, weight = torch.zeros_like(choice[0].at), None
        for label, corner in zip(own, choice, strict=True):
            at = at * sizes[label] + corner.at
            if corner.weight is not None:
                weight = corner.weight if weight is None else weight * corner.weight
        found.append(Corner(at, weight))
    return found


def _weighted(places: list[Corner], value: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | None = None
    for at, weight in places:
        part = value(at)
        if weight is not None:
            part = part * weight.to(part.real.dtype).reshape(-1, *[1] * (part.ndim - 1))
        total = part if total is None else total + part
    assert total is not None
    return total


def _selected(net: Network, k: int, table: Tensor, places: list[Corner]) -> tuple[Tensor, Labels]:
    """The part of core k that the batch needs, with its labels: the batch first, unless the core has no outside leg."""
    bonds = tuple(label for label in net.legs[k] if label not in net.outside)
    if not places:
        return table, bonds
    return _weighted(places, lambda at: table.index_select(0, at)), (BATCH, *bonds)


def _absorbed(table: Tensor, places: list[Corner], message: Tensor, axis: int) -> Tensor:
    """The selected part times one message (batch, bond) along an axis of the table, a product for every index.

    Many rows share an index: nothing of the size (batch, r, r) is made.
    """
    matrices = table.movedim(axis, 1)
    rest = matrices.shape[2:]
    matrices = matrices.flatten(2) if rest else matrices[..., None]

    def value(at: Tensor) -> Tensor:
        order = at.argsort()
        groups = message.index_select(0, order).split(torch.bincount(at, minlength=len(table)).tolist())
        done = torch.cat([rows @ matrix for rows, matrix in zip(groups, matrices.unbind(0), strict=True)])
        return done.index_select(0, order.argsort())

    return _weighted(places, value).unflatten(1, rest) if rest else _weighted(places, value)[:, 0]


def _tree_values(net: Network, tables: list[Tensor], corners: list[list[Corner]]) -> Tensor:
    """From the leaves to the root: each core takes the vectors (batch, bond) of its children, the longest first."""
    edges = tree_edges(net.legs, net.rows, net.cols, 0)
    received: dict[int, list[tuple[str, Tensor, Labels]]] = {}

    def closed(k: int) -> tuple[Tensor, Labels]:
        places = _places(net, k, corners)
        waiting = sorted(received.pop(k, []), key=lambda m: -m[1].shape[-1])
        first = waiting[0] if waiting and places else None
        if first is not None and first[2][0] == BATCH and len(first[1]) >= 8 * len(tables[k]):
            labels = tuple(label for label in net.legs[k] if label not in net.outside)
            value = _absorbed(tables[k], places, first[1], 1 + labels.index(first[0]))
            labels = (BATCH, *(label for label in labels if label != first[0]))
            waiting = waiting[1:]
        else:
            value, labels = _selected(net, k, tables[k], places)
        for bond, message, message_labels in waiting:
            kept = tuple(label for label in labels if label not in (bond, BATCH))
            out = (BATCH, *kept) if BATCH in (*labels, *message_labels) else kept
            value, labels = contract(_letters(labels, message_labels, out), value, message), out
        return value, labels

    for edge in reversed(edges):
        message, labels = closed(edge.child)
        received.setdefault(edge.parent, []).append((edge.bond, message, labels))
    return closed(0)[0]


def _path_values(net: Network, tables: list[Tensor], corners: list[list[Corner]]) -> Tensor:
    """Hyper-edges and loops: one contraction with the batch as a label that all cores share."""
    found = [_selected(net, k, tables[k], _places(net, k, corners)) for k in range(len(net.cores))]
    legs = [labels for _, labels in found]
    batch = next(len(value) for value, labels in found if BATCH in labels)
    sizes = {label: size for label, size in net.sizes.items() if label not in net.outside}
    plan = plan_path(legs, {**sizes, BATCH: bucket(batch)}, (BATCH,), net.dtype.itemsize)
    return run(plan.steps, [value for value, _ in found])


def _letters(left: Labels, right: Labels, out: Labels) -> str:
    letter = {label: chr(ord("a") + k) for k, label in enumerate(dict.fromkeys((*left, *right)))}
    return ",".join("".join(letter[x] for x in leg) for leg in (left, right)) + "->" + "".join(letter[x] for x in out)
