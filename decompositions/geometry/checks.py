"""Checks for users: does a format have the geometry, does a loss have the gradient and the Hessian that it claims.

Taylor remainders along a retraction must fall with the step as theory says; the slopes are printed and drawn. Only
remainders above their own rounding errors have a say: where too few are, a check says that it cannot tell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, log10
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from decompositions.formats.algebra import norm, scale, to_dense
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Network
from decompositions.geometry.derivatives import check_full_rank, hessian_vector_product, riemannian_gradient
from decompositions.geometry.gauges import Gauges, gauges
from decompositions.geometry.retraction import retract
from decompositions.geometry.tangent import Tangent, project, transport
from decompositions.linalg import accumulate_dtype


@dataclass(frozen=True)
class Check:
    """One check: a number and what it may be at most, or Taylor remainders and what their slope is at least.

    Args:
        name: what is checked.
        value: the defect, or the observed slope (inf where all is rounding and should be, NaN where that hides it).
        limit: largest defect allowed, or smallest slope.
        steps: step sizes of the remainders; empty for a defect.
        remainders: one a step.
        floors: size of the rounding errors of each remainder.
    """

    name: str
    value: float
    limit: float
    steps: tuple[float, ...] = ()
    remainders: tuple[float, ...] = ()
    floors: tuple[float, ...] = ()

    @property
    def outcome(self) -> Literal["ok", "exact", "inconclusive", "failed"]:
        """What was found: "exact" is a remainder of zero to rounding, "inconclusive" one that rounding hides."""
        if not self.steps:
            return "ok" if self.value <= self.limit else "failed"
        if self.value != self.value:
            return "inconclusive"
        if self.value == float("inf"):
            return "exact"
        return "ok" if self.value >= self.limit else "failed"

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against it: the number is within its limit, or rounding hides it (see `outcome`)."""
        return self.outcome != "failed"

    def __str__(self) -> str:
        label = {"ok": "ok    ", "exact": "ok    ", "inconclusive": "unsure", "failed": "FAILED"}[self.outcome]
        kind = {
            "exact": "zero to rounding",
            "inconclusive": "rounding hides the slope; use double precision, or a larger loss",
        }.get(self.outcome, f"slope {self.value:.2f} (at least {self.limit:g})")
        return f"{label} {self.name}: {kind if self.steps else f'{self.value:.1e} (at most {self.limit:g})'}"


@dataclass(frozen=True)
class Checks:
    """Results of `check_geometry` or `check_gradient`; `print` them, or look at `figure()`."""

    title: str
    rows: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did: none failed."""
        return all(row.passed for row in self.rows)

    @property
    def conclusive(self) -> bool:
        """Whether every check could tell; in single precision a right slope may drown in rounding errors."""
        return all(row.outcome != "inconclusive" for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([self.title, *map(str, self.rows)])

    def figure(self, path: str | Path | None = None) -> Any:
        """Draw the Taylor remainders against the step, with lines of the slopes expected; also saved to `path`."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for row in self.rows:
            if not row.steps:
                continue
            (line,) = axes.loglog(
                row.steps, [max(r, 1e-18) for r in row.remainders], "o-", markersize=4, label=str(row)[7:]
            )
            expected = round(row.limit + 0.2)
            start = next((k for k, r in enumerate(row.remainders) if r > 0), 0)
            guide = [row.remainders[start] * (h / row.steps[start]) ** expected for h in row.steps]
            axes.loglog(row.steps, guide, "--", color=line.get_color(), linewidth=1, alpha=0.6)
        axes.set_xlabel("step t")
        axes.set_ylabel("remainder")
        axes.set_ylim(bottom=1e-17)
        axes.set_title(self.title, fontsize=10)
        axes.legend(fontsize=8, loc="upper left")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


STEPS = tuple(10 ** (-0.5 * k) for k in range(2, 17))


def taylor(
    name: str,
    remainder: Callable[[float], float],
    expected: float,
    floor: float | Callable[[float], float],
    term: float = float("inf"),
) -> Check:
    """Slope of remainders: the median over the smallest steps that rounding has not reached.

    The median, because a remainder whose leading terms cancel at one step has two slopes there that mean nothing.

    Args:
        name: of the check.
        remainder: step -> number that should vanish like `step ** expected`.
        expected: order by theory; 0.2 less is let pass.
        floor: size of rounding errors, or a function of the step.
        term: what was subtracted at the largest step. Remainders that are all rounding say that it is right only where
            one per cent of it would have been more than that, or where it is zero like them.
    """
    values = [abs(remainder(t)) for t in STEPS]
    floors = [floor(t) if callable(floor) else floor for t in STEPS]
    points = [(log10(t), log10(v)) for t, v, f in zip(STEPS, values, floors, strict=True) if isfinite(v) and v > 30 * f]
    if not points and all(map(isfinite, values)) and (term == 0 or 0.01 * abs(term) > 30 * floors[0]):
        slope = float("inf")
    elif len(points) < 4:
        slope = float("nan")
    else:
        slope = median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points[-6:]))
    return Check(name, slope, expected - 0.2, STEPS, tuple(values), tuple(floors))


