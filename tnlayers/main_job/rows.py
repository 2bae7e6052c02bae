"""Rows of the main job: what one training run gave, the file that keeps them, mean and spread over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tnlayers.files import write_atomic
from tnlayers.page import Cell, Column, compact, number, percent, text_table

DENSE, TENSORIZED, SCRATCH, ADAPTIVE = VARIANTS = ("dense", "tensorized", "scratch", "rank-adaptive")
KIND, VERSION = "tnlayers rows", 1
ROWS_FILE, LOCK_FILE = "rows.json", ".lock"

Key = tuple[str, str, int]
"""(network, variant, seed)"""


class JobError(ValueError):
    """Settings or a folder that the main job cannot use: one line with the next step."""


@dataclass(frozen=True)
class Row:
    """One trained network.

    Args:
        net: "mlp" or "cnn".
        variant: "dense", "tensorized" (converted, then fine-tuned), "scratch" (tensor layers from the start) or
            "rank-adaptive" (the same at ranks that the training finds).
        seed: of the initial weights and of the order of the images.
        accuracy: of the test images after the last epoch, in 0..1.
        accuracy_before: of the converted network before fine-tuning.
        parameters: numbers that the network stores and trains.
        parameters_dense: the same of the dense network.
        flops: multiplications and additions of one sample, as executed at `inference_batch`.
        step_ms: median milliseconds of one training step.
        inference_ms: median milliseconds of one batch of `inference_batch` images.
        inference_batch: images of that batch.
        file_bytes: size of the safetensors file.
        epochs: trained.
        seconds: spent on this row.
        curve: test accuracy after every epoch.
        networks: layer -> its network, in words.
        file: of the weights, relative to the folder.
        report: page of the conversion, relative to the folder; empty for the others.
    """

    net: str
    variant: str
    seed: int
    accuracy: float
    accuracy_before: float | None
    parameters: int
    parameters_dense: int
    flops: int
    step_ms: float
    inference_ms: float
    inference_batch: int
    file_bytes: int
    epochs: int
    seconds: float
    curve: tuple[float, ...]
    networks: dict[str, str]
    file: str
    report: str

    @property
    def key(self) -> Key:
        """(network, variant, seed)."""
        return self.net, self.variant, self.seed

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `dataclasses.asdict`.

        Raises:
            ValueError: entries that are missing, unknown or of another type.
        """
        names = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise ValueError(f"expected a row with the entries {names}")
        values = dict(data)
        for name in ("accuracy", "step_ms", "inference_ms", "seconds"):
            if isinstance(values[name], bool) or not isinstance(values[name], int | float):
                raise ValueError(f"expected a number as {name}, got {values[name]!r}")
        for name in ("seed", "parameters", "parameters_dense", "flops", "inference_batch", "file_bytes", "epochs"):
            if type(values[name]) is not int:
                raise ValueError(f"expected an integer as {name}, got {values[name]!r}")
        if values["variant"] not in VARIANTS or not isinstance(values["net"], str):
            raise ValueError(f"expected one of {VARIANTS} as variant, got {values['variant']!r}")
        values["curve"] = tuple(float(value) for value in values["curve"])
        return cls(**values)


