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
from tnlayers.integrators.steps import SUBSTEP_ORDERS, SUBSTEPS, NotFinite, Stepper, Truncate

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
        substep: "rk4" or "euler" for the ODE of one core; with "euler" every method is of order 1.
        tol: relative truncation error of a step, for the adaptive methods.
        theta: absolute truncation error of a step; with neither, adaptive methods keep the ranks of the start (and
            "parallel" repeats no step).
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
    if not all(bool(torch.isfinite(core).all()) for core in y0.cores):
        raise ValueError("integrate: y0 must be finite, got NaN or infinity in a core")
    for name, value, known in (("method", method, SCHEMES), ("substep", substep, SUBSTEPS)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"integrate: {name} must be one of {tuple(known)}, got {value!r}")
    start, end = _times(t_span, steps)
    for name, number in (("tol", tol), ("theta", theta), ("adaptive", adaptive)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not (isfinite(number) and number >= 0):
            raise ValueError(f"integrate: {name} must be a number >= 0, got {number!r}")
    if adaptive == 0:
        raise ValueError("integrate: adaptive must be positive, got 0")
    if method in FIXED and (tol is not None or theta is not None or max_rank is not None):
        raise ValueError(
            f"integrate: method {method!r} keeps the ranks of y0, expected no tol, theta or max_rank; "
            "method='augmented' adapts them"
        )
    if max_rank is not None and (isinstance(max_rank, bool) or not isinstance(max_rank, int) or max_rank < 1):
        raise ValueError(f"integrate: max_rank must be an int >= 1, got {max_rank!r}")
    if callable(events) or not all(callable(event) for event in events):
        raise ValueError(f"integrate: events must be a sequence of functions (t, Y) -> bool, got {events!r}")
    if root is None:
        root = default_root(y0)
    elif isinstance(root, bool) or not isinstance(root, int) or not -len(y0.cores) <= root < len(y0.cores):
        raise ValueError(f"integrate: root must name one of the {len(y0.cores)} cores, got {root!r}")
    right = _as_field(field)
    free = tol is None and theta is None
    rank: Any = (y0.ranks if y0.ranks else None) if free and max_rank is None else max_rank
    if free and max_rank is not None and y0.ranks:
        rank = tuple(min(r, max_rank) for r in y0.ranks)
    stepper = Stepper(right, SUBSTEPS[substep], Truncate(tol, theta, rank), root % len(y0.cores))
    run = _Run(stepper, method, substep, y0, start)
    with torch.no_grad():
        if adaptive is None:
            run.fixed(end, steps, events, keep)
        else:
            run.adapt(end, (end - start) / steps, adaptive, events, keep)
    if stepper.truncate.bound:
        warn_truncation(
            f"integrate ({stepper.truncate.bound} of {len(run.times) - 1} steps, the worst)",
            stepper.truncate.worst,
            next(value for value in (theta, tol) if value is not None),
            f"max_rank={max_rank} binds",
        )
    return Solution(
        run.net,
        tuple(run.times),
        tuple(run.ranks),
        tuple(run.errors),
        run.stopped,
        run.rejected,
        tuple(run.networks) if keep else (),
    )


def _times(t_span: tuple[float, float], steps: int) -> tuple[float, float]:
    try:
        start, end = map(float, t_span)
    except (TypeError, ValueError):
        raise ValueError(
            f"integrate: t_span must be two numbers, the first and the last time, got {t_span!r}"
        ) from None
    if not (isfinite(start) and isfinite(end)) or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"integrate: expected finite times and at least one step, got t_span={t_span}, steps={steps!r}"
        )
    return start, end


def _as_field(field: Any) -> Field:
    kind = isinstance(field, type | Network)
    if not kind and callable(getattr(field, "restrict", None)):
        right: Field = field
        return right
    if kind or not callable(field):
        raise TypeError(
            "integrate: field must be a function (t, dense Y) -> dense F, or an object with restrict(network, core) "
            f"such as OperatorField, got {field!r}"
        )
    return DenseField(field)


