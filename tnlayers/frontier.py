"""Error against size over several budgets: the points, the curve, the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tnlayers.figures import GRID, INK, LINES, MUTED, new_axes
from tnlayers.page import Cell, Column, compact, number, percent
from tnlayers.report_rows import json_entry, json_number, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FrontierPoint:
    """One budget of a curve of error against size.

    Args:
        keep: share of the parameters of the targeted layers' weights.
        params: parameters of the whole model.
        error: predicted relative error of the model's output.

    Raises:
        ValueError: a negative number, or a keep that is not finite.

    Example:
        >>> FrontierPoint(0.5, 1200, 0.1).params
        1200
    """

    keep: float
    params: int
    error: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.keep) and self.keep >= 0):
            raise ValueError(f"FrontierPoint: keep must be a share >= 0, got {self.keep}")
        if self.params < 0 or self.error < 0:
            raise ValueError(f"FrontierPoint: params and error must be >= 0, got {self.params} and {self.error}")


def point_to_dict(point: FrontierPoint) -> dict[str, Any]:
    """Plain dict of a point that JSON can hold.

    Example:
        >>> point_to_dict(FrontierPoint(0.5, 1200, 0.1))
        {'keep': 0.5, 'params': 1200, 'error': 0.1}
    """
    return {"keep": float(point.keep), "params": int(point.params), "error": plain(float(point.error))}


def point_from_dict(data: Any, position: int) -> FrontierPoint:
    """Inverse of `point_to_dict`.

    Raises:
        ValueError: entries that are missing or of the wrong type.

    Example:
        >>> point_from_dict({"keep": 0.5, "params": 1200, "error": "inf"}, 0).error
        inf
    """
    where = f"point ({position}) of the frontier"
    if not isinstance(data, Mapping):
        raise ValueError(f"Report.from_dict: {where} must be a dict, got {data!r}")
    keep, error = (json_number(data.get(name), f"{name} of {where}") for name in ("keep", "error"))
    return FrontierPoint(keep, json_entry(data, "params", int, where), error)


def frontier_figure(
    points: Sequence[FrontierPoint],
    dense: int,
    *,
    chosen: tuple[int, float] | None = None,
    measured: float | None = None,
    size: tuple[float, float] = (6.4, 4.0),
    dpi: int = 160,
) -> Figure:
    """Predicted error against parameters of the whole model, a point a budget, up to the dense model without error.

    Both axes are linear: the distance between two budgets is what they differ by.

    Args:
        points: one a budget, its keep written beside it; an error that is not finite is not drawn, and said.
        dense: parameters of the dense model, 100 %.
        chosen: parameters and predicted error of the model at hand.
        measured: its measured error; drawn above `chosen`.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        ValueError: a dense model without parameters.

    Example:
        >>> points = [FrontierPoint(0.9, 90, 0.1), FrontierPoint(0.5, 50, 0.4)]
        >>> figure = frontier_figure(points, 100, chosen=(50, 0.4))
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['keep 50%', 'keep 90%']
    """
    if dense < 1:
        raise ValueError(f"frontier_figure: dense must be the parameters of the dense model, >= 1, got {dense}")
    drawn = sorted((p.params / dense, float(p.error), p.keep) for p in points if math.isfinite(p.error))
    figure, axes = new_axes(size, dpi)
    curve = [*((x, y) for x, y, _ in drawn), (1.0, 0.0)]
    curve.sort()
    axes.plot(*zip(*curve, strict=True), color=LINES[0], linewidth=1.7)
    axes.plot(
        [x for x, _, _ in drawn], [y for _, y, _ in drawn], "o", color=LINES[0], markersize=5.5,
        markeredgecolor="white", label="predicted, by budget",
    )  # fmt: skip
    if len(drawn) <= 8:
        for x, y, keep in drawn:
            axes.annotate(
                f"keep {percent(keep, 1)}", (x, y), xytext=(10, 6), textcoords="offset points", fontsize=8, color=MUTED
            )
    axes.plot([1], [0], "s", color=INK, markersize=6, clip_on=False, label=f"dense, {compact(dense)}", zorder=4)
    seen = [*curve]
    if chosen is not None and math.isfinite(chosen[1]):
        x, y = chosen[0] / dense, float(chosen[1])
        seen.append((x, y))
        ring: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2, "zorder": 5}
        label = f"chosen: {percent(x, 1)}, error {y:.3g}"
        axes.plot([x], [y], "D", markeredgecolor=LINES[1], label=label, linestyle="none", **ring)
        if measured is not None and math.isfinite(measured):
            seen.append((x, float(measured)))
            axes.plot(
                [x], [measured], "x", color=LINES[2], markersize=7.5, markeredgewidth=2.2, zorder=6,
                label=f"measured: {measured:.3g}",
            )  # fmt: skip
    bad = len(points) - len(drawn)
    if bad:
        axes.text(
            0.02, 0.04, f"{bad} of {len(points)} errors not finite", transform=axes.transAxes, color=LINES[1],
            fontsize=8.5,
        )  # fmt: skip
    _shares(axes, [x for x, _ in seen], max(y for _, y in seen), dense, size[0])
    axes.legend(
        loc="upper right",
        fontsize=8,
        frameon=False,
        labelcolor=INK,
        handlelength=1.4,
        labelspacing=0.5,
        markerscale=0.75,
    )
    return figure


def _shares(axes: Axes, x: Sequence[float], top: float, dense: int, width: float) -> None:
    """Axes of error against size: percent and counts below, error from 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    low, high = min(x), max(x)
    room = max(high - low, 0.05) * 0.07
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(0, top * 1.12 if top > 0 else 1)
    ticks = MaxNLocator(nbins=max(3, int(width)), steps=[1, 2, 5, 10]).tick_values(low, high)
    axes.xaxis.set_major_locator(FixedLocator([t for t in ticks if low - room <= t <= high + room]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{percent(round(t, 9), 1)}\n{compact(t * dense)}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:.3g}"))
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_xlabel("parameters of the whole model", color=MUTED, fontsize=8.5)
    axes.set_ylabel("predicted relative error", color=MUTED, fontsize=8.5)


COLUMNS = (
    Column("budget", "Kept parameters of the targeted layers' weights, of 100% for the dense model."),
    Column("model", "Parameters of the whole model, in percent of the dense one.", numeric=True),
    Column("error", "Predicted relative error of the model's output, from the calibration.", numeric=True),
    Column("parameters", "Parameters of the whole model.", numeric=True),
)


def frontier_table(
    points: Sequence[FrontierPoint], dense: int, *, chosen: tuple[float | None, int, float | None] | None = None
) -> list[list[Cell]]:
    """Cells for `COLUMNS`, the largest model first; a point that was chosen is marked, another gets a row of its own.

    Args:
        points: one a budget.
        dense: parameters of the dense model.
        chosen: keep, parameters and predicted error of the model at hand; None what is not known.

    Example:
        >>> cells = frontier_table([FrontierPoint(0.5, 60, 0.1)], 100, chosen=(0.5, 60, 0.1))
        >>> [[cell.text for cell in row] for row in cells]
        [['dense', '100%', '0', '100'], ['keep 50%, chosen', '60%', '0.1', '60']]
    """
    named: list[tuple[str, float | None, int, float | None]] = []
    met = False
    for p in points:
        same = chosen is not None and chosen[1] == p.params and (chosen[2] is None or _close(chosen[2], p.error))
        met |= same
        named.append((f"keep {percent(p.keep, 1)}" + ", chosen" * same, p.keep, p.params, p.error))
    if chosen is not None and not met:
        keep = chosen[0]
        named.append(("chosen" if keep is None else f"keep {percent(keep, 1)}, chosen", *chosen))
    named = [("dense", 1.0, dense, 0.0), *sorted(named, key=lambda entry: -entry[2])]
    return [
        [
            Cell(name, keep),
            Cell(percent(params, dense), params),
            Cell(number(error), error, "" if error is None or math.isfinite(error) else "bad"),
            Cell(f"{params:,}", params),
        ]
        for name, keep, params, error in named
    ]


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4) or (math.isnan(one) and math.isnan(other))
