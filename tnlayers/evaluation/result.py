"""The numbers of one model with the conditions they hold under, and a table of before and after."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tnlayers.files import write_atomic
from tnlayers.page import NOTHING, Cell, Column, printable, text_table
from tnlayers.report import plain

VERSION = 1
CHANGES = ("relative", "absolute")


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Args:
        name: "perplexity", "cosine, mean", ...; unique within an evaluation.
        group: the metric it belongs to, whose conditions it shares.
        value: the number; None if it is not defined.
        count: what it was measured on (tokens, texts, samples, calls).
        low: lower end of its interval or spread, None without one.
        high: upper end.
        change: how a table compares two of them: "relative" (percent) or "absolute" (difference).

    Raises:
        ValueError: another word for change.

    Example:
        >>> Metric("accuracy", "accuracy", 0.9, 10, change="absolute").value
        0.9
    """

    name: str
    group: str
    value: float | None
    count: int
    low: float | None = None
    high: float | None = None
    change: str = "relative"

    def __post_init__(self) -> None:
        if self.change not in CHANGES:
            raise ValueError(f"Metric: change must be one of {CHANGES}, got {self.change!r} for {self.name!r}")


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model, and the conditions of every group of them.

    Args:
        metrics: in the order they are shown.
        conditions: group -> settings in words or numbers ("window": 2048).
        title: name of the model.

    Example:
        >>> found = Evaluation((Metric("perplexity", "perplexity", 8.0, 100),), {"perplexity": {"window": 64}}, "small")
        >>> print(found)
        small
        metric      value   on
        ──────────────────────
        perplexity      8  100
        <BLANKLINE>
        perplexity: window 64
        >>> Evaluation.from_dict(found.to_dict()) == found
        True
    """

    metrics: tuple[Metric, ...]
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    title: str = "model"

    def __getitem__(self, name: str) -> Metric:
        found = next((metric for metric in self.metrics if metric.name == name), None)
        if found is None:
            raise KeyError(f"Evaluation: expected one of {[m.name for m in self.metrics]}, got {name!r}")
        return found

    def __str__(self) -> str:
        return self.table()

    def table(self, *, width: int = 120) -> str:
        """Table as text: value, the ends of its interval or spread, what it was measured on; conditions below."""
        spread = any(metric.low is not None for metric in self.metrics)
        ends = (Column("from", numeric=True), Column("to", numeric=True)) if spread else ()
        columns = (Column("metric"), Column("value", numeric=True), *ends, Column("on", numeric=True))
        rows = []
        for metric in self.metrics:
            values = [metric.value, *((metric.low, metric.high) if spread else ()), metric.count]
            rows.append([Cell(metric.name), *(Cell(_number(value)) for value in values)])
        below = [f"{group}: {_words(said)}" for group, said in self.conditions.items()]
        return "\n".join([printable(self.title), text_table(columns, rows, width=width), "", *below]).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Plain dict that JSON can hold; non-finite numbers become the strings "nan", "inf", "-inf"."""
        rows = [
            {
                name: plain(value) if name in ("value", "low", "high") else value
                for name, value in asdict(metric).items()
            }
            for metric in self.metrics
        ]
        conditions = {group: dict(said) for group, said in self.conditions.items()}
        head = {"kind": "tnlayers evaluation", "version": VERSION, "title": self.title}
        return {**head, "metrics": rows, "conditions": conditions}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Inverse of `to_dict`.

        Raises:
            ValueError: not an evaluation, another version, or entries that are missing or unknown.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "tnlayers evaluation":
            raise ValueError("Evaluation.from_dict: expected kind = 'tnlayers evaluation', as to_dict() returns")
        if data.get("version") != VERSION:
            raise ValueError(f"Evaluation.from_dict: expected version = {VERSION}, got {data.get('version')!r}")
        try:
            rows = [{**row, **{k: _float(row[k]) for k in ("value", "low", "high")}} for row in data["metrics"]]
            return cls(tuple(Metric(**row) for row in rows), dict(data["conditions"]), str(data["title"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"Evaluation.from_dict: expected what to_dict() returns, got {error!r}") from None

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text; also written to `path`, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_atomic(path, text)
        return text


def compare(before: Evaluation, after: Evaluation, *, width: int = 120) -> str:
    """One table of before and after; the conditions stand under it, once where they are the same.

    Where the conditions of a group differ (another window, other texts) the numbers cannot be compared: both conditions
    are printed and the change is left out.

    Example:
        >>> one, two = (Evaluation((Metric("perplexity", "perplexity", v, 9),), {"perplexity": {"window": 4}})
        ...             for v in (8.0, 10.0))
        >>> print(compare(one, two))
        metric      before  after   change
        ──────────────────────────────────
        perplexity       8     10  +25.00%
        <BLANKLINE>
        perplexity: window 4
    """
    olds, news = ({metric.name: metric for metric in side.metrics} for side in (before, after))
    groups = dict.fromkeys([*(metric.group for metric in before.metrics), *(metric.group for metric in after.metrics)])
    differ = {
        group
        for group in groups
        if group in before.conditions and group in after.conditions
        if dict(before.conditions[group]) != dict(after.conditions[group])
    }
    columns = (
        Column("metric"),
        Column("before", numeric=True),
        Column("after", numeric=True),
        Column("change", numeric=True),
    )
    rows = []
    for name in dict.fromkeys([*olds, *news]):
        old, new = olds.get(name), news.get(name)
        known = new if old is None else old
        assert known is not None
        change = NOTHING if known.group in differ else _change(old, new)
        rows.append([Cell(name), *(Cell(NOTHING if m is None else _number(m.value)) for m in (old, new)), Cell(change)])
    lines = [text_table(columns, rows, width=width), ""]
    for group in groups:
        sides = [said[group] for said in (before.conditions, after.conditions) if group in said]
        if group in differ:
            lines += [
                f"{group}: not comparable, the conditions differ",
                f"  before: {_words(sides[0])}",
                f"  after: {_words(sides[1])}",
            ]
        elif sides:
            lines.append(f"{group}: {_words(sides[0])}")
    return "\n".join(lines).rstrip()


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _number(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"


def _words(said: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in said.items() if value is not None)


def _change(old: Metric | None, new: Metric | None) -> str:
    if old is None or new is None or old.value is None or new.value is None:
        return NOTHING
    difference = new.value - old.value
    if not math.isfinite(difference):
        return NOTHING
    if old.change == "absolute":
        return f"{difference:+.4f}"
    return f"{100 * difference / abs(old.value):+.2f}%" if old.value else NOTHING
