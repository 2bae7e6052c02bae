"""Right-hand sides of `Y' = F(t, Y)`, seen from one core of a tree whose other cores are isometries toward it.

Every scheme needs a field in one way only: with the other cores fixed, as an ODE for the center core,

    C' = E_v[F(t, Y(C))],    E_v: contraction with the conjugates of all cores but v.

A dense field makes Y for that. An operator on networks never does: what its subtrees contribute is contracted once and
remembered as long as no core below changes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from decompositions import Network, add, to_dense
from decompositions import round as cut
from decompositions.formats.network import Labels
from decompositions.formats.plan import plan_path, run

CoreField = Callable[[float, Tensor], Tensor]
"""(t, center core) -> its derivative."""


class Field(Protocol):
    """A right-hand side that can be restricted to one core."""

    def restrict(self, net: Network, core: int) -> CoreField:
        """Derivative of core `core` of a tree whose other cores are fixed isometries toward it."""

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Dense right-hand side, for references and small problems."""


class DenseField:
    """A function (t, dense Y) -> dense F; every evaluation makes Y.

    Args:
        function: takes a time and a tensor of the shape of the network, returns one of that shape.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from tnlayers.integrators import DenseField
        >>> net = LowRank(torch.eye(3, 1), torch.ones(1, 1), torch.eye(4, 1))
        >>> DenseField(lambda t, y: 2 * y).restrict(net, 1)(0.0, net.S).item()
        2.0
    """

    def __init__(self, function: Callable[[float, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """The function's value, its shape checked."""
        value = self.function(t, y)
        if not isinstance(value, Tensor) or value.shape != y.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"integrate: the field must return a tensor like Y, expected {tuple(y.shape)}, got {got}")
        return value

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`."""
        others = [k for k in range(len(net.cores)) if k != core]
        conjugates = [net.cores[k].conj() for k in others]
        inputs = [net.outside, *(net.legs[k] for k in others)]
        back = plan_path(inputs, net.sizes, net.legs[core], net.dtype.itemsize)

        def derivative(t: float, value: Tensor) -> Tensor:
            cores = [value if k == core else fixed for k, fixed in enumerate(net.cores)]
            dense = to_dense(net._unchecked(cores, net.legs, net.rows, net.cols))
            return run(back.steps, [self(t, dense), *conjugates]).reshape(value.shape)

        return derivative


class OperatorField:
    """`F(t, Y) = factor(t) A Y` for a linear operator A that is itself a tree, with a core for every core of Y.

    Args:
        operator: a tree whose core k carries the row and the column axis of every axis that core k of Y carries (rows
            and columns of A are the axes of Y in order), joined as Y's cores are; `kronecker_sum` makes one.
        factor: a number, or a function of time.

    Raises:
        ValueError: where Y is restricted: an operator on another tree.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from tnlayers.integrators import OperatorField, kronecker_sum
        >>> net = LowRank(torch.eye(3, 1), torch.ones(1, 1), torch.eye(4, 1))
        >>> field = OperatorField(kronecker_sum(net, [{0: 2 * torch.eye(3)}, {1: 3 * torch.eye(4)}]))
        >>> field.restrict(net, 1)(0.0, net.S).item()
        5.0
    """

    def __init__(self, operator: Network, factor: float | complex | Callable[[float], float | complex] = 1.0) -> None:
        if not operator.is_tree or len(operator.rows) != len(operator.cols):
            raise ValueError(
                f"OperatorField: the operator must be a tree with as many columns as rows, got {operator!r}"
            )
        self.operator = operator
        self.factor = factor if callable(factor) else (lambda t: factor)
        self._messages: dict[tuple[int, int], tuple[list[Any], Tensor]] = {}
        self._checked: tuple[Labels, ...] | None = None

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Dense `factor(t) A Y`, for references and small problems."""
        order = len(self.operator.rows)
        dense = to_dense(self.operator).to(y.dtype)
        return self.factor(t) * torch.tensordot(dense, y, dims=order)

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`; messages along bonds are kept while the cores behind them stay the same objects."""
        self._check(net)
        op = self.operator
        labels, operands, inputs = net.legs[core], [], []
        for other in _neighbours(net.legs, core):
            operands.append(self._message(net, other, core))
            inputs.append(self._message_labels(net, other, core))
        own = op.cores[core].to(net.dtype)
        names = self._names(net, core)
        sizes = {**_prefixed("op:", op.sizes), **net.sizes, **_prefixed("bra:", net.sizes)}
        out = tuple(f"bra:{label}" for label in labels)
        plan = plan_path([labels, names, *inputs], sizes, out, net.dtype.itemsize)

        def derivative(t: float, value: Tensor) -> Tensor:
            return self.factor(t) * run(plan.steps, [value, own, *operands])

        return derivative

    def _names(self, net: Network, core: int) -> Labels:
        """Labels of an operator core: its rows are the bra's axes, its columns those of Y."""
        rows = dict(zip(self.operator.rows, net.outside, strict=True))
        cols = dict(zip(self.operator.cols, net.outside, strict=True))
        return tuple(
            f"bra:{rows[label]}" if label in rows else cols.get(label, f"op:{label}")
            for label in self.operator.legs[core]
        )

    def _message_labels(self, net: Network, source: int, target: int) -> Labels:
        bond, inner = _bond(net.legs, source, target), _bond(self.operator.legs, source, target)
        return (f"bra:{bond}", f"op:{inner}", bond)

    def _message(self, net: Network, source: int, target: int) -> Tensor:
        """The subtree of `source`, seen from `target`: (bra bond, operator bond, bond)."""
        behind = [k for k in _neighbours(net.legs, source) if k != target]
        inner = [self._message(net, k, source) for k in behind]
        key, core = (source, target), net.cores[source]
        parts = [core, *inner]
        known = self._messages.get(key)
        if (
            known is not None
            and len(known[0]) == len(parts)
            and all(a is b for a, b in zip(known[0], parts, strict=True))
        ):
            return known[1]
        op, names = self.operator, self._names(net, source)
        legs = net.legs[source]
        inputs = [legs, tuple(f"bra:{label}" for label in legs), names]
        inputs += [self._message_labels(net, k, source) for k in behind]
        sizes = {**_prefixed("op:", op.sizes), **net.sizes, **_prefixed("bra:", net.sizes)}
        plan = plan_path(inputs, sizes, self._message_labels(net, source, target), net.dtype.itemsize)
        made = run(plan.steps, [core, core.conj(), op.cores[source].to(net.dtype), *inner])
        self._messages[key] = (parts, made)
        return made

    def _check(self, net: Network) -> None:
        if self._checked == net.legs:
            return
        op = self.operator
        wanted = [
            {_bond(net.legs, k, j) is not None and j for j in _neighbours(net.legs, k)} for k in range(len(net.cores))
        ]
        same = len(op.cores) == len(net.cores) and all(
            set(_neighbours(op.legs, k)) == set(want) for k, want in enumerate(wanted)
        )
        if same:
            for k, leg in enumerate(net.legs):
                axes = [position for position, label in enumerate(net.outside) if label in leg]
                own = {op.rows[a] for a in axes} | {op.cols[a] for a in axes}
                same = same and own == {label for label in op.legs[k] if label in op.outside}
        modes = net.shape
        if not same or op.row_modes != modes or op.col_modes != modes:
            raise ValueError(
                "OperatorField: the operator must live on the tree of Y, core by core, expected an operator like "
                f"{net!r} ({net.equation}) on {modes}, got {op!r} ({op.equation}); see kronecker_sum"
            )
        self._checked = net.legs


def _prefixed(prefix: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {prefix + label: size for label, size in sizes.items()}


def _bond(legs: Sequence[Labels], a: int, b: int) -> str:
    return next(label for label in legs[a] if label in legs[b])


def _neighbours(legs: Sequence[Labels], core: int) -> list[int]:
    return [k for k, leg in enumerate(legs) if k != core and set(leg) & set(legs[core])]


def kronecker_sum(
    like: Network,
    terms: Sequence[Mapping[int, Tensor]],
    *,
    coefficients: Sequence[float | complex] | None = None,
    tol: float = 1e-14,
) -> Network:
    """The operator `A = sum_k c_k (A_{k,1} x ... x A_{k,d})` as a tree on the tree of `like`.

    Axes that a term does not name carry the identity. Terms are added a few at a time and the bonds cut where they are
    redundant: long-range Hamiltonians of d sites with d (d - 1) / 2 terms come out at a few tens of ranks at most.
    Cost: a rounding of the operator for every 16 terms.

    Args:
        like: a tree with the modes that A acts on.
        terms: for every term, axis of the dense tensor -> matrix (n, n).
        coefficients: one a term; 1 by default.
        tol: relative error allowed in the operator (Frobenius norm).

    Returns:
        A tree with rows and columns of the modes of `like`, for `OperatorField`.

    Raises:
        ValueError: no terms, an axis that does not exist, a matrix of another shape.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> from tnlayers.integrators import kronecker_sum
        >>> net = TT.random(row_modes=(2, 2, 2), rank=2)
        >>> z = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> op = kronecker_sum(net, [{0: z, 1: z}, {1: z, 2: z}, {0: z, 2: z}])
        >>> op.ranks, round(to_dense(op)[1, 0, 1, 1, 0, 1].item(), 6)
        ((2, 2), -1.0)
    """
    if not terms:
        raise ValueError("kronecker_sum: expected at least one term, got none")
    coefficients = [1.0] * len(terms) if coefficients is None else list(coefficients)
    if len(coefficients) != len(terms):
        raise ValueError(f"kronecker_sum: one coefficient a term, expected {len(terms)}, got {len(coefficients)}")
    shape, outside = like.shape, like.outside
    matrices = [m for term in terms for m in term.values()]
    dtype = torch.promote_types(torch.float64, matrices[0].dtype if matrices else torch.float64)
    for m in matrices:
        dtype = torch.promote_types(dtype, m.dtype)
    if any(isinstance(c, complex) for c in coefficients):
        dtype = torch.promote_types(dtype, torch.complex128)
    total: Network | None = None
    for k, (term, c) in enumerate(zip(terms, coefficients, strict=True)):
        for axis, matrix in term.items():
            if not 0 <= axis < len(shape) or tuple(matrix.shape) != (shape[axis], shape[axis]):
                wanted = f"axes 0..{len(shape) - 1} with square matrices of the modes {shape}"
                raise ValueError(
                    f"kronecker_sum: expected {wanted}, got {tuple(matrix.shape)} at axis {axis} of term {k}"
                )
        cores, legs = [], []
        for v, leg in enumerate(like.legs):
            core, names = torch.ones((), dtype=dtype) * (c if v == 0 else 1.0), []
            for label in leg:
                if label in outside:
                    axis = outside.index(label)
                    matrix = term.get(axis, torch.eye(shape[axis])).to(dtype)
                    core = core.unsqueeze(-1).unsqueeze(-1) * matrix
                    names += [f"row:{label}", f"col:{label}"]
                else:
                    core = core.unsqueeze(-1)
                    names.append(label)
            cores.append(core)
            legs.append(tuple(names))
        rows, cols = tuple(f"row:{label}" for label in outside), tuple(f"col:{label}" for label in outside)
        one = Network(tuple(cores), tuple(legs), rows, cols)
        total = (
            one
            if total is None
            else add(total, one)
            if len(like.cores) > 1
            else one.replace([total.cores[0] + one.cores[0]])
        )
        if k % 16 == 15 or k == len(terms) - 1:
            total = cut(total, tol=tol)
    assert total is not None
    return total
