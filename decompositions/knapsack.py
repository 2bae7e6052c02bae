"""One option for each of several groups under a joint budget: every budget at once, by dynamic programming."""

from collections.abc import Sequence
from math import gcd, inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 1 << 16
"""Budgets that are told apart at most."""


class Option(NamedTuple):
    """What one choice costs, and the error that it leaves."""

    price: int
    error: float


class Frontier:
    """Least sum of errors at every budget, where one option of each group is taken (multiple-choice knapsack).

    Prices are whole numbers. With u their greatest common divisor (in each group counted from its cheapest option), a
    budget is a number of u; the table is exact while it has at most `cells` budgets, else u is enlarged and prices
    are rounded up to it: no budget is ever exceeded, and at most (number of groups) u of it are left unused.
    Cost: O(number of options x cells) time, O(groups x cells) memory; once for all budgets.

    Args:
        groups: the options of each group, at least one.
        cells: see above.

    Raises:
        ValueError: a group without options; prices that are not whole numbers >= 0; errors that are not finite or < 0.

    References:
        H. Kellerer, U. Pferschy, D. Pisinger, Knapsack Problems, Springer 2004, chapter 11.

    Example:
        >>> two = Frontier([[Option(1, 4.0), Option(3, 0.0)], [Option(1, 1.0), Option(4, 0.0)]])
        >>> two.within(5), two.within(6), two.cheapest(1.0)
        ([1, 0], [1, 0], [1, 0])
        >>> two.least, two.most
        (2, 7)
    """

    def __init__(self, groups: Sequence[Sequence[Option]], *, cells: int = CELLS) -> None:
        if isinstance(cells, bool) or not isinstance(cells, int) or cells < 1:
            raise ValueError(f"Frontier: cells must be an int >= 1, got {cells!r}")
        for k, group in enumerate(groups):
            if not group:
                raise ValueError(f"Frontier: every group must have an option, got none in group {k}")
            for price, error in group:
                if isinstance(price, bool) or not isinstance(price, int) or price < 0:
                    raise ValueError(f"Frontier: prices must be whole numbers >= 0, got {price!r} in group {k}")
                if not (isfinite(error) and error >= 0):
                    raise ValueError(f"Frontier: errors must be finite and >= 0, got {error!r} in group {k}")
        self.groups: tuple[tuple[Option, ...], ...] = tuple(tuple(Option(*option) for option in g) for g in groups)
        self.least: int = sum(min(option.price for option in group) for group in self.groups)
        """The smallest budget that can be met."""
        useful = [_undominated(group) for group in self.groups]
        self.most: int = sum(self.groups[k][own[-1]].price for k, own in enumerate(useful))
        """What the options of least error cost together: no budget beyond it does any good."""
        steps = [[self.groups[k][i].price - self.groups[k][own[0]].price for i in own] for k, own in enumerate(useful)]
        self.unit: int = gcd(*(step for own in steps for step in own)) or 1
        width = self.most - self.least
        if width // self.unit >= cells:
            self.unit = -(-width // cells)
        self._useful = useful
        self._cells = sum(-(-own[-1] // self.unit) for own in steps)
        self._taken: list[Tensor] = []
        self._costs: list[list[int]] = [[-(-step // self.unit) for step in own] for own in steps]
        best = torch.zeros(self._cells + 1, dtype=torch.float64)
        for k, own in enumerate(useful):
            new = torch.full_like(best, inf)
            taken = torch.zeros(self._cells + 1, dtype=torch.int32)
            for place, (i, cost) in enumerate(zip(own, self._costs[k], strict=True)):
                here = best[: self._cells + 1 - cost] + self.groups[k][i].error
                better = here < new[cost:]
                new[cost:] = torch.where(better, here, new[cost:])
                taken[cost:] = torch.where(better, place, taken[cost:])
            self._taken.append(taken)
            best = new
        self._best = best

    def within(self, budget: int | float) -> list[int]:
        """Number of the option of each group whose prices sum to at most `budget`, with the least sum of errors.

        Raises:
            ValueError: the cheapest options exceed the budget.
        """
        if not budget >= self.least:
            raise ValueError(
                f"Frontier.within: the budget must hold the cheapest options, expected at least {self.least:,}, got "
                f"{budget:,}"
            )
        return self._read(int(min(budget - self.least, self._cells * self.unit)) // self.unit)

    def cheapest(self, error: int | float) -> list[int]:
        """Options with the least price (to the unit of the table) whose errors sum to at most `error`.

        Raises:
            ValueError: not even the best options reach it.
        """
        within = (self._best <= float(error)).nonzero()
        if len(within) == 0:
            raise ValueError(
                f"Frontier.cheapest: the error must be in reach, expected at least {float(self._best.min()):.6g}, got "
                f"{error:.6g}"
            )
        return self._read(int(within[0]))

    def price(self, chosen: Sequence[int]) -> int:
        """Sum of the prices of chosen options."""
        return sum(group[i].price for group, i in zip(self.groups, chosen, strict=True))

    def error(self, chosen: Sequence[int]) -> float:
        """Sum of the errors of chosen options."""
        return sum(group[i].error for group, i in zip(self.groups, chosen, strict=True))

    def _read(self, cell: int) -> list[int]:
        """Walk the tables back from a budget."""
        chosen = []
        for own, costs, taken in zip(reversed(self._useful), reversed(self._costs), reversed(self._taken), strict=True):
            place = int(taken[cell])
            chosen.append(own[place])
            cell -= costs[place]
        return chosen[::-1]


def _undominated(group: Sequence[Option]) -> list[int]:
    """Numbers of the options by rising price, those left out that cost no less and err no less than another."""
    order = sorted(range(len(group)), key=lambda i: (group[i].price, group[i].error))
    kept: list[int] = []
    for i in order:
        if not kept or group[i].error < group[kept[-1]].error:
            kept.append(i)
    return kept
