"""Checks for users: does a format have the geometry, does a loss have the gradient and the Hessian that it claims.

Taylor remainders along a retraction must fall with the step as theory says; the slopes are printed and drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompositions.formats.algebra import norm, scale, to_dense
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Network
from decompositions.geometry.derivatives import hessian_vector_product, riemannian_gradient
from decompositions.geometry.gauges import gauges
from decompositions.geometry.tangent import Tangent, project, retract, transport


@dataclass(frozen=True)
class Check:
    """One check: a number and what it may be at most, or Taylor remainders and what their slope is at least.

    Args:
        name: what is checked.
        value: the defect, or the observed slope.
        limit: largest defect allowed, or smallest slope.
        steps: step sizes of the remainders; empty for a defect.
        remainders: one a step.
    """

    name: str
    value: float
    limit: float
    steps: tuple[float, ...] = ()
    remainders: tuple[float, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the number is within its limit."""
        return self.value >= self.limit if self.steps else self.value <= self.limit

    def __str__(self) -> str:
        kind = (
            f"slope {self.value:.2f} (at least {self.limit:g})"
            if self.steps
            else f"{self.value:.1e} (at most {self.limit:g})"
        )
        return f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {kind}"


@dataclass(frozen=True)
class Checks:
    """Results of `check_geometry` or `check_gradient`; `print` them, or look at `figure()`."""

    title: str
    rows: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(row.passed for row in self.rows)

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


STEPS = tuple(10 ** (-0.5 * k) for k in range(2, 11))


def taylor(name: str, remainder: Callable[[float], float], expected: float, floor: float) -> Check:
    """Slope of remainders by a line through those that rounding has not reached.

    Args:
        name: of the check.
        remainder: step -> number that should vanish like `step ** expected`.
        expected: order by theory; 0.2 less is let pass.
        floor: size of rounding errors.
    """
    values = [abs(remainder(t)) for t in STEPS]
    points = [(log(t), log(v)) for t, v in zip(STEPS, values, strict=True) if v > 30 * floor]
    points = points[-5:] if len(points) > 5 else points  # the smallest steps that still tell something
    if len(points) < 2:
        slope = float("inf") if values[0] <= 30 * floor else 0.0  # zero to rounding from the start
    else:
        x, y = (torch.tensor(side, dtype=torch.float64) for side in zip(*points, strict=True))
        x = x - x.mean()
        slope = float((x * y).sum() / x.square().sum())
    return Check(name, slope, expected - 0.2, STEPS, tuple(values))


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

    Args:
        loss: function Network -> real number that autograd can differentiate.
        network: the point, a tree; float64 tells most.
        gradient: your own Riemannian gradient to be checked, at `gauges(network)`; by default ours.
        hessian: check `hessian_vector_product` too.
        generator: source of the direction.
        figure: file for the figure.

    Example:
        >>> import torch
        >>> from decompositions import TT, inner
        >>> from decompositions.geometry import check_gradient
        >>> net = TT.random(row_modes=(3, 4, 3), rank=2, dtype=torch.float64, std=0.1)
        >>> check_gradient(lambda w: inner(w, w) / 2, net).passed
        True
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    at = gauges(network.detach()) if gradient is None else gradient.at
    deltas = [torch.randn(core.shape, dtype=core.dtype, generator=generator).to(core.device) for core in at.center]
    xi = project(at, Tangent(at, tuple(deltas)).blocks())
    xi = xi * (float(norm(network.detach())) / max(float(xi.norm()), 1e-300))
    g = riemannian_gradient(at, loss) if gradient is None else gradient
    with torch.no_grad():
        start = float(loss(network.detach()))
    first = float(g.inner(xi).real)

    def value(t: float) -> float:
        with torch.no_grad():
            return float(loss(retract(xi, t)))

    eps = torch.finfo(network.dtype).eps
    floor = eps * max(abs(start), abs(first), 1e-300)
    rows = [taylor("gradient: f(R(t xi)) - f - t <g, xi>", lambda t: value(t) - start - t * first, 2, floor)]
    if hessian:
        second = float(hessian_vector_product(at, loss, xi).inner(xi).real)
        rows.append(
            taylor(
                "Hessian: f(R(t xi)) - f - t <g, xi> - t^2 <H xi, xi> / 2",
                lambda t: value(t) - start - t * first - t * t * second / 2,
                3,
                floor,
            )
        )
    return _finish(f"gradient at {network!r}", rows, figure)


def _finish(title: str, rows: Sequence[Check], figure: str | Path | None) -> Checks:
    found = Checks(title, tuple(rows))
    if figure is not None:
        found.figure(figure)
    return found
