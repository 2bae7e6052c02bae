"""Alternating least squares for any network: each core in turn is the best one for the others."""

from collections.abc import Callable, Sequence
from math import inf, prod, sqrt
from numbers import Integral
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.algebra import to_dense
from decompositions.formats.network import Labels, Network
from decompositions.formats.plan import plan_path, run
from decompositions.linalg import (
    accumulate_dtype,
    check_finite,
    check_kind,
    check_tol,
    full_precision,
    relative_error,
    warn_truncation,
)

N = TypeVar("N", bound=Network)

_CUTOFF = 1e-13
"""Eigenvalues of normal equations below this part of the largest are directions that no data determines."""


class Fit(NamedTuple):
    """How an iterative decomposition ended.

    Args:
        error: relative Frobenius error of the result, measured in double precision.
        converged: whether the last sweep lowered the error by less than `improvement`, or `tol` was reached.
        errors: relative error after each sweep of the best start (those of `cp_als` resolve 1e-8).
        starts: final error of every start, inf where it left the finite numbers.
    """

    error: float
    converged: bool
    errors: tuple[float, ...]
    starts: tuple[float, ...]


@full_precision
def als(
    x: Inexact[Tensor, "..."],
    start: N,
    tol: float | None = None,
    *,
    max_sweeps: int = 100,
    improvement: int | float = 1e-8,
    progress: Callable[[int, float], None] | None = None,
    with_fit: bool = False,
) -> N | tuple[N, Fit]:
    """Refine a network, of any format, toward a dense tensor: `X ≈ W(cores)`, core after core by least squares.

    The error never grows (beyond 1e-8 `‖X‖`, the precision of normal equations in float64), so that a start with a
    guarantee keeps it. It converges to a stationary point, which need not be the best network of these ranks.
    Cost: d contractions of x with the network a sweep, and an eigenvalue problem for each core, of the product of its
    bond sizes.

    Args:
        x: the dense tensor, of the network's shape.
        start: the first network; its ranks stay.
        tol: relative Frobenius error at which to stop.
        max_sweeps: upper bound on the number of sweeps.
        improvement: stop when a sweep lowers the relative error by less.
        progress: called as (sweeps done, relative error) after each sweep.
        with_fit: return `(network, Fit)`.

    Returns:
        A network like `start`, in the dtype of x; no gauge.

    Raises:
        ValueError: shapes that differ, NaN or infinity, counts that make no sense.
        TypeError: a start that is no network; a complex x with a real start.

    References:
        J. Carroll, J. Chang, Psychometrika 1970, for CP; S. Holtz, T. Rohwedder, R. Schneider, SIAM J. Sci. Comput.
        2012, for chains.

    Example:
        >>> import torch
        >>> from decompositions import TT, to_dense
        >>> x = to_dense(TT.random(row_modes=(4, 5, 6), rank=2, dtype=torch.float64))
        >>> start = TT.random(row_modes=(4, 5, 6), rank=2, dtype=torch.float64)
        >>> net, fit = als(x, start, max_sweeps=500, with_fit=True)
        >>> net.ranks, fit.error < 1e-7
        ((2, 2), True)
    """
    check_kind("als", x)
    if not isinstance(start, Network):
        raise TypeError(f"als: start must be a Network, got {type(start).__name__}; Format.random makes one")
    if tuple(x.shape) != start.shape:
        raise ValueError(f"als: x must have the shape of the network, expected {start.shape}, got {tuple(x.shape)}")
    if x.is_complex() and not start.dtype.is_complex:
        raise TypeError(f"als: a complex x needs a complex start, got {start.dtype}; use start.to(torch.complex128)")
    check_tol("als", tol)
    check_sweeps("als", max_sweeps, improvement)
    fitted, errors, converged = sweeps(Target("als", x), start, tol, max_sweeps, improvement, progress)
    return finish("als", fitted, x, tol, Fit(0.0, converged, tuple(errors), (errors[-1],)), with_fit)


