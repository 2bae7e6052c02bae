"""Options that recoveries have in common: what is refused, what is said."""

import math
import warnings
from numbers import Real
from typing import Any

import torch

from tnlayers.recovery.descent import SCHEDULES, Schedule
from tnlayers.recovery.result import RecoveryWarning


def check_limits(
    name: str, steps: Any, seconds: Any, lr: Any, every: Any, schedule: Schedule, cache_bytes: Any
) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: with the option's name.
    """
    for key, value, least in (("steps", steps, 0), ("every", every, 1), ("cache_bytes", cache_bytes, 0)):
        if (value is not None or key != "steps") and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise ValueError(f"{name}: {key} must be an int >= {least}, got {value!r}")
    for key, value in (("seconds", seconds), ("lr", lr)):
        if value is None and key == "seconds":
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
            raise ValueError(f"{name}: {key} must be a finite number > 0, got {value!r}")
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        raise ValueError(f"{name}: schedule must be one of {tuple(SCHEDULES)} or a callable, got {schedule!r}")
    if not isinstance(schedule, str) and not callable(schedule):
        raise ValueError(f"{name}: schedule must be one of {tuple(SCHEDULES)} or a callable, got {schedule!r}")


def warn_early(name: str, reason: str, lr: float) -> None:
    """Say that a recovery stopped early."""
    warnings.warn(
        f"{name}: stopped early, {reason}; the best state so far is kept. Lower lr (now {lr:g})",
        RecoveryWarning,
        stacklevel=4,
    )


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed of a recovery's own generator, whose state is saved."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))
