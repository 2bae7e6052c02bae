"""The page of a compressed grid: what it cost, what it looks like, and what other ranks would give."""

from __future__ import annotations

from math import isfinite, prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cross_approx import Source
from decompositions.formats.gauge import bond_singular_values
from decompositions.formats.network import Network
from tnlayers.figures import GRID, INK, LINES, MUTED, logarithmic, new_axes
from tnlayers.grids.store import Grid
from tnlayers.page import (
    Cell,
    Column,
    beside,
    by,
    compact,
    figure_png,
    gallery,
    html_page,
    html_table,
    inline_image,
    number,
    paragraph,
    percent,
    printable,
    tiles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS = 512
"""Longer sides of a slice are strided."""


def grid_page(grid: Grid, about: dict[str, Any], source: Source) -> str:
    """One self-contained page: numbers side by side, slices of the original, the decoded grid and their difference,
    and relative error against compression ratio.

    Reads the slices from the source (at most three planes through its middle).

    Args:
        grid: as read back from its file.
        about: what `grid.json` holds.
        source: the original.
    """
    measured = about["measured"]
    slices = plane_pictures(grid, source)
    curve = curve_figure(grid, about)
    lead = (
        f"{about['source']['path']}: {by(grid.shape)} {about['source']['dtype']} as "
        f"{'QTT' if grid.quantization else type(grid.network).__name__}, coding {grid.coding}, method {about['method']}"
    )
    sections = [("", tiles(_tiles(grid, about)))]
    if slices:
        sections.append(("Slices", gallery_wide(slices)))
    image = _image(curve, "relative error against compression ratio")
    sections.append(("Error against ratio", beside(image, _ranks(grid, about))))
    sections.append(("How it was made", _how(grid, about)))
    where = "all entries" if measured["whole"] else f"{measured['entries']} entries drawn uniformly"
    sections.append(("Honest numbers", paragraph(_honest(about, where))))
    return html_page(f"Grid {by(grid.shape)}", sections, lead=printable(lead))


def gallery_wide(pictures: list[tuple[str, str, str]]) -> str:
    """Pictures one below the other."""
    return "".join(gallery([picture]).replace('class="gallery"', 'class="beside"') for picture in pictures)


def _tiles(grid: Grid, about: dict[str, Any]) -> list[tuple[str, str, str]]:
    measured, read = about["measured"], about["read"]
    span = f"range {number(measured['low'])} to {number(measured['high'])}"
    target = about["target"]
    met = "met" if target["met"] else "MISSED"
    psnr = decibels(measured["psnr"], measured["max_error"])
    fore = measured["foreground_psnr"]
    return [
        ("smaller", f"{about['ratio']:.3g}x", f"{compact(grid.nbytes)} bytes for {compact(about['source']['bytes'])}"),
        ("relative error", number(measured["relative_error"]), f"target {target['kind']} {target['value']:g}: {met}"),
        ("PSNR", psnr, "no foreground" if fore is None else f"foreground {fore:.2f} dB"),
        ("largest error", number(measured["max_error"]), span),
        ("entries asked for", compact(read["evaluations"]), f"{percent(read['evaluations'], prod(grid.shape))} of all"),
        ("read", f"{compact(read['bytes_read'])}B", f"{read['chunks_read']} chunks" if read["chunks_read"] else ""),
    ]


def _honest(about: dict[str, Any], where: str) -> str:
    measured = about["measured"]
    return (
        f"Measured on the file as read back, on {where}: relative error {number(measured['relative_error'])}, PSNR "
        f"{decibels(measured['psnr'], measured['max_error'])} over the range of the data. A PSNR looks good on a "
        "volume that is mostly empty; the relative error, and the PSNR of the foreground (entries other than "
        f"{number(measured['background'])}), do not hide that."
    )


def decibels(psnr: float | None, max_error: float = 0.0) -> str:
    """A PSNR as text; None where it is not finite: nothing differs, or one value has no range."""
    if psnr is None:
        return "none (no range)" if max_error else "exact"
    return f"{psnr:.2f} dB"


def _how(grid: Grid, about: dict[str, Any]) -> str:
    read = about["read"]
    rows = [
        ("method", f"{about['method']}: {about['reason']}"),
        ("error of the network", f"{number(float(about['network_error']))} on {compact(about['held_out'])} entries"),
        ("error aimed at", number(float(about["promised"]))),
        ("entries asked for", f"{read['evaluations']} ({percent(read['evaluations'], prod(grid.shape))})"),
        ("chunks read", str(read["chunks_read"] or "no chunks")),
        ("bytes read", f"{read['bytes_read']} ({percent(read['bytes_read'], about['source']['bytes'])} of the source)"),
        ("ranks", ", ".join(map(str, grid.network.ranks))),
        ("bits an entry", number(8 * grid.nbytes / prod(grid.shape))),
        ("seconds", ", ".join(f"{name} {value:.2g}" for name, value in about["seconds"].items())),
    ]
    return html_table([Column("what"), Column("value", flexible=True)], [[Cell(a), Cell(b)] for a, b in rows])


def plane_pictures(grid: Grid, source: Source) -> list[tuple[str, str, str]]:
    """(caption, remark, image) of planes through the middle: original, decoded, difference."""
    order = len(grid.shape)
    if order < 2:
        return []
    longest = sorted(range(order), key=lambda axis: -grid.shape[axis])[:3]
    pairs = [(a, b) for k, a in enumerate(sorted(longest)) for b in sorted(longest)[k + 1 :]]
    planes: list[tuple[tuple[int, int], tuple[slice, ...], np.ndarray, np.ndarray]] = []
    for pair in pairs:
        box = tuple(
            slice(0, n, max(1, -(-n // PIXELS))) if axis in pair else slice(n // 2, n // 2 + 1)
            for axis, n in enumerate(grid.shape)
        )
        shape = [len(range(*box[axis].indices(grid.shape[axis]))) for axis in pair]
        both = (source.slab(box).cpu(), grid.block(box))
        exact, made = (values.double().reshape(shape).numpy() for values in both)
        planes.append((pair, box, exact, made))
    low = min(float(exact.min()) for *_, exact, _ in planes)
    high = max(float(exact.max()) for *_, exact, _ in planes)
    worst = max(float(np.abs(made - exact).max()) for *_, exact, made in planes)
    found = []
    for pair, box, exact, made in planes:
        fixed = ", ".join(f"axis {axis} = {part.start}" for axis, part in enumerate(box) if axis not in pair)
        figure = plane_figure(exact, made, (low, high), worst, pair)
        error = float(np.linalg.norm(made - exact)) / (float(np.linalg.norm(exact)) or 1.0)
        remark = (
            f"{fixed}; relative error of this slice {number(error)}" if fixed else f"relative error {number(error)}"
        )
        found.append((f"axes {pair[0]} and {pair[1]}", remark, _image(figure, f"slice over axes {pair}", picture=True)))
    return found


def plane_figure(
    exact: np.ndarray, made: np.ndarray, limits: tuple[float, float], worst: float, axes: tuple[int, int]
) -> Figure:
    """Original and decoded slice in one colour scale, their difference in another, symmetric about 0.

    Example:
        >>> import numpy as np
        >>> len(plane_figure(np.eye(3), np.eye(3), (0.0, 1.0), 0.0, (0, 1)).axes)
        5
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = exact.shape
    turned = rows > 1.4 * columns  # tall slices lie on their side
    panels = [x.T if turned else x for x in (exact, made, made - exact)]
    ratio = min(max(panels[0].shape[0] / panels[0].shape[1], 0.15), 1.4)
    figure = Figure(figsize=(11.6, 3.35 * ratio + 0.75), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places: Any = figure.subplots(1, 3)
    low, high = limits
    bound = worst or 1.0
    titles = ("original", "decoded", "decoded - original")
    shown = []
    for k, (place, panel, title) in enumerate(zip(places, panels, titles, strict=True)):
        scale: dict[str, Any] = (
            {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound} if k == 2 else {"cmap": "gray", "vmin": low, "vmax": high}
        )
        scale["aspect"] = "auto" if ratio in (0.15, 1.4) else "equal"
        shown.append(place.imshow(panel, interpolation="nearest", **scale))
        place.set_title(title, color=INK, fontsize=10, loc="left")
        place.tick_params(colors=MUTED, labelsize=8, width=0.6, length=3)
        up, across = (axes[1], axes[0]) if turned else axes
        place.set_xlabel(f"axis {across}", color=MUTED, fontsize=8.5)
        place.set_ylabel(f"axis {up}" if k == 0 else "", color=MUTED, fontsize=8.5)
        for spine in place.spines.values():
            spine.set_color("#b6bfca")
    for bar in (
        figure.colorbar(shown[0], ax=list(places[:2]), pad=0.015, fraction=0.04),
        figure.colorbar(shown[2], ax=places[2], pad=0.03, fraction=0.08),
    ):
        bar.ax.tick_params(colors=MUTED, labelsize=8, width=0.6, length=3)
        bar.outline.set_color("#b6bfca")
    return figure


def rank_curve(network: Network, error: float) -> list[tuple[int, int, float]]:
    """(largest rank, numbers, bound of the relative error) if every bond were cut to that rank, from the spectra.

    The squared tails of all bonds and the error of the network itself add up (TT-SVD, HOSVD): a bound, and close to
    what a new decomposition of that rank gives. Nothing is decomposed.

    Example:
        >>> import torch
        >>> from decompositions import TT
        >>> [row[:2] for row in rank_curve(TT.random(row_modes=(8, 8), rank=2), 0.0)]
        [(1, 16), (2, 32)]
    """
    net = network.to(torch.float64)
    spectra = bond_singular_values(net)
    if not spectra:
        return [(1, sum(core.numel() for core in net.cores), error)]
    whole = max(float(values.square().sum()) for values in spectra.values())
    most = max(len(values) for values in spectra.values())
    ranks = sorted({max(1, round(most ** (k / 11))) for k in range(12)} | {most})
    found = []
    for rank in ranks:
        tails = sum(float(values[rank:].square().sum()) for values in spectra.values())
        count = sum(
            prod(min(n, rank) if label in spectra else n for n, label in zip(core.shape, leg, strict=True))
            for core, leg in zip(net.cores, net.legs, strict=True)
        )
        found.append((rank, count, min(1.0, sqrt(error**2 + tails / whole)) if whole else 0.0))
    return found


def curve_figure(grid: Grid, about: dict[str, Any]) -> Figure:
    """Relative error against compression ratio: plain float32 factors of lower ranks as a line, the file as a mark."""
    network_error = float(about["network_error"])
    rows = rank_curve(grid.network, network_error if isfinite(network_error) else 0.0)
    stored = about["source"]["bytes"]
    measured = max(about["measured"]["relative_error"], 1e-16)
    x, y = [stored / (4 * count) for _, count, _ in rows], [max(error, 1e-16) for *_, error in rows]
    figure, axes = new_axes((6.4, 4.0), 160)
    logarithmic(axes, "x", min([*x, about["ratio"]]), max([*x, about["ratio"]]), room=0.06)
    logarithmic(axes, "y", min([*y, measured]), max([*y, measured, 1e-15]), room=0.08)
    axes.grid(True, color=GRID, linewidth=0.6)
    plain, this = "float32 factors of lower ranks (from the spectra)", f"this file, coding {grid.coding} (measured)"
    axes.plot(x, y, color=LINES[0], linewidth=1.9, marker="o", markersize=3.4, label=plain)
    axes.plot([about["ratio"]], [measured], "D", color=LINES[1], markersize=8, markeredgecolor="white", label=this)
    for (rank, _, _), at, error in zip(rows, x, y, strict=True):
        axes.annotate(
            str(rank), (at, error), xytext=(-3, 4), textcoords="offset points", ha="right", fontsize=7.5, color=MUTED
        )
    label = f"compression ratio, bytes of the {about['source']['dtype']} source / bytes"
    axes.set_xlabel(label, color=MUTED, fontsize=8.5)
    axes.set_ylabel("relative error", color=MUTED, fontsize=8.5)
    axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor=INK)
    return figure


def _ranks(grid: Grid, about: dict[str, Any]) -> str:
    stored = about["source"]["bytes"]
    network_error = float(about["network_error"])
    columns = [
        Column("rank at most", "of every bond", numeric=True),
        Column("numbers", "of all cores", numeric=True),
        Column("ratio", "bytes of the source over those of float32 factors", numeric=True),
        Column("relative error", "bound, from the singular values of the network", numeric=True),
    ]
    rows = [
        [
            Cell(text, value)
            for text, value in (
                (str(rank), rank),
                (compact(count), count),
                (compact(stored / (4 * count)), stored / (4 * count)),
                (number(error), error),
            )
        ]
        for rank, count, error in rank_curve(grid.network, network_error if isfinite(network_error) else 0.0)
    ]
    return html_table(columns, rows, caption="ranks")


def _image(figure: Figure, alt: str, *, picture: bool = False) -> str:
    """An image of the page; a picture of data keeps its colours where the page is dark."""
    image = inline_image(figure_png(figure, transparent=not picture), alt)
    return image.replace("<img ", '<img style="filter:none" ') if picture else image
