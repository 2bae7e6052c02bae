"""Ranks under a budget: for one tensor, or for all networks of a model together.

What is minimized is the sum of the squared tails of all bonds, `sum_e sum_{i > r_e} sigma_{e,i}^2`: the bound of every
HOSVD, TT-SVD and hierarchical SVD on its squared error. The price of ranks is a sum of products of them, one a core.
"""

from collections.abc import Sequence
from math import inf, isfinite, sqrt
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from decompositions.formats.gauge import bond_singular_values, possible_ranks, require_tree
from decompositions.formats.network import Network
from decompositions.prices import Term, parameter_terms, tied_bonds
from decompositions.rank_problem import Choice, RankProblem, Spectra

Method = Literal["exact", "greedy"]


def select_ranks(
    spectra: Spectra,
    terms: Sequence[Term],
    budget: int | float | None = None,
    *,
    error: int | float | None = None,
    method: Method = "exact",
    multiple: int = 1,
    max_seconds: int | float = 60.0,
) -> Choice:
    """The ranks with the smallest sum of squared tails whose price fits a budget, or the cheapest within an error.

    "exact": a rank of a bond is a binary variable; the price is convex in the logarithms of the ranks, so that tangent
    planes cut off what is too dear until the optimum of the linear program fits (scipy's HiGHS). "greedy": from the
    least ranks up, always the step that saves most for its price, then exchanges of single ranks; with `error` from the
    largest down.
    Spectra are divided by the largest norm among the bonds; scaled alike they give the same ranks.
    Cost: greedy O(sum of ranks x bonds); exact a few to a few dozen integer programs of one variable a rank.

    Args:
        spectra: bond -> singular values in descending order (of the unfolding at that bond).
        terms: the price of ranks, see `parameter_terms` and `flop_terms`.
        budget: the most they may cost, in the unit of the terms.
        error: instead of a budget: what the root of the sum of the tails may be, relative to the norm of the tensor.
        method: see above.
        multiple: ranks are rounded to multiples of it (8 for tensor cores), the largest rank of a bond being allowed.
        max_seconds: after which "exact" gives up and returns the best that it knows, not marked optimal.

    Raises:
        ValueError: both a budget and an error, or neither; the least ranks exceed the budget; spectra that are not
            descending numbers >= 0; unknown bonds.

    References:
        M. Ghadiri, M. Fahrbach, G. Fu, V. Mirrokni, Approximately optimal core shapes for Tucker decompositions, ICML
        2023; M. Duran, I. Grossmann, Mathematical Programming 1986 (outer approximation).

    Example:
        >>> two = {"a": [3.0, 1.0, 0.1], "b": [3.0, 0.9, 0.5]}
        >>> select_ranks(two, [Term(1, ("a", "b")), Term(4, ("a",)), Term(4, ("b",))], 20).ranks
        {'a': 2, 'b': 2}
        >>> select_ranks(two, [Term(1, ("a", "b")), Term(4, ("a",)), Term(4, ("b",))], error=0.4).ranks
        {'a': 1, 'b': 2}
    """
    _check_goal("select_ranks", budget, error, method)
    problem = RankProblem("select_ranks", spectra, terms, budget, multiple)
    return _select(problem, error, 1.0, method, max_seconds)


def ranks_under(
    nets: Sequence[Network],
    budget: int | float | None = None,
    *,
    error: int | float | None = None,
    terms: Sequence[Sequence[Term]] | None = None,
    weights: Sequence[int | float] | None = None,
    method: Method = "greedy",
    multiple: int = 1,
) -> tuple[list[dict[str, int]], Choice]:
    """Ranks of several trees that fit one budget together, by their relative squared errors.

    Args:
        nets: trees, of ranks high enough that nothing wanted is lost (a decomposition by a small tolerance).
        budget: parameters of all, or what `terms` count.
        error: instead of a budget: root mean square of the relative errors of all (by `weights`).
        terms: the price of each network (`flop_terms`, for one); its parameters by default.
        weights: what a unit of relative squared error of each network is worth; 1 by default.
        method: see `select_ranks`.
        multiple: see `select_ranks`.

    Returns:
        For each network what `round(net, rank=...)` takes, and the choice with bonds named "0.bond", "1.bond", ...

    Raises:
        ValueError: a network that is no tree; both a budget and an error, or neither; a budget below the least ranks;
            weights that are not positive.

    Example:
        >>> import torch
        >>> from decompositions import round, svd
        >>> nets = [svd(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), svd(torch.diag(torch.tensor([5.0, 0.1, 0.1])))]
        >>> ranks, choice = ranks_under(nets, 18)
        >>> [round(net, rank=own).ranks for net, own in zip(nets, ranks)]
        [(2, 2), (1, 1)]
    """
    _check_goal("ranks_under", budget, error, method)
    weights = [1.0] * len(nets) if weights is None else list(weights)
    if len(weights) != len(nets) or not all(isinstance(w, Real) and isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"ranks_under: weights must be a positive number a network, got {weights}")
    prices = [parameter_terms(net) for net in nets] if terms is None else [list(own) for own in terms]
    if len(prices) != len(nets):
        raise ValueError(f"ranks_under: terms must be a list a network, expected {len(nets)}, got {len(prices)}")
    spectra: dict[str, Tensor] = {}
    joint = []
    for k, (net, weight, own) in enumerate(zip(nets, weights, prices, strict=True)):
        require_tree("ranks_under", net)
        values, tied = bond_singular_values(net.detach()), tied_bonds(net)
        for bond, most in zip(net.bonds, possible_ranks(net), strict=True):
            if bond not in tied:
                norm = float(torch.linalg.vector_norm(values[bond].double())) or 1.0
                spectra[f"{k}.{bond}"] = values[bond].double()[:most] / norm * sqrt(weight)
        joint += [Term(term.factor, tuple(f"{k}.{bond}" for bond in term.bonds)) for term in own]
    problem = RankProblem("ranks_under", spectra, joint, budget, multiple, relative=False)
    choice = _select(problem, error, float(sum(weights)), method, 60.0)
    found = []
    for k, net in enumerate(nets):
        tied = tied_bonds(net)
        found.append({bond: choice.ranks[f"{k}.{tied.get(bond, bond)}"] for bond in net.bonds})
    return found, choice


def _check_goal(name: str, budget: object, error: object, method: str) -> None:
    if method not in ("exact", "greedy"):
        raise ValueError(f"{name}: method must be 'exact' or 'greedy', got {method!r}")
    if (budget is None) == (error is None):
        raise ValueError(f"{name}: give a budget or an error, got budget={budget!r} and error={error!r}")
    if error is not None and (isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < inf):
        raise ValueError(f"{name}: error must be a finite number > 0, got {error!r}")


def _select(
    problem: RankProblem, error: int | float | None, weight: float, method: Method, max_seconds: int | float
) -> Choice:
    bound = None if error is None else float(error) ** 2 * weight
    found = problem.greedy() if bound is None else problem.cheapest(bound)
    optimal = False
    if method == "exact":
        found, optimal = problem.exact(found, max_seconds, bound)
    tolerance = None if error is None else float(error)
    return problem.choice(found, optimal=optimal, tolerance=tolerance, weight=weight)
