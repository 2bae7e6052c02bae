"""What the optimizers of networks accept, refused by name before anything is done."""

from collections.abc import Iterable
from math import inf, isfinite
from typing import Any


class RankLimitWarning(UserWarning):
    """Ranks cannot grow, and the message says why and what to do."""


Rule = tuple[str, Any, bool, str]
"""An option, its value, whether that is right, and what is expected."""


def number(value: Any, least: int | float, below: int | float = inf) -> bool:
    """A finite number in [least, below).

    Example:
        >>> number(0.5, 0), number(float("nan"), 0), number(True, 0), number(1, 0, 1), number("1", 0)
        (True, False, False, False, False)
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and isfinite(value) and least <= value < below


def integer(value: Any, least: int) -> bool:
    """An int that is no bool, at least `least`.

    Example:
        >>> integer(3, 1), integer(3.0, 1), integer(True, 1), integer(0, 1)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def refuse(name: str, rules: Iterable[Rule]) -> None:
    """Raise for the first option that is not right.

    Raises:
        ValueError: one of them.

    Example:
        >>> refuse("CondLR", [("lr", 0.1, True, "a number >= 0")])
    """
    for option, value, right, expected in rules:
        if not right:
            raise ValueError(f"{name}: {option} must be {expected}, got {value!r}")


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
    """Refuse options of `RankAdaptive` that make no sense.

    Raises:
        ValueError: one of them.
    """
    rules: list[Rule] = [
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
    refuse("RankAdaptive", rules)
