"""Pictures of a conversion: singular values with the cut, and parameters by layer.

Everything is drawn on `matplotlib.figure.Figure` with its own Agg canvas: no pyplot, no display, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tnlayers.page import compact, percent, printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66707c", "#e3e7ec"
LINES = ("#0072b2", "#d55e00", "#009e73", "#a6538a", "#b98200", "#3a8fc4")
"""Okabe and Ito's colours for the colour-blind, the pale ones darkened to be read on white."""
DENSE, NOW = "#ccd4dd", "#0072b2"
FLOOR = 1e-9
"""Relative singular values below this are not drawn: they are rounding."""
MAX_BARS = 40
WEIGHTED, PLAIN = "weighted", "unweighted"
DASHED, DOTTED, DASH_DOTTED = (0, (3, 2)), (0, (1, 2)), (0, (5, 1.2, 1, 1.2))


def spectrum_figure(
    spectra: Mapping[str, Sequence[float]],
    cuts: Mapping[str, int] | None = None,
    title: str = "",
    *,
    weighted: Mapping[str, Sequence[float]] | None = None,
    break_even: int | None = None,
    size: tuple[float, float] = (6.4, 4.0),
    dpi: int = 160,
) -> Figure:
    """Singular values relative to the largest, against their index, one line a bond; what a cut discards is pale.

    Both axes are logarithmic: a power law is a straight line, and a cut at 8 of 4096 is still seen. The cut is a
    dashed vertical line with a dot on the last value kept and the rank above it. With `weighted` every bond has two
    lines, weighted solid and plain dash-dotted.

    Args:
        spectra: bond -> its singular values (any order). Values below 1e-9 of the largest are not drawn.
        cuts: bond -> rank kept; bonds that are not named are drawn whole.
        title: above the axes, in one line.
        weighted: bond -> singular values of the weighted weight; bonds may lack one kind.
        break_even: rank at which a dotted vertical line stands; beyond the last index it is left out.
        size: width and height in inches.
        dpi: pixels an inch.

    Raises:
        ValueError: a cut names no bond or is negative.

    Example:
        >>> figure = spectrum_figure({"0": [1.0, 0.5, 0.25]}, {"0": 2}, "fc1")
        >>> len(figure.axes)
        1
    """
    cuts, weighted = dict(cuts or {}), dict(weighted or {})
    bonds = list(dict.fromkeys([*spectra, *weighted]))
    for bond, rank in cuts.items():
        if bond not in bonds:
            raise ValueError(f"spectrum_figure: cuts must name bonds of spectra {bonds}, got {bond!r}")
        if rank < 0:
            raise ValueError(f"spectrum_figure: a cut must be a rank >= 0, got {rank} for bond {bond!r}")
    lines, remarks = _lines(bonds, spectra, weighted, cuts)
    crowded = sum(line.leads for line in lines) > 4
    figure, axes = new_axes(size, dpi)
    longest = max((line.values.size for line in lines), default=1)
    lowest = min((float(line.values[line.values > FLOOR].min()) for line in lines), default=0.1)
    logarithmic(axes, "x", 1, max(longest, 2), room=0.04)
    logarithmic(axes, "y", min(lowest, 0.5), 1, room=0.06)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_xlabel("index of the singular value", color=MUTED, fontsize=8.5)
    axes.set_ylabel("relative to the largest", color=MUTED, fontsize=8.5)
    for line in lines:
        _draw(axes, line, marker="o" if longest <= 24 else "")
    even = break_even if break_even is not None and 1 <= break_even <= longest and lines else None
    levels = _mark_cuts(axes, lines, crowded, even)
    if weighted and lines:
        _legend_of_kinds(figure, lines, even, size[0])
    elif len(bonds) > 1 and lines:
        small: dict[str, Any] = {"fontsize": 8 if len(lines) <= 14 else 6, "handlelength": 1.2, "labelspacing": 0.3}
        small |= {"frameon": False, "labelcolor": INK, "borderpad": 0.3}
        if crowded:
            figure.legend(loc="outside right upper", **small)
        else:
            axes.legend(loc="lower left", **small)
    if remarks:
        text = "\n".join([*remarks[:6], *([f"and {len(remarks) - 6} more"] if len(remarks) > 6 else [])])
        x, y, side, edge = (0.98, 0.97, "right", "top") if lines else (0.5, 0.5, "center", "center")
        axes.text(x, y, text, transform=axes.transAxes, color=LINES[1], fontsize=8.5, ha=side, va=edge)
        if not lines:
            axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    if title:
        axes.set_title(_label(title, int(11 * size[0])), color=INK, fontsize=10.5, loc="left", pad=7 + 11 * levels)
    return figure


