"""Tucker tensors in which several modes have one factor: tangent space, projection, transport, retraction.

    X = W x_1 F_1 ... x_d F_d,    F_k = U_g for every mode k of group g

(a knowledge graph: X[relation, head, tail] with one entity table). At orthonormal U_g, with the unfoldings of W along
the modes of a group side by side, `[W_(k) for k in g] = S_g [V_k for k in g]` and orthonormal rows of the latter,

    xi = (delta, U_1, .., U_G) + sum over g, over k in g of (V_k, K_g in mode k, U elsewhere),    U_g^T K_g = 0,

and `<xi, eta> = <delta, delta'> + sum_g <K_g, K_g'>`: terms that differ in the mode where K_g stands are orthogonal by
the gauge. So (delta, K_1, .., K_G) are coordinates in an orthonormal basis; S_g, which may be singular, is not inverted
(the change of U_g is K_g S_g^-1). With groups of one mode each this is the geometry of Tucker tensors.

References:
    I. Peshekhonov, A. Arzhantsev, M. Rakhuba, Training a Tucker model with shared factors: a Riemannian optimization
    approach, AISTATS 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod

import torch
from jaxtyping import Float
from torch import Tensor

from decompositions.geometry.blocks import along, flatten, normal_basis, unflatten
from decompositions.linalg import check_tol, full_precision, positive_qr, safe_svd, truncation_rank
from decompositions.lockstep import alone

Chooser = Callable[[int, Tensor, float], int]
"""(group, squared singular values of its unfoldings side by side, norm of the tensor) -> rank."""


@dataclass(frozen=True, eq=False, repr=False)
class SharedGauges:
    """A Tucker tensor with shared factors, orthonormal, and the bases of its tangent space; see the module.

    Args:
        core: W (r_1, ..., r_d).
        factors: U_g (n_g, r_g), one a group, orthonormal columns.
        groups: modes of every group; together all modes, each once.
        rest: V_k, one a mode: W with another axis k, of the size v_g <= r_g that the unfoldings allow.
        links: S_g (r_g, v_g).

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> at.owner, at.shapes, bool(torch.allclose(at.factors[1].mT @ at.factors[1], torch.eye(3), atol=1e-5))
        ((0, 1, 1), ((2, 3, 3), (5, 2), (7, 3)), True)
    """

    core: Tensor
    factors: tuple[Tensor, ...]
    groups: tuple[tuple[int, ...], ...]
    rest: tuple[Tensor, ...]
    links: tuple[Tensor, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """r_g of every group."""
        return tuple(factor.shape[1] for factor in self.factors)

    @property
    def root(self) -> int:
        """Which delta has the point itself as a value, as of `Gauges`: the core's."""
        return 0

    @property
    def center(self) -> tuple[Tensor, ...]:
        """That value."""
        return (self.core,)

    @property
    def owner(self) -> tuple[int, ...]:
        """Group of every mode."""
        found = {k: g for g, modes in enumerate(self.groups) for k in modes}
        return tuple(found[k] for k in range(len(found)))

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the deltas of a tangent vector."""
        widths = zip(self.factors, self.links, strict=True)
        return (tuple(self.core.shape), *((len(u), link.shape[1]) for u, link in widths))

    def map(self, fn: Callable[[Tensor], Tensor]) -> "SharedGauges":
        """The same with a function of every tensor: another dtype or device."""
        factors, rest, links = (tuple(map(fn, own)) for own in (self.factors, self.rest, self.links))
        return SharedGauges(fn(self.core), factors, self.groups, rest, links)

    def to_dense(self) -> Tensor:
        """X."""
        return _multiplied(self.core, [self.factors[g] for g in self.owner])

    def __repr__(self) -> str:
        return f"SharedGauges(groups={self.groups}, ranks={self.ranks})"


@full_precision
def shared_gauges(
    core: Float[Tensor, "..."],
    factors: Sequence[Float[Tensor, "_n _r"]],
    groups: Sequence[Sequence[int]],
    *,
    gauged: bool = False,
) -> SharedGauges:
    """Orthonormalize a Tucker tensor with shared factors; X stays, ranks that it cannot have are dropped.

    Cost: a QR of every factor, and of the core's unfoldings.

    Args:
        core: (r_1, ..., r_d), real.
        factors: one (n_g, r_g) a group.
        groups: modes of every group.
        gauged: whether the factors are known to be orthonormal and the ranks to be possible.

    Raises:
        TypeError: complex tensors.
        ValueError: groups that are no partition of the modes, factors that do not fit the core.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> at.ranks, at.to_dense().shape
        ((2, 3), torch.Size([5, 7, 7]))
    """
    modes = tuple(tuple(own) for own in groups)
    _check(core, factors, modes)
    if not gauged:
        bases, core = list(factors), core
        for g, own in enumerate(modes):
            bases[g], r = positive_qr(factors[g])
            for k in own:
                core = along(core, k, r)
        core, factors = _feasible(core, bases, modes)
    rest: dict[int, Tensor] = {}
    links = []
    for own in modes:
        rows = [flatten(core, k) for k in own]
        q, r = positive_qr(torch.cat(rows))
        links.append(r.mT)
        for k, part in zip(own, q.split([len(row) for row in rows]), strict=True):
            rest[k] = unflatten(part, core.shape, k)
    return SharedGauges(core, tuple(factors), modes, tuple(rest[k] for k in range(core.ndim)), tuple(links))


def _check(core: Tensor, factors: Sequence[Tensor], groups: tuple[tuple[int, ...], ...]) -> None:
    if any(x.is_complex() for x in (core, *factors)):
        raise TypeError("shared_gauges: expected real tensors, got complex ones")
    if sorted(k for own in groups for k in own) != list(range(core.ndim)) or not all(groups):
        raise ValueError(
            f"shared_gauges: groups must hold each of the {core.ndim} modes once, got {groups}; "
            "for a relation and two entity modes [(0,), (1, 2)]"
        )
    have = [tuple(factor.shape[1:]) for factor in factors]
    want = [{(core.shape[k],) for k in own} for own in groups]
    if len(have) != len(want) or any({width} != sizes for width, sizes in zip(have, want, strict=True)):
        raise ValueError(
            f"shared_gauges: a factor (n_g, r_g) for every group, expected widths equal to the core's axes, core "
            f"{tuple(core.shape)} in groups {groups}, got factors {[tuple(f.shape) for f in factors]}"
        )


def possible_shared_ranks(
    ranks: Sequence[int], sizes: Sequence[int], groups: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Ranks lowered to what the others allow: `r_g <= min(n_g, sum over k in g of prod over j != k of r_j)`.

    The largest such ranks, found by lowering until all hold: integers only.

    Args:
        ranks: r_g of every group.
        sizes: n_g of every group.
        groups: modes of every group; together all modes, each once.

    Example:
        >>> possible_shared_ranks((9, 2), (20, 30), [(0,), (1, 2)])
        (4, 2)
    """
    found = [min(r, n) for r, n in zip(ranks, sizes, strict=True)]
    owner = {k: g for g, own in enumerate(groups) for k in own}
    changed = True
    while changed:
        changed = False
        for g, own in enumerate(groups):
            most = sum(prod(found[owner[j]] for j in owner if j != k) for k in own)
            if found[g] > most:
                found[g], changed = most, True
    return tuple(found)