def check_sweeps(name: str, max_sweeps: int, improvement: int | float, restarts: int = 0) -> None:
    """Refuse counts and a threshold that make no sense."""
    for key, value, least in (("restarts", restarts, 0), ("max_sweeps", max_sweeps, 1)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: {key} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: {key} must be at least {least}, got {value}")
    if not 0 <= improvement < inf:
        raise ValueError(f"{name}: improvement must be a finite number >= 0, got {improvement!r}")


class Target:
    """A tensor in double precision with its norm taken out."""

    def __init__(self, name: str, x: Tensor) -> None:
        largest = check_finite(name, x)
        double = torch.promote_types(x.dtype, torch.float64)
        scaled = x.detach().to(double) / (largest or 1.0)
        norm = float(torch.linalg.vector_norm(scaled))
        self.unit = scaled / (norm or 1.0)
        self.norm = norm * (largest or 1.0)


def sweeps(
    target: Target,
    start: N,
    tol: float | None,
    max_sweeps: int,
    improvement: int | float,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[N, list[float], bool]:
    """Sweeps from one start: the network in double precision, its error after each sweep, whether it converged."""
    cores = [core.detach().to(target.unit.dtype) for core in start.cores]
    if target.norm == 0:
        return start.replace([torch.zeros_like(core) for core in cores]), [0.0], True
    # the cores of the start stand for a tensor of any size: the first update of each makes up for it
    cores = [core / (float(core.abs().max()) or 1.0) for core in cores]
    errors: list[float] = []
    for done in range(1, max_sweeps + 1):
        explained = 0.0
        for k in range(len(cores)):
            cores[k], explained = _best_core(target.unit, start, cores, k)
            size = float(torch.linalg.vector_norm(cores[k]))
            if k + 1 < len(cores) and size > 0:
                cores[k] = cores[k] / size  # the last core carries the norm
        missing = 1.0 - explained
        if missing < 1e-10:  # a difference of ones: what is left has to be looked at itself
            missing = float((target.unit - to_dense(start.replace(cores))).abs().square().sum())
        errors.append(sqrt(missing))
        if progress is not None:
            progress(done, errors[-1])
        if tol is not None and errors[-1] <= tol:
            return _scaled(start, cores, target.norm), errors, True
        if len(errors) > 1 and errors[-2] - errors[-1] < improvement:
            return _scaled(start, cores, target.norm), errors, True
    return _scaled(start, cores, target.norm), errors, False


def _best_core(x: Tensor, net: Network, cores: Sequence[Tensor], k: int) -> tuple[Tensor, float]:
    """The core that minimizes `‖X - W‖` for the others, and `‖W‖^2` then (what it explains of `‖X‖^2`).

    Labels of the core: its bonds are the unknowns of one system; outside labels that other cores carry too
    (hyper-edges) number independent systems; outside labels of its own number right-hand sides.
    """
    others = [j for j in range(len(cores)) if j != k]
    outside, leg = set(net.outside), net.legs[k]
    elsewhere = {label for j in others for label in net.legs[j]}
    bonds = [label for label in leg if label not in outside]
    systems = [label for label in leg if label in outside and label in elsewhere]
    own = [label for label in leg if label in outside and label not in elsewhere]
    mark = "*" * (1 + max(len(label) - len(label.lstrip("*")) for label in net.sizes))  # no label begins with as many
    twin = {label: label if label in outside else mark + label for label in net.sizes}
    sizes = {**net.sizes, **{twin[label]: size for label, size in net.sizes.items()}}
    plain = [net.legs[j] for j in others]
    double: list[Labels] = [tuple(twin[label] for label in labels) for labels in plain]
    conjugates = [cores[j].conj() for j in others]
    made = [cores[j] for j in others]

    def contract(inputs: list[Labels], operands: list[Tensor], output: list[str]) -> Tensor:
        return run(plan_path(inputs, sizes, tuple(output), x.dtype.itemsize).steps, operands)

    right = contract([net.outside, *plain], [x, *conjugates], [*systems, *bonds, *own])
    shape = [sizes[label] for label in (*systems, *bonds, *own)]
    unknowns = prod(sizes[label] for label in bonds)
    flat = right.reshape(*shape[: len(systems)], unknowns, -1)
    if others:
        output = [*systems, *bonds, *(twin[label] for label in bonds)]
        gram = contract([*plain, *double], [*conjugates, *made], output)
        values, vectors = torch.linalg.eigh(gram.reshape(*shape[: len(systems)], unknowns, unknowns))
        kept = values > _CUTOFF * values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        solved = vectors @ (inverse.unsqueeze(-1) * (vectors.mH @ flat))
    else:
        solved = flat
    explained = float((flat.conj() * solved).sum().real)
    labels = [*systems, *bonds, *own]
    return solved.reshape(shape).permute([labels.index(label) for label in leg]).contiguous(), explained


def _scaled(start: N, cores: Sequence[Tensor], norm: float) -> N:
    """Cores of equal norm that stand for `norm` times the tensor."""
    sizes = [float(torch.linalg.vector_norm(core)) for core in cores]
    if min(sizes) == 0:
        return start.replace([torch.zeros_like(core) for core in cores])
    each = prod(size ** (1 / len(cores)) for size in (*sizes, norm))
    return start.replace([core * (each / size) for core, size in zip(cores, sizes, strict=True)])


def finish(name: str, net: N, x: Tensor, tol: float | None, fit: Fit, with_fit: bool) -> N | tuple[N, Fit]:
    """Cast back, measure, warn where the tolerance was missed."""
    made: N = net.replace([core.to(accumulate_dtype(x.dtype)).to(x.dtype) for core in net.cores])
    if not all(bool(torch.isfinite(core).all()) for core in made.cores):
        raise ValueError(f"{name}: the cores do not fit {x.dtype}; decompose x.to(torch.float32)")
    double = torch.promote_types(x.dtype, torch.float64)
    error = relative_error(to_dense(made.to(double)), x.detach())
    if tol is not None and error > tol:
        reason = "ranks or starts do not suffice" if fit.converged else "max_sweeps binds"
        warn_truncation(name, error, tol, reason)
    return (made, fit._replace(error=error)) if with_fit else made