class _Line(NamedTuple):
    """One bond to draw: its values relative to the largest, descending, and how many are kept."""

    label: str
    values: np.ndarray
    cut: int | None
    color: str
    style: Any
    plain: bool
    """Whether this is the plain spectrum beside a weighted one."""
    leads: bool
    """Whether the cut of the bond is marked at this line: it is the first of the bond."""

    @property
    def kept(self) -> int:
        return self.values.size if self.cut is None else min(self.cut, self.values.size)


def _lines(
    bonds: Sequence[str],
    spectra: Mapping[str, Sequence[float]],
    weighted: Mapping[str, Sequence[float]],
    cuts: Mapping[str, int],
) -> tuple[list[_Line], list[str]]:
    """The spectra that can be drawn, weighted ones first, and a remark for each that cannot."""
    lines: list[_Line] = []
    remarks = []
    led: set[str] = set()
    each = [(bond, kind) for bond in bonds for kind in (weighted, spectra) if bond in kind]
    for bond, kind in each:
        k, values = bonds.index(bond), np.asarray(kind[bond], dtype=np.float64)
        plain = bool(weighted) and kind is spectra
        name = _label(bond, 22)
        word = f"{WEIGHTED if kind is weighted else PLAIN} " if weighted else ""
        prefix = f"{name} {word}".rstrip() + ": " if len(bonds) > 1 else word and f"{word.rstrip()}: "
        bad = np.count_nonzero(~np.isfinite(values))
        if values.size == 0:
            remarks.append(f"{prefix}no singular values")
        elif bad:
            remarks.append(f"{prefix}{bad} of {values.size} singular values not finite")
        elif values.max() <= 0:
            remarks.append(f"{prefix}all {values.size} singular values are zero")
        else:
            cut = cuts.get(bond)
            label = f"{name}: {values.size}" if cut is None else f"{name}: {cut} of {values.size}"
            alone = len(bonds) == 1 and plain  # with one bond, colours are free to tell the two kinds apart
            color = LINES[1] if alone else LINES[k % len(LINES)]
            style: Any = DASH_DOTTED if plain else "-" if weighted or k < len(LINES) else "--"
            ordered = np.sort(values)[::-1] / values.max()
            lines.append(_Line(label, ordered, cut, color, style, plain, bond not in led))
            led.add(bond)
    return lines, remarks


def _draw(axes: Axes, line: _Line, marker: str) -> None:
    index = np.arange(1, line.values.size + 1)
    shown = line.values > FLOOR
    head = shown & (index <= line.kept)
    common: dict[str, Any] = {"color": line.color, "linestyle": line.style, "marker": marker}
    wide = 1.4 if line.plain else 1.9
    axes.plot(index[shown], line.values[shown], alpha=0.35, linewidth=min(wide, 1.4), markersize=3, **common)
    axes.plot(index[head], line.values[head], linewidth=wide, markersize=3.4, label=line.label, **common)


