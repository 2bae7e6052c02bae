"""Which candidate every layer takes: policies for ranks under a budget."""

from collections.abc import Callable, Sequence
from math import inf

from decompositions.knapsack import Frontier, Option
from tnlayers.compression.candidates import Candidate, Problem, effective_rank

POLICIES = ("auto", "loss", "knapsack", "energy", "welore", "effective", "uniform")


def choose(
    policy: str,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Candidate]],
    budget: int | None,
    error: float | None = None,
    table: Frontier | None = None,
) -> list[int]:
    """Number of the candidate of each layer.

    "loss" and "knapsack" minimize the sum of the errors, or of the errors relative to the layer's own, exactly
    (`Frontier`); "uniform" gives every layer the same share of its price; "energy" lets every layer lose the same share
    of its weighted energy; "welore" keeps the singular values above the same share of the layer's largest; "effective"
    gives prices in proportion to effective ranks, and spends what a layer cannot use on the others.

    Args:
        policy: see above.
        problems: the layers.
        groups: their candidates.
        budget: of all prices; or None with
        error: what the sum of the errors may be at most; with another policy than "loss", of the relative ones.
        table: the frontier of these candidates (of relative errors but for "loss"), where it is there already.

    Raises:
        ValueError: a budget or an error out of reach.

    References:
        A. Jaiswal et al., From GaLore to WeLore, 2024, arXiv 2407.11239 ("welore").

    Example:
        >>> import torch
        >>> from tnlayers.compression.candidates import candidates
        >>> problems = [Problem(torch.diag(torch.tensor([5.0, *[small] * 7]))) for small in (0.1, 2.0)]
        >>> groups = [candidates(problem, ("low_rank",)) for problem in problems]
        >>> chosen = choose("loss", problems, groups, 80)
        >>> [groups[k][i].ranks for k, i in enumerate(chosen)]
        [(1,), ()]
    """
    relative = policy != "loss"
    sizes = [(problem.total or 1.0) if relative else 1.0 for problem in problems]
    if policy in ("loss", "knapsack"):
        table = frontier(groups, sizes) if table is None else table
        return table.within(_reach(budget, groups)) if error is None else table.cheapest(error)
    measure = _measure(policy, problems, groups)
    low, high, best = 0.0, 1.0, None
    for _ in range(60):  # what is spent grows with the level
        middle = (low + high) / 2
        taken = [measure(k, middle) for k in range(len(groups))]
        spent = sum(groups[k][i].price for k, i in enumerate(taken))
        lost = sum(groups[k][i].error / sizes[k] for k, i in enumerate(taken))
        fits = lost <= error if error is not None else spent <= _reach(budget, groups)
        if fits:
            best = taken
        # with a budget the largest level that fits, with an error the smallest
        if fits == (error is None):
            low = middle
        else:
            high = middle
    whole = [measure(k, 1.0) for k in range(len(groups))]
    if best is None and error is not None and sum(groups[k][i].error / sizes[k] for k, i in enumerate(whole)) <= error:
        best = whole
    if best is None:
        return frontier(groups, sizes).within(_reach(budget, groups))  # below what the policy can name: the cheapest
    if error is None and sum(groups[k][i].price for k, i in enumerate(whole)) <= _reach(budget, groups):
        return whole
    return best


def frontier(groups: Sequence[Sequence[Candidate]], sizes: Sequence[float] | None = None) -> Frontier:
    """Every budget at once, errors divided by `sizes`."""
    sizes = [1.0] * len(groups) if sizes is None else sizes
    return Frontier(
        [[Option(c.price, c.error / size) for c in group] for group, size in zip(groups, sizes, strict=True)]
    )


def _reach(budget: int | None, groups: Sequence[Sequence[Candidate]]) -> int:
    assert budget is not None
    least = sum(min(c.price for c in group) for group in groups)
    if budget < least:
        raise ValueError(
            f"compress: the budget must hold the least ranks everywhere, expected at least {least:,}, got {budget:,}; "
            "keep more, or target fewer layers"
        )
    return budget


def _measure(
    policy: str, problems: Sequence[Problem], groups: Sequence[Sequence[Candidate]]
) -> Callable[[int, float], int]:
    """(layer, level in 0..1) -> its candidate; price and quality grow with the level."""
    wide = [effective_rank(problem) for problem in problems] if policy == "effective" else []
    largest = max(
        (width / max(problem.whole_price, 1) * sum(problem.matrix.shape) * problem.price
         for width, problem in zip(wide, problems, strict=False)),
        default=1.0,
    )  # fmt: skip

    def taken(k: int, level: float) -> int:
        problem, group = problems[k], groups[k]
        if policy == "energy":
            allowed = (1 - level) ** 2 * problem.total
            fitting = [i for i, c in enumerate(group) if c.error <= allowed]
            return min(fitting, key=lambda i: (group[i].price, group[i].error))
        if policy == "welore":
            values = problem.spectrum.values
            rank = int((values > (1 - level) * values[0]).sum())
            fitting = [i for i, c in enumerate(group) if c.make is not None and max(c.ranks) <= rank]
            best = min(fitting, key=lambda i: group[i].error) if fitting else -1
            even = max((max(c.ranks) for c in group if c.make is not None), default=0)
            if best >= 0 and rank <= even:
                return best
            return 0 if rank > even else min(range(len(group)), key=lambda i: group[i].price)
        share = level
        if policy == "effective":
            own = wide[k] * sum(problem.matrix.shape) * problem.price / max(problem.whole_price, 1)
            share = min(1.0, level * own / largest / max(1e-9, 1 - level)) if level < 1 else inf
        affordable = [i for i, c in enumerate(group) if c.price <= share * problem.whole_price]
        if not affordable:
            return min(range(len(group)), key=lambda i: group[i].price)
        return min(affordable, key=lambda i: (group[i].error, group[i].price))

    return taken