class _Run:
    """A solution in the making."""

    def __init__(self, stepper: Stepper, method: str, substep: str, y0: Network, start: float) -> None:
        self.stepper, self.scheme, self.method = stepper, SCHEMES[method], method
        self.order = min(ORDERS[method], SUBSTEP_ORDERS[substep])
        self.net: Network = y0.detach()
        if len(y0.cores) == 1:
            self.net = y0.replace([y0.cores[0].detach().clone()])  # what a user's function writes to is not y0
        self.times, self.ranks, self.networks = [start], [y0.ranks], [y0]
        self.errors: list[float] = []
        self.stopped, self.rejected = False, 0

    def accept(self, t: float, net: Network, events: Sequence[Event], keep: bool) -> bool:
        """Take a step; whether an event asks to stop."""
        self.net = net
        self.times.append(t)
        self.ranks.append(net.ranks)
        if keep:
            self.networks.append(net)
        answers = [event(t, net) for event in events]  # all are asked: they may record
        return any(answers)

    def fixed(self, end: float, steps: int, events: Sequence[Event], keep: bool) -> None:
        start = self.times[0]
        if start == end:
            return
        for k in range(steps):
            t = self.times[-1]
            after = end if k == steps - 1 else start + (k + 1) * (end - start) / steps
            net = self.scheme(self.stepper, self.net, t, after - t)
            _check(net, self.method, t, after - t)
            if self.accept(after, net, events, keep):
                self.stopped = k < steps - 1
                return

    def adapt(self, end: float, h: float, allowed: float, events: Sequence[Event], keep: bool) -> None:
        least = 1e-12 * abs(end - self.times[0])
        while self.times[-1] != end:
            t = self.times[-1]
            after = end if abs(end - t) <= abs(h) * (1 + 1e-9) else t + h
            now = after - t
            made, error = self._try(t, now)
            limit = allowed * max(float(norm(made)), 1e-300) if made is not None else 0.0
            if made is not None and error <= limit:
                self.errors.append(error)
                factor = 4.0 if error == 0 else min(4.0, max(1.0, 0.9 * (limit / error) ** (1 / (self.order + 1))))
                h = now * factor
                if self.accept(after, made, events, keep):
                    self.stopped = after != end
                    return
                continue
            self.rejected += 1
            h = now * (0.2 if made is None else min(0.9, max(0.2, 0.9 * (limit / error) ** (1 / (self.order + 1)))))
            if abs(h) < least or t + h == t:
                got = "a result that is not finite" if made is None else f"a local error of {error:.3g}"
                raise ValueError(
                    f"integrate: the step fell below rounding at t = {t:.6g}, got {got} where {limit:.3g} is allowed; "
                    "truncate less (tol, theta) or allow more"
                )

    def _try(self, t: float, h: float) -> tuple[Network | None, float]:
        """Two half steps, and an estimate of their error; None where numbers left the range."""
        try:
            whole = self.scheme(self.stepper, self.net, t, h)
            half = self.scheme(self.stepper, self.net, t, h / 2)
            made = self.scheme(self.stepper, half, t + h / 2, h / 2)
        except NotFinite:
            return None, 0.0
        if not all(bool(torch.isfinite(core).all()) for net in (whole, made) for core in net.cores):
            return None, 0.0
        return made, _distance(whole, made) / (2**self.order - 1)


def _distance(a: Network, b: Network) -> float:
    """`‖A - B‖` of two networks on the same tree, without cancellation."""
    from decompositions.formats.gauge import _distance

    return _distance(a, b)


def _check(net: Network, method: str, t: float, h: float) -> None:
    if all(bool(torch.isfinite(core).all()) for core in net.cores):
        return
    remedy = "method='augmented' has no backward step" if method in ("splitting", "strang") else "more steps"
    raise ValueError(f"integrate: Y is not finite after the step from t = {t:.6g} by {h:.3g}; try {remedy}")
