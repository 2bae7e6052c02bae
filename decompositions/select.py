"""Ranks under a budget: for one tensor, or for all networks of a model together.

What is minimized is the sum of the squared tails of all bonds, `sum_e sum_{i > r_e} sigma_{e,i}^2`: the bound of every
HOSVD, TT-SVD and hierarchical SVD on its squared error. The price of ranks is a sum of products of them, one a core.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from math import exp, inf, isfinite, log, sqrt
from numbers import Integral, Real
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decompositions.formats.gauge import bond_singular_values, possible_ranks, require_tree
from decompositions.formats.low_rank import LowRank
from decompositions.formats.network import Network

Spectra = Mapping[str, Sequence[int | float] | Tensor | np.ndarray]


class Term(NamedTuple):
    """A part of the price: `factor * product of the ranks of bonds`.

    Args:
        factor: what one entry costs (the product of a core's mode sizes, for parameters).
        bonds: whose ranks multiply.
    """

    factor: int | float
    bonds: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """Ranks under a budget, and why.

    Args:
        ranks: bond -> rank.
        price: of these ranks.
        budget: what was allowed.
        tails: bond -> part of the squared norm that is cut there.
        optimal: whether no other ranks have smaller tails, to 1e-7 of their sum (exact method).
    """

    ranks: dict[str, int]
    price: int
    budget: int
    tails: dict[str, float]
    optimal: bool
    next_gain: dict[str, float] = field(repr=False)

    @property
    def error(self) -> float:
        """Bound on the relative error: root of the sum of the tails."""
        return sqrt(sum(self.tails.values()))

    def explain(self, names: Mapping[str, str] | None = None) -> str:
        """A line a bond: its rank, what is cut there, and what one more would save.

        Args:
            names: other names of bonds.

        Example:
            >>> choice = select_ranks({"r": [4.0, 2.0, 1.0]}, [Term(10, ("r",))], 20)
            >>> print(choice.explain())
            20 of 20, error <= 0.218 (optimal)
            r: rank 2, cuts 4.8e-02 of the squared norm, one more would save 4.8e-02
        """
        kind = "optimal" if self.optimal else "greedy"
        lines = [f"{self.price:,} of {self.budget:,}, error <= {self.error:.3g} ({kind})"]
        lines += [
            f"{(names or {}).get(bond, bond)}: rank {rank}, cuts {self.tails[bond]:.1e} of the squared norm, "
            f"one more would save {self.next_gain[bond]:.1e}"
            for bond, rank in self.ranks.items()
        ]
        return "\n".join(lines)


def select_ranks(
    spectra: Spectra,
    terms: Sequence[Term],
    budget: int,
    *,
    method: Literal["exact", "greedy"] = "exact",
    multiple: int = 1,
    max_seconds: int | float = 60.0,
) -> Choice:
    """The ranks with the smallest sum of squared tails whose price fits a budget.

    "exact": a rank of a bond is a binary variable; the price is convex in the logarithms of the ranks, so that tangent
    planes cut off what is too dear until the optimum of the linear program fits (scipy's HiGHS). "greedy": from the
    least ranks up, always the step that saves most for its price, then exchanges of single ranks.
    Spectra are divided by the largest norm among the bonds; scaled alike they give the same ranks.
    Cost: greedy O(sum of ranks x bonds); exact a few to a few dozen integer programs of one variable a rank.

    Args:
        spectra: bond -> singular values in descending order (of the unfolding at that bond).
        terms: the price of ranks, see `parameter_terms`.
        budget: the most they may cost.
        method: see above.
        multiple: ranks are rounded to multiples of it (8 for tensor cores), the largest rank of a bond being allowed.
        max_seconds: after which "exact" gives up and returns the best that it knows, not marked optimal.

    Raises:
        ValueError: the least ranks exceed the budget; spectra that are not descending numbers >= 0; unknown bonds.

    References:
        M. Ghadiri, M. Fahrbach, G. Fu, V. Mirrokni, Approximately optimal core shapes for Tucker decompositions, ICML
        2023; M. Duran, I. Grossmann, Mathematical Programming 1986 (outer approximation).

    Example:
        >>> two = {"a": [3.0, 1.0, 0.1], "b": [3.0, 0.9, 0.5]}
        >>> select_ranks(two, [Term(1, ("a", "b")), Term(4, ("a",)), Term(4, ("b",))], 20).ranks
        {'a': 2, 'b': 2}
    """
    return _select(_Problem("select_ranks", spectra, terms, budget, multiple), method, max_seconds)


@singledispatch
def parameter_terms(net: Network) -> list[Term]:
    """Parameters as a function of the ranks: a term a core.

    Example:
        >>> from decompositions import Tucker
        >>> parameter_terms(Tucker.random(row_modes=(5, 6), rank=2))
        [Term(factor=1, bonds=('r0', 'r1')), Term(factor=5, bonds=('r0',)), Term(factor=6, bonds=('r1',))]
    """
    outside, terms = set(net.outside), []
    for leg, core in zip(net.legs, net.cores, strict=True):
        factor = 1
        for label, size in zip(leg, core.shape, strict=True):
            factor *= size if label in outside else 1
        terms.append(Term(factor, tuple(label for label in leg if label not in outside)))
    return terms


@parameter_terms.register
def _(net: LowRank) -> list[Term]:
    """Merged: r (m + n); both bonds have the same singular values and the same rank."""
    return [Term(net.U.shape[0] + net.V.shape[0], (net.bonds[0],))]


def ranks_under(
    nets: Sequence[Network],
    budget: int,
    *,
    weights: Sequence[int | float] | None = None,
    method: Literal["exact", "greedy"] = "greedy",
    multiple: int = 1,
) -> tuple[list[dict[str, int]], Choice]:
    """Ranks of several trees that hold at most `budget` parameters together, by their relative squared errors.

    Args:
        nets: trees, of ranks high enough that nothing wanted is lost (a decomposition by a small tolerance).
        budget: parameters of all.
        weights: what a unit of relative squared error of each network is worth; 1 by default.
        method: see `select_ranks`.
        multiple: see `select_ranks`.

    Returns:
        For each network what `round(net, rank=...)` takes, and the choice with bonds named "0.bond", "1.bond", ...

    Raises:
        ValueError: a network that is no tree; a budget below the least ranks; weights that are not positive.

    Example:
        >>> import torch
        >>> from decompositions import round, svd
        >>> nets = [svd(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), svd(torch.diag(torch.tensor([5.0, 0.1, 0.1])))]
        >>> ranks, choice = ranks_under(nets, 18)
        >>> [round(net, rank=own).ranks for net, own in zip(nets, ranks)]
        [(2, 2), (1, 1)]
    """
    weights = [1.0] * len(nets) if weights is None else list(weights)
    if len(weights) != len(nets) or not all(isinstance(w, Real) and isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"ranks_under: weights must be a positive number a network, got {weights}")
    spectra: dict[str, Tensor] = {}
    terms, caps = [], {}
    for k, (net, weight) in enumerate(zip(nets, weights, strict=True)):
        require_tree("ranks_under", net)
        values = bond_singular_values(net.detach())
        own = parameter_terms(net)
        priced = {bond for term in own for bond in term.bonds}
        for bond, most in zip(net.bonds, possible_ranks(net), strict=True):
            if bond in priced:
                norm = float(torch.linalg.vector_norm(values[bond].double())) or 1.0
                spectra[f"{k}.{bond}"] = values[bond].double()[:most] / norm * sqrt(weight)
                caps[f"{k}.{bond}"] = most
        terms += [Term(term.factor, tuple(f"{k}.{bond}" for bond in term.bonds)) for term in own]
    problem = _Problem("ranks_under", spectra, terms, budget, multiple, relative=False)
    choice = _select(problem, method, 60.0)
    found = []
    for k, net in enumerate(nets):
        own_ranks = {bond: choice.ranks.get(f"{k}.{bond}") for bond in net.bonds}
        # a bond without a price follows the one it is tied to
        found.append({bond: rank or max(r or 1 for r in own_ranks.values()) for bond, rank in own_ranks.items()})
    return found, choice


def _select(problem: "_Problem", method: str, max_seconds: int | float) -> Choice:
    if method not in ("exact", "greedy"):
        raise ValueError(f"{problem.name}: method must be 'exact' or 'greedy', got {method!r}")
    found = problem.greedy()
    return problem.choice(found, optimal=False) if method == "greedy" else problem.exact(found, max_seconds)


class _Problem:
    """Bonds with their allowed ranks and tails, and the price of a choice."""

    def __init__(
        self,
        name: str,
        spectra: Spectra,
        terms: Sequence[Term],
        budget: int,
        multiple: int,
        relative: bool = True,
    ) -> None:
        if isinstance(budget, bool) or not isinstance(budget, Real) or not isfinite(budget):
            raise ValueError(f"{name}: budget must be a finite number, got {budget!r}")
        if isinstance(multiple, bool) or not isinstance(multiple, Integral) or multiple < 1:
            raise ValueError(f"{name}: multiple must be an int >= 1, got {multiple!r}")
        self.name: str = name
        self.budget: int = int(budget)
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
        self.of: list[list[int]] = [[] for _ in self.bonds]
        for t, (_, own_bonds) in enumerate(self.terms):
            for k in own_bonds:
                self.of[k].append(t)
        least = [own[0] for own in self.allowed]
        if self.price(least) > self.budget:
            raise ValueError(
                f"{name}: the budget must hold the least ranks, expected at least {self.price(least):,} for "
                f"{dict(zip(self.bonds, least, strict=True))}, got {self.budget:,}; convert fewer layers, or lower "
                "multiple"
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
        return sum(self.term(t, ranks) for t in self.of[k]) * (rank / ranks[k] - 1)

    def greedy(self) -> list[int]:
        """Up from the least ranks by the best saving a unit of price, then exchanges; the best of several paths."""
        best = self._exchanged(self._climbed([own[0] for own in self.allowed]))
        down = self._exchanged(self._climbed(self._descended()))
        return min(best, down, key=self.lost)

    def _climbed(self, start: Sequence[int]) -> list[int]:
        ranks, place = list(start), [own.index(r) for own, r in zip(self.allowed, start, strict=True)]
        price = float(self.price(ranks))
        active = set(range(len(ranks)))
        while active:
            top: tuple[float, int] | None = None
            for k in list(active):
                if place[k] + 1 == len(self.allowed[k]):
                    active.discard(k)
                    continue
                more = self.allowed[k][place[k] + 1]
                added = self._change(k, more, ranks)
                if price + added > self.budget + 0.5:
                    active.discard(k)  # prices only grow
                    continue
                gain = (self.tails[k][ranks[k]] - self.tails[k][more]) / max(added, 1e-300)
                if top is None or gain > top[0]:
                    top = (gain, k)
            if top is not None:
                k = top[1]
                more = self.allowed[k][place[k] + 1]
                price += self._change(k, more, ranks)
                ranks[k], place[k] = more, place[k] + 1
        return ranks

    def _descended(self) -> list[int]:
        """Down from the largest ranks, always the step that loses least for what it saves."""
        place = [len(own) - 1 for own in self.allowed]
        ranks = [own[-1] for own in self.allowed]
        price = float(self.price(ranks))
        while price > self.budget + 0.5:
            top: tuple[float, int] | None = None
            for k, at in enumerate(place):
                if at == 0:
                    continue
                less = self.allowed[k][at - 1]
                saved = -self._change(k, less, ranks)
                loss = (self.tails[k][less] - self.tails[k][ranks[k]]) / max(saved, 1e-300)
                if top is None or loss < top[0]:
                    top = (loss, k)
            assert top is not None  # the least ranks fit
            k = top[1]
            less = self.allowed[k][place[k] - 1]
            price += self._change(k, less, ranks)
            ranks[k], place[k] = less, place[k] - 1
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
        own, rest = self.allowed[k], self.budget + 0.5 - self.price(ranks)
        share = sum(self.term(t, ranks) for t in self.of[k]) / ranks[k]
        most = ranks[k] + (rest / share if share > 0 else inf)
        fits = [r for r in own if r <= most]
        raised = list(ranks)
        raised[k] = max(fits[-1] if fits else ranks[k], ranks[k])
        return self._climbed(raised)

    def exact(self, start: list[int], max_seconds: int | float) -> Choice:
        """Outer approximation: integer programs in which the price is replaced by its tangent planes."""
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
        rows = csr_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(self.bonds), count))
        one = LinearConstraint(rows, 1, 1)

        def plane(ranks: Sequence[int | float]) -> tuple[np.ndarray, float]:
            """`sum_t P_t (1 + sum_k (log r_k - log ranks_k)) <= budget`: below the price everywhere, equal here.

            Terms of one bond are linear in the variables and stand as they are.
            """
            row, right = np.zeros(count), float(self.budget)
            for factor, bonds in self.terms:
                if len(bonds) == 1:
                    row += factor * sizes * (owner == bonds[0])
                    continue
                here = factor * exp(sum(log(ranks[k]) for k in bonds))
                right -= here * (1 - sum(log(ranks[k]) for k in bonds))
                for k in bonds:
                    row += here * logs * (owner == k)
            return row, right

        best, lost = start, self.lost(start)
        planes = [plane(start), plane([own[0] for own in self.allowed])]
        for factor in (0.7, 1.4):
            near = [min(max(r * factor, own[0]), own[-1]) for r, own in zip(start, self.allowed, strict=True)]
            planes.append(plane(near))
        while True:
            left = max_seconds - (time.monotonic() - begin)
            if left <= 0:
                return self.choice(best, optimal=False)
            matrix = np.stack([row for row, _ in planes])
            scale = np.abs(matrix).max(1, keepdims=True).clip(1e-300)
            found = milp(
                value / (value.max() or 1.0),
                constraints=[one, LinearConstraint(matrix / scale, ub=[r for _, r in planes] / scale[:, 0] + 1e-9)],
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                options={"time_limit": left, "mip_rel_gap": 1e-7},
            )
            if found.x is None or found.status != 0:
                return self.choice(best, optimal=False)
            ranks = [0] * len(self.bonds)
            for place in np.flatnonzero(found.x > 0.5):
                ranks[places[place][0]] = places[place][1]
            if self.price(ranks) <= self.budget:
                return self.choice(ranks if self.lost(ranks) <= lost else best, optimal=True)
            if self.lost(ranks) >= lost * (1 - 1e-9):  # even without the whole price nothing is better
                return self.choice(best, optimal=True)
            planes.append(plane(ranks))
            inside = self._fitted(ranks)
            if self.lost(inside) < lost:
                best, lost = inside, self.lost(inside)

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

    def choice(self, ranks: list[int], *, optimal: bool) -> Choice:
        """What is told about ranks."""
        following = [next((r for r in own if r > rank), rank) for own, rank in zip(self.allowed, ranks, strict=True)]
        return Choice(
            ranks=dict(zip(self.bonds, ranks, strict=True)),
            price=self.price(ranks),
            budget=self.budget,
            tails={b: float(t[r]) for b, t, r in zip(self.bonds, self.tails, ranks, strict=True)},
            optimal=optimal,
            next_gain={
                b: float(t[r] - t[n]) for b, t, r, n in zip(self.bonds, self.tails, ranks, following, strict=True)
            },
        )
