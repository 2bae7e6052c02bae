"""One budget over all layers that a model is converted to: ranks chosen together, then every network rounded."""

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from decompositions import Network, round
from decompositions.select import Choice, ranks_under


def parameters_allowed(budget: int | float, dense: int) -> int:
    """Parameters of a budget: a count, or a share of what the dense weights hold.

    Raises:
        ValueError: neither.
    """
    if not isinstance(budget, bool):
        if isinstance(budget, Integral) and budget > 0:
            return int(budget)
        if isinstance(budget, Real) and not isinstance(budget, Integral) and 0 < budget <= 1:
            return int(budget * dense)
    raise ValueError(
        "tensorize: budget must be a number of parameters (an int) or a share of those of the dense weights (a float "
        f"in (0, 1]), got {budget!r}"
    )


def cut_to_budget(networks: Mapping[str, Network], allowed: int) -> tuple[dict[str, Network], Choice]:
    """Round networks, by layer name, so that they hold `allowed` parameters together with the smallest tails.

    Raises:
        ValueError: a network that cannot be rounded, or a budget below rank 1 everywhere.
    """
    for name, net in networks.items():
        if not net.is_tree:
            raise ValueError(
                f"tensorize: budget= rounds networks, which must be trees, got {net!r} for {name or '(model)'}; give "
                "this layer its rank by its recipe in a call of its own"
            )
    ranks, choice = ranks_under(list(networks.values()), allowed)
    cut: dict[str, Any] = {name: round(net, rank=own) for (name, net), own in zip(networks.items(), ranks, strict=True)}
    return cut, choice


def told(choice: Choice, layers: list[str]) -> str:
    """`Choice.explain` with the names of layers for the numbers of their networks."""
    names = {}
    for bond in choice.ranks:
        number, _, own = bond.partition(".")
        names[bond] = f"{layers[int(number)] or '(model)'}.{own}"
    return f"budget: {choice.explain(names)}"
