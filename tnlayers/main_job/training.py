"""Training and measuring one network: the same recipe for every variant, so that rows can be compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.main_job.data import Dataset
from tnlayers.main_job.workers import count as worker_count
from tnlayers.main_job.workers import mean, prepared, share

WEIGHT_DECAY = 0.01
WARM_UP = 0.2
"""Part of the steps in which the learning rate rises; then it falls to zero along a cosine."""
INFERENCE_BATCH = 256

StepProgress = Callable[[int, int], None]
"""(steps done, steps in all)."""


class TrainingError(ValueError):
    """Training that cannot go on: one line with the next step."""


@dataclass(frozen=True)
class Training:
    """What a training run left behind.

    Args:
        curve: test accuracy after every epoch, in 0..1.
        step_ms: median milliseconds of one step (forward, backward, update).
        steps: how many.
        earlier: seconds that earlier, interrupted calls had spent.
    """

    curve: tuple[float, ...]
    step_ms: float
    steps: int
    earlier: float = 0.0


@dataclass
class Course:
    """Where a training run stands, between two steps: with the model and its optimizer, all that the rest depends on.

    Args:
        order: state of the generator of the image orders, before it drew that of the present epoch.
        step: steps done, over all epochs.
        curve: accuracy after every finished epoch.
        times: milliseconds of every step.
        earlier: seconds that earlier, interrupted calls had spent.
    """

    order: Tensor
    step: int = 0
    curve: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    earlier: float = 0.0

    @classmethod
    def of(cls, seed: int) -> Course:
        """The beginning."""
        return cls(torch.Generator().manual_seed(seed).get_state())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle: a line up to `peak` over the first fifth of the steps, then a cosine down to zero.

    Example:
        >>> [round(learning_rate(step, 10, 1.0), 2) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: StepProgress | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    evaluated: Callable[[nn.Module], nn.Module] | None = None,
    course: Course | None = None,
    stepped: Callable[[Course, float], None] | None = None,
    called: nn.Module | None = None,
) -> Training:
    """Minimize cross-entropy under `learning_rate`, in place.

    Args:
        model: images -> logits.
        data: its training part is learned, its test part measured after every epoch.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate.
        seed: of the order of the images.
        progress: called as (steps done, steps in all).
        optimizer: of the model; AdamW by default. All its groups follow the schedule.
        evaluated: gives the model whose accuracy counts; the model itself by default.
        course: where to continue; the beginning by default.
        stepped: called as (course, loss) after every step.
        called: what to call in place of the model, where it was prepared for several workers already.

    Raises:
        TrainingError: the loss is no longer finite.

    Example:
        >>> from tnlayers.main_job.data import load_data
        >>> data, model = load_data("digits", limit=60), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> train(model, data, epochs=1, batch_size=20, lr=0.01, seed=0).steps
        3
    """
    count, workers = len(data.train_x), worker_count()
    each = math.ceil(count / batch_size)
    steps = epochs * each
    called = prepared(model) if called is None else called
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    if course is None:
        course = Course.of(seed)
    generator = torch.Generator()
    generator.set_state(course.order)
    for epoch in range(len(course.curve), epochs):
        model.train()
        course.order = generator.get_state()
        batches = torch.randperm(count, generator=generator).split(batch_size)
        for rows in batches[course.step - epoch * each :]:
            own = share(rows)
            x, y = data.train_x[own], data.train_y[own]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(course.step, steps, lr)
            start = time.perf_counter()
            loss = _step(called, optimizer, x, y, len(own) * workers / len(rows))
            course.times.append(1e3 * (time.perf_counter() - start))
            course.step += 1
            if not math.isfinite(loss):
                raise TrainingError(
                    f"train: the loss must stay finite, got {loss} in epoch {epoch + 1}, step {course.step} "
                    f"(lr = {lr:g}); lower --lr"
                )
            if stepped is not None:
                stepped(course, loss)
            if progress is not None:
                progress(course.step, steps)
        course.curve.append(accuracy(model if evaluated is None else evaluated(model), data.test_x, data.test_y))
    return Training(tuple(course.curve), statistics.median(course.times), steps, course.earlier)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, weight: float) -> float:
    """`weight`: by which the workers' means make that of the batch."""
    optimizer.zero_grad()
    logits = model(x)
    loss = F.cross_entropy(logits, y) * weight if len(y) else logits.sum()
    loss.backward()
    value = mean(loss.item())
    if math.isfinite(value):  # an optimizer that decomposes what it moves has its own words for NaN
        optimizer.step()
    return value


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Part of the images whose largest logit is their label; the model is left in evaluation mode.

    Example:
        >>> accuracy(nn.Identity(), torch.eye(3), torch.tensor([0, 1, 1]))
        0.6666666666666666
    """
    model.eval()
    right = sum(
        int((model(images).argmax(1) == labels).sum())
        for images, labels in zip(x.split(500), y.split(500), strict=True)
    )
    return right / len(y)


@torch.no_grad()
def inference_ms(model: nn.Module, x: Tensor, repeats: int = 25) -> float:
    """Median milliseconds of one forward pass over x, in evaluation mode, after three passes that do not count."""
    model.eval()
    times = []
    for _ in range(3 + repeats):
        start = time.perf_counter()
        model(x)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


@torch.no_grad()
def flops_per_sample(model: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of matrix products and convolutions that one forward pass executes, by sample.

    Counted while the model runs, so that a weight that is merged before it is used is paid for.

    Example:
        >>> flops_per_sample(nn.Linear(3, 2), torch.ones(4, 3))
        12
    """
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(x)
    return round(counter.get_total_flops() / len(x))
