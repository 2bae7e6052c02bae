"""What `RankAdaptive` accepts."""

from math import isfinite
from typing import Any


class RankLimitWarning(UserWarning):
    """Ranks cannot grow, and the message says why and what to do."""


def check_options(
    lr: float,
    tol: float | None,
    theta: float | None,
    reserve: int,
    settle: int | None,
    min_rank: int,
    max_rank: int | None,
    budget: int | None,
    every: int,
    betas: tuple[float, float | None],
    weight_decay: float,
) -> None:
    """Refuse options that make no sense, by name.

    Raises:
        ValueError: one of them.
    """

    def number(value: Any, least: float) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and isfinite(value) and value >= least

    def integer(value: Any, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    rules: list[tuple[str, Any, bool, str]] = [
        ("lr", lr, number(lr, 0.0), "a number >= 0"),
        ("tol", tol, tol is None or (number(tol, 0.0) and tol < 1), "a number in [0, 1), or None"),
        ("theta", theta, theta is None or number(theta, 0.0), "a number >= 0, or None"),
        ("reserve", reserve, integer(reserve, 0), "an int >= 0"),
        ("settle", settle, settle is None or integer(settle, 1), "an int >= 1 (a step), or None"),
        ("min_rank", min_rank, integer(min_rank, 1), "an int >= 1"),
        ("max_rank", max_rank, max_rank is None or integer(max_rank, min_rank), "an int >= min_rank, or None"),
        ("budget", budget, budget is None or integer(budget, 1), "a number of parameters >= 1, or None"),
        ("every", every, integer(every, 1), "an int >= 1"),
        ("weight_decay", weight_decay, number(weight_decay, 0.0), "a number >= 0"),
    ]
    pair = isinstance(betas, tuple | list) and len(betas) == 2
    decays = pair and number(betas[0], 0.0) and betas[0] < 1
    decays = decays and (betas[1] is None or (number(betas[1], 0.0) and betas[1] < 1))
    rules.append(("betas", betas, decays, "two numbers in [0, 1), the second may be None"))
    for name, value, right, expected in rules:
        if not right:
            raise ValueError(f"RankAdaptive: {name} must be {expected}, got {value!r}")
