"""What a conversion did, layer by layer: as a table, as JSON, as figures, as one self-contained page."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tnlayers.figures import parameters_figure, spectrum_figure
from tnlayers.files import write_atomic
from tnlayers.page import (
    NOTHING,
    Cell,
    Column,
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

VERSION = 1
STATUSES = ("converted", "kept")
PAGE_FIGURE = {"size": (3.7, 2.55), "dpi": 200}


@dataclass(frozen=True)
class LayerRow:
    """One layer of a converted model.

    Args:
        name: dotted name of the module.
        kind: its class, "Linear".
        shape: of the dense weight.
        status: "converted" or "kept".
        reason: why it was kept; empty if converted.
        format: "TTMatrix"; "dense" if kept.
        ranks: of the bonds.
        break_even_rank: the largest rank at which this format has fewer parameters than the dense weight.
        params_dense: parameters before, weight and bias.
        params: parameters now, weight and bias.
        flops_dense: multiplications and additions of one forward pass for one sample, before.
        flops: the same, now.
        error: relative Frobenius error of the weight; None if nothing was approximated.
        output_bound: bound of `‖y - ŷ‖ / ‖x‖`.
        spectra: bond -> singular values of the dense weight's unfolding there; may be empty.
        cuts: bond -> rank kept.
        floor: least training time relative to the dense layer, where the weight is merged at every step; else None.
        diagram: the network as SVG (`decompositions.draw`); may be empty.

    Raises:
        ValueError: a status that is neither, or a negative count.

    Example:
        >>> LayerRow("fc", "Linear", (8, 8), "converted", format="LowRank", ranks=(2,), params_dense=72, params=40).name
        'fc'
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    status: str
    reason: str = ""
    format: str = "dense"
    ranks: tuple[int, ...] = ()
    break_even_rank: int | None = None
    params_dense: int = 0
    params: int = 0
    flops_dense: int = 0
    flops: int = 0
    error: float | None = None
    output_bound: float | None = None
    spectra: dict[str, tuple[float, ...]] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    floor: float | None = None
    diagram: str = ""

    @property
    def label(self) -> str:
        """The name to show: "(model)" for the model itself, which has none."""
        return self.name or "(model)"

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"LayerRow: status must be one of {STATUSES}, got {self.status!r} for {self.name!r}")
        for count in ("params_dense", "params", "flops_dense", "flops"):
            if getattr(self, count) < 0:
                raise ValueError(f"LayerRow: {count} must be >= 0, got {getattr(self, count)} for {self.name!r}")


