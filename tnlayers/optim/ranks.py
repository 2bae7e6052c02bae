"""Which ranks a rounding keeps: tolerance, reserve, hysteresis, caps, and one budget over all layers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
from torch import Tensor

from decompositions import Network, numel
from decompositions.formats.gauge import possible_ranks

HYSTERESIS = 0.8
"""A rank falls when less than the tolerance is lost, and rises when more than the tolerance would be; in between it
stays: the tail behind a rank must be below this part of the tolerance for the rank to fall back after it rose."""


@dataclass
class Ranks:
    """Ranks of one network and how they are chosen at a rounding.

    With `theta_e` the error allowed at a bond (`tol ‖W‖ / sqrt(#bonds)`, or `theta / sqrt(#bonds)`), the rank of a bond
    is the least with a tail of at most `theta_e`; `reserve` more directions are kept, whatever their singular values.

    Args:
        tol: relative tolerance of a rounding.
        theta: absolute one.
        reserve: directions kept beyond those of the tolerance.
        least: smallest rank.
        most: cap, the reserve included.
        found: rank of every bond, by the tolerance.
        kept: with the reserve.
        spectra: squared singular values of every bond at the last rounding.
    """

    tol: float | None
    theta: float | None
    reserve: int
    least: int
    most: int | None
    found: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0

    def start(self, net: Network) -> None:
        """Take the ranks of a network as they are."""
        self.found = dict(zip(net.bonds, net.ranks, strict=True))
        self.kept = dict(self.found)

    def chooser(self, net: Network, *, fixed: bool, reserve: int | None = None) -> Callable[[str, Tensor, float], int]:
        """What `cut_by` asks at every bond; books what it answers.

        Args:
            net: the network to be cut (for the ranks that its bonds can have).
            fixed: keep the ranks that were kept last.
            reserve: another reserve than usual.
        """
        return self.choosing(dict(zip(net.bonds, possible_ranks(net), strict=True)), fixed=fixed, reserve=reserve)

    def choosing(
        self, possible: Mapping[str, int], *, fixed: bool, reserve: int | None = None
    ) -> Callable[[str, Tensor, float], int]:
        """The same for bonds whose possible ranks are given."""
        more = self.reserve if reserve is None else reserve
        bonds = max(1, len(possible))

        def choose(bond: str, squares: Tensor, norm: float) -> int:
            self.spectra[bond], self.norm = squares.detach(), norm
            if fixed:
                return self.kept[bond]
            allowed = [a for a in (self.theta, None if self.tol is None else self.tol * norm) if a is not None]
            limit = min(allowed, default=0.0) / sqrt(bonds)
            low = _rank(squares, limit)
            high = _rank(squares, HYSTERESIS * limit)
            rank = min(max(self.found.get(bond, low), low), high)
            rank = min(max(rank, self.least), possible[bond], len(squares))
            if self.most is not None:
                rank = min(rank, self.most)
            self.found[bond] = rank
            self.kept[bond] = self._with_reserve(rank, more, possible[bond])
            return self.kept[bond]

        return choose

    def _with_reserve(self, rank: int, reserve: int, possible: int) -> int:
        wanted = min(rank + reserve, possible)
        return wanted if self.most is None else min(wanted, self.most)

    def wanted(self, net: Network) -> dict[str, int]:
        """Sizes that the bonds of a network should have: found and reserve, as far as possible."""
        possible = dict(zip(net.bonds, possible_ranks(net), strict=True))
        sizes = {bond: self._with_reserve(rank, self.reserve, possible[bond]) for bond, rank in self.found.items()}
        return limit(net, sizes)

    def consistent(self, net: Network) -> dict[str, int]:
        """Sizes of a network's bonds without what is redundant beside its neighbours; the found ranks follow."""
        sizes = limit(net, dict(zip(net.bonds, net.ranks, strict=True)))
        self.found = {bond: min(rank, sizes[bond]) for bond, rank in self.found.items()}
        return sizes


def _rank(squares: Tensor, limit: float) -> int:
    """Least k >= 1 with `sqrt(sum_{j >= k} sigma_j^2) <= limit`."""
    tails = squares.double().clamp_min(0).flip(0).cumsum(0).flip(0)
    return max(1, int((tails > limit * limit).sum()))


def within_budget(nets: Sequence[Network], ranks: Sequence[Ranks], budget: int) -> list[dict[str, int]]:
    """Ranks whose networks hold at most `budget` parameters together: the smallest singular values go first.

    All bonds of all layers are ranked in one list by `sigma / ‖W‖`. No rank falls below its `least`.

    Args:
        nets: one a layer; only modes are read.
        ranks: found ranks and spectra of each.
        budget: parameters of all networks together.

    Raises:
        ValueError: the least ranks exceed the budget already.

    Example:
        >>> from decompositions import LowRank
        >>> net = LowRank.random(row_modes=(10,), col_modes=(10,), rank=3)
        >>> own = Ranks(0.1, None, 1, 1, None, spectra={b: torch.tensor([4.0, 2.0, 1.0]) for b in net.bonds}, norm=2.0)
        >>> own.start(net)
        >>> within_budget([net], [own], 40)
        [{'a': 2, 'b': 2}]
    """
    chosen = [dict(own.found) for own in ranks]
    counts = [_count(net, sizes) for net, sizes in zip(nets, chosen, strict=True)]
    while sum(counts) > budget:
        best: tuple[float, int, str] | None = None
        for k, own in enumerate(ranks):
            for bond, rank in chosen[k].items():
                if rank > own.least and rank <= len(own.spectra[bond]):
                    value = sqrt(max(0.0, float(own.spectra[bond][rank - 1]))) / max(own.norm, 1e-300)
                    best = (value, k, bond) if best is None or value < best[0] else best
        if best is None:
            raise _too_small(sum(counts), budget)
        _, k, bond = best
        chosen[k][bond] -= 1
        limit(nets[k], chosen[k])
        counts[k] = _count(nets[k], chosen[k])
    return chosen


def check_budget(nets: Sequence[Network], least: int, budget: int) -> None:
    """Refuse a budget that networks exceed at their least ranks.

    Raises:
        ValueError: it is too small.
    """
    needed = sum(_count(net, limit(net, dict.fromkeys(net.bonds, least))) for net in nets)
    if needed > budget:
        raise _too_small(needed, budget)


def _too_small(needed: int, budget: int) -> ValueError:
    return ValueError(
        f"RankAdaptive: budget must hold the networks at their least ranks, expected at least {needed}, got {budget}; "
        "lower min_rank, or convert fewer layers"
    )


def limit(net: Network, sizes: dict[str, int]) -> dict[str, int]:
    """Lower every bond to what the other legs of its two cores allow, in place; more would be redundant.

    Example:
        >>> from decompositions import LowRank
        >>> limit(LowRank.random(row_modes=(9,), col_modes=(9,), rank=5), {"a": 5, "b": 3})
        {'a': 3, 'b': 3}
    """
    known = {**net.sizes, **sizes}
    changed = True
    while changed:
        changed = False
        for leg in net.legs:
            for bond in set(leg) & set(sizes):
                most = prod(known[label] for label in leg if label != bond)
                if known[bond] > most:
                    known[bond] = sizes[bond] = most
                    changed = True
    return sizes


def _count(net: Network, sizes: Mapping[str, int]) -> int:
    """Parameters of a network with other sizes of its bonds, as its format counts them."""
    known = {**net.sizes, **sizes}
    cores = [torch.empty([known[label] for label in leg], device="meta") for leg in net.legs]
    return numel(net._unchecked(cores, net.legs, net.rows, net.cols))