def _feasible(
    core: Tensor, factors: Sequence[Tensor], groups: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, list[Tensor]]:
    """The same tensor at ranks that it can have."""
    ranks = [factor.shape[1] for factor in factors]
    allowed = possible_shared_ranks(ranks, [len(factor) for factor in factors], groups)
    if list(allowed) == ranks:
        return core, list(factors)
    return _cut(core, factors, groups, lambda g, squares, norm: allowed[g])


def _multiplied(core: Tensor, matrices: Sequence[Tensor], *skip: int) -> Tensor:
    """The core times a matrix along every mode, but for some."""
    for k, matrix in enumerate(matrices):
        if k not in skip:
            core = along(core, k, matrix)
    return core


def _cut(
    core: Tensor, factors: Sequence[Tensor], groups: tuple[tuple[int, ...], ...], choose: Chooser
) -> tuple[Tensor, list[Tensor]]:
    """HOSVD with shared factors: the leading left singular vectors of a group's unfoldings side by side."""
    norm = float(torch.linalg.vector_norm(core))
    turns = []
    for g, own in enumerate(groups):
        r = torch.linalg.qr(torch.cat([flatten(core, k) for k in own]), mode="r").R
        _, s, vh = safe_svd(r)
        if len(s) < factors[g].shape[1]:  # fewer rows than columns: the others are at singular value zero
            s = torch.cat([s, s.new_zeros(factors[g].shape[1] - len(s))])
            vh = torch.linalg.qr(vh.mT, mode="complete").Q.mT
        turns.append(vh[: choose(g, s.square(), norm)])
    for turn, own in zip(turns, groups, strict=True):
        for k in own:
            core = along(core, k, turn)
    return core, [factor @ turn.mT for factor, turn in zip(factors, turns, strict=True)]


