"""Linear operators on trees as right-hand sides: a tree of its own, or a sum of Kronecker products term by term."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from decompositions import Network, add, to_dense
from decompositions import round as cut
from decompositions.formats.network import Labels, TreeEdge, tree_edges
from decompositions.formats.plan import bucket, run
from decompositions.geometry.blocks import along, flatten
from tnlayers.integrators.fields import CoreField, Steps, path, refuse_complex

Factor = float | complex | Callable[[float], float | complex]


def _as_function(factor: Factor) -> Callable[[float], float | complex]:
    return factor if callable(factor) else (lambda t: factor)


def _times(factor: float | complex, value: Tensor) -> Tensor:
    """`factor value`, refused where a complex factor would make a real Y complex."""
    if isinstance(factor, complex):
        refuse_complex("the factor", torch.complex128, value.dtype)
    return value if isinstance(factor, int | float) and factor == 1 else factor * value


def _numbers(coefficients: Sequence[float | complex] | None, count: int, name: str) -> list[float | complex]:
    """Coefficients as plain numbers (of torch, numpy or Python)."""
    found = [1.0] * count if coefficients is None else [complex(c) for c in coefficients]
    if len(found) != count:
        raise ValueError(f"{name}: one coefficient a term, expected {count}, got {len(found)}")
    return [c.real if isinstance(c, complex) and c.imag == 0 else c for c in found]


class _Messages:
    """Contractions along bonds, remembered while what they were made of stays the same tensors with the same values."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[list[tuple[Tensor | None, int]], Tensor]] = {}

    def clear(self) -> None:
        """Forget all: the tree is another one."""
        self._known.clear()

    @staticmethod
    def _stamp(parts: Sequence[Tensor | None]) -> list[tuple[Tensor | None, int]]:
        grad = torch.is_grad_enabled()
        stamps = [0 if part is None or part.is_inference() else part._version for part in parts]
        return [(part, 2 * stamp + grad) for part, stamp in zip(parts, stamps, strict=True)]

    def get(self, key: tuple[int, ...], parts: Sequence[Tensor | None]) -> Tensor | None:
        old, made = self._known.get(key, ([], None))
        now = self._stamp(parts)
        same = len(old) == len(now) and all(a is b and u == v for (a, u), (b, v) in zip(old, now, strict=True))
        return made if same else None

    def put(self, key: tuple[int, ...], parts: Sequence[Tensor | None], made: Tensor) -> Tensor:
        self._known[key] = (self._stamp(parts), made)
        return made


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

    def __init__(self, operator: Network, factor: Factor = 1.0) -> None:
        if not operator.is_tree or len(operator.rows) != len(operator.cols):
            raise ValueError(
                f"OperatorField: the operator must be a tree with as many columns as rows, got {operator!r}"
            )
        self.operator = operator
        self.factor = _as_function(factor)
        self._messages = _Messages()
        self._known_steps: dict[tuple[object, ...], Steps] = {}
        self._checked: object = None

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Dense `factor(t) A Y`, for references and small problems."""
        order = len(self.operator.rows)
        refuse_complex("the operator", self.operator.dtype, y.dtype)
        dense = to_dense(self.operator).to(y.dtype)
        return _times(self.factor(t), torch.tensordot(dense, y, dims=order))

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`; messages along bonds are kept while the cores behind them stay the same objects."""
        self._check(net)
        op = self.operator
        labels, operands, inputs = net.legs[core], [], []
        made: dict[int, Tensor] = {}
        for edge in reversed(_edges(net.legs, net.rows, net.cols, core)):  # leaves first
            made[edge.child] = self._message(net, edge.child, edge.parent, made)
        for other in _neighbours(net.legs, core):
            operands.append(made[other])
            inputs.append(self._message_labels(net, other, core))
        own = op.cores[core].to(net.dtype)

        def find() -> Steps:
            sizes = {**_prefixed("op:", op.sizes), **net.sizes, **_prefixed("bra:", net.sizes)}
            out = tuple(f"bra:{label}" for label in labels)
            return path([labels, self._names(net, core), *inputs], sizes, out, net.dtype.itemsize)

        steps = self._steps_for(("core", core, core), [net.cores[core], own, *operands], find)

        def derivative(t: float, value: Tensor) -> Tensor:
            return _times(self.factor(t), run(steps, [value, own, *operands]))

        return derivative

    def _steps_for(self, key: tuple[object, ...], operands: Sequence[Tensor], find: Callable[[], Steps]) -> Steps:
        """Steps of a contraction by the powers of two of the operands' sizes, remembered while the tree stays."""
        full = (*key, *(bucket(size) for operand in operands for size in operand.shape))
        steps = self._known_steps.get(full)
        if steps is None:
            steps = self._known_steps[full] = find()
        return steps

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

    def _message(self, net: Network, source: int, target: int, made: Mapping[int, Tensor]) -> Tensor:
        """The subtree of `source`, seen from `target`: (bra bond, operator bond, bond)."""
        behind = _neighbours(net.legs, source, target)
        inner = [made[k] for k in behind]
        key, core = (source, target), net.cores[source]
        parts = [core, *inner]
        known = self._messages.get(key, parts)
        if known is not None:
            return known
        op = self.operator
        own = op.cores[source].to(net.dtype)

        def find() -> Steps:
            legs = net.legs[source]
            inputs = [legs, tuple(f"bra:{label}" for label in legs), self._names(net, source)]
            inputs += [self._message_labels(net, k, source) for k in behind]
            sizes = {**_prefixed("op:", op.sizes), **net.sizes, **_prefixed("bra:", net.sizes)}
            return path(inputs, sizes, self._message_labels(net, source, target), net.dtype.itemsize)

        steps = self._steps_for(("message", source, target), [core, own, *inner], find)
        message = run(steps, [core, core.conj(), own, *inner])
        return self._messages.put(key, parts, message)

    def _check(self, net: Network) -> None:
        structure = (net.legs, net.rows, net.cols, net.shape)
        if self._checked == structure:
            return
        self._messages.clear()
        self._known_steps.clear()
        op = self.operator
        refuse_complex("the operator", op.dtype, net.dtype)
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
        self._checked = structure


