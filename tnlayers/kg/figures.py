"""Pictures of knowledge-graph models: MRR over parameters, entities in the Poincaré disk, training curves."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tnlayers.figures import GRID, INK, LINES, MUTED, _label, dress, logarithmic, new_axes
from tnlayers.kg.embedding_tables import ball_points, degrees, embeddings
from tnlayers.kg.history import History
from tnlayers.kg.model import KGModel
from tnlayers.kg.triples import Triples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One more than colours: 42 models look different."""
STYLES = ("-", (0, (3, 2)), (0, (1, 2)), (0, (5, 1.2, 1, 1.2)))
"""Of lines: the next one when the colours begin again."""
NAMED = 6
"""Entities of highest degree, of those that lie apart and have room, that are named on a map."""
APART = 34
"""Points (1/72 inch) between named entities, at least."""
TRIED = 60
"""Entities of highest degree among which those with room for a name come first."""
CIRCLES = (1, 2, 3)
"""Distances from the centre of the disk, as drawn, at which it has circles."""
SPREAD = 0.8
"""Of the radius of the disk: where the median of the outer tenth lies when coordinates are shrunk to be seen."""


@dataclass(frozen=True)
class Point:
    """One result: a model, its parameters, its MRR.

    Args:
        name: of the model; results of one name are joined by a line.
        parameters: numbers that are trained.
        mrr: mean reciprocal rank, or its mean over seeds.
        spread: standard deviation over seeds; None for one seed.
        note: beside the point.

    Example:
        >>> Point("TuckER", 316_660, 0.893).spread is None
        True
    """

    name: str
    parameters: int
    mrr: float
    spread: float | None = None
    note: str = ""


def mrr_figure(
    points: Sequence[Point], title: str = "", *, size: tuple[float, float] = (6.4, 4.0), dpi: int = 160
) -> Figure:
    """MRR against parameters on a logarithmic axis, a colour and a marker a model, bars of the spread over seeds.

    Args:
        points: at least one.
        title: above the axes.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        ValueError: no points, or parameters below 1.

    Example:
        >>> figure = mrr_figure([Point("TuckER", 300_000, 0.89), Point("TuckER", 100_000, 0.86)], "umls")
        >>> len(figure.axes)
        1
    """
    if not points or min(point.parameters for point in points) < 1:
        raise ValueError("mrr_figure: expected points with at least 1 parameter each, got none or fewer")
    figure, axes = new_axes(size, dpi)
    counts = [point.parameters for point in points]
    logarithmic(axes, "x", min(counts), max(max(counts), 2 * min(counts)), room=0.1)
    axes.grid(True, color=GRID, linewidth=0.6)
    names = list(dict.fromkeys(point.name for point in points))
    for k, name in enumerate(names):
        own = sorted((point for point in points if point.name == name), key=lambda point: point.parameters)
        x, y = [p.parameters for p in own], [p.mrr for p in own]
        color, marker = LINES[k % len(LINES)], MARKERS[k % len(MARKERS)]
        axes.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.3, label=_label(name, 24), zorder=3)
        bars = [p.spread or 0.0 for p in own]
        if any(bars):
            axes.errorbar(x, y, bars, fmt="none", ecolor=color, elinewidth=1.1, capsize=2.5, zorder=2)
    low = min(p.mrr - (p.spread or 0) for p in points)
    high = max(p.mrr + (p.spread or 0) for p in points)
    room = max(0.12 * (high - low), 0.01)
    axes.set_ylim(max(0.0, low - room), min(1.005, high + 1.5 * room))
    axes.set_xlabel("parameters", color=MUTED, fontsize=8.5)
    axes.set_ylabel("MRR", color=MUTED, fontsize=8.5)
    _legend(figure, len(names))
    _titled(axes, title)
    if any(point.note for point in points):
        _note_points(figure, axes, points)
    return figure


