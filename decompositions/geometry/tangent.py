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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from math import prod
from numbers import Complex, Real
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from decompositions.formats.algebra import to_dense
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Labels, Network
from decompositions.formats.plan import plan_path, run
from decompositions.geometry.blocks import (
    DELTA,
    PLAIN,
    Block,
    BlockTree,
    all_but_one,
    along,
    contract_common,
    flatten,
    leave_one_out,
    unflatten,
)
from decompositions.geometry.gauges import Gauges, _given, gauges, gauges_of
from decompositions.linalg import accumulate_dtype, full_precision

N = TypeVar("N", bound=Network)
Messages = dict[int, dict[int, Tensor]]  # core -> half of the bond above -> (operand's bond, basis)


@dataclass(frozen=True, eq=False, repr=False)
class Tangent(Generic[N]):
    """A tangent vector: a delta for every core, in the gauge centered there.

    Supports `+`, `-`, products with numbers (or tensors without axes) and quotients by them; both sides of a sum must
    share the point, and a complex factor needs a complex point.

    Args:
        at: the gauges of the point.
        deltas: one a core, of the shape of `at.center`; orthogonal to `at.up` but at the root.

    Raises:
        TypeError: deltas of another dtype; a factor that is no number, or a complex one on a real point.
        ValueError: deltas that do not have the shapes of the center cores; a factor with axes; a sum over two points.

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

    __array_ufunc__ = None  # numpy leaves products with its numbers to us, and those with its arrays to nobody

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", tuple(self.deltas))
        want = [tuple(core.shape) for core in self.at.center]
        got = [tuple(delta.shape) for delta in self.deltas]
        if got != want:
            raise ValueError(f"Tangent: one delta a core, of the center cores' shapes, expected {want}, got {got}")
        for delta in self.deltas:
            if delta.dtype != self.at.net.dtype:
                raise TypeError(f"Tangent: deltas must have the point's dtype {self.at.net.dtype}, got {delta.dtype}")

    def _with(self, deltas: Sequence[Tensor]) -> "Tangent[N]":
        return Tangent(self.at, tuple(deltas))

    def _matching(self, other: "Tangent[N]") -> Sequence[Tensor]:
        if not isinstance(other, Tangent):
            raise TypeError(f"Tangent: expected another tangent vector, got {type(other).__name__}")
        if other.at is not self.at:
            raise ValueError(
                "Tangent: both tangent vectors must belong to one point (the same Gauges object); "
                "bring the other one here by transport(point, xi)"
            )
        return other.deltas

    def _factor(self, factor: object) -> float | complex | Tensor | None:
        """A factor that every delta can take; None for what is no factor."""
        made: float | complex | Tensor
        if isinstance(factor, Tensor):
            if factor.ndim:
                raise ValueError(
                    f"Tangent: a factor must be a number or a tensor without axes, got shape {tuple(factor.shape)}"
                )
            made, is_complex = factor, factor.is_complex()
        elif isinstance(factor, Real):
            made, is_complex = float(factor), False
        elif isinstance(factor, Complex):
            made, is_complex = complex(factor), True
        else:
            return None
        dtype = self.at.net.dtype
        if is_complex and not dtype.is_complex:
            raise TypeError(f"Tangent: a complex factor expects a complex point, got {dtype}; see net.to")
        return made

    def __add__(self, other: "Tangent[N]") -> "Tangent[N]":
        if not isinstance(other, Tangent):
            return NotImplemented
        return self._with([a + b for a, b in zip(self.deltas, self._matching(other), strict=True)])

    def __sub__(self, other: "Tangent[N]") -> "Tangent[N]":
        if not isinstance(other, Tangent):
            return NotImplemented
        return self._with([a - b for a, b in zip(self.deltas, self._matching(other), strict=True)])

    def __mul__(self, factor: float | complex | Tensor) -> "Tangent[N]":
        number = self._factor(factor)
        return NotImplemented if number is None else self._with([delta * number for delta in self.deltas])

    __rmul__ = __mul__

    def __truediv__(self, factor: float | complex | Tensor) -> "Tangent[N]":
        number = self._factor(factor)
        return NotImplemented if number is None else self._with([delta / number for delta in self.deltas])

    def __neg__(self) -> "Tangent[N]":
        return self._with([-delta for delta in self.deltas])

    def inner(self, other: "Tangent[N]") -> Tensor:
        """`<self, other> = sum_v <delta_v, eta_v>`, conjugate-linear in the first; O(number of parameters).

        Half precision is summed in float32.
        """
        dtype = accumulate_dtype(self.at.net.dtype)
        pairs = zip(self.deltas, self._matching(other), strict=True)
        return torch.stack([torch.vdot(a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)) for a, b in pairs]).sum()

    def norm(self) -> Tensor:
        """Norm of the tangent vector, which is that of its dense tensor; of half precision in float32."""
        dtype = accumulate_dtype(self.at.net.dtype)
        norms = [torch.linalg.vector_norm(delta.to(dtype)) for delta in self.deltas]
        return torch.linalg.vector_norm(torch.stack(norms))

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
        rest = e - u @ (u.mH @ e)
        # once more where little is left of a gradient nearly in the span: it is not orthogonal to it otherwise
        if twice and not bool(torch.linalg.vector_norm(rest) > 0.1 * torch.linalg.vector_norm(e)):
            rest = rest - u @ (u.mH @ rest)
        deltas[edge.child] = unflatten(rest, deltas[edge.child].shape, axis)
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
            tangent vector at another point; converted to the dtype of the point.

    Returns:
        The tangent vector at the point.

    Raises:
        TypeError: a z that is none of these.
        ValueError: shapes that differ from the point's; a complex z at a real point.

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


def _check_real(dtype: torch.dtype, at: Gauges[Any]) -> None:
    """A complex z has a part that a real point cannot follow: to drop it is for the caller to say."""
    if dtype.is_complex and not at.net.dtype.is_complex:
        raise ValueError(
            f"project: a complex z needs a complex point, got z of {dtype} and a point of {at.net.dtype}; "
            f"use point.to({torch.promote_types(at.net.dtype, torch.complex64)}), or the real part of z"
        )


@singledispatch
def _gradients(z: Any, at: Gauges[Any]) -> list[Tensor]:
    raise TypeError(
        f"project: z must be a dense tensor, a Network or a Tangent, got {type(z).__name__}; "
        "see riemannian_gradient(point, loss) for a function"
    )


@_gradients.register
def _(z: Tensor, at: Gauges[Any]) -> list[Tensor]:
    """Two sweeps of contractions of a dense z: down with what lies above, where all subtrees but one are compressed."""
    net = at.net
    shape, matrix = net.shape, (prod(net.row_modes), prod(net.col_modes))
    if tuple(z.shape) not in (shape, matrix):
        raise ValueError(f"project: z must have the shape of the point, expected {shape}, got {tuple(z.shape)}")
    _check_real(z.dtype, at)
    below = at.below
    found: list[Tensor | None] = [None] * len(net.cores)

    def compress(x: Tensor, labels: Labels, v: int) -> tuple[Tensor, Labels]:
        """Contract the subtree of v away: its outside axes become the one of the bond above it."""
        for edge in below[v]:
            x, labels = compress(x, labels, edge.child)
        return contract_common(x, labels, at.up[v].conj(), net.legs[v])

    def descend(x: Tensor, labels: Labels, v: int) -> None:
        """`x` carries the bond above v (in the basis V) and the outside axes of the subtree of v."""
        children = [edge.child for edge in below[v]]
        for child, (partial, rest) in all_but_one(x, labels, children, compress):
            if child is None:
                found[v] = partial.permute([rest.index(label) for label in net.legs[v]])
            else:
                descend(*contract_common(partial, rest, _given(at.down[child]).conj(), net.legs[v]), child)

    descend(z.reshape(shape).to(net.dtype), net.outside, at.root)
    return [_given(core).contiguous() for core in found]


@_gradients.register
def _(z: Network, at: Gauges[Any]) -> list[Tensor]:
    net = at.net
    if z.shape != net.shape or len(z.rows) != len(net.rows):
        raise ValueError(f"project: z must have the modes of the point, expected {net!r}, got {z!r}")
    _check_real(z.dtype, at)
    z = z.to(net.dtype)
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
    net = at.net
    sizes = {label: net.sizes[label] for label in net.outside}
    if (z.legs, z.rows, z.cols, z.sizes) != (net.legs, net.rows, net.cols, sizes):
        # equal legs do not say which of their labels are rows, nor how large they are
        return _gradients(Network(tuple(z.to_cores()), z.legs, z.rows, z.cols), at)
    _check_real(z.blocks[0][0].core.dtype, at)
    return _block_gradients(z.to(net.dtype), at)


@_gradients.register
def _(z: Tangent, at: Gauges[Any]) -> list[Tensor]:
    return _gradients(z.blocks(), at)


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