def _mark_cuts(axes: Axes, lines: Sequence[_Line], crowded: bool, even: int | None) -> int:
    """Line, dot and rank of every cut, and the break-even rank; returns how many rows of numbers stand above."""
    low, high = axes.get_xlim()
    across = 0.8 * 72 * float(axes.get_figure(root=True).get_figwidth())  # type: ignore[union-attr]  # points, about
    placed: list[tuple[float, int]] = []
    levels = 0
    text: dict[str, Any] = {"annotation_clip": False, "textcoords": "offset points"}

    def above(place: int, number: int, color: str, **style: Any) -> None:
        """A number above the axes, a row higher for each one that is near."""
        nonlocal levels
        at = float(np.log(place / low) / np.log(high / low))
        digits = len(str(number))
        level = sum(abs(at - other) * across < max(0.075 * across, 3.3 * (digits + more) + 4) for other, more in placed)
        placed.append((at, digits))
        levels = max(levels, level + 1)
        axes.annotate(
            str(number), (place, 1), xytext=(0, 3 + 11 * level), xycoords=("data", "axes fraction"), ha="center",
            color=color, **style, **text,
        )  # fmt: skip

    shown_twice = any(line.plain for line in lines)
    shared = shown_twice and sum(line.leads for line in lines) == 1
    for line in lines:
        if line.cut is None:
            continue
        place = max(line.kept, 1)
        value = float(line.values[place - 1])
        if line.kept and value > FLOOR:
            axes.plot([place], [value], "o", color=line.color, markersize=6, markeredgecolor="white", zorder=5)
        if not line.leads:
            continue
        color = INK if shared else line.color  # the cut of one bond belongs to both of its lines
        axes.axvline(place, color=color, linewidth=0.9, linestyle=DASHED, alpha=0.85)
        if crowded and shown_twice:
            continue
        if crowded:  # the numbers would cover each other above the axes; the legend has them too
            axes.annotate(
                str(line.cut), (place, max(value, FLOOR)), xytext=(5, 3), color=color, fontsize=9, fontweight="bold",
                **text,
            )  # fmt: skip
            continue
        above(place, line.cut, color, fontsize=9, fontweight="bold")
    if even is not None:
        axes.axvline(even, color=MUTED, linewidth=1.1, linestyle=DOTTED)
        above(even, even, MUTED, fontsize=8.5)
    return levels


def _legend_of_kinds(figure: Figure, lines: Sequence[_Line], even: int | None, width: float) -> None:
    """Below the axes, where it covers nothing: what the two kinds of lines and the two verticals are."""
    from matplotlib.lines import Line2D

    single = sum(line.leads for line in lines) == 1
    handles = []
    if not single:
        handles += [Line2D([], [], color=line.color, lw=1.9, label=line.label) for line in lines if line.leads]
    for plain, word in ((False, WEIGHTED), (True, PLAIN)):
        kind = [line for line in lines if line.plain == plain]
        if kind:
            color = kind[0].color if single else MUTED
            handles.append(Line2D([], [], color=color, ls=kind[0].style, lw=1.4 if plain else 1.9, label=word))
    if any(line.cut is not None for line in lines):
        handles.append(Line2D([], [], color=INK if single else MUTED, ls=DASHED, lw=0.9, label="rank kept"))
    if even is not None:
        handles.append(Line2D([], [], color=MUTED, ls=DOTTED, lw=1.1, label="break-even"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), max(2, int(width * 1.1))), fontsize=7.5,
        handlelength=1.7, handletextpad=0.5, columnspacing=1.0, labelspacing=0.3, frameon=False, labelcolor=INK,
        borderpad=0.1,
    )  # fmt: skip


