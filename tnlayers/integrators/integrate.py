"""`integrate`: an ODE of matrices or tensors, solved on networks of low rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from decompositions import Network, norm
from decompositions.formats.network import tree_edges
from decompositions.linalg import warn_truncation
from tnlayers.integrators.fields import DenseField, Field
from tnlayers.integrators.schemes import FIXED, ORDERS, SCHEMES
from tnlayers.integrators.steps import SUBSTEPS, Stepper, Truncate

Event = Callable[[float, Network], bool]


@dataclass(frozen=True)
class Solution:
    """What `integrate` returns.

    Args:
        network: Y at the last time.
        times: of the accepted steps, the start first.
        ranks: of every bond at these times.
        errors: estimated local errors of the steps, absolute; empty for fixed steps.
        stopped: whether an event ended the run before its time.
        rejected: steps that were tried and repeated with a smaller size.
    """

    network: Network
    times: tuple[float, ...]
    ranks: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...] = ()
    stopped: bool = False
    rejected: int = 0
    networks: tuple[Network, ...] = field(default=(), repr=False)


def default_root(net: Network) -> int:
    """The middle of the tree: the core from which the farthest one is nearest (of equals the first without own axes).

    Example:
        >>> from decompositions import TT, LowRank
        >>> from tnlayers.integrators.integrate import default_root
        >>> default_root(LowRank.random(row_modes=(5,), col_modes=(4,), rank=2))
        1
    """
    outside = set(net.outside)

    def height(root: int) -> int:
        depth = {root: 0}
        for edge in tree_edges(net.legs, net.rows, net.cols, root):
            depth[edge.child] = depth[edge.parent] + 1
        return max(depth.values())

    return min(range(len(net.cores)), key=lambda k: (height(k), bool(outside & set(net.legs[k])), k))


def integrate(
    field: Field | Callable[[float, Tensor], Tensor],
    y0: Network,
    t_span: tuple[float, float],
    steps: int,
    *,
    method: str = "augmented",
    substep: str = "rk4",
    tol: float | None = None,
    theta: float | None = None,
    max_rank: int | None = None,
    root: int | None = None,
    adaptive: float | None = None,
    events: Sequence[Event] = (),
    keep: bool = False,
) -> Solution:
    """Solve `Y' = F(t, Y)` on trees of low rank: one family of schemes for LowRank, Tucker, TT, TT-matrix, any tree.

    | method | order | ranks | what is known |
    |---|---|---|---|
    | "splitting", "strang" | 1, 2 | fixed | exact where the solution has the rank; stiffness breaks its backward step |
    | "bug" | 1 | fixed | exact likewise; no backward step |
    | "augmented" | 1 | adaptive | the same, and norm, energy and descent up to the truncation |
    | "midpoint" | 2 | adaptive | |
    | "parallel" | 1 | adaptive | all cores at once; steps whose new directions see the field are repeated |
    | "parallel2" | 2 | adaptive | |
    | "corrected" | 1 | adaptive | splitting with augmented bases in place of the backward steps |

    Errors do not depend on small singular values. A matrix in LowRank rooted at its middle core gives the schemes as
    they are published for matrices.

    Args:
        field: a function (t, dense Y) -> dense F, or an object with `restrict` such as `OperatorField`, which never
            densifies.
        y0: the start, a tree.
        t_span: first and last time; the second may be the smaller one.
        steps: number of equal steps (the first guess of it, where `adaptive` is given).
        method: one of the table.
        substep: "rk4" or "euler" for the ODE of one core.
        tol: relative truncation error of a step, for the adaptive methods.
        theta: absolute truncation error of a step; with neither, adaptive methods keep the ranks of the start.
        max_rank: cap of every bond.
        root: core that the tree hangs from; the middle of the tree by default.
        adaptive: local error allowed in a step, relative to ‖Y‖; the step size follows the difference between the step
            and two half steps.
        events: functions (t, Y) -> bool, asked after every step; True ends the run.
        keep: return the network of every step in `networks`.

    Returns:
        A `Solution`.

    Raises:
        ValueError: not a tree, an unknown method, times or counts that make no sense, a tolerance given to a method of
            fixed ranks, a step that becomes not finite (say with which remedy).

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> from tnlayers.integrators import integrate
        >>> y0 = LowRank.random(row_modes=(6,), col_modes=(5,), rank=2, dtype=torch.float64)
        >>> done = integrate(lambda t, y: -y, y0, (0.0, 1.0), 10)
        >>> bool(torch.allclose(to_dense(done.network), to_dense(y0) * torch.tensor(-1.0).exp(), atol=1e-5))
        True
    """
    if not isinstance(y0, Network) or not y0.is_tree:
        raise ValueError(f"integrate: y0 must be a tree network, got {y0!r}")
    if method not in SCHEMES:
        raise ValueError(f"integrate: method must be one of {tuple(SCHEMES)}, got {method!r}")
    if substep not in SUBSTEPS:
        raise ValueError(f"integrate: substep must be one of {tuple(SUBSTEPS)}, got {substep!r}")
    t, end = map(float, t_span)
    if not (isfinite(t) and isfinite(end)) or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"integrate: expected finite times and at least one step, got t_span={t_span}, steps={steps!r}"
        )
    for name, value in (("tol", tol), ("theta", theta), ("adaptive", adaptive)):
        if value is not None and not (isfinite(value) and value >= 0):
            raise ValueError(f"integrate: {name} must be a number >= 0, got {value}")
    if adaptive == 0:
        raise ValueError("integrate: adaptive must be positive, got 0")
    if method in FIXED and (tol is not None or theta is not None or max_rank is not None):
        raise ValueError(
            f"integrate: method {method!r} keeps the ranks of y0, expected no tol, theta or max_rank; "
            "method='augmented' adapts them"
        )
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"integrate: max_rank must be an int >= 1, got {max_rank!r}")
    right: Field = field if hasattr(field, "restrict") else DenseField(field)  # type: ignore[assignment]
    root = default_root(y0) if root is None else root % len(y0.cores)
    free = tol is None and theta is None
    rank: Any = (y0.ranks if y0.ranks else None) if free and max_rank is None else max_rank
    stepper = Stepper(right, SUBSTEPS[substep], Truncate(tol, theta, rank), root)
    scheme = SCHEMES[method]
    h = (end - t) / steps
    net, times, ranks, errors, networks = y0.detach(), [t], [y0.ranks], [], [y0]
    stopped, rejected = False, 0
    with torch.no_grad():
        while abs(end - t) > 1e-12 * max(1.0, abs(end)):
            if adaptive is None:
                h_now = (end - t) / (steps - len(times) + 1)
                after = scheme(stepper, net, t, h_now)
            else:
                h_now = h if abs(h) < abs(end - t) else end - t
                whole = scheme(stepper, net, t, h_now)
                after = scheme(stepper, scheme(stepper, net, t, h_now / 2), t + h_now / 2, h_now / 2)
                error = _distance(whole, after) / (2 ** ORDERS[method] - 1)
                allowed = adaptive * max(float(norm(after)), 1e-300)
                factor = 0.9 * (allowed / max(error, 1e-300)) ** (1 / (ORDERS[method] + 1))
                h = h_now * min(4.0, max(0.2, factor))
                if error > allowed:
                    rejected += 1
                    if abs(h) < 1e-12 * max(1.0, abs(end)):
                        raise ValueError(
                            f"integrate: the step fell below rounding at t = {t:.6g}, got a local error of {error:.3g} "
                            f"where {allowed:.3g} is allowed; truncate less (tol, theta) or allow more"
                        )
                    continue
                errors.append(error)
            _check(after, method, t, h_now)
            t, net = t + h_now, after
            times.append(t)
            ranks.append(net.ranks)
            if keep:
                networks.append(net)
            if any(event(t, net) for event in events):
                stopped = abs(end - t) > 1e-12 * max(1.0, abs(end))
                break
    if stepper.truncate.bound:
        warn_truncation(
            f"integrate ({stepper.truncate.bound} of {len(times) - 1} steps, the worst)",
            stepper.truncate.worst,
            next(value for value in (theta, tol) if value is not None),
            f"max_rank={max_rank} binds",
        )
    return Solution(net, tuple(times), tuple(ranks), tuple(errors), stopped, rejected, tuple(networks) if keep else ())


def _distance(a: Network, b: Network) -> float:
    """`‖A - B‖` of two networks on the same tree, without cancellation."""
    from decompositions.formats.gauge import _distance

    return _distance(a, b)


def _check(net: Network, method: str, t: float, h: float) -> None:
    if all(bool(torch.isfinite(core).all()) for core in net.cores):
        return
    remedy = "method='augmented' has no backward step" if method in ("splitting", "strang") else "more steps"
    raise ValueError(f"integrate: Y is not finite after the step from t = {t:.6g} by {h:.3g}; try {remedy}")
