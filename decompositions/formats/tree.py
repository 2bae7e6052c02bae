"""Tree: cores on any tree, outside legs on any of them; hierarchical Tucker on any dimension tree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import as_integer, check_num_rows
from decompositions.formats.network import Labels, Network, is_tree
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks

DimensionTree = tuple[Any, ...]
"""One tuple a core: its ints are the dense axes that the core carries, its tuples are its children."""


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Tree(Network):
    """A core at every node of a tree, outside legs at any of them (hierarchical Tucker and all its relatives).

    A dimension tree is written as nested tuples, one a core: ints are the dense axes that the core carries, tuples are
    its children. `((0,), (1,), (2,))` is Tucker, `(0, (1, (2,)))` a tensor train, `(((0,), (1,)), ((2,), (3,)))`
    balanced hierarchical Tucker, `(0, 2, (1, 3))` a TT-matrix. Cores stand in the order in which the tuples open, the
    root first; the axes of a core are the bond to its parent, then what its tuple lists, in that order.
    Parameters: sum over the cores of (rank to the parent) x (sizes of its axes) x (ranks to its children). Gauge: an
    invertible matrix on every bond.

    Args:
        cores: in the order in which the tuples of `tree` open.
        tree: the dimension tree.
        num_rows: how many leading axes of the dense tensor are rows; all by default.

    Raises:
        TypeError: num_rows that is not an int.
        ValueError: nested tuples that are no dimension tree, or cores that do not fit it.

    References:
        W. Hackbusch, S. Kuehn, A new scheme for the tensor representation, J. Fourier Anal. Appl. 2009;
        L. Grasedyck, Hierarchical singular value decomposition of tensors, SIAM J. Matrix Anal. Appl. 2010.

    Example:
        >>> import torch
        >>> from decompositions import Tree
        >>> net = Tree([torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3, 5, 6)], tree=((0,), (1, 2)))
        >>> net.shape, net.ranks
        ((4, 5, 6), (2, 3))
    """

    def __init__(
        self, cores: Sequence[Inexact[Tensor, "..."]], tree: DimensionTree, num_rows: int | None = None
    ) -> None:
        nodes = read_tree("Tree", tree)
        order = sum(len(node.axes) for node in nodes)
        num_rows = check_num_rows("Tree", num_rows, order)
        outside = tuple(f"i{k}" for k in range(order))
        self._init(tuple(cores), tree_legs(nodes), outside[:num_rows], outside[num_rows:])

    def _check(self) -> None:
        if not is_tree(self.legs, self.rows, self.cols):
            raise ValueError(f"Tree: every bond must join two cores, without a cycle, got {self.equation}")

    @property
    def tree(self) -> DimensionTree:
        """The dimension tree, with core 0 as its root."""
        position = {label: k for k, label in enumerate(self.outside)}
        below: dict[int, list[Any]] = {k: [] for k in range(len(self.cores))}
        seen = set()
        for k, leg in enumerate(self.legs):  # parents stand before their children
            for label in leg:
                if label in position:
                    below[k].append(position[label])
                elif label not in seen:
                    seen.add(label)
                    below[k].append(next(j for j, other in enumerate(self.legs) if j != k and label in other) + 0.5)
        made: dict[int, DimensionTree] = {}
        for k in reversed(range(len(self.cores))):
            made[k] = tuple(entry if isinstance(entry, int) else made[int(entry)] for entry in below[k])
        return made[0]

    @classmethod
    def skeleton(
        cls,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | Sequence[int],
        tree: DimensionTree | None = None,
    ) -> "Tree":
        """Shapes alone, on the meta device. `rank`: a cap for all bonds, or one entry a bond, in their order."""
        rows = _mode_sizes("row_modes", row_modes)
        sizes = (*rows, *_mode_sizes("col_modes", col_modes))
        tree = balanced_tree(len(sizes)) if tree is None else tree
        nodes = read_tree("Tree", tree, len(sizes))
        ranks = tree_ranks("Tree", nodes, sizes, rank)
        shapes = tree_shapes(nodes, sizes, ranks)
        return cls([torch.empty(shape, device="meta") for shape in shapes], tree, len(rows))

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...] = (),
        rank: int | Sequence[int],
        tree: DimensionTree | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Tree":
        """Draw a tree (a balanced binary one by default) whose entries have root mean square `std` exactly."""
        skeleton = cls.skeleton(row_modes, col_modes, rank, tree)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


def _mode_sizes(name: str, modes: Any) -> tuple[int, ...]:
    sizes = [as_integer(size) for size in modes] if isinstance(modes, Iterable) else [None]
    found = tuple(size for size in sizes if size is not None)
    if len(found) < len(sizes):
        raise TypeError(f"Tree: {name} must be a tuple of ints, got {modes!r}")
    if any(size < 1 for size in found):
        raise ValueError(f"Tree: every mode size must be at least 1, got {name}={modes!r}")
    return found


class Node(NamedTuple):
    """One core of a dimension tree; of an entry (axis, child) one is None."""

    parent: int  # -1 for the root
    entries: tuple[tuple[int | None, int | None], ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Dense axes that this core carries."""
        return tuple(axis for axis, _ in self.entries if axis is not None)

    @property
    def children(self) -> tuple[int, ...]:
        """Cores below this one."""
        return tuple(child for _, child in self.entries if child is not None)