class FixedField:
    """`F(t, Y) = Z` for a network Z on the tree of Y, of any ranks; never densified.

    Args:
        z: a network with the legs of Y.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, scale
        >>> net = LowRank(torch.eye(3, 1), torch.ones(1, 1), torch.eye(4, 1))
        >>> FixedField(scale(net, 5.0)).restrict(net, 1)(0.0, net.S).item()
        5.0
    """

    def __init__(self, z: Network) -> None:
        self.z = z

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Z, dense."""
        return to_dense(self.z)

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`: one sweep of contractions of both trees, leaves first."""
        seen = list(self.z.cores)  # with what lies behind already contracted
        for edge in reversed(_edges(net.legs, net.rows, net.cols, core)):
            axis, other = net.legs[edge.child].index(edge.bond), net.legs[edge.parent].index(edge.bond)
            message = flatten(net.cores[edge.child], axis).mH @ flatten(seen[edge.child], axis)
            seen[edge.parent] = along(seen[edge.parent], other, message)
        return lambda t, value: seen[core]


class KroneckerField:
    """`F(t, Y) = factor(t) sum_k c_k (A_{k,1} x ... x A_{k,d}) Y`, applied term by term.

    For few terms with large matrices: axes that a term does not name, and bonds behind which it names none, cost
    nothing; matrices may be sparse. Many terms on many small modes (spin chains) are cheaper as one `OperatorField` of
    `kronecker_sum`. Cost of an evaluation at one core: one product of the core with every matrix that acts on its own
    axes, O(r^2) numbers for every other term.

    Args:
        terms: for every term, axis of the dense tensor -> matrix (n, n), dense or sparse.
        coefficients: one a term; 1 by default.
        factor: a number, or a function of time.

    Raises:
        ValueError: no terms, or another number of coefficients; where Y is restricted: an axis that Y does not have, a
            matrix that does not fit its mode.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from tnlayers.integrators import KroneckerField
        >>> net = LowRank(torch.eye(3, 1), torch.ones(1, 1), torch.eye(4, 1))
        >>> field = KroneckerField([{0: 2 * torch.eye(3)}, {1: 3 * torch.eye(4)}])
        >>> field.restrict(net, 1)(0.0, net.S).item()
        5.0
    """

    def __init__(
        self,
        terms: Sequence[Mapping[int, Tensor]],
        *,
        coefficients: Sequence[float | complex] | None = None,
        factor: Factor = 1.0,
    ) -> None:
        if not terms:
            raise ValueError("KroneckerField: expected at least one term, got none")
        _check_terms("KroneckerField", terms)
        self.terms = [dict(term) for term in terms]
        self.coefficients = _numbers(coefficients, len(self.terms), "KroneckerField")
        self.factor = _as_function(factor)
        self._messages = _Messages()
        self._checked: object = None
        self._structure: object = None

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """Dense value, for references and small problems."""
        self._check(tuple(y.shape), y.dtype)
        total = torch.zeros_like(y)
        for c, term in zip(self.coefficients, self.terms, strict=True):
            moved = y
            for axis, matrix in term.items():
                moved = _act(moved, axis, matrix.to(y.dtype))
            total = total + c * moved
        return _times(self.factor(t), total)

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `Field`; messages along bonds are kept while the cores behind them stay the same objects."""
        self._check(net.shape, net.dtype)
        if self._structure != (net.legs, net.rows, net.cols):
            self._messages.clear()
            self._structure = (net.legs, net.rows, net.cols)
        scalar: complex = 0.0
        single: dict[int, Tensor] = {}  # axis -> sum of all that acts along it alone
        products: list[tuple[float | complex, list[tuple[int, Tensor]]]] = []
        edges = _edges(net.legs, net.rows, net.cols, core)
        for k, c in enumerate(self.coefficients):
            factors = self._own(net, core, k)
            made: dict[int, Tensor | None] = {}
            for edge in reversed(edges):  # leaves first
                made[edge.child] = self._message(net, edge.child, edge.parent, k, made)
            for other in _neighbours(net.legs, core):
                message = made[other]
                if message is not None:
                    factors.append((net.legs[core].index(_bond(net.legs, core, other)), message))
            if not factors:
                scalar += c
            elif len(factors) == 1 and factors[0][1].layout == torch.strided:
                ((axis, matrix),) = factors
                single[axis] = single[axis] + c * matrix if axis in single else matrix if c == 1 else c * matrix
            else:
                products.append((c, factors))
        shift = scalar.real if isinstance(scalar, complex) and scalar.imag == 0 else scalar

        def derivative(t: float, value: Tensor) -> Tensor:
            total = shift * value if shift else None
            for axis, matrix in single.items():
                term = along(value, axis, matrix)
                total = term if total is None else total + term
            for c, factors in products:
                term = value
                for axis, matrix in factors:
                    term = _act(term, axis, matrix)
                total = c * term if total is None else total + c * term
            assert total is not None
            return _times(self.factor(t), total)

        return derivative

    def _own(self, net: Network, core: int, k: int) -> list[tuple[int, Tensor]]:
        """(axis of the core, matrix) for the axes of term k that the core carries."""
        leg = net.legs[core]
        found = [(net.outside[axis], matrix) for axis, matrix in self.terms[k].items()]
        return [(leg.index(label), matrix.to(net.dtype)) for label, matrix in found if label in leg]

    def _message(
        self, net: Network, source: int, target: int, k: int, made: Mapping[int, Tensor | None]
    ) -> Tensor | None:
        """Term k on the subtree of `source`, seen from `target`: (bra bond, bond); None where it is the identity."""
        behind = [(other, made[other]) for other in _neighbours(net.legs, source, target)]
        own, core, leg = self._own(net, source, k), net.cores[source], net.legs[source]
        if not own and all(message is None for _, message in behind):
            return None
        parts = [core, *(message for _, message in behind)]
        known = self._messages.get((source, target, k), parts)
        if known is not None:
            return known
        moved = core
        inner = [(leg.index(_bond(net.legs, source, other)), m) for other, m in behind if m is not None]
        for axis, matrix in (*inner, *own):
            moved = _act(moved, axis, matrix)
        axis = leg.index(_bond(net.legs, source, target))
        message = flatten(core, axis).mH @ flatten(moved, axis)
        return self._messages.put((source, target, k), parts, message)

    def _check(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if self._checked == (shape, dtype):
            return
        for k, (term, c) in enumerate(zip(self.terms, self.coefficients, strict=True)):
            refuse_complex(f"coefficient {k}", torch.complex128 if isinstance(c, complex) else dtype, dtype)
            for axis, matrix in term.items():
                refuse_complex(f"the matrix at axis {axis} of term {k}", matrix.dtype, dtype)
                if not 0 <= axis < len(shape) or tuple(matrix.shape) != (shape[axis], shape[axis]):
                    raise ValueError(
                        f"KroneckerField: expected axes 0..{len(shape) - 1} with square matrices of the modes {shape}, "
                        f"got {tuple(matrix.shape)} at axis {axis} of term {k}"
                    )
        self._checked = (shape, dtype)


def _check_terms(name: str, terms: Sequence[Mapping[int, Tensor]]) -> None:
    for k, term in enumerate(terms):
        right = isinstance(term, Mapping) and all(
            isinstance(axis, int) and not isinstance(axis, bool) and isinstance(matrix, Tensor)
            for axis, matrix in term.items()
        )
        if not right:
            raise TypeError(
                f"{name}: terms must be mappings axis (int) -> matrix (Tensor), got {term!r} as term {k}; "
                "torch.as_tensor makes tensors of arrays"
            )


def _act(core: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """`along` for matrices of any layout."""
    if matrix.layout == torch.strided:
        return along(core, axis, matrix)
    moved = core.movedim(axis, 0)
    return (matrix @ moved.reshape(moved.shape[0], -1)).reshape(moved.shape).movedim(0, axis)


def _prefixed(prefix: str, sizes: Mapping[str, int]) -> dict[str, int]:
    return {prefix + label: size for label, size in sizes.items()}


def _bond(legs: Sequence[Labels], a: int, b: int) -> str:
    return next(label for label in legs[a] if label in legs[b])


@lru_cache(maxsize=4096)
def _edges(legs: tuple[Labels, ...], rows: Labels, cols: Labels, root: int) -> tuple[TreeEdge, ...]:
    return tree_edges(legs, rows, cols, root)


@lru_cache(maxsize=4096)
def _neighbours(legs: tuple[Labels, ...], core: int, but: int | None = None) -> list[int]:
    return [k for k, leg in enumerate(legs) if k not in (core, but) and set(leg) & set(legs[core])]


def kronecker_sum(
    like: Network,
    terms: Sequence[Mapping[int, Tensor]],
    *,
    coefficients: Sequence[float | complex] | None = None,
    tol: float = 1e-13,
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
    coefficients = _numbers(coefficients, len(terms), "kronecker_sum")
    if not isinstance(like, Network) or not like.is_tree:
        raise ValueError(f"kronecker_sum: like must be a tree network, got {like!r}")
    _check_terms("kronecker_sum", terms)
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