@dataclass(frozen=True)
class Report:
    """What `tensorize` did: one row a layer, and the parameters of the whole model before and after.

    Args:
        rows: one a layer, in model order.
        params_dense: parameters of the whole model before (also of layers without a row).
        params: parameters of the whole model now.
        title: heading of the table and the page.
        budget: how ranks were chosen under a budget, a line a bond; empty without one.

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

    def __str__(self) -> str:
        return self.table()

    @property
    def compression(self) -> float:
        """`params / params_dense` of the whole model; 1 for a model without parameters."""
        return self.params / self.params_dense if self.params_dense else 1.0

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
        lines = [printable(f"{self.title}: {self._summary()}"), *self.budget.splitlines()[:1]]
        if not self.rows:
            return "\n".join([*lines, "no layer of this model can be converted"])
        lines += ["", text_table(_COLUMNS, [_cells(row) for row in self.rows], width=width)]
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
            advice = "; a larger batch or smaller ranks would help" if _is_slow(row) else ""
            lines.append(f"  {shorten(printable(row.label), 40)}: at least {row.floor:.2f} x the dense layer{advice}")
        if len(merged) > FLOORS:
            lines.append(f"  and {len(merged) - FLOORS} more")
        return "\n".join(lines)

    def to_dict(self, *, spectra: bool = True) -> dict[str, Any]:
        """Plain dict that JSON can hold; non-finite numbers become the strings "nan", "inf", "-inf".

        Args:
            spectra: whether to include the singular values and diagrams (they are most of the size).
        """
        rows = []
        for row in self.rows:
            entry: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(LayerRow)}
            for name in ("params_dense", "params", "flops_dense", "flops"):
                entry[name] = int(entry[name])
            if row.break_even_rank is not None:
                entry["break_even_rank"] = int(row.break_even_rank)
            entry["shape"], entry["ranks"] = [int(n) for n in row.shape], [int(r) for r in row.ranks]
            for name in ("error", "output_bound", "floor"):
                entry[name] = plain(entry[name])
            entry["diagram"] = row.diagram if spectra else ""
            entry["cuts"] = {str(bond): int(cut) for bond, cut in row.cuts.items()}
            entry["spectra"] = (
                {str(bond): [plain(float(v)) for v in values] for bond, values in row.spectra.items()}
                if spectra
                else {}
            )
            rows.append(entry)
        return {
            "kind": "tnlayers report",
            "version": VERSION,
            "title": self.title,
            "params_dense": int(self.params_dense),
            "params": int(self.params),
            "compression": self.compression,
            "budget": self.budget,
            "rows": rows,
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
        rows = _entry(data, "rows", list, "report")
        return cls(
            rows=tuple(_row(entry, k) for k, entry in enumerate(rows)),
            params_dense=_entry(data, "params_dense", int, "report"),
            params=_entry(data, "params", int, "report"),
            title=_entry(data, "title", str, "report"),
            budget=_entry(data, "budget", str, "report") if "budget" in data else "",
        )

    def to_json(self, path: str | os.PathLike[str] | None = None, *, spectra: bool = True) -> str:
        """JSON text; also written to `path`, whole or not at all."""
        text = json.dumps(self.to_dict(spectra=spectra), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text

    def figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write `parameters.png` and one `spectrum-NNN-NAME.png` a layer that has singular values.

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
        for k, row in enumerate(self.rows):
            if row.spectra:
                name = re.sub(r"[^A-Za-z0-9._-]+", "_", row.name).strip("._")[:60] or "layer"
                written.append(folder / f"spectrum-{k:03d}-{name}.png")
                figure = spectrum_figure(row.spectra, _cuts(row), f"{row.label}  {by(row.shape)}")
                write_atomic(written[-1], figure_png(figure))
        return written

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One self-contained page; also written to `path`, whole or not at all."""
        smaller = f"{1 / self.compression:.3g}\u00d7 smaller" if 0 < self.compression < 1 else "no smaller"
        flops_dense, flops = sum(r.flops_dense for r in self.rows), sum(r.flops for r in self.rows)
        top = [
            ("Parameters", percent(self.params, self.params_dense), self._arrow(self.params_dense, self.params)),
            ("Size", smaller, "the whole model, parameters before / now"),
            ("FLOPs", percent(flops, flops_dense), f"{self._arrow(flops_dense, flops)}, layers listed, one sample"),
            ("Converted", f"{len(self.converted)} of {len(self.rows)}", "layers"),
        ]
        errors = [(row.error, row.label) for row in self.rows if row.error is not None]
        if errors:
            worst = max(errors, key=lambda e: math.inf if math.isnan(e[0]) else e[0])
            top.append(("Largest error", number(worst[0]), worst[1]))
        sections = [("", tiles(top))]
        if self.rows:
            sections.append(("Layers", html_table(_COLUMNS, [_cells(row) for row in self.rows], caption="Layers")))
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
        pictures = [_picture(row) for row in self.rows if row.spectra]
        if pictures:
            sections.append(("Singular values", paragraph(SPECTRUM_NOTE) + gallery(pictures)))
        text = html_page(self.title, sections, lead=self._summary("\u2192"))
        if path is not None:
            write_atomic(path, text)
        return text

    def _summary(self, arrow: str = "->") -> str:
        return (
            f"{len(self.converted)} of {len(self.rows)} layers converted, parameters {self.params_dense:,} {arrow} "
            f"{self.params:,} ({percent(self.params, self.params_dense)})"
        )

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

DIAGRAM_NOTE = (
    "A disk is a core, a line a bond with its rank, a red leg a row mode, a green leg a column mode; a black dot joins "
    "more than two. Layers with the same network share a picture."
)
DRAWINGS = 24
"""Distinct networks that a page draws."""

FLOOR_NOTE = "merged at every training step, which saves memory and not time"
FLOORS = 12
"""Layers whose floor is listed below the table."""

_COLUMNS = (
    Column("layer", "Dotted name of the module.", flexible=True),
    Column("kind", "Class of the layer."),
    Column("shape", "Shape of the dense weight."),
    Column("format", "Format of the weight now; dense if the layer was kept."),
    Column("ranks", "Rank of every bond of the network."),
    Column("even", "Largest rank at which this format has fewer parameters than the dense weight.", numeric=True),
    Column("dense", "Parameters before, weight and bias.", numeric=True),
    Column(
        "now",
        "Parameters now, weight and bias; LowRank counts merged, r (out + in).",
        numeric=True,
    ),
    Column("ratio", "Parameters now, in percent of before.", numeric=True),
    Column("FLOPs", "FLOPs of one forward pass of one sample, in percent of before.", numeric=True),
    Column("error", "Relative Frobenius error of the weight.", numeric=True),
    Column("bound", "Bound of the output error: no input x changes its output by more than bound × ‖x‖.", numeric=True),
    Column(
        "floor",
        "Least training time of a weight that is merged at every step, relative to the dense layer.",
        numeric=True,
        html_only=True,
    ),
    Column("why kept", "Why the layer was left dense.", html_only=True),
)


