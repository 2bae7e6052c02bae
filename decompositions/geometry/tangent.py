"""Tangent spaces of trees of fixed ranks: projection, transport, retraction, Riemannian gradients and Hessians.

With `C_v` the center core at v and the other cores isometries toward it (`gauges`), a tangent vector at W is

    xi = sum over the cores v of (the tree with `delta_v` in place of `C_v`),     U_v^H delta_v = 0 but at the root,

and <xi, eta> = sum_v <delta_v, eta_v>: the deltas are coordinates in orthonormal bases. One code for LowRank, Tucker,
TT, TT-matrix and any other tree; nothing is inverted but in the Hessian, whose curvature term contains the inverse of
the links by nature.

References:
    C. Lubich, T. Rohwedder, R. Schneider, B. Vandereycken, Dynamical approximation by hierarchical Tucker and
    tensor-train tensors, SIAM J. Matrix Anal. Appl. 2013; A. Uschmajew, B. Vandereycken, The geometry of algorithms
    using hierarchical tensors, Linear Algebra Appl. 2013; M. Steinlechner, Riemannian optimization for
    high-dimensional tensor completion, SIAM J. Sci. Comput. 2016.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import isfinite, prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from decompositions.formats.algebra import to_dense
from decompositions.formats.gauge import cut_or_warn
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Labels, Network
from decompositions.formats.plan import plan_path, run
from decompositions.geometry.blocks import (
    DELTA,
    PLAIN,
    Block,
    BlockTree,
    along,
    flatten,
    leave_one_out,
    unflatten,
)
from decompositions.geometry.gauges import Gauges, gauges
from decompositions.linalg import accumulate_dtype, full_precision

N = TypeVar("N", bound=Network)
Messages = dict[int, dict[int, Tensor]]
"""For every core, by the half of the bond above it: a matrix (size of the operand's bond, size of the basis)."""


@dataclass(frozen=True, eq=False, repr=False)
class Tangent(Generic[N]):
    """A tangent vector: a delta for every core, in the gauge centered there.

    Supports `+`, `-`, and products with numbers; both sides of a sum must share the point.

    Args:
        at: the gauges of the point.
        deltas: one a core, of the shape of `at.center`; orthogonal to `at.up` but at the root.

    Raises:
        ValueError: deltas that do not have the shapes of the center cores.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from decompositions.geometry import project
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> xi = project(net, torch.randn(6, 5, dtype=torch.float64))
        >>> bool(torch.isclose((2 * xi - xi).norm(), xi.to_dense().norm()))
        True
    """

    at: Gauges[N]
    deltas: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", tuple(self.deltas))
        want = [tuple(core.shape) for core in self.at.center]
        got = [tuple(delta.shape) for delta in self.deltas]
        if got != want:
            raise ValueError(f"Tangent: one delta a core, of the center cores' shapes, expected {want}, got {got}")

    def _with(self, deltas: Sequence[Tensor]) -> "Tangent[N]":
        return Tangent(self.at, tuple(deltas))

    def _matching(self, other: "Tangent[N]") -> Sequence[Tensor]:
        if other.at is not self.at:
            raise ValueError(
                "Tangent: both tangent vectors must belong to one point (the same Gauges object); "
                "bring the other one here by transport(point, xi)"
            )
        return other.deltas

    def __add__(self, other: "Tangent[N]") -> "Tangent[N]":
        return self._with([a + b for a, b in zip(self.deltas, self._matching(other), strict=True)])

    def __sub__(self, other: "Tangent[N]") -> "Tangent[N]":
        return self._with([a - b for a, b in zip(self.deltas, self._matching(other), strict=True)])

    def __mul__(self, factor: float | complex | Tensor) -> "Tangent[N]":
        return self._with([delta * factor for delta in self.deltas])

    __rmul__ = __mul__

    def __neg__(self) -> "Tangent[N]":
        return self._with([-delta for delta in self.deltas])

    def inner(self, other: "Tangent[N]") -> Tensor:
        """`<self, other> = sum_v <delta_v, eta_v>`, conjugate-linear in the first; O(number of parameters)."""
        pairs = zip(self.deltas, self._matching(other), strict=True)
        return torch.stack([torch.vdot(a.reshape(-1), b.reshape(-1)) for a, b in pairs]).sum()

    def norm(self) -> Tensor:
        """Norm of the tangent vector, which is that of its dense tensor."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(delta) for delta in self.deltas]))

    def blocks(self, *, point: bool = False) -> BlockTree:
        """The doubled tree of xi, or of `W + xi`, as the blocks that are not zero: k + 2 at a core with k children."""
        net, at = self.at.net, self.at
        above, below = at.above, at.below
        found = []
        for v, leg in enumerate(net.legs):
            edge = above.get(v)

            def halves(child: str | None, parent: int, leg: Labels = leg, own: Any = edge) -> tuple[int, ...]:
                """DELTA at the bond to one child, `parent` at the bond upward, PLAIN elsewhere."""
                top = None if own is None else own.bond
                return tuple(parent if label == top else DELTA if label == child else PLAIN for label in leg)

            made = [Block(halves(down.bond, DELTA), _given(at.down[down.child])) for down in below[v]]
            if edge is None:
                made.append(Block(halves(None, PLAIN), self.deltas[v] + at.center[v] if point else self.deltas[v]))
            else:
                made += [Block(halves(None, PLAIN), at.up[v]), Block(halves(None, DELTA), self.deltas[v])]
            found.append(tuple(made))
        return BlockTree(net.legs, net.rows, net.cols, tuple(found))

    def to_network(self, *, point: bool = False) -> N:
        """Xi, or `W + xi`, as a network of the same format with doubled ranks."""
        return self.at.net.replace(self.blocks(point=point).to_cores())

    def to_dense(self) -> Tensor:
        """Dense tensor of xi."""
        return to_dense(self.to_network())

    def __repr__(self) -> str:
        return f"Tangent(at {self.at.net!r})"


def _given(core: Tensor | None) -> Tensor:
    assert core is not None
    return core


def gauges_of(point: N | Gauges[N]) -> Gauges[N]:
    """The gauges of a point that is given as a network or by its gauges."""
    return point if isinstance(point, Gauges) else gauges(point)


def dimension(net: Network) -> int:
    """Dimension of the manifold of trees with these ranks: `sum_v |core v| - sum_e r_e^2`.

    Ranks larger than a side of their bond allows are counted as what it allows.

    Example:
        >>> from decompositions import LowRank
        >>> from decompositions.geometry import dimension
        >>> dimension(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)) == 2 * (6 + 5 - 2)
        True
    """
    at = gauges(net.detach())
    exact = round_network(net.detach()) if any(s.shape[0] != s.shape[1] for s in at.links.values()) else at.net
    return sum(core.numel() for core in exact.cores) - sum(rank**2 for rank in exact.ranks)


def gauge_fix(at: Gauges[N], gradients: Sequence[Tensor], *, twice: bool = True) -> Tangent[N]:
    """`delta_v = (I - U_v U_v^H) E_v` at every core but the root: coordinates of the projection of the gradient."""
    deltas = list(gradients)
    for edge in at.edges:
        axis = at.axis(edge.child, edge.bond)
        u, e = flatten(at.up[edge.child], axis), flatten(deltas[edge.child], axis)
        e = e - u @ (u.mH @ e)
        if twice:  # what is left of a gradient that is nearly in the span is not orthogonal to it otherwise
            e = e - u @ (u.mH @ e)
        deltas[edge.child] = unflatten(e, deltas[edge.child].shape, axis)
    return Tangent(at, tuple(deltas))


@full_precision
def project(point: N | Gauges[N], z: Tensor | Network | BlockTree | Tangent[Any]) -> Tangent[N]:
    """Orthogonal projection onto the tangent space: the tangent vector closest to z.

    A dense z is contracted with the isometries, leaves first; a network z on the same tree is met core by core, never
    densified, O(d r^2 (r + R) n) for ranks r of the point and R of z along a chain; a network of another shape goes
    through opt_einsum's paths, one for each core.

    Args:
        point: a tree, or its `gauges`.
        z: a dense tensor of shape `row_modes + col_modes` (or the matrix of both), a network with the same modes, a
            tangent vector at another point.

    Returns:
        The tangent vector at the point.

    Raises:
        ValueError: shapes that differ from the point's.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> from decompositions.geometry import project
        >>> net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64)
        >>> xi = project(net, torch.randn(3, 4, 3, dtype=torch.float64))
        >>> bool(torch.allclose(project(net, xi.to_dense()).to_dense(), xi.to_dense()))
        True
    """
    at = gauges_of(point)
    return gauge_fix(at, center_gradients(at, z))


def center_gradients(at: Gauges[N], z: Tensor | Network | BlockTree | Tangent[Any]) -> list[Tensor]:
    """`E_v`: z contracted with the conjugates of all cores but v in the gauge centered at v; of the shape of core v."""
    return _gradients(z, at)


@singledispatch
def _gradients(z: Any, at: Gauges[Any]) -> list[Tensor]:
    raise TypeError(
        f"project: z must be a dense tensor, a Network or a Tangent, got {type(z).__name__}; "
        "see riemannian_gradient(loss, net) for a function"
    )


@_gradients.register
def _(z: Tensor, at: Gauges[Any]) -> list[Tensor]:
    """Two sweeps of contractions of a dense z: down with what lies above, where all subtrees but one are compressed."""
    net = at.net
    shape, matrix = net.shape, (prod(net.row_modes), prod(net.col_modes))
    if tuple(z.shape) not in (shape, matrix):
        raise ValueError(f"project: z must have the shape of the point, expected {shape}, got {tuple(z.shape)}")
    below = at.below
    found: list[Tensor | None] = [None] * len(net.cores)

    def compress(x: Tensor, labels: Labels, v: int) -> tuple[Tensor, Labels]:
        """Contract the subtree of v away: its outside axes become the one of the bond above it."""
        for edge in below[v]:
            x, labels = compress(x, labels, edge.child)
        return _dot(x, labels, at.up[v].conj(), net.legs[v])

    def descend(x: Tensor, labels: Labels, v: int) -> None:
        """`x` carries the bond above v (in the basis V) and the outside axes of the subtree of v."""
        children = [edge.child for edge in below[v]]
        for child, (partial, rest) in _all_but_one(x, labels, children, compress):
            if child is None:
                found[v] = partial.permute([rest.index(label) for label in net.legs[v]])
            else:
                descend(*_dot(partial, rest, _given(at.down[child]).conj(), net.legs[v]), child)

    descend(z.reshape(shape).to(net.dtype), net.outside, at.root)
    return [_given(core).contiguous() for core in found]


def _dot(x: Tensor, labels: Labels, core: Tensor, leg: Labels) -> tuple[Tensor, Labels]:
    """Contract over the labels that both have."""
    common = [label for label in leg if label in labels]
    axes = [labels.index(label) for label in common], [leg.index(label) for label in common]
    rest = tuple(label for label in labels if label not in common)
    return torch.tensordot(x, core, dims=axes), rest + tuple(label for label in leg if label not in common)


def _all_but_one(
    x: Tensor, labels: Labels, children: Sequence[int], compress: Callable[..., Any], *, full: bool = True
) -> Any:
    """Pairs (child, x with the subtrees of all other children compressed), and where `full` (None, all compressed).

    By halves, so that no subtree is compressed more than log k times.
    """
    if len(children) <= 1:
        for child in children:
            yield child, (x, labels)
            x, labels = compress(x, labels, child) if full else (x, labels)
        if full:
            yield None, (x, labels)
        return
    half = len(children) // 2
    for keep, absorb, last in ((children[:half], children[half:], full), (children[half:], children[:half], False)):
        rest = (x, labels)
        for child in absorb:
            rest = compress(*rest, child)
        yield from _all_but_one(*rest, keep, compress, full=last)


@_gradients.register
def _(z: Network, at: Gauges[Any]) -> list[Tensor]:
    net = at.net
    if z.shape != net.shape or len(z.rows) != len(net.rows):
        raise ValueError(f"project: z must have the modes of the point, expected {net!r}, got {z!r}")
    if z.legs == net.legs and (z.rows, z.cols) == (net.rows, net.cols):
        return _block_gradients(BlockTree.of(z), at)
    # another network: its labels are made distinct from ours, but for the outside ones
    names = dict(zip(z.outside, net.outside, strict=True))
    legs = [tuple(names.get(label, f"z:{label}") for label in leg) for leg in z.legs]
    sizes = {names.get(label, f"z:{label}"): size for label, size in z.sizes.items()}
    found = []
    for v in range(len(net.cores)):
        centered = at.centered(v)
        operands = [*z.cores, *(core.conj() for k, core in enumerate(centered.cores) if k != v)]
        inputs = [*legs, *(leg for k, leg in enumerate(net.legs) if k != v)]
        plan = plan_path(inputs, {**sizes, **centered.sizes}, net.legs[v], net.dtype.itemsize)
        found.append(run(plan.steps, operands).reshape(at.center[v].shape))
    return found


@_gradients.register
def _(z: BlockTree, at: Gauges[Any]) -> list[Tensor]:
    if z.legs != at.net.legs:
        raise ValueError(f"project: z must be a sum of trees like the point's, expected legs {at.net.legs}")
    return _block_gradients(z, at)


@_gradients.register
def _(z: Tangent, at: Gauges[Any]) -> list[Tensor]:
    if z.at.net.legs == at.net.legs:
        return _block_gradients(z.blocks(), at)
    return _gradients(z.to_network(), at)


def _block_gradients(z: BlockTree, at: Gauges[Any]) -> list[Tensor]:
    """One sweep up and one down over the cores of a tree and of z together."""
    legs, above, below = at.net.legs, at.above, at.below
    up: Messages = {k: {} for k in range(len(legs))}  # subtree of z against that of U
    down: Messages = {k: {} for k in range(len(legs))}  # all of z above a bond against V
    for edge in reversed(at.edges):
        v, axis = edge.child, at.axis(edge.child, edge.bond)
        basis = flatten(at.up[v], axis).conj()
        for block in z.blocks[v]:
            core = block.core
            for lower in below[v]:
                k = at.axis(v, lower.bond)
                core = along(core, k, up[lower.child][block.halves[k]].mT)
            _accumulate(up[v], block.halves[axis], flatten(core, axis).mT @ basis)
    found: list[Tensor | None] = [None] * len(legs)
    for v in (at.root, *(edge.child for edge in at.edges)):  # parents before children
        for block in z.blocks[v]:
            core = block.core
            if v in above:
                k = at.axis(v, above[v].bond)
                core = along(core, k, down[v][block.halves[k]].mT)
            child = {at.axis(v, lower.bond): lower.child for lower in below[v]}
            factors = [(k, up[w][block.halves[k]].mT) for k, w in child.items()]
            whole = core
            for k, partial in leave_one_out(core, factors):
                basis = flatten(_given(at.down[child[k]]), k).conj()
                _accumulate(down[child[k]], block.halves[k], flatten(partial, k).mT @ basis)
                if k == factors[-1][0]:
                    whole = along(partial, k, factors[-1][1])
            found[v] = whole if found[v] is None else _given(found[v]) + whole
    return [_given(core) for core in found]


def _accumulate(messages: dict[int, Tensor], half: int, value: Tensor) -> None:
    messages[half] = messages[half] + value if half in messages else value


@full_precision
def retract(
    xi: Tangent[N],
    step: float = 1.0,
    *,
    rank: int | Sequence[int] | Mapping[str, int] | None = None,
    tol: float | None = None,
) -> N:
    """Back to the manifold: `round(W + step xi)`, to the ranks of the point, to other ranks, or by a tolerance.

    A second-order retraction: `R(t xi) = W + t xi + O(t^2)`, and the tangential part of the second-order term is zero,
    so that f(R(t xi)) has the Riemannian gradient and Hessian as derivatives. By `tol` it is the step of
    rank-adaptive schemes: ranks may double or shrink, and `‖result - (W + step xi)‖ <= tol ‖W + step xi‖`.
    Cost: a QR of the deltas and a rounding at doubled ranks, O(sum_v n_v (2 r)^(deg + 1)).

    Args:
        xi: the tangent vector.
        step: its factor.
        rank: see `round`; by default the ranks of the point where there is no tolerance.
        tol: relative Frobenius error of the rounding.

    Raises:
        ValueError: a step that is not finite; what `round` refuses.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from decompositions.geometry import project, retract
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2)
        >>> retract(project(net, torch.randn(6, 5)), -0.1).ranks
        (2, 2)
    """
    if not isfinite(step):
        raise ValueError(f"retract: step must be finite, got {step}")
    if rank is None and tol is None:
        rank = xi.at.net.ranks
    return cut_or_warn("retract", extend(xi * step), rank, tol, center=xi.at.root, gauged=True)


def extend(xi: Tangent[N]) -> N:
    """`W + xi` with all cores but the root isometries toward it: bases `[U_v, Q_v]`, U_v verbatim in front.

    The deltas are orthogonal to U_v, so that only they are factored. A basis that is square already is not extended.
    Cost: one QR of (others x r) a bond instead of (others x 2 r), and the doubled cores.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from decompositions.geometry import project
        >>> from decompositions.geometry.tangent import extend
        >>> net = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> xi = project(net, torch.randn(6, 5, dtype=torch.float64))
        >>> bool(torch.allclose(to_dense(extend(xi)), to_dense(net) + xi.to_dense()))
        True
    """
    at, below, above = xi.at, xi.at.below, xi.at.above
    new: dict[int, Tensor] = {}  # core v in the extended bases
    turn: dict[int, Tensor] = {}  # delta half above v = Q_v turn[v]
    for v in (*(edge.child for edge in reversed(at.edges)), at.root):
        plain, delta = at.up[v], xi.deltas[v]
        if v == at.root:
            plain = delta = delta + at.center[v]
        wide = list(delta.shape)
        for edge in below[v]:
            wide[at.axis(v, edge.bond)] += turn[edge.child].shape[0]
        moved = _padded(delta, wide)
        for edge in below[v]:
            axis = at.axis(v, edge.bond)
            if turn[edge.child].shape[0]:
                half = along(_given(at.down[edge.child]), axis, turn[edge.child])
                place = moved.narrow(axis, delta.shape[axis], half.shape[axis])
                for k, size in enumerate(half.shape):
                    place = place.narrow(k, 0, size)
                place += half
        if v == at.root:
            new[v] = moved
            continue
        axis = at.axis(v, above[v].bond)
        wide[axis] = plain.shape[axis]
        basis, rest = flatten(_padded(plain, wide), axis), flatten(moved, axis)
        q = normal_basis(basis, rest)
        turn[v] = q.mH @ rest
        wide[axis] += q.shape[1]
        new[v] = unflatten(torch.cat([basis, q], 1), wide, axis)
    return at.net._unchecked([new[v] for v in range(len(new))], at.net.legs, at.net.rows, at.net.cols)


def _padded(core: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy with zeros behind along every axis."""
    made = core.new_zeros(tuple(shape))
    place = made
    for axis, size in enumerate(core.shape):
        place = place.narrow(axis, 0, size)
    place.copy_(core)
    return made


