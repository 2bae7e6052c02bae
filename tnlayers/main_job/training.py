"""Training and measuring one network: the same recipe for every variant, so that rows can be compared."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlayers.main_job.data import Dataset

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
    """

    curve: tuple[float, ...]
    step_ms: float
    steps: int


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
) -> Training:
    """Minimize cross-entropy by AdamW under `learning_rate`, in place.

    Args:
        model: images -> logits.
        data: its training part is learned, its test part measured after every epoch.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate.
        seed: of the order of the images.
        progress: called as (steps done, steps in all).

    Raises:
        TrainingError: the loss is no longer finite.

    Example:
        >>> from tnlayers.main_job.data import load_data
        >>> data, model = load_data("digits", limit=60), nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> train(model, data, epochs=1, batch_size=20, lr=0.01, seed=0).steps
        3
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_x)
    steps = epochs * math.ceil(count / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    curve: list[float] = []
    times: list[float] = []
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(count, generator=generator).split(batch_size):
            x, y = data.train_x[rows], data.train_y[rows]
            optimizer.param_groups[0]["lr"] = learning_rate(len(times), steps, lr)
            start = time.perf_counter()
            loss = _step(model, optimizer, x, y)
            times.append(1e3 * (time.perf_counter() - start))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"train: the loss must stay finite, got {loss} in epoch {epoch + 1}, step {len(times)} "
                    f"(lr = {lr:g}); lower --lr"
                )
            if progress is not None:
                progress(len(times), steps)
        curve.append(accuracy(model, data.test_x, data.test_y))
    return Training(tuple(curve), statistics.median(times), steps)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


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