def _cells(row: LayerRow) -> list[Cell]:
    kept = row.status == "kept"
    shape, ranks = by(row.shape), ",".join(map(str, row.ranks))
    ratio = row.params / row.params_dense if row.params_dense else None
    work = row.flops / row.flops_dense if row.flops_dense else None
    return [
        Cell(row.label, row.label),
        Cell(shorten(row.kind, 15), row.kind),
        Cell(shorten(shape, 16), math.prod(row.shape)),
        Cell(shorten(row.format, 13), row.format, "quiet" if kept else ""),
        Cell(shorten(ranks, 16) or NOTHING, max(row.ranks, default=None)),
        Cell(NOTHING if row.break_even_rank is None else str(row.break_even_rank), row.break_even_rank),
        Cell(compact(row.params_dense), row.params_dense),
        Cell(compact(row.params), row.params),
        Cell(percent(row.params, row.params_dense), ratio, _judge(ratio)),
        Cell(percent(row.flops, row.flops_dense), work, _judge(work)),
        Cell(number(row.error), row.error, _unsound(row.error)),
        Cell(number(row.output_bound), row.output_bound, _unsound(row.output_bound)),
        Cell(NOTHING if row.floor is None else f"{row.floor:.2f}", row.floor, "bad" if _is_slow(row) else ""),
        Cell(row.reason, row.reason or None, "wrap quiet"),
    ]


def _judge(ratio: float | None) -> str:
    if ratio is None or ratio == 1:
        return "quiet"
    return "good" if ratio < 1 else "bad"


def _is_slow(row: LayerRow) -> bool:
    """Whether the bond in the middle exceeds a third of the batch."""
    return row.floor is not None and row.floor > 4 / 3


def _unsound(value: float | None) -> str:
    return "" if value is None or math.isfinite(value) else "bad"


def _cuts(row: LayerRow) -> dict[str, int]:
    return {bond: cut for bond, cut in row.cuts.items() if bond in row.spectra}


def _picture(row: LayerRow) -> tuple[str, str, str]:
    cuts = _cuts(row)
    bonds = [
        f"bond {bond}: {cuts[bond]} of {len(values)} kept" if bond in cuts else f"bond {bond}: {len(values)} values"
        for bond, values in row.spectra.items()
    ]
    figure = spectrum_figure(row.spectra, cuts, **PAGE_FIGURE)  # type: ignore[arg-type]
    alt = f"Singular values of {row.label}. {'; '.join(bonds)}."
    return row.label, f"{by(row.shape)}, {row.format}", inline_image(figure_png(figure, transparent=True), alt)


def _drawing(svg: str, rows: list[LayerRow]) -> tuple[str, str, str]:
    first = rows[0]
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    alt = f"Diagram of the network of {first.label}: {first.format}, ranks {by(first.ranks)}."
    return first.label + more, f"{by(first.shape)}, {first.format}", inline_drawing(svg, alt)


def plain(value: float | None) -> float | str | None:
    """A number that JSON can hold: non-finite ones by name.

    Example:
        >>> plain(0.5), plain(float("nan"))
        (0.5, 'nan')
    """
    return value if value is None or math.isfinite(value) else str(float(value))


def _number(value: Any, where: str) -> float:
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Report.from_dict: expected a number, got {value!r} in {where}")
    return float(value)


def _entry(data: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in data:
        raise ValueError(f"Report.from_dict: every {where} needs {name!r}, got {sorted(data)}")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"Report.from_dict: {name} of a {where} must be a {kind.__name__}, got {value!r}")
    return value


def _row(data: Any, position: int) -> LayerRow:
    where = f"row ({position})"
    if not isinstance(data, Mapping):
        raise ValueError(f"Report.from_dict: {where} must be a dict, got {data!r}")
    known = {f.name for f in fields(LayerRow)}
    if set(data) - known:
        raise ValueError(f"Report.from_dict: {where} has unknown entries {sorted(map(str, set(data) - known))}")
    values: dict[str, Any] = {name: _entry(data, name, str, where) for name in _STRINGS}
    values |= {name: _entry(data, name, int, where) for name in _COUNTS}
    for name in ("shape", "ranks"):
        values[name] = tuple(_integers(_entry(data, name, list, where), f"{name} of {where}"))
    for name in ("error", "output_bound", "floor"):
        value = data.get(name)
        values[name] = None if value is None else _number(value, f"{name} of {where}")
    even = data.get("break_even_rank")
    values["break_even_rank"] = None if even is None else _integers([even], f"break_even_rank of {where}")[0]
    diagram = _entry(data, "diagram", str, where) if "diagram" in data else ""
    if diagram and not diagram.startswith("<svg"):
        raise ValueError(f"Report.from_dict: diagram of {where} must be an SVG document, got {diagram[:20]!r}")
    values["diagram"] = diagram
    values["spectra"] = {
        str(bond): tuple(_number(v, f"spectra of {where}") for v in _entry(data["spectra"], bond, list, where))
        for bond in _entry(data, "spectra", dict, where)
    }
    cuts = _entry(data, "cuts", dict, where)
    values["cuts"] = dict(zip(map(str, cuts), _integers(list(cuts.values()), f"cuts of {where}"), strict=True))
    return LayerRow(**values)


def _integers(values: list[Any], where: str) -> list[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"Report.from_dict: expected ints, got {value!r} in {where}")
    return values


_STRINGS = ("name", "kind", "status", "reason", "format")
_COUNTS = ("params_dense", "params", "flops_dense", "flops")