def normal_basis(basis: Tensor, rest: Tensor) -> Tensor:
    """Orthonormal columns, normal to those of `basis` (n, r), that span `rest`, which is normal to them already.

    As many as `rest` has columns, or n - r. Where `rest` has no full rank, QR completes its columns by any, which must
    be normal to `basis` too: then both are factored together.
    """
    n, r = basis.shape
    count = min(rest.shape[1], n - r)
    if count == 0:
        return basis.new_zeros(n, 0)
    half = basis.dtype
    basis, rest = basis.to(accumulate_dtype(half)), rest.to(accumulate_dtype(half))
    if count == rest.shape[1]:
        q = torch.linalg.qr(rest).Q
        overlap = basis.mH @ q
        if float(torch.linalg.vector_norm(overlap)) < torch.finfo(q.dtype).eps ** 0.5:
            return (q - basis @ overlap).to(half)
    return torch.linalg.qr(torch.cat([basis, rest], 1)).Q[:, r : r + count].to(half)


def transport(point: N | Gauges[N], xi: Tangent[N]) -> Tangent[N]:
    """Vector transport by projection: the tangent vector at `point` closest to xi, which lives at another point.

    Cost: contractions of two trees, block by block, never dense.

    Args:
        point: the new point, or its `gauges`; its ranks may differ from the old ones.
        xi: a tangent vector at the old one.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> from decompositions.geometry import project, retract, transport
        >>> xi = project(LowRank.random(row_modes=(6,), col_modes=(5,), rank=2), torch.randn(6, 5))
        >>> moved = transport(retract(xi, 0.1), xi)
        >>> bool(moved.norm() <= xi.norm() * 1.001)
        True
    """
    return project(point, xi)
