"""The rank-adaptive row: small tensor layers whose ranks `RankAdaptive` finds, and the checkpoint it continues from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnlayers.files import atomic_target
from tnlayers.main_job.data import Dataset
from tnlayers.main_job.nets import START_RANK, START_SIZE
from tnlayers.main_job.rank_log import RankLog
from tnlayers.main_job.training import WEIGHT_DECAY, Course, StepProgress, Training, TrainingError, train
from tnlayers.main_job.workers import number, prepared
from tnlayers.optim import RankAdaptive, compact

KIND = "tnlayers rank-adaptive row"
TOL = 0.1
RESERVE = 2
SETTLE = 0.6
"""Part of the steps after which ranks stay."""
LR_FACTOR = 2.0
"""Of the other rows' peak learning rate: here it is how far a core moves the entries of W, there its own entries."""
RECIPE = {
    "lr_factor": LR_FACTOR, "tol": TOL, "reserve": RESERVE, "settle": SETTLE, "start_rank": START_RANK,
    "start_size": START_SIZE, "weight_decay": WEIGHT_DECAY,
}  # fmt: skip

Make = Callable[[], tuple[nn.Module, int]]
"""A fresh network, and the parameters that its tensor layers may hold together."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a row is kept while it is trained.

    Args:
        file: written whole or not at all, every `every` steps; its folder is made.
        identity: everything the row depends on; a file that holds another one is not read.
        every: steps.
    """

    file: Path
    identity: Mapping[str, Any]
    every: int

    def write(self, model: nn.Module, optimizer: RankAdaptive, course: Course, seconds: float) -> None:
        """Keep a moment between two steps."""
        self.file.parent.mkdir(exist_ok=True)
        content = {
            "kind": KIND,
            "identity": self._identity(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "course": {**asdict(course), "earlier": seconds},
            "rng": torch.get_rng_state(),
        }
        with atomic_target(self.file) as temporary:
            torch.save(content, temporary)

    def read(self, model: nn.Module, optimizer: RankAdaptive) -> Course | None:
        """Set model, optimizer and torch's generator to the moment that was kept; None where there is none of ours.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: a damaged file; model and optimizer may be half set.
        """
        try:
            content = torch.load(self.file, weights_only=True)
        except Exception:  # no file, or a damaged one: torch and pickle raise almost any type
            return None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            return None
        if content.get("identity") != self._identity():
            return None
        course = Course(**{f.name: content["course"][f.name] for f in fields(Course)})
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        return course

    def _identity(self) -> str:
        return json.dumps({**self.identity, "recipe": RECIPE}, sort_keys=True)

    def remove(self) -> None:
        """Forget the row, with what a killed process left of a file that it was writing."""
        for file in (self.file, *self.file.parent.glob(f".{self.file.name[:40]}.*.tmp")):
            file.unlink(missing_ok=True)
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()


def train_adaptive(
    make: Make,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    log: Path,
    checkpoint: Checkpoint,
    progress: Callable[[RankAdaptive], StepProgress] | None = None,
    resumed: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, Training]:
    """Train by `RankAdaptive` under the schedule of `train`, from the checkpoint where there is one.

    Epochs, batches, schedule and weight decay are those of the other rows. Accuracies are those of
    `tnlayers.compact(model)`: at the ranks found, without the directions in reserve. A run that was killed at any step
    and continued ends with the same weights, bit for bit.

    Args:
        make: the network, drawn from torch's generator, and its budget.
        data: its training part is learned, its test part measured after every epoch.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate of the other rows; this one's is twice as large.
        seed: of the order of the images.
        log: one line a rounding, see `RankLog`.
        checkpoint: where to continue, and what is written for that.
        progress: given the optimizer, makes what is called as (steps done, steps in all).
        resumed: called as (steps done, steps in all) where a checkpoint was found.

    Returns:
        The compact network, and what its training left behind.

    Raises:
        TrainingError: the loss is no longer finite, or what it leaves cannot be rounded.
    """
    begin = time.perf_counter()
    lr *= LR_FACTOR
    steps = epochs * math.ceil(len(data.train_x) / batch_size)
    random = torch.get_rng_state()

    def fresh() -> tuple[nn.Module, nn.Module, RankAdaptive]:
        torch.set_rng_state(random)
        model, budget = make()
        called = prepared(model)
        settle = max(1, round(SETTLE * steps))
        return (
            model,
            called,
            RankAdaptive(model, lr, tol=TOL, reserve=RESERVE, budget=budget, settle=settle, weight_decay=WEIGHT_DECAY),
        )

    model, called, optimizer = fresh()
    try:
        course = checkpoint.read(model, optimizer)
    except (ValueError, KeyError, TypeError, RuntimeError):
        model, called, optimizer = fresh()
        course = None
    if course is None:
        course = Course.of(seed)
    elif resumed is not None:
        resumed(course.step, steps)
    earlier = course.earlier

    with RankLog(log, after=course.step) if number() == 0 else nullcontext() as lines:

        def stepped(now: Course, loss: float) -> None:
            if lines is None:
                return
            lines.add(now.step, loss, optimizer.ranks(), settled=optimizer.fixed)
            if now.step % checkpoint.every == 0:
                checkpoint.write(model, optimizer, now, earlier + time.perf_counter() - begin)

        try:
            trained = train(
                model, data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, optimizer=optimizer,
                evaluated=compact, course=course, stepped=stepped, called=called,
                progress=None if progress is None else progress(optimizer),
            )  # fmt: skip
        except torch.linalg.LinAlgError as error:
            raise TrainingError(
                f"train: weights must stay finite, got some that cannot be rounded after step {course.step} "
                f"(lr = {lr:g}: {error}); lower --lr"
            ) from None
    return compact(model), trained
