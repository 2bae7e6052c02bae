"""Steps on a loss until a number of steps or seconds, with what can be saved between two of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tnlayers.recovery.feed import Feed
from tnlayers.recovery.result import Moment
from tnlayers.recovery.session import Clock, copied, is_finite

Schedule = str | Callable[[float], float]
"""A name of `SCHEDULES`, or the factor of the learning rate by the part of the way (0 to 1)."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda part: 0.5 * (1 + math.cos(math.pi * part)),
    "linear": lambda part: 1 - part,
    "constant": lambda part: 1.0,
}

WARM_UP = 0.05
"""Part of the way in which the learning rate of the named schedules rises."""
CLIP = 1.0
"""Largest norm of a gradient; losses are relative, so that it is rarely reached but in the first steps."""
CHECKS = 0.1
"""Part of the time, where that is limited, that validation and checkpoints may take."""


def factor(schedule: Schedule, part: float) -> float:
    """Factor of the learning rate.

    Example:
        >>> [round(factor("cosine", part), 3) for part in (0.0, 0.05, 0.525, 1.0)]
        [0.02, 1.0, 0.5, 0.0]
    """
    if not isinstance(schedule, str):
        return float(schedule(part))
    if part < WARM_UP:
        return max(0.02, part / WARM_UP)
    return SCHEDULES[schedule](min(1.0, (part - WARM_UP) / (1 - WARM_UP)))


class Limits(NamedTuple):
    """Where to stop: after so many steps, at so many seconds of the clock, at whichever comes first."""

    steps: int | None
    start: float = 0.0
    end: float | None = None

    def part(self, step: int, elapsed: float) -> float:
        """Part of the way, 0 to 1."""
        done = [] if self.steps is None else [step / max(1, self.steps)]
        if self.end is not None:
            done.append((elapsed - self.start) / max(1e-9, self.end - self.start))
        return min(1.0, max(done))

    def reached(self, step: int, elapsed: float) -> str:
        """Why to stop, empty while there is more to do."""
        if self.steps is not None and step >= self.steps:
            return f"all {self.steps} steps are done"
        if self.end is not None and elapsed >= self.end:
            return f"the time of {self.end - self.start:.0f} s is over"
        return ""


@dataclass
class Standing:
    """Between two steps: all that a descent depends on besides the model, its optimizer and the feed.

    Args:
        step: steps done.
        history: so far.
        best: state with the least validation loss, or the last one that was seen to be finite.
        value: its validation loss, inf without one.
    """

    step: int = 0
    history: list[Moment] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    value: float = math.inf

    def state(self) -> dict[str, Any]:
        """As tensors and plain data."""
        history = [list(moment) for moment in self.history]
        return {"step": self.step, "history": history, "best": self.best, "value": self.value}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Standing":
        """Inverse of `state`."""
        return cls(state["step"], [Moment(*one) for one in state["history"]], state["best"], state["value"])


class Ended(NamedTuple):
    """How a descent ended: whether in good order, and the words for it."""

    good: bool
    reason: str


def descend(
    module: nn.Module,
    optimizer: Optimizer,
    feed: Feed,
    loss_of: Callable[[int | None, Any], Tensor],
    standing: Standing,
    limits: Limits,
    clock: Clock,
    *,
    schedule: Schedule,
    bases: list[float],
    every: int,
    name: str = "",
    judge: Callable[[], float] | None = None,
    state_of: Callable[[nn.Module], dict[str, Any]] = copied,
    stepped: Callable[[float], None] | None = None,
    settled: Callable[[], None] | None = None,
    save: Callable[[], None] | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> Ended:
    """Move the module's parameters down a loss; at the end, and on any exception, it holds a finite state.

    With `judge` that is the state of the least validation loss; without, the last one, or where the loss or a gradient
    left the finite numbers (and on an exception) the last that was looked at, every `every` steps.

    Args:
        module: what the optimizer trains; `standing.best` is a state of it.
        optimizer: of it; its learning rates are `bases` times the schedule.
        feed: of the batches.
        loss_of: (index, batch) -> loss.
        standing: where to go on; kept up to date.
        limits: of steps and seconds.
        clock: of this recovery.
        schedule: see `factor`.
        bases: learning rates of the optimizer's groups, at factor one.
        every: steps between two looks, entries of the history and saves.
        name: of the block, for the history.
        judge: validation loss of the module as it is.
        state_of: a state dict in memory of its own.
        stepped: called with the part of the way after every step.
        settled: called before every save, saved or not: brings the optimizer to what a saved state would give.
        save: writes a checkpoint.
        tell: called as (step, mean loss) after every step.
    """
    total = torch.zeros((), dtype=torch.float64)
    checks, ended = 0.0, Ended(True, "")
    try:
        while not (reason := limits.reached(standing.step, clock.elapsed)):
            part = limits.part(standing.step, clock.elapsed)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor(schedule, part)
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(*next(feed))
            value = float(loss.detach())
            if not math.isfinite(value):
                ended = Ended(False, f"the loss is {value} after step {standing.step}")
                break
            loss.backward()
            moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            size = float(nn.utils.clip_grad_norm_(moving, CLIP)) if moving else 0.0
            if not math.isfinite(size):
                ended = Ended(False, f"a gradient is not finite after step {standing.step}")
                break
            optimizer.step()
            standing.step += 1
            total += value
            if stepped is not None:
                stepped(limits.part(standing.step, clock.elapsed))
            short = limits.end is not None and checks > CHECKS * (clock.elapsed - limits.start)
            if standing.step % every == 0 and not short:
                before = clock.elapsed
                moment = _moment(standing, float(total), before, name)
                _look(module, standing, judge, state_of, moment)
                total.zero_()
                if settled is not None:
                    settled()
                if save is not None:
                    save()
                checks += clock.elapsed - before
            if tell is not None:
                tell(standing.step, value)
        else:
            ended = Ended(True, reason)
            if judge is not None:
                if standing.step > _last(standing):
                    moment = _moment(standing, float(total), clock.elapsed, name)
                    _look(module, standing, judge, state_of, moment)
            else:
                state = state_of(module)
                if is_finite(state):
                    standing.best = state
                else:
                    ended = Ended(False, f"a parameter is not finite after step {standing.step}")
    finally:
        optimizer.zero_grad(set_to_none=True)
        module.load_state_dict(standing.best)
    return ended


def _last(standing: Standing) -> int:
    return standing.history[-1].step if standing.history else 0


def _moment(standing: Standing, total: float, elapsed: float, name: str) -> Moment:
    return Moment(standing.step, elapsed, total / (standing.step - _last(standing)), None, name)


def _look(
    module: nn.Module,
    standing: Standing,
    judge: Callable[[], float] | None,
    state_of: Callable[[nn.Module], dict[str, Any]],
    moment: Moment,
) -> None:
    """Write the history; keep the state if it is finite and no worse."""
    value = None if judge is None else judge()
    standing.history.append(moment._replace(validation=value))
    if value is not None and not value < standing.value:
        return
    state = state_of(module)
    if is_finite(state):
        standing.best, standing.value = state, math.inf if value is None else value