@dataclass(frozen=True, eq=False, repr=False)
class SharedTangent:
    """A tangent vector: the core's delta and one K_g (n_g, v_g) a group, `U_g^T K_g = 0`.

    Args:
        at: the point.
        deltas: (delta, K_1, .., K_G), of the shapes `at.shapes`; that U_g^T K_g = 0 is not checked.

    Raises:
        ValueError: deltas of other shapes.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> xi = shared_project(at, torch.randn(5, 7, 7))
        >>> bool(torch.isclose(xi.norm(), xi.to_dense().norm()))
        True
    """

    at: SharedGauges
    deltas: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "deltas", tuple(self.deltas))
        got = tuple(tuple(delta.shape) for delta in self.deltas)
        if got != self.at.shapes:
            raise ValueError(
                f"SharedTangent: one delta for the core and each factor, expected {self.at.shapes}, got {got}"
            )

    def doubled(self, *, point: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Core (r_k + v_k along mode k) and factors [U_g, K_g] of xi, or of X + xi; differentiable in the deltas."""
        at = self.at
        delta, *turns = self.deltas
        core = delta.new_zeros([r + v.shape[k] for k, (r, v) in enumerate(zip(at.core.shape, at.rest, strict=True))])
        plain = [slice(0, r) for r in at.core.shape]
        core[tuple(plain)] += at.core + delta if point else delta
        for k, v in enumerate(at.rest):
            core[(*plain[:k], slice(at.core.shape[k], None), *plain[k + 1 :])] += v
        return core, [torch.cat([u, turn], 1) for u, turn in zip(at.factors, turns, strict=True)]

    def to_dense(self) -> Tensor:
        """The dense tensor xi."""
        core, factors = self.doubled()
        return _multiplied(core, [factors[g] for g in self.at.owner])

    def inner(self, other: "SharedTangent") -> Tensor:
        """`<self, other>`, that of the dense tensors, for two vectors at one point."""
        return torch.stack([torch.sum(a * b) for a, b in zip(self.deltas, other.deltas, strict=True)]).sum()

    def norm(self) -> Tensor:
        """That of the dense tensor."""
        return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(delta) for delta in self.deltas]))

    def __mul__(self, factor: int | float | Tensor) -> "SharedTangent":
        return SharedTangent(self.at, tuple(delta * factor for delta in self.deltas))

    __rmul__ = __mul__


def shared_gauge_fix(at: SharedGauges, gradients: Sequence[Tensor]) -> SharedTangent:
    """Remove the parts along U_g: gradients with respect to (delta, K_1, ..) become the projection of the gradient.

    `K_g = (I - U_g U_g^T) E_g`, twice, as what is left of a gradient nearly in the span is not orthogonal otherwise.
    Cost: 8 n_g r_g v_g FLOPs a group.

    Args:
        at: the point.
        gradients: (delta, E_1, .., E_G), of the shapes `at.shapes`.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> xi = shared_gauge_fix(at, [torch.randn(shape) for shape in at.shapes])
        >>> float((at.factors[1].mT @ xi.deltas[2]).norm()) < 1e-5
        True
    """
    core, *turns = gradients
    return SharedTangent(at, (core, *(_normal(u, turn) for u, turn in zip(at.factors, turns, strict=True))))


def _normal(u: Tensor, x: Tensor) -> Tensor:
    """X without its part along the orthonormal columns of u; twice, where little is left the first time."""
    for _ in range(2):
        x = x - u @ (u.mT @ x)
    return x


@full_precision
def shared_project(at: SharedGauges, z: Float[Tensor, "..."]) -> SharedTangent:
    """Orthogonal projection of a dense tensor onto the tangent space; a reference, as training never has it dense.

    `delta = z x_1 F_1^T ... x_d F_d^T`, and K_g from the sum over k in g of z times F_j^T along all j but k, times V_k.
    Cost: d + 1 products of z with the factors.

    Args:
        at: the point.
        z: (n_1, ..., n_d), the shape of X.

    Raises:
        ValueError: another shape than that of X.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> xi = shared_project(at, torch.randn(5, 7, 7))
        >>> bool(torch.allclose(shared_project(at, xi.to_dense()).to_dense(), xi.to_dense(), atol=1e-4))
        True
    """
    shape = tuple(len(at.factors[g]) for g in at.owner)
    if tuple(z.shape) != shape:
        raise ValueError(f"shared_project: z must have the shape of the point, expected {shape}, got {tuple(z.shape)}")
    bases = [at.factors[g].mT for g in at.owner]
    gradients = [_multiplied(z, bases)]
    for own in at.groups:
        parts = [flatten(_multiplied(z, bases, k), k).mT @ flatten(at.rest[k], k) for k in own]
        gradients.append(torch.stack(parts).sum(0))
    return shared_gauge_fix(at, gradients)


@full_precision
def shared_transport(at: SharedGauges, xi: SharedTangent, *, lost: bool = True) -> SharedTangent:
    """Vector transport by projection: the tangent vector at `at` closest to xi, which lives at another point.

    Without `lost` it omits what the new bases have lost of the old ones, times the deltas elsewhere, which a projection
    turns into K_g; it then differs from the projection by terms of the size of the move. An optimizer that scales small
    deltas up needs that (see `follow` in `retraction`).
    Cost: products of (n_g, r_g) with (r_g, r_g) matrices and of cores.

    Args:
        at: the new point; its ranks may differ from the old ones.
        xi: a tangent vector at the old one, of the same modes and groups.
        lost: see above.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> xi = shared_project(at, torch.randn(5, 7, 7))
        >>> bool(shared_transport(shared_retract(xi, 0.1), xi).norm() <= 1.001 * xi.norm())
        True
    """
    old, owner = xi.at, at.owner
    delta, *turns = xi.deltas
    kept = [new.mT @ u for new, u in zip(at.factors, old.factors, strict=True)]
    taken = [new.mT @ turn for new, turn in zip(at.factors, turns, strict=True)]
    keeping = [kept[g] for g in owner]

    def terms(*skip: int) -> Tensor:
        """Xi in the new bases, but along a mode that is skipped, where only the part in the old basis is taken."""
        made = _multiplied(delta, keeping, *skip)
        for k, g in enumerate(owner):
            if k not in skip:
                made = made + along(_multiplied(old.rest[k], keeping, k, *skip), k, taken[g])
        return made

    made = [terms()]
    for g, own in enumerate(at.groups):
        turned = [flatten(_multiplied(old.rest[k], keeping, k), k).mT @ flatten(at.rest[k], k) for k in own]
        change = turns[g] @ torch.stack(turned).sum(0)
        if lost:
            parts = [flatten(terms(k), k).mT @ flatten(at.rest[k], k) for k in own]
            change = change + old.factors[g] @ torch.stack(parts).sum(0)
        made.append(change)
    return shared_gauge_fix(at, made)


@full_precision
def shared_retract(
    xi: SharedTangent,
    step: int | float = 1.0,
    *,
    rank: int | Sequence[int] | None = None,
    tol: int | float | None = None,
) -> SharedGauges:
    """Back to the manifold: HOSVD of `X + step xi` with shared factors, whose core is doubled and never larger.

    The factor of a group is made of the leading left singular vectors of the unfoldings of its modes side by side. A
    second-order retraction at the ranks of the point; at other ranks, or by `tol`, the step of a scheme that adapts
    them (they may double), and `‖result - (X + step xi)‖ <= tol ‖X + step xi‖`.
    Cost: a QR of every K_g, and SVDs of unfoldings of the core of doubled ranks.

    Args:
        xi: the tangent vector.
        step: its factor.
        rank: at most these, one for all groups or one each; those of the point where there is no tolerance.
        tol: relative Frobenius error, split over the groups in quadrature.

    Raises:
        ValueError: a step that is not finite, ranks below 1, a tolerance that is none.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> shared_retract(shared_project(at, torch.randn(5, 7, 7)), -0.1).ranks
        (2, 3)
    """
    if not isfinite(step):
        raise ValueError(f"shared_retract: step must be finite, got {step}")
    check_tol("shared_retract", tol)
    count = len(xi.at.groups)
    caps = xi.at.ranks if rank is None and tol is None else rank
    caps = (caps,) * count if isinstance(caps, int) else caps
    if caps is not None and (len(caps) != count or min(caps) < 1):
        raise ValueError(f"shared_retract: a rank >= 1 for each of the {count} groups, got {rank!r}")

    def choose(g: int, squares: Tensor, norm: float) -> int:
        budget = -inf if tol is None else (tol * norm) ** 2 / count
        return truncation_rank(squares, budget, len(squares) if caps is None else min(len(squares), caps[g]))

    return retract_by(xi * step, choose)


def retract_by(xi: SharedTangent, choose: Chooser) -> SharedGauges:
    """`shared_retract` with step 1 at ranks that a function chooses, at most twice those of the point.

    Args:
        xi: the tangent vector.
        choose: see `Chooser`.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> retract_by(shared_project(at, torch.randn(5, 7, 7)), lambda group, squares, norm: len(squares) - 1).ranks
        (3, 5)
    """
    at = xi.at
    core, *turns = xi.deltas
    bases, added = [], []
    for u, turn in zip(at.factors, turns, strict=True):
        q = alone(normal_basis(u, turn))
        bases.append(torch.cat([u, q], 1))
        added.append(q.mT @ turn)
    moved = core.new_zeros([bases[g].shape[1] for g in at.owner])
    plain = [slice(0, r) for r in at.core.shape]
    moved[tuple(plain)] = at.core + core
    for k, g in enumerate(at.owner):
        beyond = (*plain[:k], slice(at.core.shape[k], None), *plain[k + 1 :])
        moved[beyond] = along(at.rest[k], k, added[g])
    return shared_cut(moved, bases, at.groups, choose)


def shared_cut(
    core: Tensor, factors: Sequence[Tensor], groups: tuple[tuple[int, ...], ...], choose: Chooser
) -> SharedGauges:
    """HOSVD with shared factors of a tensor whose factors are orthonormal, at ranks that a function chooses.

    The squared error is at most the sum, over the groups, of the squared singular values that are dropped.
    Cost: a QR and an SVD of the core's unfoldings of every group.

    Args:
        core: (r_1, ..., r_d).
        factors: one (n_g, r_g) a group, orthonormal columns.
        groups: modes of every group.
        choose: see `Chooser`.

    Example:
        >>> import torch
        >>> at = shared_gauges(torch.randn(2, 3, 3), [torch.randn(5, 2), torch.randn(7, 3)], [(0,), (1, 2)])
        >>> shared_cut(at.core, at.factors, at.groups, lambda group, squares, norm: 2).ranks
        (2, 2)
    """
    made, bases = _feasible(*_cut(core, factors, groups, choose), groups)
    return shared_gauges(made, bases, groups, gauged=True)
