"""One budget over all layers that a model is converted to: ranks chosen together, then every network rounded."""

from collections.abc import Mapping
from typing import NamedTuple

from decompositions import Network, parameter_terms, round
from decompositions.prices import Term, flop_terms, scaled_terms
from decompositions.select import Choice, ranks_under
from tnlayers.layer import NetworkLayer, Shapes

Budget = int | float | Mapping[str, int | float]
UNITS = {"parameters": "parameters", "bytes": "bytes", "flops": "FLOPs a sample", "error": "parameters"}
ROUNDS = 12
"""Times that plans are made anew for ranks under a budget of FLOPs."""


class Dense(NamedTuple):
    """The weights that are replaced: shapes seen at their layers, and what all of them cost."""

    seen: dict[str, Shapes | None]
    parameters: int
    bytes: int
    flops: int


def read_budget(budget: Budget, dense: Dense) -> tuple[str, int | float]:
    """What is limited, and to how much; shares become numbers.

    Raises:
        ValueError: neither a number nor a share, or an unknown word.
    """
    kind, value = "parameters", budget
    if isinstance(budget, Mapping):
        if len(budget) != 1 or next(iter(budget)) not in UNITS:
            raise ValueError(f"tensorize: a budget has one of the keys {list(UNITS)}, got {dict(budget)!r}")
        kind, value = next(iter(budget.items()))
    if isinstance(value, int | float) and not isinstance(value, bool):
        if kind == "error" and 0 < value < 1:
            return kind, float(value)
        if kind != "error" and isinstance(value, int) and value > 0:
            return kind, value
        if kind != "error" and isinstance(value, float) and 0 < value <= 1:
            return kind, int(value * getattr(dense, kind))
    rule = "a relative error in (0, 1)" if kind == "error" else f"a number of {kind} (an int) or a share of those of "
    rule += "" if kind == "error" else "the dense weights (a float in (0, 1])"
    raise ValueError(f"tensorize: budget must be {rule}, got {value!r}")


def cut_to_budget(
    layers: Mapping[str, NetworkLayer], budget: Budget, dense: Dense, multiple: int = 1
) -> tuple[dict[str, Network], Choice | None, str]:
    """Round the networks of layers, by name, so that they fit a budget together with the smallest tails.

    Returns:
        Networks, the choice (None without a layer), and the unit of its price.

    Raises:
        ValueError: a network that cannot be rounded, or a budget below rank 1 everywhere.
    """
    kind, allowed = read_budget(budget, dense)
    nets = {name: layer.network.detach() for name, layer in layers.items()}
    for name, net in nets.items():
        if not net.is_tree:
            raise ValueError(
                f"tensorize: budget= rounds networks, which must be trees, got {net!r} for {name or '(model)'}; give "
                "this layer its rank by its recipe in a call of its own"
            )
        if kind == "flops" and dense.seen[name] is None:
            raise ValueError(
                f"tensorize: a budget of FLOPs needs the sizes that layers see, got no call of {name or '(model)'}; "
                "give example_input="
            )
    if not nets:
        return {}, None, UNITS[kind]
    every = list(nets.values())
    if kind == "flops":
        ranks, choice = _under_flops(layers, dense, allowed, multiple)
    elif kind == "error":
        ranks, choice = ranks_under(every, error=allowed, multiple=multiple)
    else:
        each = [net.dtype.itemsize if kind == "bytes" else 1 for net in every]
        terms = [scaled_terms(parameter_terms(net), size) for net, size in zip(every, each, strict=True)]
        ranks, choice = ranks_under(every, allowed, terms=terms, multiple=multiple)
    cut = {name: round(net, rank=own) for (name, net), own in zip(nets.items(), ranks, strict=True)}
    return cut, choice, UNITS[kind]


def _under_flops(
    layers: Mapping[str, NetworkLayer], dense: Dense, allowed: int | float, multiple: int
) -> tuple[list[dict[str, int]], Choice]:
    """Ranks whose plans fit. A plan is a sum of products of ranks; other ranks may have another plan: so in rounds."""
    nets = [layer.network.detach() for layer in layers.values()]

    def planned(ranks: list[dict[str, int]]) -> tuple[list[list[Term]], int]:
        """The price around these ranks, and what they cost."""
        terms, spent = [], 0
        for (name, layer), net, own in zip(layers.items(), nets, ranks, strict=True):
            sizes = {**net.sizes, **own}
            shapes = [[sizes[label] for label in leg] for leg in net.legs]
            layer.set_network(
                net.replace([core.new_zeros(shape) for core, shape in zip(net.cores, shapes, strict=True)])
            )
            plan, parts = layer._sample_plan(dense.seen[name])
            terms.append(scaled_terms(flop_terms(layer.network, plan.work), 1 / parts))
            spent += layer.sample_flops(dense.seen[name])
        return terms, spent

    current = [dict.fromkeys(net.bonds, 1) for net in nets]
    terms, least = planned(current)
    if least > allowed:
        raise ValueError(
            f"tensorize: the budget must hold the least ranks, expected at least {least:,} FLOPs a sample, got "
            f"{int(allowed):,}; convert fewer layers"
        )
    best: tuple[list[dict[str, int]], Choice] | None = None
    limit = allowed
    for _ in range(ROUNDS):
        ranks, choice = ranks_under(nets, limit, terms=terms, multiple=multiple)
        own_terms, spent = planned(ranks)
        if spent > allowed:  # these ranks have another plan: aim lower by the old one
            limit *= max(0.5, min(0.99, allowed / spent))
            if best is not None or limit < least:
                break
            continue
        if best is None or choice.error < best[1].error:
            best = ranks, choice
        if ranks == current:
            break
        current, terms, limit = ranks, own_terms, allowed
    if best is None:
        raise ValueError(
            f"tensorize: no ranks found whose plans take at most {int(allowed):,} FLOPs a sample; allow more, or use "
            "a budget of parameters"
        )
    return best


def told(choice: Choice | None, unit: str, layers: list[str]) -> str:
    """`Choice.explain` with the names of layers for the numbers of their networks."""
    if choice is None:
        return ""
    names = {}
    for bond in choice.ranks:
        number, _, own = bond.partition(".")
        names[bond] = f"{layers[int(number)] or '(model)'}.{own}"
    first, _, rest = choice.explain(names).partition("\n")
    return f"budget: {first}; prices in {unit}\n{rest}"