def parameters_figure(
    names: Sequence[str], dense: Sequence[int], now: Sequence[int], *, width: float = 8.0, dpi: int = 160
) -> Figure:
    """Parameters of every layer, dense (pale, thick) and now (strong, thin), on a logarithmic axis, in model order.

    Above 40 layers the 39 largest are drawn, still in model order, and one last bar adds up the others.

    Args:
        names: of the layers.
        dense: parameters of each layer before.
        now: parameters of each layer after.
        width: in inches; the height follows the number of layers.
        dpi: pixels an inch.

    Raises:
        ValueError: the three sequences differ in length, or a count is negative.

    Example:
        >>> figure = parameters_figure(["fc1", "fc2"], [4096, 640], [512, 640])
        >>> len(figure.axes[0].patches)
        3
    """
    if not len(names) == len(dense) == len(now):
        raise ValueError(
            f"parameters_figure: names, dense and now must be of one length, got {len(names)}, {len(dense)}, {len(now)}"
        )
    if min([*dense, *now], default=0) < 0:
        raise ValueError(f"parameters_figure: counts must be >= 0, got {min([*dense, *now])}")
    bars = [(_label(n, 34), int(d), int(p)) for n, d, p in zip(names, dense, now, strict=True)]
    if len(bars) > MAX_BARS:
        largest = set(sorted(range(len(bars)), key=lambda k: -max(bars[k][1:]))[: MAX_BARS - 1])
        rest = [bar for k, bar in enumerate(bars) if k not in largest]
        bars = [bar for k, bar in enumerate(bars) if k in largest]
        bars.append((f"{len(rest)} smaller layers together", sum(b[1] for b in rest), sum(b[2] for b in rest)))
    height = 1.05 + 0.27 * max(len(bars), 2)
    figure, axes = new_axes((width, height), dpi)
    if not bars:
        axes.text(0.5, 0.5, "no layers", transform=axes.transAxes, ha="center", va="center", color=MUTED)
        axes.set_xticks([])
        axes.set_yticks([])
        return figure
    low = min((count for bar in bars for count in bar[1:] if count > 0), default=1)
    high = max(max(bar[1:]) for bar in bars)
    left = 10.0 ** np.floor(np.log10(low / 2)) if low > 1 else 0.5
    logarithmic(axes, "x", left, max(high, 10), room=0)
    y = range(len(bars))
    axes.barh(y, [max(bar[1], left) - left for bar in bars], left=left, height=0.74, color=DENSE)
    changed = [(at, bar[2]) for at, bar in zip(y, bars, strict=True) if bar[1] != bar[2]]
    axes.barh(
        [at for at, _ in changed], [max(after, left) - left for _, after in changed], left=left, height=0.34, color=NOW
    )
    axes.set_yticks(y, [bar[0] for bar in bars], fontsize=8.5, color=INK)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.grid(True, axis="x", color=GRID, linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("parameters", color=MUTED, fontsize=8.5)
    for at, (_, before, after) in zip(y, bars, strict=True):
        kept = after == before
        _beside(axes, at, 8, f"{compact(before)}, kept" if kept else f"{compact(before)} \u2192 {compact(after)}", kept)
        if not kept and min(before, after) > 0:
            _beside(axes, at, 92, percent(after, before), after >= before)
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=DENSE, label="dense"), Patch(color=NOW, label="now")], loc="outside upper left", ncols=2,
        fontsize=8.5, frameon=False, labelcolor=INK, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
    return figure


def _beside(axes: Axes, at: float, offset: float, text: str, quiet: bool) -> None:
    """Text to the right of the axes, level with bar `at`, `offset` points from the edge."""
    axes.annotate(
        text, (1, at), xycoords=("axes fraction", "data"), xytext=(offset, 0), textcoords="offset points", va="center",
        fontsize=8, color=MUTED if quiet else INK, annotation_clip=False,
    )  # fmt: skip


def new_axes(size: tuple[float, float], dpi: int) -> tuple[Figure, Axes]:
    """Figure on its own Agg canvas with one bare axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures: matplotlib is needed to draw; pip install matplotlib") from error

    figure = Figure(figsize=size, dpi=dpi, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    dress(axes)
    return figure, axes


def dress(axes: Axes) -> None:
    """No box around the axes, pale spines, small muted ticks, the grid below the data."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b6bfca")
    axes.tick_params(colors=MUTED, labelsize=8.5, width=0.6, length=3)


def logarithmic(axes: Axes, which: str, low: float, high: float, *, room: float) -> None:
    """Logarithmic axis with few, plainly written ticks (matplotlib's own ticks cost most of the drawing time)."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    margin = (high / low) ** room
    low, high = low / margin, high * margin
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    inside = [10.0**d for d in decades if low <= 10.0**d <= high]
    if len(inside) >= 3:
        ticks = inside[::-1][:: -(-len(inside) // 7)]
    else:
        ticks = [f * 10.0**d for d in decades for f in ((1, 2, 5) if high / low < 50 else (1, 3))]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(sorted(t for t in ticks if low <= t <= high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    getattr(axes, f"set_{which}lim")(low, high)


def _label(text: object, width: int) -> str:
    """Text as matplotlib must get it: no formulas (`$`), and no leading underscore, which hides a legend entry."""
    label = shorten(printable(str(text)), width).replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label


def _tick(value: float) -> str:
    """`0.01`, `1`, `1k`, `1e-5`: plain text, no exponents raised."""
    if value >= 1:
        return compact(round(value))
    return f"{value:.0e}".replace("e-0", "e-") if value < 9e-4 else f"{value:g}"
