"""What a network is: cores, the labels of their legs, and which labels are the outside ones.

Everything else in this package is a free function of these four fields.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar

import opt_einsum
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from decompositions.formats.modes import balanced_modes

Labels = tuple[str, ...]
N = TypeVar("N", bound="Network")  # not typing.Self: the shape checker decorates methods one by one


class TreeEdge(NamedTuple):
    """One bond of a rooted tree: from `parent` down to `child`."""

    parent: int
    child: int
    bond: str


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """Cores and one einsum equation: `W[rows, cols] = sum over bonds of prod_k core_k[legs_k]`.

    Args:
        cores: the tensors; the only dynamic field (the leaves of the pytree).
        legs: one tuple of labels per core, a label for each of its axes. A label shared by two cores is a bond;
            a label shared by more (or by several cores and the outside) is a hyper-edge.
        rows: outside labels of the output side, in the order of the dense axes.
        cols: outside labels of the input side; the dense tensor has the shape `row_modes + col_modes`.

    Raises:
        ValueError: labels and shapes disagree; a label is summed although only one core has it; a size is 0.
        TypeError: cores of different dtypes, or neither floating nor complex.

    Example:
        >>> import torch
        >>> from decompositions import Network, to_dense
        >>> a, b = torch.ones(2, 3), torch.ones(3, 4)
        >>> net = Network((a, b), legs=(("i", "r"), ("r", "j")), rows=("i",), cols=("j",))
        >>> net.is_tree, net.ranks, to_dense(net)[0, 0].item()
        (True, (3,), 3.0)
    """

    cores: tuple[Tensor, ...]
    legs: tuple[Labels, ...]
    rows: Labels
    cols: Labels = ()

    formats: ClassVar[dict[str, type["Network"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    def __post_init__(self) -> None:
        for name, value in (
            ("cores", tuple(self.cores)),
            ("legs", tuple(tuple(leg) for leg in self.legs)),
            ("rows", tuple(self.rows)),
            ("cols", tuple(self.cols)),
        ):
            object.__setattr__(self, name, value)
        _check_cores(type(self).__name__, self.cores)
        check_labels(type(self).__name__, tuple(tuple(c.shape) for c in self.cores), self.legs, self.rows, self.cols)
        self._check()

    def _check(self) -> None:
        """Refuse cores that do not have this format's shapes; formats override it."""

    def _init(self, cores: Iterable[Tensor], legs: Iterable[Labels], rows: Labels, cols: Labels) -> None:
        """Set the fields and validate them: what a format's own `__init__` calls last."""
        for name, value in (("cores", cores), ("legs", legs), ("rows", rows), ("cols", cols)):
            object.__setattr__(self, name, value)
        self.__post_init__()

    @classmethod
    def _unchecked(cls: type[N], cores: Iterable[Any], legs: tuple[Labels, ...], rows: Labels, cols: Labels) -> N:
        """Make a network without validation: inside pytree transforms leaves may be anything."""
        net = object.__new__(cls)
        for name, value in (("cores", tuple(cores)), ("legs", legs), ("rows", rows), ("cols", cols)):
            object.__setattr__(net, name, value)
        return net

    def replace(
        self: N, cores: Sequence[Tensor] | None = None, *, rows: Labels | None = None, cols: Labels | None = None
    ) -> N:
        """Return the same network with other cores, or another split of its outside labels, validated."""
        net = self._unchecked(
            self.cores if cores is None else cores,
            self.legs,
            self.rows if rows is None else rows,
            self.cols if cols is None else cols,
        )
        net.__post_init__()
        return net

    @classmethod
    def default_modes(cls, shape: tuple[int, ...], order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Row and column modes for a weight `(out, in, *kernel)`.

        A kernel keeps its axes; a matrix gets `order` balanced modes a side, whose products may exceed its widths.
        """
        out, width, *kernel = shape
        if kernel:
            return (out,), (width, *kernel)
        return balanced_modes(out, order), balanced_modes(width, order)

    @classmethod
    def operator_modes(
        cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Modes that this format gives an operator between tensors of these modes; the products stay."""
        return row_modes, col_modes

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every label."""
        return {
            label: size
            for c, leg in zip(self.cores, self.legs, strict=True)
            for label, size in zip(leg, c.shape, strict=True)
        }

    @property
    def outside(self) -> Labels:
        """`rows + cols`: the labels of the dense axes."""
        return self.rows + self.cols

    @property
    def row_modes(self) -> tuple[int, ...]:
        """Mode sizes of the output side."""
        sizes = self.sizes
        return tuple(sizes[label] for label in self.rows)

    @property
    def col_modes(self) -> tuple[int, ...]:
        """Mode sizes of the input side."""
        sizes = self.sizes
        return tuple(sizes[label] for label in self.cols)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor, `row_modes + col_modes`."""
        return self.row_modes + self.col_modes

    @property
    def order(self) -> int:
        """Number of outside indices."""
        return len(self.rows) + len(self.cols)

    @property
    def bonds(self) -> Labels:
        """Summed labels in the order in which the cores show them."""
        outside = set(self.outside)
        return tuple(dict.fromkeys(label for leg in self.legs for label in leg if label not in outside))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Bond sizes, in the order of `bonds`."""
        sizes = self.sizes
        return tuple(sizes[label] for label in self.bonds)

    @property
    def dtype(self) -> torch.dtype:
        """Common dtype of the cores."""
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """Common device of the cores."""
        return self.cores[0].device

    @property
    def equation(self) -> str:
        """The einsum equation of the dense tensor, with one symbol a label (beyond 52 labels: Unicode letters)."""
        symbol = {
            label: opt_einsum.get_symbol(k)
            for k, label in enumerate(dict.fromkeys(label for leg in self.legs for label in leg))
        }
        inputs = ",".join("".join(symbol[label] for label in leg) for leg in self.legs)
        return f"{inputs}->{''.join(symbol[label] for label in self.outside)}"

    @property
    def is_tree(self) -> bool:
        """Whether every bond joins exactly two cores, each outside label has one core, and there is no cycle."""
        return is_tree(self.legs, self.rows, self.cols)

    def to(self: N, *args: Any, **kwargs: Any) -> N:
        """`torch.Tensor.to` for every core."""
        return self._unchecked([c.to(*args, **kwargs) for c in self.cores], self.legs, self.rows, self.cols)

    def detach(self: N) -> N:
        """Return the same network cut from the autograd graph."""
        return self._unchecked([c.detach() for c in self.cores], self.legs, self.rows, self.cols)

    def __repr__(self) -> str:
        rows, cols = ("x".join(map(str, modes)) for modes in (self.row_modes, self.col_modes))
        modes = f"{rows} | {cols}" if self.cols else rows
        return f"{type(self).__name__}({modes}, ranks={self.ranks}, {str(self.dtype).removeprefix('torch.')})"


def _register(cls: type[Network]) -> None:
    """Make a format a pytree (cores are leaves, labels are static context) and known by name to checkpoints.

    The name is what a file says, so that another class of the same name must not take it over.
    """
    known = Network.formats.get(cls.__name__)
    if known is not None and known.__module__ != cls.__module__:
        raise TypeError(
            f"Network: a format named {cls.__name__!r} exists already ({known.__module__}); choose another name"
        )
    Network.formats[cls.__name__] = cls
    pytree.register_pytree_node(
        cls,
        lambda net: (list(net.cores), (net.legs, net.rows, net.cols)),
        lambda cores, context: cls._unchecked(cores, *context),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=lambda context: [[list(leg) for leg in context[0]], list(context[1]), list(context[2])],
        from_dumpable_context=lambda c: (tuple(tuple(leg) for leg in c[0]), tuple(c[1]), tuple(c[2])),
        flatten_with_keys_fn=lambda net: (
            [(pytree.SequenceKey(k), core) for k, core in enumerate(net.cores)],
            (net.legs, net.rows, net.cols),
        ),
    )


_register(Network)


def _check_cores(name: str, cores: tuple[Tensor, ...]) -> None:
    if not cores:
        raise ValueError(f"{name}: a network needs at least one core, got none")
    for k, core in enumerate(cores):
        if not isinstance(core, Tensor):
            raise TypeError(f"{name}: cores must be tensors, got {type(core).__name__} for core {k}")
        if not (core.is_floating_point() or core.is_complex()):
            raise TypeError(
                f"{name}: cores must be floating or complex, got {core.dtype} for core {k}; convert it first"
            )
        if core.dtype != cores[0].dtype or core.device != cores[0].device:
            raise TypeError(
                f"{name}: cores must share dtype and device, expected {cores[0].dtype} on {cores[0].device} "
                f"(core 0), got {core.dtype} on {core.device} (core {k})"
            )


def check_labels(
    name: str, shapes: Sequence[tuple[int, ...]], legs: Sequence[Labels], rows: Labels, cols: Labels
) -> dict[str, int]:
    """Check shapes against labels and return the size of every label.

    Works on shapes alone, so that a file can be refused before anything is allocated.

    Raises:
        ValueError: what disagrees, with both numbers.
    """
    if len(legs) != len(shapes):
        raise ValueError(f"{name}: legs needs one tuple per core, expected {len(shapes)}, got {len(legs)}")
    sizes: dict[str, int] = {}
    owners: dict[str, int] = {}
    for k, (shape, leg) in enumerate(zip(shapes, legs, strict=True)):
        if len(shape) != len(leg):
            raise ValueError(
                f"{name}: core {k} needs one axis per label, expected {len(leg)} (legs {leg}), got shape {tuple(shape)}"
            )
        if len(set(leg)) != len(leg):
            raise ValueError(f"{name}: a core may carry a label once, got legs {leg} for core {k}")
        for label, size in zip(leg, shape, strict=True):
            if size < 1:
                raise ValueError(f"{name}: sizes must be at least 1, got {size} for label {label!r} of core {k}")
            if sizes.setdefault(label, size) != size:
                raise ValueError(
                    f"{name}: label {label!r} must have one size, expected {sizes[label]} "
                    f"(from an earlier core), got {size} in core {k}"
                )
            owners[label] = owners.get(label, 0) + 1
    outside = rows + cols
    if len(set(outside)) != len(outside):
        raise ValueError(f"{name}: outside labels must be distinct, got rows {rows} and cols {cols}")
    for label in outside:
        if label not in sizes:
            raise ValueError(f"{name}: outside label {label!r} must belong to a core, got legs {tuple(legs)}")
    for label, count in owners.items():
        if count == 1 and label not in outside:
            raise ValueError(
                f"{name}: a summed label must join two cores or more, got {label!r} in one core only; "
                "list it in rows or cols, or drop its axis"
            )
    return sizes


@lru_cache(maxsize=4096)
def is_tree(legs: tuple[Labels, ...], rows: Labels, cols: Labels) -> bool:
    """Tell from labels alone whether the network is a tree (see `Network.is_tree`)."""
    owners: dict[str, list[int]] = {}
    for k, leg in enumerate(legs):
        for label in leg:
            owners.setdefault(label, []).append(k)
    outside = set(rows + cols)
    bonds = [cores for label, cores in owners.items() if label not in outside]
    if any(len(owners[label]) != 1 for label in outside) or any(len(cores) != 2 for cores in bonds):
        return False
    if len(bonds) != len(legs) - 1:
        return False
    reached, frontier = {0}, [0]
    while frontier:
        k = frontier.pop()
        for pair in bonds:
            if k in pair:
                other = pair[0] if pair[1] == k else pair[1]
                if other not in reached:
                    reached.add(other)
                    frontier.append(other)
    return len(reached) == len(legs)


@lru_cache(maxsize=4096)
def tree_edges(legs: tuple[Labels, ...], rows: Labels, cols: Labels, root: int) -> tuple[TreeEdge, ...]:
    """Edges of a tree network in depth-first order from `root` (parents before children).

    Raises:
        ValueError: the network is not a tree.
    """
    if not is_tree(legs, rows, cols):
        raise ValueError(
            f"tree_edges: the network must be a tree (each bond joins two cores, no cycle), got legs {legs}"
        )
    outside = set(rows + cols)
    edges: list[TreeEdge] = []
    stack = [TreeEdge(-1, root, "")]  # the root's own entry leads to no parent
    while stack:
        above = stack.pop()
        if above.parent >= 0:
            edges.append(above)
        below = [
            TreeEdge(above.child, next(k for k, other in enumerate(legs) if k != above.child and bond in other), bond)
            for bond in legs[above.child]
            if bond not in outside and (above.parent < 0 or bond != above.bond)
        ]
        stack.extend(reversed(below))  # a subtree is finished before its sibling starts: a center can walk this order
    return tuple(edges)


def bond_sides(net: Network, bond: str) -> tuple[Labels, Labels]:
    """Outside labels on the two sides of a bond of a tree, each in the order of the dense axes.

    The singular values of the unfolding that groups the first side are those of the bond.

    Raises:
        ValueError: not a tree, or no such bond.

    Example:
        >>> from decompositions import TT, bond_sides
        >>> bond_sides(TT.random(row_modes=(2, 3, 4), rank=1), "b0")
        (('i0',), ('i1', 'i2'))
    """
    if bond not in net.bonds:
        raise ValueError(f"bond_sides: expected one of the bonds {net.bonds}, got {bond!r}")
    edges = tree_edges(net.legs, net.rows, net.cols, 0)
    cut = next(edge for edge in edges if edge.bond == bond)
    below = {cut.child}
    for edge in edges:  # parents come before children
        if edge.parent in below and edge.bond != bond:
            below.add(edge.child)
    inside = {label for k in below for label in net.legs[k]}
    first = tuple(label for label in net.outside if label not in inside)
    return first, tuple(label for label in net.outside if label in inside)


def dense_size(net: Network) -> int:
    """Number of entries of the dense tensor."""
    return prod(net.shape)
