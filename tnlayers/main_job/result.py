"""What the main job returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tnlayers.main_job.rows import Row, Summary, summarize


@dataclass(frozen=True)
class JobResult:
    """What `run` returns: every row, and where the files are.

    Args:
        rows: one a (network, variant, seed), in the order of the table.
        settings: everything the numbers depend on, but for nets and seeds.
        hardware: processor, threads, versions.
        out: the folder.
        trained: rows of this call; the others were found finished.
        seconds: duration of this call.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]
    hardware: dict[str, Any]
    out: Path
    trained: int
    seconds: float

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """Mean and spread over the seeds, one a (network, variant)."""
        return summarize(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict that JSON can hold."""
        return {
            "kind": "tnlayers main job",
            "settings": self.settings,
            "hardware": self.hardware,
            "summary": [asdict(summary) for summary in self.summaries],
            "rows": [asdict(row) for row in self.rows],
            "out": str(self.out),
            "page": str(self.out / "index.html"),
            "trained": self.trained,
            "seconds": round(self.seconds, 3),
        }
