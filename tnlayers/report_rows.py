"""What a report holds: one row a layer, its columns, and its JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tnlayers.page import NOTHING, Cell, Column, by, compact, number, percent, shorten

STATUSES = ("converted", "kept")
ROUNDING = 1e-6
"""What sums of shares may miss 1 by."""


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
        weighted: bond -> singular values of the weighted weight `L W R^H` there, R of the activations and L of the
            gradients; may be empty, bonds as in `spectra`.
        weighted_error: relative error of the weight in that norm, `‖L (W - W') R^H‖ / ‖L W R^H‖`.
        share: of this layer in the predicted squared error of the model, 0 to 1.

    Raises:
        ValueError: a status that is neither, a negative count, or a share outside 0 to 1.

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
    weighted: dict[str, tuple[float, ...]] = field(default_factory=dict)
    weighted_error: float | None = None
    share: float | None = None

    @property
    def label(self) -> str:
        """The name to show: "(model)" for the model itself, which has none."""
        return self.name or "(model)"

    @property
    def bonds(self) -> tuple[str, ...]:
        """Bonds with singular values, weighted or not."""
        return tuple(dict.fromkeys([*self.spectra, *self.weighted]))

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"LayerRow: status must be one of {STATUSES}, got {self.status!r} for {self.name!r}")
        for count in ("params_dense", "params", "flops_dense", "flops"):
            if getattr(self, count) < 0:
                raise ValueError(f"LayerRow: {count} must be >= 0, got {getattr(self, count)} for {self.name!r}")
        if self.share is not None and not math.isnan(self.share) and not -ROUNDING <= self.share <= 1 + ROUNDING:
            raise ValueError(f"LayerRow: share must be in 0 to 1, got {self.share} for {self.name!r}")


# --- columns ---

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
    Column("weighted", "Relative error of the weight in the norm of activations (and gradients).", numeric=True),
    Column("share", "Share of the layer in the predicted squared error of the model.", numeric=True),
    Column("bound", "Bound of the output error: no input x changes its output by more than bound × ‖x‖.", numeric=True),
    Column(
        "floor",
        "Least training time of a weight that is merged at every step, relative to the dense layer.",
        numeric=True,
        html_only=True,
    ),
    Column("why kept", "Why the layer was left dense.", html_only=True),
)
_CALIBRATED = ("weighted", "share")
_MAY_LACK = ("floor", "why kept")
"""Columns that such a table has only if they say something."""
_GIVE_WAY = ("kind", "FLOPs", "bound")
"""Columns that the text table leaves to the page when it needs the room for weighted errors."""


def layer_table(rows: Sequence[LayerRow]) -> tuple[list[Column], list[list[Cell]]]:
    """Columns and cells of the table of layers; weighted errors and shares only if a row has them.

    Example:
        >>> columns, cells = layer_table([LayerRow("fc", "Linear", (8, 8), "kept", share=0.25)])
        >>> [column.label for column in columns if not column.html_only][-2:], cells[0][0].text
        (['error', 'share'], 'fc')
    """
    cells = [_cells(row) for row in rows]
    empty = {column.label for k, column in enumerate(_COLUMNS) if all(row[k].sort is None for row in cells)}
    calibrated = not empty.issuperset(_CALIBRATED)
    absent = empty.intersection((*_CALIBRATED, *_MAY_LACK) if calibrated else _CALIBRATED)
    shown = [k for k, column in enumerate(_COLUMNS) if column.label not in absent]
    columns = [_COLUMNS[k] for k in shown]
    if calibrated:
        columns = [replace(column, html_only=True) if column.label in _GIVE_WAY else column for column in columns]
    return columns, [[row[k] for k in shown] for row in cells]


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
        Cell(number(row.weighted_error), row.weighted_error, _unsound(row.weighted_error)),
        Cell(NOTHING if row.share is None else percent(row.share, 1), row.share, _unsound(row.share)),
        Cell(number(row.output_bound), row.output_bound, _unsound(row.output_bound)),
        Cell(NOTHING if row.floor is None else f"{row.floor:.2f}", row.floor, "bad" if is_slow(row) else ""),
        Cell(row.reason, row.reason or None, "wrap quiet"),
    ]


def _judge(ratio: float | None) -> str:
    if ratio is None or ratio == 1:
        return "quiet"
    return "good" if ratio < 1 else "bad"


def is_slow(row: LayerRow) -> bool:
    """Whether the bond in the middle exceeds a third of the batch.

    Example:
        >>> is_slow(LayerRow("fc", "Linear", (8, 8), "converted", floor=1.5))
        True
    """
    return row.floor is not None and row.floor > 4 / 3


def _unsound(value: float | None) -> str:
    return "" if value is None or math.isfinite(value) else "bad"


# --- JSON ---

_STRINGS = ("name", "kind", "status", "reason", "format")
_COUNTS = ("params_dense", "params", "flops_dense", "flops")
_NUMBERS = ("error", "output_bound", "floor", "weighted_error", "share")
_SPECTRA = ("spectra", "weighted")
_LATER: dict[str, Any] = {"weighted": {}, "weighted_error": None, "share": None}
"""Entries that a file has only where they say something: older files lack them, and older readers refuse them."""


def row_to_dict(row: LayerRow, *, spectra: bool = True) -> dict[str, Any]:
    """Plain dict of a row that JSON can hold; `spectra=False` leaves singular values and the diagram out.

    Example:
        >>> entry = row_to_dict(LayerRow("fc", "Linear", (8, 8), "kept"))
        >>> entry["shape"], "share" in entry, row_from_dict(entry, 0).name
        ([8, 8], False, 'fc')
    """
    entry: dict[str, Any] = {f.name: getattr(row, f.name) for f in fields(LayerRow)}
    for name in _COUNTS:
        entry[name] = int(entry[name])
    if row.break_even_rank is not None:
        entry["break_even_rank"] = int(row.break_even_rank)
    entry["shape"], entry["ranks"] = [int(n) for n in row.shape], [int(r) for r in row.ranks]
    for name in _NUMBERS:
        entry[name] = None if entry[name] is None else plain(float(entry[name]))
    entry["diagram"] = row.diagram if spectra else ""
    entry["cuts"] = {str(bond): int(cut) for bond, cut in row.cuts.items()}
    for name in _SPECTRA:
        given = entry[name] if spectra else {}
        entry[name] = {str(bond): [plain(float(v)) for v in values] for bond, values in given.items()}
    return {name: value for name, value in entry.items() if name not in _LATER or value != _LATER[name]}


def row_from_dict(data: Any, position: int) -> LayerRow:
    """Inverse of `row_to_dict`; `position` names the row in refusals.

    Raises:
        ValueError: entries that are missing, unknown or of the wrong type.

    Example:
        >>> row_from_dict(3, 1)
        Traceback (most recent call last):
        ValueError: Report.from_dict: row (1) must be a dict, got 3
    """
    where = f"row ({position})"
    if not isinstance(data, Mapping):
        raise ValueError(f"Report.from_dict: {where} must be a dict, got {data!r}")
    known = {f.name for f in fields(LayerRow)}
    if set(data) - known:
        raise ValueError(f"Report.from_dict: {where} has unknown entries {sorted(map(str, set(data) - known))}")
    values: dict[str, Any] = {name: json_entry(data, name, str, where) for name in _STRINGS}
    values |= {name: json_entry(data, name, int, where) for name in _COUNTS}
    for name in ("shape", "ranks"):
        values[name] = tuple(json_integers(json_entry(data, name, list, where), f"{name} of {where}"))
    for name in _NUMBERS:
        value = data.get(name)
        values[name] = None if value is None else json_number(value, f"{name} of {where}")
    even = data.get("break_even_rank")
    values["break_even_rank"] = None if even is None else json_integers([even], f"break_even_rank of {where}")[0]
    diagram = json_entry(data, "diagram", str, where) if "diagram" in data else ""
    if diagram and not diagram.startswith("<svg"):
        raise ValueError(f"Report.from_dict: diagram of {where} must be an SVG document, got {diagram[:20]!r}")
    values["diagram"] = diagram
    for name in _SPECTRA:
        given = {} if name in _LATER and name not in data else json_entry(data, name, dict, where)
        values[name] = {
            str(bond): tuple(json_number(v, f"{name} of {where}") for v in json_entry(given, bond, list, where))
            for bond in given
        }
    cuts = json_entry(data, "cuts", dict, where)
    values["cuts"] = dict(zip(map(str, cuts), json_integers(list(cuts.values()), f"cuts of {where}"), strict=True))
    return LayerRow(**values)


def plain(value: float | None) -> float | str | None:
    """A number that JSON can hold: non-finite ones by name.

    Example:
        >>> plain(0.5), plain(float("nan"))
        (0.5, 'nan')
    """
    return value if value is None or math.isfinite(value) else str(float(value))


def json_number(value: Any, where: str) -> float:
    """Inverse of `plain`.

    Raises:
        ValueError: no number; `where` says which.

    Example:
        >>> json_number("nan", "error"), json_number(1, "error")
        (nan, 1.0)
    """
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Report.from_dict: expected a number, got {value!r} in {where}")
    return float(value)


def json_entry(data: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Entry of a dict that must be there and of this type.

    Raises:
        ValueError: it is missing or of another type; `where` says what it is an entry of.

    Example:
        >>> json_entry({"params": 3}, "params", int, "report")
        3
    """
    if name not in data:
        raise ValueError(f"Report.from_dict: every {where} needs {name!r}, got {sorted(data)}")
    value = data[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"Report.from_dict: {name} of a {where} must be a {kind.__name__}, got {value!r}")
    return value


def json_integers(values: list[Any], where: str) -> list[int]:
    """The list itself, if it holds ints only.

    Raises:
        ValueError: it holds something else.

    Example:
        >>> json_integers([1, 2], "ranks")
        [1, 2]
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"Report.from_dict: expected ints, got {value!r} in {where}")
    return values
