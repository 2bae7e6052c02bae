"""MRR over parameters of every run of a set, as pictures of the guide."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from kg_runs import Row

from tnlayers.kg.figures import Point, mrr_figure

KINDS = {"fixed": "fixed", "adaptive": "found"}
IMAGES = Path(__file__).parent.parent / "docs" / "img"


def names(store: dict[str, Any], name: str) -> dict[tuple[str, str], list[Row]]:
    """(model, which of its runs) -> rows of the seeds."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in store.get("epochs", []):
        if row["set"] == name:
            label = "TuckER" if row["method"] == "ours" else "TuckER, PyKEEN"
            found.setdefault((label, "100"), []).append(row)
    for row in store.get("mixed", []):
        if row["set"] == name:
            label = row["arm"].partition(" ")[0]
            if "joint" in row["arm"]:
                label += ", joint"
            found.setdefault((label, row["arm"].split()[1]), []).append(row)
    for row in store.get("adaptive", []):
        if row["set"] == name:
            kind, _, rest = row["arm"].partition(" ")
            found.setdefault((f"R-TuckER, {KINDS[kind.rstrip(',')]} ranks", rest), []).append(row)
    return found


def draw(store: dict[str, Any], name: str) -> Path:
    """Write the picture of a set."""
    points = [
        Point(
            label,
            round(statistics.mean(row["parameters"] for row in rows)),
            statistics.mean(row["mrr"] for row in rows),
            statistics.stdev(row["mrr"] for row in rows),
        )
        for (label, _), rows in names(store, name).items()
    ]
    file = IMAGES / f"kg-{name}.png"
    mrr_figure(points, f"{name}: test MRR, mean and spread over seeds").savefig(file, metadata={"Software": None})
    return file