def read_tree(name: str, tree: DimensionTree, order: int | None = None) -> list[Node]:
    """Nodes of a dimension tree, parents before children, in the order in which the tuples open.

    Raises:
        ValueError: not nested tuples of ints, an empty tuple, or axes that are not 0..order - 1, once each.

    Example:
        >>> [node.parent for node in read_tree("Tree", (((0,), 1), (2,)))]
        [-1, 0, 1, 0]
    """
    found: list[tuple[int, list[tuple[int | None, int | None]]]] = []
    axes: list[int] = []
    stack: list[tuple[Any, int, int]] = [(tree, -1, 0)]  # (tuple, parent, entry of the parent)
    while stack:
        node, parent, place = stack.pop()
        if not isinstance(node, tuple | list) or not node:
            raise ValueError(
                f"{name}: a dimension tree is made of tuples that are not empty, got {node!r} in {tree!r}; "
                "for example ((0,), (1, 2)): a root without axes and two children"
            )
        number = len(found)
        if parent >= 0:
            found[parent][1][place] = (None, number)
        entries: list[tuple[int | None, int | None]] = []
        found.append((parent, entries))
        below = []
        for entry in node:
            axis = as_integer(entry)
            if axis is not None:
                entries.append((axis, None))
                axes.append(axis)
            else:
                below.append((entry, number, len(entries)))
                entries.append((None, None))
        stack.extend(reversed(below))
    order = len(axes) if order is None else order
    if sorted(axes) != list(range(order)):
        raise ValueError(f"{name}: the tree must carry each of the axes 0..{order - 1} once, got {axes} in {tree!r}")
    return [Node(parent, tuple(entries)) for parent, entries in found]


def tree_legs(nodes: Sequence[Node]) -> list[Labels]:
    """Labels of the cores: `b{k - 1}` joins core k to its parent, `i{a}` is the dense axis a."""
    return [
        ((f"b{k - 1}",) if k else ())
        + tuple(f"b{child - 1}" if axis is None and child is not None else f"i{axis}" for axis, child in node.entries)
        for k, node in enumerate(nodes)
    ]


def tree_shapes(nodes: Sequence[Node], sizes: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Core shapes: the rank to the parent, then the size of every entry."""
    return [
        ((ranks[k - 1],) if k else ())
        + tuple(sizes[axis] if axis is not None else ranks[(child or 0) - 1] for axis, child in node.entries)
        for k, node in enumerate(nodes)
    ]


def largest_ranks(nodes: Sequence[Node], sizes: Sequence[int]) -> list[int]:
    """Largest useful rank of the bond above every core but the root."""
    below = [prod(sizes[axis] for axis in node.axes) for node in nodes]
    for k in range(len(nodes) - 1, 0, -1):
        below[nodes[k].parent] *= below[k]
    return [min(size, below[0] // size) for size in below[1:]]


def tree_ranks(name: str, nodes: Sequence[Node], sizes: Sequence[int], rank: int | Sequence[int] | None) -> list[int]:
    """Caps of the bonds above core 1, 2, ...; the user's entries are in the order in which the cores show the bonds."""
    largest = largest_ranks(nodes, sizes)
    shown = [child for node in nodes for child in node.children]
    caps = dict(zip(shown, check_ranks(name, rank, [largest[child - 1] for child in shown]), strict=True))
    return [caps[k] for k in range(1, len(nodes))]


def balanced_tree(axes: int | Sequence[int]) -> DimensionTree:
    """Binary dimension tree whose two halves differ by one axis at most; every leaf carries one axis.

    Args:
        axes: how many, or which in what order.

    Raises:
        TypeError: neither an int nor a sequence of ints.
        ValueError: no axis, an axis twice, or a negative one.

    Example:
        >>> balanced_tree(4), balanced_tree([2, 0, 1])
        ((((0,), (1,)), ((2,), (3,))), (((2,), (0,)), (1,)))
    """
    axes = _axes("balanced_tree", axes)
    if len(axes) == 1:
        return (axes[0],)
    half = (len(axes) + 1) // 2
    return balanced_tree(axes[:half]), balanced_tree(axes[half:])


def _axes(name: str, axes: int | Sequence[int]) -> list[int]:
    """Axes of a dimension tree, from how many or from which."""
    count = as_integer(axes)
    if count is None and (not isinstance(axes, Sequence) or isinstance(axes, str)):
        raise TypeError(f"{name}: axes must be an int (how many) or a sequence of ints (which), got {axes!r}")
    given = range(count) if count is not None else axes
    found = [axis for axis in map(as_integer, given) if axis is not None]  # type: ignore[arg-type]
    if len(found) < len(given):  # type: ignore[arg-type]
        raise TypeError(f"{name}: axes must be ints, got {axes!r}")
    if len(found) < 1:
        raise ValueError(f"{name}: expected at least one axis, got {axes!r}")
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"{name}: expected every axis once, counted from 0, got {axes!r}")
    return found


def chain_tree(axes: int | Sequence[int]) -> DimensionTree:
    """Dimension tree of a tensor train: every core carries one axis and has one child.

    Args:
        axes: how many, or which in what order.

    Raises:
        TypeError: neither an int nor a sequence of ints.
        ValueError: no axis, an axis twice, or a negative one.

    Example:
        >>> chain_tree(3)
        (0, (1, (2,)))
    """
    axes = _axes("chain_tree", axes)
    made: DimensionTree = (axes[-1],)
    for axis in reversed(axes[:-1]):
        made = (axis, made)
    return made
