"""The integer problem behind ranks under a budget: allowed ranks, tails, prices, and two ways to solve it."""

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, isfinite, log, sqrt
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from decompositions.prices import Term

Spectra = Mapping[str, Sequence[int | float] | Tensor | np.ndarray]


@dataclass(frozen=True)
class Choice:
    """Ranks under a budget, and why.

    Args:
        ranks: bond -> rank.
        price: of these ranks.
        budget: what was allowed; None where an error was.
        tails: bond -> part of the squared norm that is cut there.
        optimal: whether no other ranks are better, to 1e-7 of the sum of the tails (exact method).
        tolerance: the error that was allowed; None where a budget was.
        weight: of all networks that were chosen for together, 1 for one tensor.
    """

    ranks: dict[str, int]
    price: int
    budget: int | None
    tails: dict[str, float]
    optimal: bool
    next_gain: dict[str, float] = field(repr=False)
    tolerance: float | None = None
    weight: float = 1.0

    @property
    def error(self) -> float:
        """Bound on the relative error: root of the sum of the tails; of several networks, on that of each."""
        return sqrt(sum(self.tails.values()))

    @property
    def mean_error(self) -> float:
        """Bound on the root mean square of the relative errors of the networks chosen for together."""
        return sqrt(sum(self.tails.values()) / self.weight)

    def explain(self, names: Mapping[str, str] | None = None) -> str:
        """A line a bond: its rank, what is cut there, and what one more would save.

        Args:
            names: other names of bonds.

        Example:
            >>> from decompositions import select_ranks
            >>> choice = select_ranks({"r": [4.0, 2.0, 1.0]}, [Term(10, ("r",))], 20)
            >>> print(choice.explain())
            20 of 20, error <= 0.218 (optimal)
            r: rank 2, cuts 4.8e-02 of the squared norm, one more would save 4.8e-02
        """
        price = f"{self.price:,}" if self.budget is None else f"{self.price:,} of {self.budget:,}"
        allowed = "" if self.tolerance is None else f" of {self.tolerance:.3g}"
        word = "error" if self.weight == 1 else "mean error"
        kind = "optimal" if self.optimal else "greedy"
        lines = [f"{price}, {word} <= {self.mean_error:.3g}{allowed} ({kind})"]
        lines += [
            f"{(names or {}).get(bond, bond)}: rank {rank}, cuts {self.tails[bond]:.1e} of the squared norm, "
            f"one more would save {self.next_gain[bond]:.1e}"
            for bond, rank in self.ranks.items()
        ]
        return "\n".join(lines)


