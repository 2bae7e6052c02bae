"""One step of every scheme, for any tree: written on cores, gauges and restricted fields alone.

Names: U_v is core v as an isometry toward its parent, V_v everything above it, C_v the center core; a hat marks an
augmented basis. The matrix schemes are the case of LowRank rooted at its middle core.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompositions import Network, norm
from decompositions.formats.gauge import cut
from decompositions.formats.network import TreeEdge, tree_edges
from decompositions.geometry import Gauges
from decompositions.linalg import accumulate_dtype
from tnlayers.integrators.fields import CoreField, Field

Substep = Callable[[CoreField, Tensor, float, float], Tensor]


def euler(f: CoreField, y: Tensor, t: float, h: float) -> Tensor:
    """Explicit Euler, order 1."""
    return y + h * f(t, y)


def rk4(f: CoreField, y: Tensor, t: float, h: float) -> Tensor:
    """The classical Runge-Kutta scheme, order 4."""
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


SUBSTEPS: dict[str, Substep] = {"euler": euler, "rk4": rk4}
SUBSTEP_ORDERS = {"euler": 1, "rk4": 4}


class NotFinite(ValueError):
    """A step left the range of its dtype."""


@dataclass
class Truncate:
    """How a step ends: by a relative tolerance, an absolute one, ranks, or a mixture.

    Args:
        tol: relative error.
        theta: absolute error.
        rank: cap, or one entry a bond.
        bound: in how many steps the cap was binding, so far.
        worst: largest relative error of these.
    """

    tol: float | None
    theta: float | None
    rank: Any
    bound: int = 0
    worst: float = 0.0

    def __call__(self, net: Network, root: int, *, gauged: bool = False) -> Network:
        """The network cut to what is allowed; `gauged` where all cores are known to be isometries toward the root."""
        tol = self.tol
        if self.theta is not None:
            size = float(torch.linalg.vector_norm(net.cores[root])) if gauged else float(norm(net))
            relative = self.theta / size if size > 0 else 0.0
            tol = relative if tol is None else min(tol, relative)
        tol = None if tol == 0 else tol  # what is redundant is removed all the same
        try:
            result, error, bound = cut(net, self.rank, tol, center=root, gauged=gauged)
        except ValueError as error_found:  # a norm beyond the dtype's range: nothing else is refused here
            raise NotFinite(f"integrate: Y left the range of {net.dtype}; take more steps") from error_found
        if bound and tol is not None and error > tol:
            self.bound, self.worst = self.bound + 1, max(self.worst, error)
        return result

    def capped(self, size: int) -> bool:
        """Whether a bond of this size may not grow."""
        return isinstance(self.rank, int) and size >= self.rank

    def budget(self, net: Network) -> float:
        """What may be discarded, absolute."""
        size = float(norm(net))
        amounts = [a for a in (self.theta, None if self.tol is None else self.tol * size) if a is not None]
        return min(amounts, default=0.0)


@dataclass
class Stepper:
    """What all schemes share: the field, the sub-integrator, the truncation, the root."""

    field: Field
    substep: Substep
    truncate: Truncate
    root: int

    def evolve(self, net: Network, core: int, t: float, h: float, start: Tensor | None = None) -> Tensor:
        """Integrate the center core, the others fixed; `start` in place of the net's own.

        Raises:
            ValueError: the result is not finite.
        """
        done = self.substep(self.field.restrict(net, core), net.cores[core] if start is None else start, t, h)
        if not bool(torch.isfinite(done).all()):
            raise NotFinite(
                f"integrate: Y is not finite in the step from t = {t:.6g} by {h:.3g}; take more steps, or a method "
                "without a backward step (augmented, parallel) where F is stiff"
            )
        return done

    def edges(self, net: Network) -> tuple[TreeEdge, ...]:
        """Bonds from the root down."""
        return tree_edges(net.legs, net.rows, net.cols, self.root)


def children(at: Gauges[Any], core: int) -> list[tuple[int, int]]:
    """(axis, child) of the bonds below a core."""
    return [(at.axis(core, edge.bond), edge.child) for edge in at.below[core]]


def with_cores(net: Network, cores: Sequence[Tensor]) -> Network:
    """The network with other cores, unchecked: bonds may change their sizes."""
    return net._unchecked(cores, net.legs, net.rows, net.cols)


def bottom_up(at: Gauges[Any]) -> list[int]:
    """Cores but the root, children before parents."""
    return [edge.child for edge in reversed(at.edges)]


def subtree(at: Gauges[Any], core: int) -> set[int]:
    """A core and everything below it."""
    found = {core}
    for edge in at.edges:
        if edge.parent in found:
            found.add(edge.child)
    return found


def with_new_children(at: Gauges[Any], new: dict[int, Tensor], core: int, value: Tensor) -> Network:
    """The tree centered at `core` (which holds `value`): new bases below it, old ones everywhere else."""
    below = subtree(at, core) - {core}
    cores = [new[k] if k in below else c for k, c in enumerate(at.centered(core).cores)]
    cores[core] = value
    return with_cores(at.net, cores)


def pad(core: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind along an axis: the coordinates in an augmented basis that begins with the old one."""
    if core.shape[axis] == size:
        return core
    shape = list(core.shape)
    shape[axis] = size - core.shape[axis]
    return torch.cat([core, core.new_zeros(shape)], axis)


def complement(basis: Tensor, vectors: Tensor) -> Tensor:
    """Orthonormal columns that span what `vectors` add to the span of `basis` (n, r), at most n - r of them.

    What rounding leaves of vectors inside the span is no direction and is dropped.
    """
    half = vectors.dtype
    basis, vectors = basis.to(accumulate_dtype(half)), vectors.to(accumulate_dtype(half))
    rest = vectors - basis @ (basis.mH @ vectors)
    rest = rest - basis @ (basis.mH @ rest)
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    size = float(torch.linalg.vector_norm(vectors))
    keep = int((s > 10 * torch.finfo(s.dtype).eps * max(size, 1e-300)).sum())
    u = u[:, : min(keep, basis.shape[0] - basis.shape[1])]
    for _ in range(2):
        u = u - basis @ (basis.mH @ u)
        u = torch.linalg.qr(u).Q
    return u.to(half)


def given(core: Tensor | None) -> Tensor:
    """A core that is known to exist."""
    assert core is not None
    return core
