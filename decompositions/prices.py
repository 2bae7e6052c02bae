"""What ranks cost: sums of products of them, read off the cores or off a contraction plan."""

from collections.abc import Sequence
from functools import singledispatch
from math import prod
from typing import NamedTuple

from decompositions.formats.low_rank import LowRank
from decompositions.formats.network import Network
from decompositions.formats.plan import Work


class Term(NamedTuple):
    """A part of the price: `factor * product of the ranks of bonds`, a bond named twice counting squared.

    Args:
        factor: what one entry costs (the product of a core's mode sizes, for parameters).
        bonds: whose ranks multiply.
    """

    factor: int | float
    bonds: tuple[str, ...]


@singledispatch
def tied_bonds(net: Network) -> dict[str, str]:
    """Bonds that have the singular values and the rank of another one: bond -> that one.

    Example:
        >>> tied_bonds(LowRank.random(row_modes=(5,), col_modes=(6,), rank=2))
        {'b': 'a'}
    """
    return {}


@tied_bonds.register
def _(net: LowRank) -> dict[str, str]:
    return {net.bonds[1]: net.bonds[0]}


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


def flop_terms(net: Network, work: Work) -> list[Term]:
    """FLOPs of a plan as a function of the ranks: a term a step, as long as the steps stay the same.

    Args:
        net: the network that the plan was made for.
        work: of the plan, `Plan.work`.

    Example:
        >>> from decompositions import TT, plan_apply
        >>> net = TT.random(row_modes=(6,), col_modes=(5,), rank=2)
        >>> path = min(plan_apply(net, batch=10), key=lambda plan: plan.flops)
        >>> flop_terms(net, path.work)
        [Term(factor=100, bonds=('b0',)), Term(factor=120, bonds=('b0',))]
    """
    ranks, same = dict(zip(net.bonds, net.ranks, strict=True)), tied_bonds(net)
    terms = []
    for flops, labels in work:
        own = [label for label in labels if label in ranks]
        each = prod(ranks[label] for label in own)
        factor = flops // each if flops % each == 0 else flops / each
        if factor > 0:
            terms.append(Term(factor, tuple(same.get(label, label) for label in own)))
    return terms


def scaled_terms(terms: Sequence[Term], factor: int | float) -> list[Term]:
    """The same price in other units: bytes for parameters.

    Example:
        >>> scaled_terms([Term(3, ("r",))], 4)
        [Term(factor=12, bonds=('r',))]
    """
    return [Term(term.factor * factor, term.bonds) for term in terms]