class RowStore:
    """The rows of one folder, kept in `rows.json`, which is replaced whole after every row.

    Open it with `RowStore.open` in a `with` block: the folder is locked until the block ends.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], rows: Sequence[Row], lock: IO[str]) -> None:
        self.folder, self.settings, self._lock = folder, settings, lock
        self._rows = {row.key: row for row in rows}

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], *, overwrite: bool = False) -> RowStore:
        """Lock the folder (made if missing) and read its rows.

        Args:
            folder: where the rows are.
            settings: what the numbers depend on; rows of other settings are refused.
            overwrite: forget rows of other settings, and use a folder that holds other files.

        Raises:
            JobError: a folder that cannot be used, that another run uses, or that holds something else.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / LOCK_FILE).open("w", encoding="utf-8")
        except OSError as error:
            raise JobError(f"train: --out must be a folder that can be written, got {folder} ({error})") from None
        try:
            _take(lock, folder)
            rows = [] if overwrite else _read_rows(folder, settings)
            store = cls(folder, settings, rows, lock)
            store._prepare()
        except BaseException:
            lock.close()
            raise
        return store

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()  # which also unlocks

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def path(self, name: str) -> Path:
        """Path of a file in the folder."""
        return self.folder / name

    def add(self, row: Row) -> None:
        """Keep a row, on disk when this returns."""
        self._rows[row.key] = row
        self._write()

    def select(self, nets: Sequence[str], seeds: Sequence[int], variants: Sequence[str] = VARIANTS) -> tuple[Row, ...]:
        """Rows of these networks, seeds and variants, in the order of the table."""
        keys = [(net, variant, seed) for net in nets for variant in variants for seed in seeds]
        return tuple(self._rows[key] for key in keys if key in self._rows)

    def _prepare(self) -> None:
        """Write the settings, and make the folders for models and reports."""
        try:
            self._write()
            for name in ("models", "reports"):
                self.path(name).mkdir(exist_ok=True)
        except (OSError, ValueError) as error:
            raise JobError(f"train: --out must be a folder that can be written, got {self.folder} ({error})") from None

    def _write(self) -> None:
        content = {
            "kind": KIND,
            "version": VERSION,
            "settings": self.settings,
            "rows": [asdict(row) for row in self._rows.values()],
        }
        write_atomic(self.folder / ROWS_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _take(lock: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no locks on this system
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise JobError(f"train: {folder} is in use by another run; wait for it, or give another --out") from None


def _read_rows(folder: Path, settings: dict[str, Any]) -> list[Row]:
    """Rows of the folder; refuses other settings, other content and damaged files."""
    file = folder / ROWS_FILE
    remedy = "give another --out, or --overwrite"
    if not file.exists():
        others = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_FILE)
        if others:
            raise JobError(
                f"train: --out must be new, empty or of an earlier run, got {folder} with {others[0]}; {remedy}"
            )
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["kind"] != KIND or content["version"] != VERSION:
            raise ValueError(f"expected kind = {KIND!r} and version = {VERSION}")
        found, rows = content["settings"], [Row.from_dict(row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobError(f"train: {file} cannot be read ({' '.join(str(error).split())[:200]}); {remedy}") from None
    if found != settings:
        names = [k for k in {**settings, **found} if found.get(k) != settings.get(k)]
        there, here = found.get(names[0]), settings.get(names[0])
        raise JobError(
            f"train: {folder} holds rows of other settings, {names[0]} = {there} there and {here} here "
            f"({len(names)} differ: {', '.join(names)}); {remedy}"
        )
    return rows


# -- mean and spread ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Rows of one network and variant over their seeds: means, and the spread of the accuracy.

    Args:
        net: see `Row`.
        variant: see `Row`.
        seeds: of the rows.
        accuracy: mean.
        spread: sample standard deviation of the accuracy; None with one seed.
        gap: mean accuracy minus the dense network's, in points of a percent; None where there is no dense row.
        accuracy_before: mean, before fine-tuning.
        parameters: mean.
        share: parameters as a part of the dense network's.
        flops: mean.
        step_ms: mean of medians.
        inference_ms: mean of medians.
        inference_batch: images a batch.
        file_bytes: mean.
    """

    net: str
    variant: str
    seeds: tuple[int, ...]
    accuracy: float
    spread: float | None
    gap: float | None
    accuracy_before: float | None
    parameters: float
    share: float
    flops: float
    step_ms: float
    inference_ms: float
    inference_batch: int
    file_bytes: float


def summarize(rows: Sequence[Row]) -> tuple[Summary, ...]:
    """One summary a (network, variant), in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.net, row.variant), []).append(row)
    return tuple(_summary(group, groups.get((net, DENSE))) for (net, _), group in groups.items())


def _summary(group: Sequence[Row], dense: Sequence[Row] | None) -> Summary:
    def mean(name: str) -> float:
        return statistics.fmean(getattr(row, name) for row in group)

    accuracy = mean("accuracy")
    gap = None if dense is None else 100 * (accuracy - statistics.fmean(row.accuracy for row in dense))
    before = [row.accuracy_before for row in group if row.accuracy_before is not None]
    return Summary(
        net=group[0].net,
        variant=group[0].variant,
        seeds=tuple(row.seed for row in group),
        accuracy=accuracy,
        spread=statistics.stdev(row.accuracy for row in group) if len(group) > 1 else None,
        gap=gap,
        accuracy_before=statistics.fmean(before) if before else None,
        parameters=mean("parameters"),
        share=mean("parameters") / mean("parameters_dense"),
        flops=mean("flops"),
        step_ms=mean("step_ms"),
        inference_ms=mean("inference_ms"),
        inference_batch=group[0].inference_batch,
        file_bytes=mean("file_bytes"),
    )


COLUMNS = (
    Column("net", "Network: mlp has two hidden layers, cnn two convolutions and two linear layers."),
    Column(
        "variant",
        "dense: torch.nn layers. tensorized: the trained dense network converted, then fine-tuned. scratch: tensor "
        "layers from random networks, trained as the dense ones. rank-adaptive: the same, at ranks that the training "
        "finds, with twice the learning rate.",
    ),
    Column("accuracy", "Percent of the test images, after the last epoch; ± sample standard deviation.", numeric=True),
    Column("vs dense", "Points of accuracy above (+) or below the dense network.", numeric=True),
    Column("before", "Accuracy of the converted network before it was fine-tuned.", numeric=True),
    Column("parameters", "Numbers that the network stores and trains.", numeric=True),
    Column("share", "Parameters in percent of the dense network's.", numeric=True),
    Column("FLOPs", "Multiplications and additions of one image, as executed in the inference batch.", numeric=True),
    Column("ms/step", "Median milliseconds of one training step: forward, backward, update.", numeric=True),
    Column("ms/infer", "Median milliseconds of one forward pass of the inference batch.", numeric=True),
    Column("file", "Size of the safetensors file.", numeric=True),
)


def cells(summary: Summary) -> list[Cell]:
    """One line of the table."""
    s = summary
    spread = "" if s.spread is None else f" ± {100 * s.spread:.2f}"
    gap = None if s.variant == DENSE else s.gap
    before = s.accuracy_before
    return [
        Cell(s.net, s.net),
        Cell(s.variant, VARIANTS.index(s.variant)),
        Cell(f"{100 * s.accuracy:.2f}{spread}", s.accuracy),
        Cell("" if gap is None else f"{gap:+.2f}", gap),
        Cell("" if before is None else f"{100 * before:.2f}", before),
        Cell(f"{s.parameters:,.0f}", s.parameters),
        Cell(percent(s.share, 1), s.share, "good" if s.share < 1 else "quiet"),
        Cell(compact(round(s.flops)), s.flops),
        Cell(number(s.step_ms), s.step_ms),
        Cell(number(s.inference_ms), s.inference_ms),
        Cell(f"{math.ceil(s.file_bytes / 1000):,} kB", s.file_bytes),
    ]


def table(summaries: Sequence[Summary], *, width: int = 120) -> str:
    """Table as text, at most `width` columns."""
    return text_table(COLUMNS, [cells(summary) for summary in summaries], width=width)


def footnote(settings: Mapping[str, Any], hardware: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    """One line under a table: data, recipe, machine."""
    seeds = max((len(summary.seeds) for summary in summaries), default=0)
    batch = max((summary.inference_batch for summary in summaries), default=0)
    return (
        f"{settings['train_images']:,} training and {settings['test_images']:,} test images, "
        f"{_count(settings['epochs'], 'epoch')} (fine-tuning {settings['finetune_epochs']}), "
        f"batch {settings['batch_size']}, inference batch {batch}, {_count(seeds, 'seed')}; "
        f"{hardware['cpu']}, {_count(hardware['threads'], 'thread')}, torch {hardware['torch']}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