class RankProblem:
    """Bonds with their allowed ranks and tails, and the price of a choice.

    Args:
        name: of the caller, for messages.
        spectra: bond -> singular values, descending.
        terms: the price.
        budget: the most that ranks may cost; None where their tails are bounded instead.
        multiple: of what ranks are to be multiples.
        relative: divide the spectra by the largest norm among them.
    """

    def __init__(
        self,
        name: str,
        spectra: Spectra,
        terms: Sequence[Term],
        budget: int | float | None,
        multiple: int,
        relative: bool = True,
    ) -> None:
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, Real) or not isfinite(budget)):
            raise ValueError(f"{name}: budget must be a finite number, got {budget!r}")
        if isinstance(multiple, bool) or not isinstance(multiple, Integral) or multiple < 1:
            raise ValueError(f"{name}: multiple must be an int >= 1, got {multiple!r}")
        self.name: str = name
        self.bonds: list[str] = list(spectra)
        self.squares: list[np.ndarray] = []
        for bond, values in spectra.items():
            own = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
            if own.ndim != 1 or not len(own) or not np.isfinite(own).all() or (own < 0).any():
                raise ValueError(f"{name}: spectra must be lists of finite numbers >= 0, got {values!r} for {bond!r}")
            if (np.diff(own) > 1e-6 * own[0]).any():
                raise ValueError(f"{name}: singular values must be in descending order, got {values!r} for {bond!r}")
            self.squares.append(own**2)
        unknown = {bond for term in terms for bond in term.bonds} - set(self.bonds)
        if unknown:
            raise ValueError(f"{name}: terms name bonds with spectra, expected {self.bonds}, got {sorted(unknown)}")
        if any(not (isfinite(term.factor) and term.factor > 0) for term in terms):
            raise ValueError(f"{name}: factors must be positive numbers, got {[term.factor for term in terms]}")
        if relative:
            total = max((float(own.sum()) for own in self.squares), default=1.0) or 1.0
            self.squares = [own / total for own in self.squares]
        # tails[k][r]: what is lost when r are kept
        self.tails: list[np.ndarray] = [np.append(np.cumsum(own[::-1])[::-1], 0.0) for own in self.squares]
        self.allowed: list[list[int]] = [
            sorted({*range(multiple, len(own) + 1, multiple), len(own)}) for own in self.squares
        ]
        index = {bond: k for k, bond in enumerate(self.bonds)}
        self.terms: list[tuple[float, list[int]]] = [
            (float(term.factor), [index[bond] for bond in term.bonds]) for term in terms
        ]
        self.of: list[list[tuple[int, int]]] = [[] for _ in self.bonds]  # terms of a bond, with its power there
        near: list[set[int]] = [set() for _ in self.bonds]
        for t, (_, own_bonds) in enumerate(self.terms):
            for k, power in Counter(own_bonds).items():
                self.of[k].append((t, power))
                near[k].update(own_bonds)
        self.near: list[list[int]] = [sorted(own) for own in near]  # bonds whose price a change of this one changes
        self.least: list[int] = [own[0] for own in self.allowed]
        self.most: list[int] = [own[-1] for own in self.allowed]
        self.budget: int = self.price(self.most) if budget is None else int(budget)
        if self.price(self.least) > self.budget:
            raise ValueError(
                f"{name}: the budget must hold the least ranks, expected at least {self.price(self.least):,} for "
                f"{dict(zip(self.bonds, self.least, strict=True))}, got {self.budget:,}; convert fewer layers, or "
                "lower multiple"
            )

    def term(self, t: int, ranks: Sequence[int]) -> float:
        """Price of one term."""
        value, bonds = self.terms[t]
        for k in bonds:
            value *= ranks[k]
        return value

    def price(self, ranks: Sequence[int]) -> int:
        """Price of all."""
        return round(sum(self.term(t, ranks) for t in range(len(self.terms))))

    def lost(self, ranks: Sequence[int]) -> float:
        """Sum of the tails."""
        return float(sum(tail[r] for tail, r in zip(self.tails, ranks, strict=True)))

    def _change(self, k: int, rank: int, ranks: list[int]) -> float:
        """What another rank of one bond would add to the price."""
        ratio = rank / ranks[k]
        return sum(self.term(t, ranks) * (ratio**power - 1) for t, power in self.of[k])

    # --- greedy ---

    def greedy(self) -> list[int]:
        """Up from the least ranks by the best saving a unit of price, then exchanges; the best of several paths."""
        best = self._exchanged(self._climbed(self.least))
        down = self._exchanged(self._climbed(self._descended(lambda ranks, price: price <= self.budget + 0.5)))
        return min(best, down, key=self.lost)

    def _climbed(self, start: Sequence[int]) -> list[int]:
        """Always the step that saves most for its price, while it fits."""
        ranks, place = list(start), [own.index(r) for own, r in zip(self.allowed, start, strict=True)]
        price, version = float(self.price(ranks)), [0] * len(ranks)
        heap: list[tuple[float, int, int]] = []

        def offer(k: int) -> None:
            if place[k] + 1 < len(self.allowed[k]):
                more = self.allowed[k][place[k] + 1]
                added = self._change(k, more, ranks)
                if price + added <= self.budget + 0.5:  # prices only grow: what does not fit now never will
                    gain = (self.tails[k][ranks[k]] - self.tails[k][more]) / max(added, 1e-300)
                    heapq.heappush(heap, (-gain, k, version[k]))

        for k in range(len(ranks)):
            offer(k)
        while heap:
            _, k, made = heapq.heappop(heap)
            if made != version[k]:
                continue
            more = self.allowed[k][place[k] + 1]
            added = self._change(k, more, ranks)
            if price + added > self.budget + 0.5:
                continue
            price += added
            ranks[k], place[k] = more, place[k] + 1
            for other in {k, *self.near[k]}:
                version[other] += 1
                offer(other)
        return ranks

    def _descended(
        self, done: Callable[[list[int], float], bool], allowed: Callable[[float], bool] = lambda lost: True
    ) -> list[int]:
        """Down from the largest ranks, always the step that loses least for what it saves, until `done`.

        Steps whose loss is not `allowed` are left out.
        """
        place, ranks = [len(own) - 1 for own in self.allowed], list(self.most)
        price, lost, version = float(self.price(ranks)), self.lost(ranks), [0] * len(ranks)
        heap: list[tuple[float, int, int]] = []

        def offer(k: int) -> None:
            if place[k]:
                less = self.allowed[k][place[k] - 1]
                saved = max(-self._change(k, less, ranks), 1e-300)
                heapq.heappush(heap, ((self.tails[k][less] - self.tails[k][ranks[k]]) / saved, k, version[k]))

        for k in range(len(ranks)):
            offer(k)
        while heap and not done(ranks, price):
            _, k, made = heapq.heappop(heap)
            if made != version[k]:
                continue
            less = self.allowed[k][place[k] - 1]
            more_lost = self.tails[k][less] - self.tails[k][ranks[k]]
            if not allowed(lost + more_lost):
                continue  # losses only grow
            price += self._change(k, less, ranks)
            lost += more_lost
            ranks[k], place[k] = less, place[k] - 1
            for other in {k, *self.near[k]}:
                version[other] += 1
                offer(other)
        return ranks

    def _exchanged(self, start: list[int], most: int = 24) -> list[int]:
        """Lower one bond by up to a few steps, climb with what that frees, while it helps; few bonds only."""
        best, lost = start, self.lost(start)
        if len(start) > most:
            return best
        improved = True
        while improved:
            improved = False
            for k, own in enumerate(self.allowed):
                at = own.index(best[k])
                for step in (1, 2, 4, 8, 16, 32):
                    if at - step < 0:
                        break
                    trial = list(best)
                    trial[k] = own[at - step]
                    for other in range(len(trial)):
                        if other == k:
                            continue
                        raised = self._raised(trial, other)
                        trial_lost = self.lost(raised)
                        if trial_lost < lost * (1 - 1e-12):
                            best, lost, improved = raised, trial_lost, True
        return best

    def _raised(self, ranks: list[int], k: int) -> list[int]:
        """One bond as high as the budget allows, then all others by climbing."""
        rest = self.budget + 0.5 - self.price(ranks)
        raised = list(ranks)
        fits = bisect_right(self.allowed[k], rest, key=lambda rank: self._change(k, rank, ranks))
        raised[k] = max(ranks[k], self.allowed[k][max(0, fits - 1)])
        return self._climbed(raised)

    # --- an error instead of a budget ---

    def cheapest(self, bound: float) -> list[int]:
        """Low price with tails of at most `bound`: down from the largest ranks, then better ranks at that price."""
        bound = bound * (1 + 1e-12)
        best = self._descended(lambda ranks, price: False, lambda lost: lost <= bound)
        for _ in range(8):
            self.budget = self.price(best) - 1
            if self.price(self.least) > self.budget:
                break
            better = self.greedy()
            if self.lost(better) > bound:
                break
            best = better
        self.budget = self.price(best)
        return best

    # --- exact ---

    def exact(self, start: list[int], max_seconds: int | float, bound: float | None = None) -> tuple[list[int], bool]:
        """Outer approximation: integer programs in which the price is replaced by its tangent planes.

        The least tails within the budget, or with `bound` the least price with tails of at most that. Returns the
        ranks, and whether they are proven optimal.
        """
        import time

        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix

        begin = time.monotonic()
        places = [(k, r) for k, own in enumerate(self.allowed) for r in own]
        value = np.array([self.tails[k][r] for k, r in places])
        logs = np.array([log(r) for _, r in places])
        sizes = np.array([float(r) for _, r in places])
        owner = np.array([k for k, _ in places])
        count = len(places)
        # a variable a rank, and the price, in units of what the start costs
        unit = float(max(1, self.price(start)))
        rows = csr_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(self.bonds), count + 1))
        constraints = [LinearConstraint(rows, 1, 1)]
        if bound is None:
            objective, upper = np.append(value / (value.max() or 1.0), 0.0), self.budget / unit
        else:
            objective, upper = np.append(np.zeros(count), 1.0), inf
            largest = value.max() or 1.0
            constraints.append(LinearConstraint(np.append(value / largest, 0.0)[None], ub=bound / largest))

        def plane(ranks: Sequence[int | float]) -> tuple[np.ndarray, float]:
            """`sum_t P_t (1 + sum_k (log r_k - log ranks_k)) <= price`: below the price everywhere, equal here.

            Terms of one bond, in whatever power, are linear in the variables and stand as they are.
            """
            row, right = np.zeros(count), 0.0
            for factor, bonds in self.terms:
                if len(set(bonds)) == 1:
                    row += factor * sizes ** len(bonds) * (owner == bonds[0])
                    continue
                here = factor * exp(sum(log(ranks[k]) for k in bonds))
                right -= here * (1 - sum(log(ranks[k]) for k in bonds))
                for k in bonds:
                    row += here * logs * (owner == k)
            return np.append(row, -unit), right

        def goal(ranks: list[int]) -> float:
            return self.lost(ranks) if bound is None else float(self.price(ranks))

        best = start
        planes = [plane(start), plane(self.least)]
        for factor in (0.7, 1.4):
            near = [min(max(r * factor, own[0]), own[-1]) for r, own in zip(start, self.allowed, strict=True)]
            planes.append(plane(near))
        while True:
            left = max_seconds - (time.monotonic() - begin)
            if left <= 0:
                return best, False
            matrix = np.stack([row for row, _ in planes])
            scale = np.abs(matrix).max(1, keepdims=True).clip(1e-300)
            found = milp(
                objective,
                constraints=[
                    *constraints,
                    LinearConstraint(matrix / scale, ub=[r for _, r in planes] / scale[:, 0] + 1e-9),
                ],
                integrality=np.append(np.ones(count), 0.0),
                bounds=Bounds(0, np.append(np.ones(count), upper)),
                options={"time_limit": left, "mip_rel_gap": 1e-7},
            )
            if found.x is None or found.status != 0:
                return best, False
            ranks = [0] * len(self.bonds)
            for place in np.flatnonzero(found.x[:count] > 0.5):
                ranks[places[place][0]] = places[place][1]
            # the planes lie below the price: where the price of the optimum is reached, or no better goal, it is found
            reached = self.budget if bound is None else found.x[-1] * unit * (1 + 1e-7) + 1e-6
            if self.price(ranks) <= reached:
                return (ranks if goal(ranks) <= goal(best) else best), True
            lower = self.lost(ranks) if bound is None else found.x[-1] * unit
            if lower >= goal(best) * (1 - (1e-9 if bound is None else 1e-7)):
                return best, True
            planes.append(plane(ranks))
            inside = self._fitted(ranks) if bound is None else ranks
            if goal(inside) < goal(best):
                best = inside

    def _fitted(self, ranks: list[int]) -> list[int]:
        """Ranks that are too dear, lowered until they fit, then raised again."""
        ranks = list(ranks)
        while self.price(ranks) > self.budget:
            options = []
            for k, own in enumerate(self.allowed):
                at = own.index(ranks[k])
                if at:
                    saved = max(-self._change(k, own[at - 1], ranks), 1e-300)
                    options.append(((self.tails[k][own[at - 1]] - self.tails[k][ranks[k]]) / saved, k, own[at - 1]))
            _, k, less = min(options)
            ranks[k] = less
        return self._climbed(ranks)

    def choice(self, ranks: list[int], *, optimal: bool, tolerance: float | None = None, weight: float = 1.0) -> Choice:
        """What is told about ranks."""
        following = [next((r for r in own if r > rank), rank) for own, rank in zip(self.allowed, ranks, strict=True)]
        return Choice(
            ranks=dict(zip(self.bonds, ranks, strict=True)),
            price=self.price(ranks),
            budget=self.budget if tolerance is None else None,
            tails={b: float(t[r]) for b, t, r in zip(self.bonds, self.tails, ranks, strict=True)},
            optimal=optimal,
            next_gain={
                b: float(t[r] - t[n]) for b, t, r, n in zip(self.bonds, self.tails, ranks, following, strict=True)
            },
            tolerance=tolerance,
            weight=weight,
        )
