"""Figures and the page of the main job: learning curves, ranks, accuracy against parameters, one table."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tnlayers.figures import GRID, INK, LINES, MUTED, logarithmic, new_axes
from tnlayers.files import write_atomic
from tnlayers.main_job.rank_log import log_name, read_log, series
from tnlayers.main_job.rows import (
    ADAPTIVE,
    COLUMNS,
    DENSE,
    SCRATCH,
    TENSORIZED,
    VARIANTS,
    Row,
    Summary,
    cells,
    footnote,
    table,
)
from tnlayers.page import compact, figure_png, gallery, html_page, html_table, inline_image, paragraph, percent, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tnlayers.main_job.data import Dataset
    from tnlayers.main_job.result import JobResult

COLORS = {DENSE: MUTED, TENSORIZED: LINES[1], SCRATCH: LINES[0], ADAPTIVE: LINES[2]}
MARKS = {"mlp": ("s", 9.0), "cnn": ("o", 6.0)}
"""Marker and size: the smaller one is drawn over the larger, so that equal points are both seen."""
LABELS = {
    DENSE: "dense",
    TENSORIZED: "tensorized, fine-tuned",
    SCRATCH: "tensor layers from scratch",
    ADAPTIVE: "tensor layers, ranks found",
}
SHORT = {DENSE: "dense", TENSORIZED: "tensorized", SCRATCH: "from scratch", ADAPTIVE: "rank-adaptive"}
Log = list[dict[str, Any]]


def write_outputs(result: JobResult, data: Dataset) -> list[Path]:
    """Write `curves-NET.png`, `accuracy.png`, `table.txt` and `index.html` to the folder of a result.

    And `ranks-NET.png` where there are rank-adaptive rows.

    Returns:
        The files written.
    """
    nets = list(dict.fromkeys(row.net for row in result.rows))
    written = []
    for net in nets:
        rows = [row for row in result.rows if row.net == net]
        written.append(result.out / f"curves-{net}.png")
        write_atomic(written[-1], figure_png(curves_figure(rows, f"{net} on {data.name}")))
        if logs := _logs(result, net):
            written.append(result.out / f"ranks-{net}.png")
            write_atomic(written[-1], figure_png(ranks_figure(logs, f"Ranks of the {net} on {data.name}")))
    written.append(result.out / "accuracy.png")
    write_atomic(written[-1], figure_png(accuracy_figure(result.summaries, data.name)))
    written.append(result.out / "table.txt")
    note = footnote(result.settings, result.hardware, result.summaries)
    write_atomic(written[-1], f"{table(result.summaries)}\n{note}\n")
    written.append(result.out / "index.html")
    write_atomic(written[-1], page(result, data))
    return written


def page(result: JobResult, data: Dataset) -> str:
    """Return the self-contained page: table, figures, links to the conversion reports."""
    summaries = result.summaries
    note = footnote(result.settings, result.hardware, summaries)
    nets = list(dict.fromkeys(row.net for row in result.rows))
    first = "Accuracy against parameters"
    pictures = [(first, data.name, _inline(accuracy_figure(summaries, "", size=SMALL), first))]
    for net in nets:
        rows = [row for row in result.rows if row.net == net]
        caption = f"Learning curves, {net}"
        pictures.append((caption, "test images", _inline(curves_figure(rows, "", size=SMALL), caption)))
        if logs := _logs(result, net):
            caption = f"Ranks, {net}"
            alt = f"{caption}; the logs hold the numbers."
            image = inline_image(figure_png(ranks_figure(logs, "", size=SMALL), transparent=True), alt)
            pictures.append((caption, "rank-adaptive", image))
    sections = [
        ("", tiles(_tiles(summaries))),
        ("Results", html_table(COLUMNS, [cells(s) for s in summaries], caption="Results") + paragraph(note)),
        ("Figures", gallery(pictures)),
        ("Conversions", _conversions(result.rows)),
        ("Networks", _networks(result.rows)),
    ]
    if any(row.variant == ADAPTIVE for row in result.rows):
        sections.insert(-1, ("Ranks over time", _ranks(result)))
    seeds = ", ".join(map(str, sorted({row.seed for row in result.rows})))
    adaptive = " at given ranks and at ranks found" if any(row.variant == ADAPTIVE for row in result.rows) else ""
    lead = f"Dense networks, their conversions, and tensor layers from scratch{adaptive} on {data.name}; seeds {seeds}."
    return html_page(f"tnlayers: {data.name}", sections, lead=lead)


SMALL = (4.6, 3.3)


def _inline(figure: Figure, caption: str) -> str:
    return inline_image(figure_png(figure, transparent=True), f"{caption}; the table holds the numbers.")


def _tiles(summaries: Sequence[Summary]) -> list[tuple[str, str, str]]:
    found = []
    for s in summaries:
        if s.variant == DENSE:
            found.append((f"{s.net} dense", f"{100 * s.accuracy:.2f} %", f"{compact(round(s.parameters))} parameters"))
        else:
            gap = "" if s.gap is None else f", {s.gap:+.2f} points"
            found.append((f"{s.net} {s.variant}", f"{100 * s.accuracy:.2f} %", f"{percent(s.share, 1)} of dense{gap}"))
    return found


def _conversions(rows: Sequence[Row]) -> str:
    items = "".join(
        f'<li><a href="{html.escape(row.report, quote=True)}">{html.escape(row.net)}, seed {row.seed}</a>: '
        f"{100 * (row.accuracy_before or 0):.2f} % before fine-tuning, {100 * row.accuracy:.2f} % after</li>"
        for row in rows
        if row.report
    )
    intro = paragraph(
        "One report a conversion: ranks, errors, bounds and singular values of every layer. Ranks start at 1 and grow "
        "where a parameter removes most of the relative squared error, up to the share that was asked for."
    )
    return f"{intro}<ul>{items}</ul>\n"


def _logs(result: JobResult, net: str) -> list[Log]:
    """Logs of the rank-adaptive rows of a network, as far as they are there."""
    rows = [row for row in result.rows if row.net == net and row.variant == ADAPTIVE]
    found = [read_log(result.out / log_name(net, row.seed)) for row in rows]
    return [log for log in found if log]


def _ranks(result: JobResult) -> str:
    """Links to the figures and the logs."""
    links = []
    for net in dict.fromkeys(row.net for row in result.rows):
        if _logs(result, net):
            links.append((f"ranks-{net}.png", f"{net}, figure"))
    for row in result.rows:
        if row.variant == ADAPTIVE and (result.out / log_name(row.net, row.seed)).is_file():
            links.append((log_name(row.net, row.seed), f"{row.net}, seed {row.seed}: step, loss and ranks"))
    items = "".join(
        f'<li><a href="{html.escape(link, quote=True)}">{html.escape(text)}</a></li>' for link, text in links
    )
    intro = paragraph(
        "The rank-adaptive networks start at rank 2, with twice the learning rate of the others. After every step each "
        "weight is rounded with a relative error of 0.1, and where all together hold more parameters than the share "
        "from scratch allows, the smallest singular values go; after six tenths of the steps ranks stay. Bonds of a "
        "convolution: output channels, input channels."
    )
    return f"{intro}<ul>{items}</ul>\n"


def _networks(rows: Sequence[Row]) -> str:
    first = min((row.seed for row in rows), default=0)
    items = "".join(
        f"<li>{html.escape(f'{row.net} {row.variant}, {name}: {text}')}</li>"
        for row in rows
        if row.seed == first
        for name, text in row.networks.items()
    )
    return f"{paragraph(f'Tensor layers of seed {first}; every other layer is dense.')}<ul>{items}</ul>\n"


# -- figures -----------------------------------------------------------------------------------------------------------


def curves_figure(rows: Sequence[Row], title: str, *, size: tuple[float, float] = (6.4, 4.0), dpi: int = 160) -> Figure:
    """Test accuracy after every epoch: mean over the seeds, thin lines for each; fine-tuning follows the dense epochs.

    The axis leaves out the first epochs where they are far below the rest.

    Args:
        rows: of one network.
        title: above the axes.
        size: width and height in inches.
        dpi: pixels an inch.
    """
    figure, axes = new_axes(size, dpi)
    dense_epochs = max((row.epochs for row in rows if row.variant != TENSORIZED), default=0)
    for variant in VARIANTS:
        lines = [_points(row, dense_epochs) for row in rows if row.variant == variant]
        if not lines:
            continue
        color = COLORS[variant]
        if len(lines) > 1:
            for x, y in lines:
                axes.plot(x, y, color=color, linewidth=0.7, alpha=0.35)
        x, means = lines[0][0], [statistics.fmean(values) for values in zip(*(y for _, y in lines), strict=True)]
        dots = "o" if variant == TENSORIZED or len(x) <= 12 else None
        axes.plot(x, means, color=color, linewidth=1.9, marker=dots, markersize=4, label=LABELS[variant])
    _accuracy_axis(axes, [100 * value for row in rows for value in _settled(row)])
    _whole_epochs(axes, max(row.epochs for row in rows) if rows else 1, rows, dense_epochs)
    axes.set_xlabel("epoch", color=MUTED, fontsize=8.5)
    figure.legend(
        loc="outside lower left", ncols=3 if len(axes.get_legend_handles_labels()[0]) <= 3 else 2, fontsize=8,
        frameon=False, labelcolor=INK, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip
    if title:
        axes.set_title(title, color=INK, fontsize=10.5, loc="left", pad=8)
    return figure


def ranks_figure(logs: Sequence[Log], title: str, *, size: tuple[float, float] = (6.4, 4.0), dpi: int = 160) -> Figure:
    """Ranks after every rounding, a line a bond: mean over the seeds, thin lines for each; dotted where they settle.

    Args:
        logs: of one network, see `read_log`.
        title: above the axes.
        size: width and height in inches.
        dpi: pixels an inch.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes(size, dpi)
    names = list(series(logs[0][0]["ranks"])) if logs else []
    for k, name in enumerate(names):
        style: dict[str, Any] = {
            "color": LINES[k % len(LINES)], "linestyle": "-" if k < len(LINES) else "--", "drawstyle": "steps-post",
        }  # fmt: skip
        lines = [
            {line["step"]: ranks[name] for line in log if name in (ranks := series(line["ranks"]))} for log in logs
        ]
        if len(lines) > 1:
            for line in lines:
                axes.plot(list(line), list(line.values()), linewidth=0.7, alpha=0.35, **style)
        common = sorted(set.intersection(*map(set, lines)))
        means = [statistics.fmean(line[step] for line in lines) for step in common]
        axes.plot(common, means, linewidth=1.9, label=name, **style)
    settled = [line["step"] for log in logs for line in log if line["settled"]]
    if settled:
        axes.axvline(min(settled), color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            "ranks stay", (min(settled), 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
            textcoords="offset points", va="top", fontsize=8, color=MUTED,
        )  # fmt: skip
    last = max((log[-1]["step"] for log in logs), default=1)
    highest = max((rank for log in logs for line in log for rank in series(line["ranks"]).values()), default=1)
    axes.set_xlim(1 - 0.02 * last, last * 1.02)
    axes.set_ylim(0, highest * 1.12 + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_xlabel("step", color=MUTED, fontsize=8.5)
    axes.set_ylabel("rank", color=MUTED, fontsize=8.5)
    if names:
        figure.legend(
            loc="outside lower left", ncols=3, fontsize=8, frameon=False, labelcolor=INK, handlelength=1.4,
            columnspacing=1.2,
        )  # fmt: skip
    if title:
        axes.set_title(title, color=INK, fontsize=10.5, loc="left", pad=8)
    return figure


def _points(row: Row, dense_epochs: int) -> tuple[list[int], list[float]]:
    """Epochs and accuracies in percent; a converted network starts where the dense one ended."""
    curve = [100 * value for value in row.curve]
    if row.variant != TENSORIZED or row.accuracy_before is None:
        return list(range(1, len(curve) + 1)), curve
    return list(range(dense_epochs, dense_epochs + len(curve) + 1)), [100 * row.accuracy_before, *curve]


def _settled(row: Row) -> list[float]:
    """Accuracies that must be seen: those after the first fifth of the epochs, and those of fine-tuning."""
    before = [] if row.accuracy_before is None else [row.accuracy_before]
    return [*before, *row.curve[len(row.curve) // 5 :]]


def _accuracy_axis(axes: Axes, percents: Sequence[float]) -> None:
    low, high = (min(percents), max(percents)) if percents else (0.0, 100.0)
    room = max(0.08 * (high - low), 0.05)
    axes.set_ylim(max(0.0, low - room), min(100.0, high + room) + 0.001)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_ylabel("test accuracy, %", color=MUTED, fontsize=8.5)


def _whole_epochs(axes: Axes, most: int, rows: Sequence[Row], dense_epochs: int) -> None:
    from matplotlib.ticker import MaxNLocator

    extra = max((row.epochs for row in rows if row.variant == TENSORIZED), default=0)
    last = max(most, dense_epochs + extra)
    axes.set_xlim(1 - 0.02 * last, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def accuracy_figure(
    summaries: Sequence[Summary], title: str, *, size: tuple[float, float] = (6.4, 4.0), dpi: int = 160
) -> Figure:
    """Accuracy against parameters (logarithmic): a point a network and variant, bars one standard deviation long.

    Args:
        summaries: to draw.
        title: above the axes.
        size: width and height in inches.
        dpi: pixels an inch.
    """
    figure, axes = new_axes(size, dpi)
    for s in summaries:
        mark, side = MARKS.get(s.net, ("^", 7.0))
        axes.errorbar(
            s.parameters, 100 * s.accuracy, yerr=None if s.spread is None else 100 * s.spread, color=COLORS[s.variant],
            marker=mark, markersize=side, linewidth=1, capsize=side / 3, markeredgecolor="white", zorder=20 - side,
        )  # fmt: skip
    counts = [s.parameters for s in summaries] or [1.0, 10.0]
    logarithmic(axes, "x", min(counts) / 1.3, max(counts) * 1.3, room=0)
    spreads = [100 * (s.accuracy + sign * (s.spread or 0)) for s in summaries for sign in (-1, 1)]
    _accuracy_axis(axes, spreads)
    axes.set_xlabel("parameters", color=MUTED, fontsize=8.5)
    _marks_legend(axes, [v for v in VARIANTS if any(s.variant == v for s in summaries)], {s.net for s in summaries})
    if title:
        axes.set_title(title, color=INK, fontsize=10.5, loc="left", pad=8)
    return figure


def _marks_legend(axes: Axes, variants: Sequence[str], nets: set[str]) -> None:
    """Colours are variants; where there are two networks, shapes are networks."""
    from matplotlib.lines import Line2D

    def mark(color: str, shape: str, size: float, label: str) -> Line2D:
        return Line2D([], [], color=color, marker=shape, linestyle="", markersize=size, label=label)

    handles = [mark(COLORS[variant], "o", 6, SHORT[variant]) for variant in variants]
    if len(nets) > 1:
        handles += [mark(INK, *MARKS[net], net) for net in MARKS if net in nets]
        for handle in handles[len(variants) :]:
            handle.set_markerfacecolor("none")
    axes.figure.legend(
        handles=handles, loc="outside lower left", ncols=5 if len(handles) <= 5 else 3, fontsize=8, frameon=False,
        labelcolor=INK, handletextpad=0.2, columnspacing=1.2,
    )  # fmt: skip