def check_geometry(
    format: type[Network] | Network, *, generator: torch.Generator | None = None, figure: str | Path | None = None
) -> Checks:
    """Check the identities of the geometry on a network, or on a small random one of a format.

    The doubled tree is `W + xi`; the projection is idempotent, self-adjoint and the closest point; transport is
    projection; retraction is second order; everything against dense tensors in double precision.

    Args:
        format: a class with `random`, or a network (a small one: it is densified).
        generator: source of randomness.
        figure: file for the figure.

    Raises:
        ValueError: a network that is not a tree.

    Example:
        >>> from decompositions import TT
        >>> from decompositions.geometry import check_geometry
        >>> check_geometry(TT).passed
        True
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if isinstance(format, Network):
        net = format.to(torch.promote_types(format.dtype, torch.float64))
    else:
        rows, cols = format.operator_modes((4, 3), (3, 4))
        net = format.random(row_modes=rows, col_modes=cols, rank=2, dtype=torch.float64, generator=generator)  # type: ignore[attr-defined]
    net = round_network(net.detach())
    net = scale(net, 1 / max(float(norm(net)), 1e-300))
    at = gauges(net)
    dense = to_dense(net)

    def draw() -> Tensor:
        z = torch.randn(dense.shape, dtype=dense.dtype, generator=generator)
        return z / z.norm()

    y, z = draw(), draw()
    py, pz = project(at, y), project(at, z)
    flat = pz.to_dense()
    other = round_network(retract(pz, 0.3))
    moved = transport(other, pz)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.vdot(a.reshape(-1), b.reshape(-1))

    along_y = py.to_dense()
    defects = {
        "gauges represent W": to_dense(at.net) - dense,
        "doubled tree is W + xi": to_dense(pz.to_network(point=True)) - dense - flat,
        "projection is idempotent": project(at, flat).to_dense() - flat,
        "projection is self-adjoint": dot(along_y, z) - dot(y, flat),
        "closest point": dot(along_y, z - flat),
        "inner product of deltas": py.inner(pz) - dot(along_y, flat),
        "transport is projection": moved.to_dense() - project(moved.at, flat).to_dense(),
    }
    rows_found = [Check(name, float(torch.linalg.vector_norm(value)), 1e-12) for name, value in defects.items()]

    def off(t: float) -> float:
        return float((to_dense(retract(pz, t)) - dense - t * flat).norm())

    rows_found.append(taylor("retraction: R(t xi) - W - t xi", off, 2, 1e-15))

    def tangential(t: float) -> float:
        return float(project(at, to_dense(retract(pz, t)) - dense - t * flat).norm())

    rows_found.append(taylor("retraction, tangential part", tangential, 3, 1e-15))
    return _finish(f"geometry of {net!r}", rows_found, figure)


def check_gradient(
    loss: Callable[[Any], Tensor],
    network: Network,
    *,
    gradient: Tangent[Any] | None = None,
    hessian: bool = True,
    generator: torch.Generator | None = None,
    figure: str | Path | None = None,
) -> Checks:
    """Taylor slopes of a loss along the retraction: 2 with the Riemannian gradient, 3 with the Hessian.

    The Hessian is checked once more by the gradient, whose projection onto the point's tangent space moves by `t H xi`
    up to a remainder of slope 2: that sees all of `H xi`, and more of it before rounding does.

    Args:
        loss: function Network -> real number that autograd can differentiate.
        network: the point, a tree of full ranks; float64 tells most.
        gradient: your own Riemannian gradient to be checked, at `gauges(network)`; by default ours.
        hessian: check `hessian_vector_product` too.
        generator: source of the direction, half of which is that of the gradient.
        figure: file for the figure.

    Returns:
        A row for each remainder. A row fails where the slope speaks against it; where too few steps lie above
        rounding (often in single precision) it passes with the outcome "inconclusive", and `conclusive` is False.

    Raises:
        TypeError: a loss that is no function, a network that is none, or one in half precision.
        ValueError: a loss that does not return one real number, finite at the network, or not with autograd; a
            network of deficient rank, around which the manifold is not smooth.

    Example:
        >>> import torch
        >>> from decompositions import TT, inner
        >>> from decompositions.geometry import check_gradient
        >>> net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64, std=0.1)
        >>> found = check_gradient(lambda w: inner(w, w) / 2, net)
        >>> found.passed, found.conclusive
        (True, True)
    """
    if not isinstance(network, Network):
        raise TypeError(f"check_gradient: network must be a Network, got {type(network).__name__}")
    if not callable(loss):
        raise TypeError(f"check_gradient: loss must be a function of a network, got {type(loss).__name__}")
    if not isinstance(gradient, Tangent | None):
        raise TypeError(f"check_gradient: gradient must be a Tangent, got {type(gradient).__name__}; see project")
    if accumulate_dtype(network.dtype) != network.dtype:
        raise TypeError(
            f"check_gradient: expected single or double precision, got {network.dtype}, whose rounding hides every "
            "slope; use network.to(torch.float64)"
        )
    network = network.detach()

    def value(net: Network) -> float:
        with torch.no_grad():
            got = loss(net)
        if isinstance(got, Tensor) and got.numel() == 1 and not got.is_complex():
            return float(got)
        if isinstance(got, float | int):
            return float(got)
        shown = f"shape {tuple(got.shape)}, {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"check_gradient: the loss must return one real number, got {shown}")

    start = value(network)
    if not isfinite(start):
        raise ValueError(f"check_gradient: the loss must be finite at the network, got {start}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    at = gauges(network) if gradient is None else gradient.at
    check_full_rank("check_gradient", at)
    g = riemannian_gradient(at, loss) if gradient is None else gradient
    xi, size = _direction(at, g, generator), float(norm(network))
    first, slope = float(g.inner(xi).real), float(g.norm())
    second = bend = 0.0
    if hessian:
        h = hessian_vector_product(at, loss, xi)
        second, bend = float(h.inner(xi).real), float(h.norm())
    eps = torch.finfo(network.dtype).eps
    values = {t: value(retract(xi, t)) for t in STEPS}

    def floor(t: float) -> float:
        """Rounding of the terms of a remainder, and of the point R(t xi), where the gradient is about g + t H xi."""
        terms = (start, values[t], t * first, t * t * second, slope * size, t * bend * size)
        return eps * max(map(abs, terms))

    far = STEPS[0]
    rows = [
        taylor("gradient: f(R(t xi)) - f - t <g, xi>", lambda t: values[t] - start - t * first, 2, floor, far * first)
    ]
    if hessian:
        rows.append(
            taylor(
                "Hessian: f(R(t xi)) - f - t <g, xi> - t^2 <H xi, xi> / 2",
                lambda t: values[t] - start - t * first - t * t * second / 2,
                3,
                floor,
                far * far * second / 2,
            )
        )
        here = g if gradient is None else riemannian_gradient(at, loss)

        def turn(t: float) -> float:
            return float((transport(at, riemannian_gradient(retract(xi, t), loss)) - here - t * h).norm())

        # a gradient whose normal part is large moves with the tangent space, so that its rounding is measured
        noise = max(*(turn(k * eps) for k in (-2, 0, 2)), eps * max(slope, bend, abs(start) / (size or 1.0)))
        rows.append(taylor("Hessian: P grad f(R(t xi)) - g - t H xi", turn, 2, noise, far * bend))
    return _finish(f"gradient at {network!r}", rows, figure)


def _direction(at: Gauges[Any], g: Tangent[Any], generator: torch.Generator) -> Tangent[Any]:
    """Where to go: half at random, half along the gradient, so that no part of it is orthogonal by chance.

    As far as the manifold is about flat: its curvature is the inverse of the smallest singular value.
    """
    device = generator.device
    deltas = [torch.randn(c.shape, dtype=c.dtype, device=device, generator=generator).to(c.device) for c in at.center]
    xi = project(at, Tangent(at, tuple(deltas)).blocks())
    xi = xi / xi.norm()
    if float(g.norm()) > 0:
        xi = (xi if float(g.inner(xi).real) >= 0 else -xi) + g / g.norm()  # never opposite: the sum is not zero
        xi = xi / xi.norm()
    size = float(torch.linalg.vector_norm(at.center[at.root])) or 1.0
    smallest = min((float(torch.linalg.svdvals(link)[-1]) for link in at.links.values()), default=size)
    return xi * min(size, 3 * smallest)


def _finish(title: str, rows: Sequence[Check], figure: str | Path | None) -> Checks:
    found = Checks(title, tuple(rows))
    if figure is not None:
        found.figure(figure)
    return found
