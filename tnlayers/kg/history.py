"""What a training run left behind, epoch by epoch: in memory, as JSON lines, and for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from tnlayers.files import write_atomic
from tnlayers.kg.metrics import Metrics


@dataclass(frozen=True)
class Epoch:
    """One pass over the training queries.

    Args:
        epoch: its number, from 1.
        loss: mean over its queries.
        seconds: spent on it, without validation.
        lr: of the first group at its last step.
        mrr: filtered mean reciprocal rank of the validation split, where it was measured.
        hits: K -> share of ranks <= k, likewise.
        mr: mean rank, likewise.
        ranks: layer -> ranks of its bonds, where an optimizer of networks trains.
    """

    epoch: int
    loss: float
    seconds: float
    lr: float
    mrr: float | None = None
    hits: Mapping[int, float] | None = None
    mr: float | None = None
    ranks: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class History:
    """Epochs of a training run, those of earlier, interrupted calls included.

    Args:
        epochs: in order.
        best: number of the epoch with the highest validation MRR (the first of equals); None without validation.
        stopped: why it ended: "epochs" (all done), "patience" or "max_seconds".

    Example:
        >>> history = History((Epoch(1, 0.7, 0.1, 0.01), Epoch(2, 0.5, 0.1, 0.01, mrr=0.3)), 2, "epochs")
        >>> history.losses, history.mrr, history.best_mrr
        ((0.7, 0.5), {2: 0.3}, 0.3)
    """

    epochs: tuple[Epoch, ...]
    best: int | None
    stopped: str

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean training loss of every epoch."""
        return tuple(epoch.loss for epoch in self.epochs)

    @property
    def seconds(self) -> float:
        """Training time, without validation."""
        return sum(epoch.seconds for epoch in self.epochs)

    @property
    def mrr(self) -> dict[int, float]:
        """Epoch -> validation MRR, of the epochs where it was measured."""
        return {epoch.epoch: epoch.mrr for epoch in self.epochs if epoch.mrr is not None}

    @property
    def best_mrr(self) -> float | None:
        """The validation MRR of the best epoch."""
        return None if self.best is None else self.mrr[self.best]

    def __repr__(self) -> str:
        return f"History({self})"

    def __str__(self) -> str:
        if not self.epochs:
            return "no epoch done"
        last = self.epochs[-1]
        text = f"{last.epoch} epochs in {self.seconds:.1f} s, loss {last.loss:.5g}, ended by {self.stopped}"
        return text if self.best is None else f"{text}; best validation MRR {self.best_mrr:.4f} in epoch {self.best}"


def measured(metrics: Metrics) -> dict[str, Any]:
    """The figures of an evaluation that an epoch keeps."""
    return {"mrr": metrics.mrr, "hits": dict(metrics.hits), "mr": metrics.mr}


def to_plain(epoch: Epoch) -> dict[str, Any]:
    """Numbers, lists and strings, without what was not measured.

    Example:
        >>> to_plain(Epoch(1, 0.5, 0.1, 0.01))
        {'epoch': 1, 'loss': 0.5, 'seconds': 0.1, 'lr': 0.01}
    """
    plain = {key: value for key, value in asdict(epoch).items() if value is not None}
    if epoch.hits is not None:
        plain["hits"] = {str(k): value for k, value in epoch.hits.items()}
    if epoch.ranks is not None:
        plain["ranks"] = {name: list(ranks) for name, ranks in epoch.ranks.items()}
    return plain


def from_plain(plain: Mapping[str, Any]) -> Epoch:
    """An epoch from what `to_plain` made of it.

    Example:
        >>> epoch = Epoch(1, 0.5, 0.1, 0.01, mrr=0.2, hits={1: 0.1}, mr=7.0, ranks={"core": (3, 3)})
        >>> from_plain(to_plain(epoch)) == epoch
        True
    """
    found = {field.name: plain[field.name] for field in fields(Epoch) if field.name in plain}
    if "hits" in found:
        found["hits"] = {int(k): value for k, value in found["hits"].items()}
    if "ranks" in found:
        found["ranks"] = {name: tuple(ranks) for name, ranks in found["ranks"].items()}
    return Epoch(**found)


class EpochLog:
    """Appends one JSON line an epoch, each on disk at once; the same for TensorBoard.

    Args:
        file: JSON lines; None: none. Its folder is made.
        board: folder of TensorBoard; None: none.
        after: epochs done; lines of later ones, left by a run that was interrupted, are dropped.

    Raises:
        ImportError: a folder of TensorBoard without TensorBoard.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> with EpochLog(file, None, 0) as log:
        ...     log.add(Epoch(1, 0.5, 0.1, 0.01))
        >>> file.read_text()
        '{"epoch": 1, "loss": 0.5, "seconds": 0.1, "lr": 0.01}\\n'
    """

    def __init__(self, file: str | os.PathLike[str] | None, board: str | os.PathLike[str] | None, after: int) -> None:
        self._file: Any = None
        self._board: Any = None
        if board is not None:
            self._board = _writer(board, after)
        if file is not None:
            path = Path(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, "".join(json.dumps(line) + "\n" for line in _lines(path) if line["epoch"] <= after))
            self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> EpochLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for held in (self._file, self._board):
            if held is not None:
                held.close()

    def add(self, epoch: Epoch) -> None:
        """One line."""
        plain = to_plain(epoch)
        if self._file is not None:
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            hits = {f"valid/hits@{k}": value for k, value in plain.pop("hits", {}).items()}
            ranks = {f"ranks/{name or 'layer'}": max(sizes) for name, sizes in plain.pop("ranks", {}).items()}
            named = {"mrr": "valid/mrr", "mr": "valid/mr"}
            rest = {named.get(key, key): value for key, value in plain.items() if key != "epoch"}
            for name, value in (rest | hits | ranks).items():
                self._board.add_scalar(name, value, epoch.epoch)


def _writer(folder: str | os.PathLike[str], after: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("train: tensorboard= needs TensorBoard; pip install 'tnlayers[tensorboard]'") from None
    return SummaryWriter(os.fspath(folder), purge_step=after + 1)


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines up to the first that is no epoch: the last may be torn."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return found
    for line in text.splitlines():
        try:
            content = json.loads(line)
            from_plain(content)
            int(content["epoch"])
        except (ValueError, KeyError, TypeError):
            break
        found.append(content)
    return found