def history_figure(
    histories: Mapping[str, History], title: str = "", *, size: tuple[float, float] = (6.4, 4.0), dpi: int = 160
) -> Figure:
    """Training loss of every epoch (logarithmic), and below it the validation MRR where it was measured.

    The best epoch carries a ring.

    Args:
        histories: name -> what `train` returned.
        title: above the axes.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        ValueError: no epoch in any.

    Example:
        >>> from tnlayers.kg import Epoch, History
        >>> past = History((Epoch(1, 0.7, 0.1, 0.01), Epoch(2, 0.5, 0.1, 0.01, mrr=0.3)), 2, "epochs")
        >>> len(history_figure({"TuckER": past}).axes)
        2
    """
    if not any(history.epochs for history in histories.values()):
        raise ValueError("history_figure: expected at least one epoch, got none; train first")
    validated = any(history.mrr for history in histories.values())
    figure, first = new_axes(size, dpi)
    axes: list[Any] = [first]
    if validated:
        figure.delaxes(first)
        upper, lower = figure.subplots(2, 1, sharex=True)
        axes = [upper, lower]
        for part in axes:
            dress(part)
    losses = [loss for history in histories.values() for loss in history.losses if loss > 0]
    if losses:
        logarithmic(axes[0], "y", min(losses), max(max(losses), 1.01 * min(losses)), room=0.06)
    for k, (name, history) in enumerate(histories.items()):
        color = LINES[k % len(LINES)]
        style: dict[str, Any] = {"color": color, "linestyle": STYLES[k // len(LINES) % len(STYLES)], "linewidth": 1.4}
        numbers = [epoch.epoch for epoch in history.epochs]
        dot = "o" if len(numbers) < 3 else ""
        axes[0].plot(numbers, history.losses, marker=dot, markersize=4, label=_label(name, 24), **style)
        if validated and history.mrr:
            x, y = list(history.mrr), list(history.mrr.values())
            axes[1].plot(x, y, marker="o" if len(x) <= 30 else "", markersize=3.5, **style)
            if history.best is not None:
                axes[1].plot(
                    [history.best], [history.mrr[history.best]], "o", markersize=8, markerfacecolor="none",
                    markeredgecolor=color, markeredgewidth=1.3, clip_on=False,
                )  # fmt: skip
    for part, what in zip(axes, ("training loss", "valid MRR"), strict=False):
        part.grid(True, color=GRID, linewidth=0.6)
        part.set_ylabel(what, color=MUTED, fontsize=8.5)
    axes[-1].set_xlabel("epoch", color=MUTED, fontsize=8.5)
    _whole_numbers(axes[-1])
    if len(histories) > 1:
        _legend(figure, len(histories))
    _titled(axes[0], title)
    return figure


def entity_map(
    model: KGModel,
    triples: Triples,
    title: str | None = None,
    *,
    names: int = NAMED,
    size: tuple[float, float] = (5.6, 5.2),
    dpi: int = 160,
) -> Figure:
    """Entities coloured by degree: in the Poincaré disk for hyperbolic models, on two principal axes for others.

    In the disk the distance from the centre is the hyperbolic distance of the entity from the origin, the angle that of
    its tangent vector at the origin on the two principal directions; a model of dimension 2 is drawn as it is. Where
    all points lie near the centre, or the rim, distances are scaled by one factor. Three circles mark equal steps of
    the distance, written with the factor under the disk.

    Args:
        model: a trained model of the graph.
        triples: the graph; degrees count its training triples.
        title: above; None says what is shown.
        names: entities that are named: of highest degree, of those that lie apart and have room for a name.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        ValueError: a model without a table of entities.

    Example:
        >>> from tnlayers.kg import TuckER, load_triples
        >>> graph = load_triples({"train": [("a", "r", "b"), ("b", "r", "c")]})
        >>> len(entity_map(TuckER(graph, entity_dim=4, relation_dim=2), graph).axes)
        2
    """
    points = ball_points(model)
    degree = degrees(triples.train, triples.num_entities).cpu().numpy()
    figure, axes = new_axes(size, dpi)
    if points is None:
        table = next(iter(embeddings(model).entities.values()))
        xy, shares = principal_axes(table)
        shown = title if title is not None else f"{type(model).__name__}: entities on two principal axes"
        axes.set_xlabel(f"first principal axis, {100 * shares[0]:.0f}% of the variance", color=MUTED, fontsize=8.5)
        axes.set_ylabel(f"second, {100 * shares[1]:.0f}%", color=MUTED, fontsize=8.5)
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.margins(0.14, 0.08)
        axes.set_aspect("equal", adjustable="datalim")
    else:
        xy, factor = disk(points)
        shown = title if title is not None else f"{type(model).__name__}: entities in the Poincaré disk"
        _rim(axes)
        steps = ", ".join(f"{step / factor:.2g}" for step in CIRCLES)
        scaled = "" if factor == 1.0 else f", drawn times {factor:.2g}"
        axes.text(0, -1.06, f"circles: distance {steps} from the centre{scaled}", ha="center", va="top", fontsize=8,
                  color=MUTED)  # fmt: skip
    order = np.argsort(degree, kind="stable")  # the busiest on top
    drawn = axes.scatter(
        xy[order, 0], xy[order, 1], c=np.log10(np.maximum(degree[order], 1)), cmap=_colours(), linewidths=0.3,
        edgecolors="white", s=_dot(len(xy)), zorder=3,
    )  # fmt: skip
    _degree_bar(figure, axes, drawn, degree)
    _titled(axes, shown)
    _name_points(figure, axes, xy, order[::-1].tolist(), triples.entity_labels, names, rim=points is not None)
    return figure


def principal_axes(rows: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Rows on their two principal axes, centred, and the shares of the variance that these carry.

    Args:
        rows: (N, d).

    Example:
        >>> xy, shares = principal_axes(torch.tensor([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [2, 1, 0]]))
        >>> xy.shape, [round(share, 2) for share in shares]
        ((4, 2), [0.8, 0.2])
    """
    x = rows.detach().double().cpu()
    x = x.reshape(len(x), -1)
    x = x - x.mean(0)
    _, values, basis = torch.linalg.svd(x, full_matrices=False)
    basis = _signed(basis[:2])
    found = torch.zeros(len(x), 2, dtype=torch.float64)
    found[:, : len(basis)] = x @ basis.mT
    power = values.square()
    total = max(float(power.sum()), torch.finfo(torch.float64).tiny)
    shares = [float(p) / total for p in power[:2]] + [0.0, 0.0]
    return found.numpy(), (shares[0], shares[1])


def disk(points: Tensor) -> tuple[np.ndarray, float]:
    """Points of the unit Poincaré ball in the disk, and the factor by which distances from the centre were scaled.

    The hyperbolic distance rho = 2 artanh |p| from the origin is kept (times the factor), the direction is that of the
    tangent vector on the two principal (uncentred) directions; d = 2 keeps every direction.

    Args:
        points: (N, d) of norm below 1.

    Example:
        >>> xy, factor = disk(torch.tensor([[0.6, 0.0], [0.0, -0.8]]))
        >>> factor, np.linalg.norm(xy, axis=1).round(6).tolist()
        (1.0, [0.6, 0.8])
    """
    p = points.detach().double().cpu()
    norm = p.norm(dim=1)
    rho = 2 * torch.arctanh(norm.clamp(max=1 - 1e-15))
    if p.shape[1] > 2:
        tangent = p / norm.clamp(min=1e-300)[:, None] * rho[:, None]
        p = tangent @ _signed(torch.linalg.svd(tangent, full_matrices=False)[2][:2]).mT
    elif p.shape[1] == 1:
        p = torch.cat([p, torch.zeros_like(p)], 1)
    direction = p / p.norm(dim=1).clamp(min=1e-300)[:, None]
    outer = float(rho.quantile(0.9)) if len(rho) else 0.0
    seen = np.tanh(outer / 2)
    factor = 1.0
    if outer > 0 and not 0.35 <= seen <= 0.97:  # otherwise a dot in the middle, or a ring
        factor = float(f"{2 * np.arctanh(SPREAD) / outer:.2g}")
    xy = direction * torch.tanh(factor * rho / 2)[:, None]
    return xy.numpy(), factor


def _signed(basis: Tensor) -> Tensor:
    """Directions whose largest entry is positive: the same picture on every machine."""
    if not len(basis):
        return basis
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def _rim(axes: Axes) -> None:
    """The disk: its rim, circles of equal hyperbolic steps, no ticks."""
    from matplotlib.patches import Circle

    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.add_patch(Circle((0, 0), 1, facecolor="#f6f8fa", edgecolor=MUTED, linewidth=1.0, zorder=0))
    for rho in CIRCLES:
        axes.add_patch(
            Circle((0, 0), float(np.tanh(rho / 2)), facecolor="none", edgecolor=GRID, linewidth=0.8, zorder=1)
        )
    axes.set_xlim(-1.1, 1.1)
    axes.set_ylim(-1.16, 1.1)


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("degree", ["#9fc5e0", "#0072b2", "#5b2a86", "#2b0d3a"])


def _dot(count: int) -> float:
    return float(np.clip(6000 / max(count, 1), 2, 34))


def _degree_bar(figure: Figure, axes: Axes, drawn: Any, degree: np.ndarray) -> None:
    positive = np.maximum(degree, 1)
    low, high = np.log10(positive.min(initial=100_000)), np.log10(positive.max(initial=1))
    high = max(high, low + 0.5)
    drawn.set_clim(low, high)
    ticks = [t for power in range(7) for t in (10**power, 3 * 10**power) if low <= np.log10(t) <= high]
    bar = figure.colorbar(drawn, ax=axes, shrink=0.62, aspect=26, pad=0.02, ticks=np.log10(ticks))
    bar.ax.set_yticklabels([f"{tick:,}" for tick in ticks])
    bar.ax.tick_params(colors=MUTED, labelsize=8, width=0.6, length=2.5)
    bar.set_label("degree in training", color=MUTED, fontsize=8.5)
    bar.outline.set_visible(False)


def _name_points(
    figure: Figure,
    axes: Axes,
    xy: np.ndarray,
    order: Sequence[int],
    labels: Sequence[str],
    names: int,
    rim: bool,
) -> None:
    """Name the first points in order that lie apart; with a rim, names had better not cross it."""
    figure.draw_without_rendering()
    dots, unit = axes.transData.transform(xy), figure.dpi / 72
    if rim:
        angle = np.linspace(0, 2 * np.pi, 720)
        circle = axes.transData.transform(np.stack([np.cos(angle), np.sin(angle)], 1))
    covering = _covering(np.concatenate([dots, circle]) if rim else dots)
    taken: list[Bbox] = []
    named: list[int] = []
    rounds = [(k, limit) for limit in (0, 2) for k in order[:TRIED]] + [(k, sys.maxsize) for k in order]
    for k, covered in rounds:
        if len(named) == names:
            break
        if any(np.linalg.norm(dots[k] - dots[other]) < APART * unit for other in named):
            continue
        label = _label(labels[k], 26)
        spot = _spot(figure, axes, label, 7.5, dots[k], covering, taken, 0.0)
        if spot is None or spot.covered > covered:
            continue
        _write(axes, label, (xy[k, 0], xy[k, 1]), spot, fontsize=7.5, color=INK)
        taken.append(spot.box)
        named.append(k)


def _note_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Notes beside the points of a figure, off each other and off what is drawn."""
    figure.draw_without_rendering()
    drawn = [axes.transData.transform(np.asarray(line.get_xydata())) for line in axes.lines]
    bars = [axes.transData.transform([(p.parameters, p.mrr - (p.spread or 0)), (p.parameters, p.mrr + (p.spread or 0))])
            for p in points]  # fmt: skip
    covering = _covering(np.concatenate([_along(path) for path in (*drawn, *bars) if len(path)]))
    taken: list[Bbox] = []
    for p in points:
        at = axes.transData.transform((p.parameters, p.mrr))
        label = _label(p.note, 28)
        spot = _spot(figure, axes, label, 7.5, at, covering, taken, np.pi / 2) if p.note else None
        if spot is not None:
            _write(axes, label, (p.parameters, p.mrr), spot, fontsize=7.5, color=MUTED)
            taken.append(spot.box)


def _along(path: np.ndarray, step: float = 4.0) -> np.ndarray:
    """Points along a path of straight pieces, at most a step apart."""
    pieces = [path[-1:]]
    for start, end in itertools.pairwise(path):
        count = max(int(np.linalg.norm(end - start) / step), 1)
        pieces.append(start + (end - start) * np.arange(count)[:, None] / count)
    return np.concatenate(pieces)


def _covering(obstacles: np.ndarray) -> Callable[[Bbox], int]:
    """How many points lie in a box, to a pixel, by a table of sums: many boxes are tried."""
    low = np.floor(obstacles.min(0))
    places = (obstacles - low).astype(np.int64)
    size = places.max(0) + 1
    counts = np.zeros(size + 1, dtype=np.int64)
    np.add.at(counts, tuple(places.T + 1), 1)
    sums = counts.cumsum(0).cumsum(1)

    def covered(box: Bbox) -> int:
        x0, y0, x1, y1 = np.clip(np.rint(box.extents - np.tile(low, 2)), 0, np.tile(size, 2)).astype(np.int64)
        return int(sums[x1, y1] - sums[x0, y1] - sums[x1, y0] + sums[x0, y0])

    return covered


class _Spot(NamedTuple):
    """Where a text stands beside its point: offset in points (1/72 inch), alignment, box in pixels, what it covers."""

    dx: float
    dy: float
    align: str
    box: Bbox
    covered: int


def _spot(
    figure: Figure,
    axes: Axes,
    label: str,
    fontsize: float,
    at: np.ndarray,
    covering: Callable[[Bbox], int],
    taken: Sequence[Bbox],
    first: float,
) -> _Spot | None:
    """The best place of a text: inside the axes, off other texts, over few obstacles, near, at the first angle."""
    from matplotlib.transforms import Bbox

    unit, inside = figure.dpi / 72, axes.get_window_extent()
    probe = axes.text(0, 0, label, fontsize=fontsize)
    width, height = (getattr(probe.get_window_extent(), what) for what in ("width", "height"))
    probe.remove()
    best, least = None, np.inf
    for away in (7, 14, 22):
        for angle in first + np.arange(16) * np.pi / 8:
            dx, dy = away * float(np.cos(angle)), away * float(np.sin(angle))
            align = "left" if dx > 1 else "right" if dx < -1 else "center"
            left = at[0] + dx * unit - {"left": 0, "right": width, "center": width / 2}[align]
            box = Bbox.from_bounds(left, at[1] + dy * unit - height / 2, width, height)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not any(box.overlaps(other) for other in taken):
                covered = covering(box.padded(5))
                cost = covered + away / 20
                if cost < least:
                    best, least = _Spot(dx, dy, align, box, covered), cost
    return best


def _write(axes: Axes, label: str, at: tuple[float, float], spot: _Spot, **style: Any) -> None:
    """A text at its place, with a thin line to its point and a white halo."""
    from matplotlib.patheffects import withStroke

    edge = {"left": (0.0, 0.5), "right": (1.0, 0.5), "center": (0.5, 0.5)}[spot.align]
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2.5, "relpos": edge}
    text = axes.annotate(
        label, at, (spot.dx, spot.dy), textcoords="offset points", ha=spot.align, va="center", arrowprops=line,
        zorder=5, path_effects=[withStroke(linewidth=2.2, foreground="white")], **style,
    )  # fmt: skip
    text.set_in_layout(False)


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _legend(figure: Figure, count: int) -> None:
    columns = count if count <= 4 else -(-count // -(-count // 4))
    figure.legend(
        loc="outside lower center", ncols=columns, fontsize=8, frameon=False, labelcolor=INK, handlelength=1.6
    )


def _titled(axes: Axes, title: str) -> None:
    if title:
        axes.set_title(_label(title, 70), fontsize=10, color=INK, loc="left", pad=10)
