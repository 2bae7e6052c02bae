"""The log of a rank-adaptive row: one JSON line a rounding, the same for TensorBoard where that is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tnlayers.files import write_atomic
from tnlayers.main_job.rows import ADAPTIVE


def log_name(net: str, seed: int) -> str:
    """Path of the log of a row, in the folder of the job.

    Example:
        >>> log_name("mlp", 0)
        'logs/mlp-rank-adaptive-seed0.jsonl'
    """
    return f"logs/{net}-{ADAPTIVE}-seed{seed}.jsonl"


RankTable = Mapping[str, Sequence[int]]
"""layer -> ranks of its bonds."""


class RankLog:
    """Appends lines `{"step": 12, "loss": 0.7, "settled": false, "ranks": {"fc1": [9]}}`, each on disk at once.

    TensorBoard gets `loss` and `ranks/LAYER` (or `ranks/LAYER/BOND`) in the folder `tensorboard/` beside the file.

    Args:
        file: the log; its folder is made.
        after: lines of later steps, left by a run that was interrupted, are dropped.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "net.jsonl"
        >>> with RankLog(file) as log:
        ...     log.add(1, 0.5, {"fc1": (2,)}, settled=False)
        >>> file.read_text()
        '{"step": 1, "loss": 0.5, "settled": false, "ranks": {"fc1": [2]}}\\n'
    """

    def __init__(self, file: Path, after: int = 0) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_log(file) if line["step"] <= after]
        write_atomic(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = file.open("a", encoding="utf-8")
        self._board = _board(file.parent / "tensorboard" / file.stem, after)

    def __enter__(self) -> RankLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, step: int, loss: float, ranks: RankTable, *, settled: bool) -> None:
        """One line."""
        line = {"step": step, "loss": loss, "settled": settled, "ranks": {k: list(v) for k, v in ranks.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.add_scalar("loss", loss, step)
            for name, rank in series(ranks).items():
                self._board.add_scalar(f"ranks/{name.replace(' ', '/')}", rank, step)


def _board(folder: Path, after: int) -> Any:
    """A writer for TensorBoard, or None where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=after + 1)  # later steps are those of a lost run


def read_log(file: Path) -> list[dict[str, Any]]:
    """Lines of a log up to the first that is no such line (the last may be torn); none where there is no file.

    Example:
        >>> read_log(Path("nowhere.jsonl"))
        []
    """
    found: list[dict[str, Any]] = []
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return found
    for line in text.splitlines():
        try:
            content = json.loads(line)
            step, loss = int(content["step"]), float(content["loss"])
            ranks = {str(name): [int(rank) for rank in values] for name, values in content["ranks"].items()}
            found.append({"step": step, "loss": loss, "settled": bool(content["settled"]), "ranks": ranks})
        except (ValueError, KeyError, TypeError, AttributeError):
            break
    return found


def series(ranks: RankTable) -> dict[str, int]:
    """One number a name: the layer's, and where it has several bonds their number.

    Example:
        >>> series({"fc1": (9,), "conv2": (5, 3)})
        {'fc1': 9, 'conv2 bond0': 5, 'conv2 bond1': 3}
    """
    return {
        name if len(values) == 1 else f"{name} bond{k}": rank
        for name, values in ranks.items()
        for k, rank in enumerate(values)
    }


def in_words(ranks: RankTable, width: int = 44) -> str:
    """Ranks for a line of progress: the first layers, as far as `width` characters hold them.

    Example:
        >>> in_words({"conv2": (5, 3), "fc1": (9,)})
        'conv2 5x3, fc1 9'
        >>> in_words({f"layers.{k}.fc": (k,) for k in range(40)}, 36)
        'layers.0.fc 0, layers.1.fc 1, +38'
    """
    parts = [f"{name} {'x'.join(map(str, values))}".strip() for name, values in ranks.items()]
    for shown in range(len(parts), 0, -1):
        rest = len(parts) - shown
        text = ", ".join(parts[:shown]) + (f", +{rest}" if rest else "")
        if len(text) <= width or shown == 1:
            return text
    return ""
