"""What a conversion did, layer by layer: as a table, as JSON, as figures, as one self-contained page."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnlayers.figures import parameters_figure, spectrum_figure
from tnlayers.files import write_atomic
from tnlayers.frontier import (
    COLUMNS,
    FrontierPoint,
    frontier_figure,
    frontier_table,
    point_from_dict,
    point_to_dict,
)
from tnlayers.page import (
    beside,
    by,
    compact,
    figure_png,
    gallery,
    html_page,
    html_table,
    inline_drawing,
    inline_image,
    number,
    paragraph,
    percent,
    printable,
    shorten,
    text_table,
    tiles,
    unfolded,
)
from tnlayers.report_rows import (
    LayerRow,
    is_slow,
    json_entry,
    json_integers,
    json_number,
    layer_table,
    plain,
    row_from_dict,
    row_to_dict,
)

VERSION = 1
PAGE_FIGURE = {"size": (3.7, 2.55), "dpi": 200}


@dataclass(frozen=True)
class Report:
    """What `tensorize` did: one row a layer, and the parameters of the whole model before and after.

    Args:
        rows: one a layer, in model order.
        params_dense: parameters of the whole model before (also of layers without a row).
        params: parameters of the whole model now.
        title: heading of the table and the page.
        budget: how ranks were chosen under a budget, a line a bond; empty without one.
        targeted: parameters of the weights of the targeted layers before and now; their ratio is "keep".
        frontier: error against size over several budgets, all from one calibration.
        error: predicted relative error of the model's output.
        measured: the same, measured on calibration batches.

    Raises:
        ValueError: `targeted` that is no pair of counts, or a frontier of a model without parameters.

    Example:
        >>> row = LayerRow("fc", "Linear", (8, 8), "kept", reason="excluded", params_dense=72, params=72)
        >>> report = Report((row,), 72, 72)
        >>> report.compression, Report.from_dict(report.to_dict()) == report
        (1.0, True)
    """

    rows: tuple[LayerRow, ...]
    params_dense: int
    params: int
    title: str = "tensorize"
    budget: str = ""
    targeted: tuple[int, int] | None = None
    frontier: tuple[FrontierPoint, ...] = ()
    error: float | None = None
    measured: float | None = None

    def __post_init__(self) -> None:
        if self.targeted is not None and (len(self.targeted) != 2 or min(self.targeted) < 0):
            raise ValueError(f"Report: targeted must be parameters before and now, both >= 0, got {self.targeted}")
        if self.frontier and self.params_dense < 1:
            raise ValueError(f"Report: a frontier needs a model with parameters, got params_dense={self.params_dense}")

    def __str__(self) -> str:
        return self.table()

    @property
    def compression(self) -> float:
        """`params / params_dense` of the whole model; 1 for a model without parameters."""
        return self.params / self.params_dense if self.params_dense else 1.0

    @property
    def keep(self) -> float | None:
        """Share of the parameters of the targeted layers' weights that is left; None if they are not known."""
        if self.targeted is None:
            return None
        before, now = self.targeted
        return now / before if before else 1.0

    @property
    def converted(self) -> tuple[LayerRow, ...]:
        """Rows of the layers that were converted."""
        return tuple(row for row in self.rows if row.status == "converted")

    def table(self, *, width: int = 120) -> str:
        """Table as text, at most `width` columns; the reasons of the layers that were kept stand below it.

        Example:
            >>> print(Report((), 10, 10))
            tensorize: 0 of 0 layers converted, parameters 10 -> 10 (100%)
            no layer of this model can be converted
        """
        first, *others = self._summary()
        lines = [printable(f"{self.title}: {first}"), *others, *self.budget.splitlines()[:1]]
        if not self.rows:
            return "\n".join([*lines, "no layer of this model can be converted"])
        lines += ["", text_table(*layer_table(self.rows), width=width)]
        reasons: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status == "kept":
                reasons.setdefault(printable(row.reason) or "no reason given", []).append(printable(row.label))
        if reasons:
            lines += ["", "kept dense:"]
        for reason, names in reasons.items():
            line, left = f"  {shorten(reason, width - 60)}: ", len(names)
            for name in names:
                piece = shorten(name, 40) + (", " if left > 1 else "")
                if len(line) + len(piece) > width - 14:
                    line += f"and {left} more" if left < len(names) else f"{left} layers"
                    break
                line, left = line + piece, left - 1
            lines.append(line)
        merged = [row for row in self.converted if row.floor is not None]
        if merged:
            lines += ["", FLOOR_NOTE + ":"]
        for row in merged[:FLOORS]:
            advice = "; a larger batch or smaller ranks would help" if is_slow(row) else ""
            lines.append(f"  {shorten(printable(row.label), 40)}: at least {row.floor:.2f} x the dense layer{advice}")
        if len(merged) > FLOORS:
            lines.append(f"  and {len(merged) - FLOORS} more")
        if self.frontier:
            lines += ["", "error against size:", text_table(COLUMNS, self._frontier(), width=width)]
        return "\n".join(lines)

    def to_dict(self, *, spectra: bool = True) -> dict[str, Any]:
        """Plain dict that JSON can hold; non-finite numbers become the strings "nan", "inf", "-inf".

        Args:
            spectra: whether to include the singular values and diagrams (they are most of the size).
        """
        later = {
            "targeted": None if self.targeted is None else [int(count) for count in self.targeted],
            "frontier": [point_to_dict(point) for point in self.frontier],
            "error": None if self.error is None else plain(float(self.error)),
            "measured": None if self.measured is None else plain(float(self.measured)),
        }
        return {
            "kind": "tnlayers report",
            "version": VERSION,
            "title": self.title,
            "params_dense": int(self.params_dense),
            "params": int(self.params),
            "compression": self.compression,
            "budget": self.budget,
            **{name: value for name, value in later.items() if value not in (None, [])},
            "rows": [row_to_dict(row, spectra=spectra) for row in self.rows],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not a report, another version, or entries that are missing, unknown or of the wrong type.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "tnlayers report":
            raise ValueError("Report.from_dict: expected a dict with kind = 'tnlayers report', as to_dict() returns")
        if data.get("version") != VERSION:
            raise ValueError(f"Report.from_dict: expected version = {VERSION}, got {data.get('version')!r}")
        rows = json_entry(data, "rows", list, "report")
        frontier = json_entry(data, "frontier", list, "report") if "frontier" in data else []
        targeted = None
        if data.get("targeted") is not None:
            targeted = tuple(json_integers(json_entry(data, "targeted", list, "report"), "targeted"))
        errors = {
            name: json_number(data[name], f"{name} of the report")
            for name in ("error", "measured")
            if data.get(name) is not None
        }
        return cls(
            rows=tuple(row_from_dict(entry, k) for k, entry in enumerate(rows)),
            params_dense=json_entry(data, "params_dense", int, "report"),
            params=json_entry(data, "params", int, "report"),
            title=json_entry(data, "title", str, "report"),
            budget=json_entry(data, "budget", str, "report") if "budget" in data else "",
            targeted=targeted,  # type: ignore[arg-type]  # the report itself checks that they are two
            frontier=tuple(point_from_dict(entry, k) for k, entry in enumerate(frontier)),
            **errors,
        )

    def to_json(self, path: str | os.PathLike[str] | None = None, *, spectra: bool = True) -> str:
        """JSON text; also written to `path`, whole or not at all."""
        text = json.dumps(self.to_dict(spectra=spectra), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text

    def figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write `parameters.png` and one `spectrum-NNN-NAME.png` a layer that has singular values.

        And `error-against-size.png` where there is a frontier.

        Args:
            folder: made if it does not exist.

        Returns:
            The files written, parameters first.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"Report.figures: expected a folder, got the file {folder}; give another name")
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        if self.rows:
            written.append(folder / "parameters.png")
            write_atomic(written[-1], figure_png(self._parameters()))
        if self.frontier:
            written.append(folder / "error-against-size.png")
            write_atomic(written[-1], figure_png(self._curve()))
        for k, row in enumerate(self.rows):
            if row.bonds:
                name = re.sub(r"[^A-Za-z0-9._-]+", "_", row.name).strip("._")[:60] or "layer"
                written.append(folder / f"spectrum-{k:03d}-{name}.png")
                figure = _spectra(row, title=f"{row.label}  {by(row.shape)}")
                write_atomic(written[-1], figure_png(figure))
        return written

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page; also written to `path`, whole or not at all."""
        sections = [("", tiles(self._tiles()))]
        if self.frontier:
            png = figure_png(self._curve(**CURVE_FIGURE), transparent=True)
            table = html_table(COLUMNS, self._frontier(), caption="Error against size")
            told = paragraph(FRONTIER_NOTE) + beside(inline_image(png, self._curve_told()), table)
            sections.append(("Error against size", told))
        if self.rows:
            sections.append(("Layers", html_table(*layer_table(self.rows), caption="Layers")))
            alt = f"Parameters of {len(self.rows)} layers, dense and now; the table holds the numbers."
            png = figure_png(self._parameters(), transparent=True)
            sections.append(("Parameters by layer", inline_image(png, alt)))
        else:
            sections.append(("Layers", paragraph("No layer of this model can be converted.")))
        if self.budget:
            first, *lines = self.budget.splitlines()
            sections.append(("Budget", paragraph(first) + unfolded("Every rank, and why", lines)))
        drawings: dict[str, list[LayerRow]] = {}
        for row in self.rows:
            if row.diagram:
                drawings.setdefault(row.diagram, []).append(row)
        if drawings:
            shown = [_drawing(svg, rows) for svg, rows in list(drawings.items())[:DRAWINGS]]
            sections.append(("Networks", paragraph(DIAGRAM_NOTE) + gallery(shown)))
        pictures = [_picture(row) for row in self.rows if row.bonds]
        if pictures:
            note = WEIGHTED_NOTE if any(row.weighted for row in self.rows) else SPECTRUM_NOTE
            sections.append(("Singular values", paragraph(note) + gallery(pictures)))
        text = html_page(self.title, sections, lead="; ".join(self._summary("\u2192")))
        if path is not None:
            write_atomic(path, text)
        return text

    def _summary(self, arrow: str = "->") -> list[str]:
        """What was done, in one line; in two where shares of the targeted layers and of the model must not mix."""
        done = f"{len(self.converted)} of {len(self.rows)} layers converted"
        sizes = f"parameters {self.params_dense:,} {arrow} {self.params:,}"
        errors = [
            f"{word} error {number(value)}"
            for word, value in (("predicted", self.error), ("measured", self.measured))
            if value is not None
        ]
        if self.keep is None:
            return [", ".join([f"{done}, {sizes} ({percent(self.params, self.params_dense)})", *errors])]
        shares = f"targeted layers keep {_share(self.keep)}, whole model {_share(self.compression)}"
        return [shares, ", ".join([done, sizes, *errors])]

    def _tiles(self) -> list[tuple[str, str, str]]:
        smaller = f"{1 / self.compression:.3g}\u00d7 smaller" if 0 < self.compression < 1 else "no smaller"
        flops_dense, flops = sum(r.flops_dense for r in self.rows), sum(r.flops for r in self.rows)
        sizes = self._arrow(self.params_dense, self.params)
        if self.targeted is None or self.keep is None:
            top = [
                ("Parameters", percent(self.params, self.params_dense), sizes),
                ("Size", smaller, "the whole model, parameters before / now"),
            ]
        else:
            top = [
                ("Keep", _share(self.keep), f"{self._arrow(*self.targeted)}, weights of the targeted layers"),
                ("Whole model", _share(self.compression), f"{sizes} parameters, {smaller}"),
            ]
        if self.error is not None:
            told = "" if self.measured is None else f"; measured {number(self.measured)}"
            top.append(("Predicted error", number(self.error), f"of the model's output{told}"))
        elif self.measured is not None:
            top.append(("Measured error", number(self.measured), "of the model's output"))
        top += [
            ("FLOPs", percent(flops, flops_dense), f"{self._arrow(flops_dense, flops)}, layers listed, one sample"),
            ("Converted", f"{len(self.converted)} of {len(self.rows)}", "layers"),
        ]
        weighted = [(row.weighted_error, row.label) for row in self.rows if row.weighted_error is not None]
        errors = weighted or [(row.error, row.label) for row in self.rows if row.error is not None]
        if errors:
            worst = max(errors, key=lambda e: math.inf if math.isnan(e[0]) else e[0])
            top.append(("Largest weighted error" if weighted else "Largest error", number(worst[0]), worst[1]))
        return top

    def _frontier(self) -> Any:
        return frontier_table(self.frontier, self.params_dense, chosen=(self.keep, self.params, self.error))

    def _curve(self, **look: Any) -> Any:
        chosen = None if self.error is None else (self.params, self.error)
        return frontier_figure(self.frontier, self.params_dense, chosen=chosen, measured=self.measured, **look)

    def _curve_told(self) -> str:
        """The curve in words."""
        points = [f"{cells[0].text}: {cells[1].text} ({cells[3].text}), {cells[2].text}" for cells in self._frontier()]
        measured = "" if self.measured is None else f" Measured error at what was chosen: {number(self.measured)}."
        return f"Parameters of the whole model and predicted error. {'; '.join(points)}.{measured}"

    def _parameters(self) -> Any:
        names = [row.label for row in self.rows]
        return parameters_figure(names, [r.params_dense for r in self.rows], [r.params for r in self.rows])

    @staticmethod
    def _arrow(before: int, after: int) -> str:
        return f"{compact(before)} \u2192 {compact(after)}"


SPECTRUM_NOTE = (
    "Relative to the largest, one line a bond, both axes logarithmic. The dashed line is the rank kept; what lies to "
    "its right is discarded."
)

WEIGHTED_NOTE = (
    "Two lines a bond, both axes logarithmic: singular values of the weight as the data see it (weighted by "
    "activations, and by gradients where these were collected), by which ranks are chosen, and of the weight itself "
    "(unweighted). Each is relative to its largest. The dashed line is the rank kept; what lies to its right is "
    "discarded. The dotted line is the break-even rank: beyond it the dense weight is smaller."
)
FRONTIER_NOTE = (
    "Predicted relative error of the model's output against parameters of the whole model, every budget from the one "
    "calibration. A budget keeps a share of the targeted layers' weights; the whole model shrinks by less, since what "
    "is not targeted stays."
)
CURVE_FIGURE = {"size": (5.6, 3.5), "dpi": 200}

DIAGRAM_NOTE = (
    "A disk is a core, a line a bond with its rank, a red leg a row mode, a green leg a column mode; a black dot joins "
    "more than two. Layers with the same network share a picture."
)
DRAWINGS = 24
"""Distinct networks that a page draws."""

FLOOR_NOTE = "merged at every training step, which saves memory and not time"
FLOORS = 12
"""Layers whose floor is listed below the table."""


def _share(ratio: float) -> str:
    """`70.0 %`: one decimal, more where little is left."""
    value = 100 * ratio
    return f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2g} %"


def _spectra(row: LayerRow, **look: Any) -> Any:
    """The figure of a row; a weighted one shows the break-even rank as well."""
    cuts = {bond: cut for bond, cut in row.cuts.items() if bond in row.bonds}
    even = row.break_even_rank if row.weighted else None
    return spectrum_figure(row.spectra, cuts, weighted=row.weighted, break_even=even, **look)


def _picture(row: LayerRow) -> tuple[str, str, str]:
    bonds = [_told(row, bond) for bond in row.bonds]
    if row.weighted and row.break_even_rank is not None:
        bonds.append(f"break-even rank {row.break_even_rank}")
    about = [by(row.shape), row.format]
    if row.weighted_error is not None:
        about.append(f"weighted error {number(row.weighted_error)}")
    if row.share is not None:
        about.append(f"{percent(row.share, 1)} of the squared error")
    alt = f"Singular values of {row.label}. {'; '.join(bonds)}."
    return row.label, ", ".join(about), inline_image(figure_png(_spectra(row, **PAGE_FIGURE), transparent=True), alt)


def _told(row: LayerRow, bond: str) -> str:
    """One bond in words: how many are kept, and where there are two spectra, how large each is there."""
    count = max(len(kind.get(bond, ())) for kind in (row.spectra, row.weighted))
    if bond not in row.cuts:
        return f"bond {bond}: {count} values"
    told, cut = f"bond {bond}: {row.cuts[bond]} of {count} kept", row.cuts[bond]
    if not row.weighted:
        return told
    levels = []
    for word, kind in (("weighted", row.weighted), ("unweighted", row.spectra)):
        values = sorted(kind.get(bond, ()), reverse=True)
        if 0 < cut < len(values) and values[0] > 0:
            levels.append(f"{number(values[cut] / values[0])} {word}")
    return f"{told}, the first discarded is {' and '.join(levels)}, relative to the largest" if levels else told


def _drawing(svg: str, rows: list[LayerRow]) -> tuple[str, str, str]:
    first = rows[0]
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    alt = f"Diagram of the network of {first.label}: {first.format}, ranks {by(first.ranks)}."
    return first.label + more, f"{by(first.shape)}, {first.format}", inline_drawing(svg, alt)
