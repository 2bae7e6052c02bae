"""Settings of the main job: checked, completed, and written down beside the rows."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tnlayers.main_job.data import Dataset
from tnlayers.main_job.nets import NETS
from tnlayers.main_job.rows import ADAPTIVE, VARIANTS, JobError

SMALL_DATA = 10_000
"""Training images below which an epoch is short: more epochs and smaller batches by default."""


@dataclass(frozen=True)
class JobConfig:
    """Settings of the main job.

    Args:
        data: spec for `tnlayers.main_job.data.load_data`.
        out: folder for rows, models, reports, figures and the page.
        seed: of the first run.
        seeds: number of runs; they take the seeds seed, seed + 1, ...
        nets: which networks, of "mlp" and "cnn".
        epochs: of dense and scratch; None is 30 below 10,000 training images, else 6.
        finetune_epochs: after conversion; None is 3 below 10,000 training images, else 1.
        batch_size: None is 32 below 10,000 training images, else 128.
        lr: peak learning rate of AdamW.
        finetune_lr: the same after conversion; None is half of lr.
        tensorized_share: parameters of the converted network, as a part of the dense one's, at most.
        scratch_share: the same for tensor layers from scratch, and for the rank-adaptive ones.
        rank_adaptive: also train tensor layers at ranks that the training finds.
        checkpoint_every: steps between two checkpoints of a rank-adaptive row, from which the same call continues.
        limit: training images to keep, and as many test images.
        size: height and width to resize to (imagefolder).
        threads: CPU threads; None is 1 below 10,000 training images (small matrices gain nothing by more), else torch's
            number.
        overwrite: start anew in a folder that holds other results.

    Raises:
        JobError: a value out of range, by name.

    Example:
        >>> JobConfig(seeds=3).seed_list
        (0, 1, 2)
    """

    data: str = "digits"
    out: str | os.PathLike[str] = "runs/digits"
    seed: int = 0
    seeds: int = 1
    nets: tuple[str, ...] = NETS
    epochs: int | None = None
    finetune_epochs: int | None = None
    batch_size: int | None = None
    lr: float = 2e-3
    finetune_lr: float | None = None
    tensorized_share: float = 0.10
    scratch_share: float = 0.08
    rank_adaptive: bool = False
    checkpoint_every: int = 200
    limit: int | None = None
    size: int | None = None
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in (
            "seeds", "finetune_epochs", "epochs", "batch_size", "checkpoint_every", "limit", "size", "threads",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise JobError(f"train: {name} must be at least 1, got {value}")
        for name in ("lr", "finetune_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise JobError(f"train: {name} must be a positive number, got {value}")
        for name in ("tensorized_share", "scratch_share"):
            if not 0 < getattr(self, name) <= 1:
                raise JobError(f"train: {name} must lie in (0, 1], got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise JobError(f"train: seed must lie in 0..2^31 - 1, got {self.seed}")
        unknown = [net for net in self.nets if net not in NETS]
        if unknown or not self.nets or len(set(self.nets)) != len(self.nets):
            raise JobError(f"train: nets must be distinct names of {', '.join(NETS)}, got {', '.join(self.nets)!r}")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def variants(self) -> tuple[str, ...]:
        """What is trained of every network, in the order of the table."""
        return tuple(variant for variant in VARIANTS if self.rank_adaptive or variant != ADAPTIVE)

    def complete(self, data: Dataset) -> JobConfig:
        """Return the same settings with the defaults that depend on the data filled in."""
        small = len(data.train_x) < SMALL_DATA
        return replace(
            self,
            epochs=self.epochs or (30 if small else 6),
            finetune_epochs=self.finetune_epochs or (3 if small else 1),
            batch_size=self.batch_size or (32 if small else 128),
            finetune_lr=self.finetune_lr or self.lr / 2,
            threads=self.threads or (1 if small else torch.get_num_threads()),
        )


def settings_of(config: JobConfig, data: Dataset) -> dict[str, Any]:
    """Everything the numbers of a row depend on, but for network, variant and seed; what a user sets comes first."""
    name, colon, path = config.data.partition(":")
    digest = hashlib.sha256()
    for tensor in (data.train_y, data.test_y, data.train_x, data.test_x):
        digest.update(tensor.numpy().data)
    return {
        "data": f"{name}:{Path(path).expanduser().resolve()}" if colon else name,
        "epochs": config.epochs,
        "finetune_epochs": config.finetune_epochs,
        "batch_size": config.batch_size,
        "lr": config.lr,
        "finetune_lr": config.finetune_lr,
        "tensorized_share": config.tensorized_share,
        "scratch_share": config.scratch_share,
        "limit": config.limit,
        "size": config.size,
        "threads": config.threads,
        "torch": torch.__version__,
        "tnlayers": hardware_facts()["tnlayers"],
        "cpu": hardware_facts()["cpu"],
        "data_sha256": digest.hexdigest()[:16],
        "train_images": len(data.train_x),
        "test_images": len(data.test_x),
        "shape": list(data.shape),
    }


def hardware_facts() -> dict[str, Any]:
    """Processor, threads and versions, for the foot of a table."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        installed = version("tnlayers")
    except PackageNotFoundError:
        installed = "not installed"
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tnlayers": installed,
        "python": platform.python_version(),
        "system": platform.system(),
    }
