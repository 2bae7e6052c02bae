"""Whole models to tensor layers and back, with an honest report."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from decompositions import Network, bond_sides, draw, numel, possible_ranks, unfold
from decompositions.linalg import fold_matrix, gram, relative_error
from decompositions.progress import Progress
from tnlayers.budget import Budget, Dense, cut_to_budget, told
from tnlayers.dense import Recipe
from tnlayers.explain import layer_floor
from tnlayers.layer import NetworkLayer, Shapes
from tnlayers.report import LayerRow, Report
from tnlayers.surgery import (
    Policy,
    Site,
    is_transposed,
    keep_hooks,
    network_layers,
    owners_of_parameters,
    replace,
    sites,
    stand_in_for,
    tie_cores,
    weight_key,
    why_not,
)

SPECTRUM_SIDE = 2048
"""Largest smaller side of an unfolding whose singular values a report computes (an eigenproblem of that size)."""


def tensorize(
    model: nn.Module,
    policy: Mapping[Any, Recipe] | Recipe,
    *,
    exclude: Sequence[Any] = (),
    skip_if_no_gain: bool = True,
    example_input: Any = None,
    spectra: bool = True,
    budget: Budget | None = None,
    multiple: int = 1,
    progress: Progress | None = None,
) -> Report:
    """Replace the layers of a model, in place, by layers whose weight is the recipe's network.

    Every setting of a layer is kept, or the layer is left alone and the report says why. Tied weights stay tied (their
    layers share cores); a tied weight whose partner stays dense stays dense too. All networks are made before the
    first module is replaced: if a recipe fails, the model is as it was.

    Args:
        model: any module that holds `nn.Linear`, `nn.Conv1d/2d/3d`, `nn.ConvTranspose1d/2d/3d`, `nn.Embedding`,
            `nn.EmbeddingBag` (or Hugging Face `Conv1D`).
        policy: a mapping from name patterns (shell style, `"encoder.*.fc?"`) or module types to recipes, the first
            match winning, or one recipe for every layer that can be replaced. A recipe is a callable
            dense weight -> Network, such as `functools.partial(svd, tol=0.1)`.
        exclude: name patterns or module types to leave alone.
        skip_if_no_gain: leave a layer dense where its network has no fewer parameters.
        example_input: a tensor, a tuple or a dict of keyword arguments for the model; plans are made for its batch and
            FLOPs counted at its sizes.
        spectra: compute singular values for the report's figures.
        budget: parameters that all networks may hold together (an int), or a share of those of the dense weights that
            they replace (a float in (0, 1]); or one of `{"parameters": n}`, `{"bytes": n}` (of the parameters),
            `{"flops": n}` (of one sample of `example_input`, by the plans the layers take), each as a number or a
            share, and `{"error": e}`: the fewest parameters with a root mean square of the layers' relative errors of
            at most e. The recipes then make networks of high ranks (by a small tolerance, or exact), and ranks are
            chosen for all layers together by their squared relative errors (`ranks_under`); the report's `budget` says
            which and why.
        multiple: under a budget, ranks are multiples of it (8 for tensor cores), or the largest that a bond has.
        progress: called as (done, total, name) before each layer.

    Returns:
        Report with one row for each layer that the policy names or could have named.

    Raises:
        ValueError: a pattern that matches nothing; a recipe that fails (the message names the layer); a budget below
            rank 1 everywhere, or with networks that are no trees, or for FLOPs without an example.
        TypeError: a policy of another kind.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> import tnlayers
        >>> from decompositions import svd
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> report = tnlayers.tensorize(model, {"0": partial(svd, rank=4)})
        >>> [row.status for row in report.rows], report.rows[0].params, report.rows[0].params_dense
        (['converted', 'kept'], 576, 4160)
    """
    found = sites(model)
    candidates = [site for site in found if stand_in_for(site.module) is not None]
    rules = Policy.read("tensorize", policy, exclude)
    rules.check("tensorize", candidates, isinstance(policy, Mapping))
    reasons = _reasons(candidates, rules)
    _keep_ties(model, candidates, reasons)
    seen = _run_example(model, example_input)
    ready: dict[int, Network] = {}
    told_budget = ""
    if budget is not None:
        full = _make_layers(candidates, rules, dict(reasons), False, progress)
        ready, told_budget = _fit(candidates, full, budget, multiple, seen)
    layers = _make_layers(candidates, rules, reasons, skip_if_no_gain, None if ready else progress, ready)
    _keep_ties(model, candidates, reasons)  # a layer without gain stays dense, and so do those tied to it
    layers = {key: layer for key, layer in layers.items() if not reasons[key]}
    for site in candidates:
        if id(site.module) in layers and "" in site.names:
            replace(model, site, layers[id(site.module)])  # raises: the model itself has no parent
    rows = []
    for site in candidates:
        layer = layers.get(id(site.module))
        rows.append(_row(site, layer, reasons[id(site.module)], seen.get(id(site.module)), spectra))
    params_dense = parameter_count(model)
    for site in candidates:  # nothing can fail from here on
        if id(site.module) in layers:
            layer = layers[id(site.module)]
            if id(site.module) in seen:
                layer.plan_for_shapes(seen[id(site.module)])
            replace(model, site, layer)
    return Report(tuple(rows), params_dense, parameter_count(model), budget=told_budget)


def _fit(
    candidates: Sequence[Site],
    full: dict[int, NetworkLayer],
    budget: Budget,
    multiple: int,
    seen: Mapping[int, Shapes],
) -> tuple[dict[int, Network], str]:
    """Networks by the id of the dense weight, cut to the budget; and the words that say how."""
    names: dict[str, int] = {}
    layers: dict[str, NetworkLayer] = {}
    dense = Dense({}, 0, 0, 0)
    for site in candidates:
        module: Any = site.module
        if id(module) in full and id(module.weight) not in names.values():
            names[site.name], layers[site.name] = id(module.weight), full[id(module)]
            shapes, weight, stand_in = seen.get(id(module)), module.weight, stand_in_for(module)
            assert stand_in is not None
            dense = Dense(
                {**dense.seen, site.name: shapes},
                dense.parameters + weight.numel(),
                dense.bytes + weight.numel() * weight.itemsize,
                dense.flops + stand_in.dense_flops(tuple(weight.shape), shapes),
            )
    cut, choice, unit = cut_to_budget(layers, budget, dense, multiple)
    return {names[name]: net for name, net in cut.items()}, told(choice, unit, list(layers))


def densify(model: nn.Module) -> nn.Module:
    """Replace every tensor layer, in place, by the `torch.nn` layer with the same function; ties stay.

    Returns:
        The model (a dense layer where the model itself was a tensor layer).

    Example:
        >>> from torch import nn
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> model = nn.Sequential(tnlayers.Linear(8, 8, network=tnlayers.random_network(LowRank, rank=2)))
        >>> tnlayers.densify(model)
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    if isinstance(model, NetworkLayer):
        dense = model.to_dense_module()
        keep_hooks(model, dense)
        return dense
    weights: dict[Any, nn.Parameter] = {}
    for site in sites(model):
        layer = site.module
        if isinstance(layer, NetworkLayer):
            made: Any = layer.to_dense_module()
            own, made.weight = made.weight, weights.setdefault(weight_key(layer), made.weight)
            padding = getattr(made, "padding_idx", None)
            if padding is not None:  # of tied layers the embedding knows its padding row best
                with torch.no_grad():
                    made.weight[padding] = own[padding]
            keep_hooks(layer, made)
            replace(model, site, made)
    return model


def summary(model: nn.Module) -> str:
    """Table of a model's tensor layers: network, parameters, and their share of the dense weight.

    Example:
        >>> from torch import nn
        >>> import tnlayers
        >>> from decompositions import LowRank
        >>> model = nn.Sequential(tnlayers.Linear(64, 64, network=tnlayers.random_network(LowRank, rank=4)))
        >>> print(tnlayers.summary(model).splitlines()[-1].partition(";")[0])
        whole model: 576 parameters, 4,160 with dense layers (13.8 %)
    """
    header = ("layer", "kind", "network", "parameters", "dense", "share")
    rows = []
    total = dense_total = parameter_count(model)
    seen: set[Any] = set()
    for name, layer in network_layers(model):
        own, dense = layer.numel(), prod(layer.weight_shape)
        rows.append(
            (
                name or "(model)",
                type(layer).__name__,
                repr(layer.network),
                f"{own:,}",
                f"{dense:,}",
                f"{own / dense:.1%}",
            )
        )
        if weight_key(layer) not in seen:
            seen.add(weight_key(layer))
            dense_total += dense - own
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]
    lines = [
        "  ".join(
            text.ljust(w) if k < 3 else text.rjust(w) for k, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, tuple("-" * w for w in widths), *rows)
    ]
    share = total / dense_total if dense_total else 1.0
    stored = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    gauge = "" if stored == total else f"; {stored:,} numbers stored: the middle matrices of LowRank are gauge"
    lines.append(f"whole model: {total:,} parameters, {dense_total:,} with dense layers ({100 * share:.1f} %){gauge}")
    return "\n".join(lines)


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once, networks as their format counts them."""
    held = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
    seen: set[Any] = set()
    for _, layer in network_layers(model):
        if weight_key(layer) not in seen:
            seen.add(weight_key(layer))
            held += layer.numel() - sum(core.numel() for core in layer.cores)
    return held


def _reasons(candidates: Sequence[Site], rules: Policy) -> dict[int, str]:
    """Why each candidate stays dense; empty where it is to be converted."""
    reasons: dict[int, str] = {}
    for site in candidates:
        if rules.excludes(site):
            reason = "excluded"
        elif rules.recipe_for(site) is None:
            reason = "no rule matches"
        else:
            reason = _unfit(site)
        reasons[id(site.module)] = reason
    return reasons


def _unfit(site: Site) -> str:
    if any("_orig_mod" in name.split(".") for name in site.names):
        return "it is inside a compiled module, which keeps calling the old one; tensorize before torch.compile"
    return why_not(site.module)


def reasons_against(model: nn.Module, wanted: Sequence[Site]) -> dict[str, str]:
    """Why `tensorize` would leave some of these layers dense, by name; ties to others than these among it.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> model[1].weight = model[0].weight
        >>> reasons_against(model, [site for site in sites(model) if site.name == "1"])
        {'1': 'its weight is tied to 0.weight, which stays dense'}
    """
    names = {id(site.module): site.name for site in wanted}
    candidates = [site for site in sites(model) if stand_in_for(site.module) is not None]
    reasons = {id(s.module): _unfit(s) if id(s.module) in names else "not among these" for s in candidates}
    _keep_ties(model, candidates, reasons)
    return {name: reasons[key] for key, name in names.items() if reasons[key]}


def _keep_ties(model: nn.Module, candidates: Sequence[Site], reasons: dict[int, str]) -> None:
    """Find ties to something that stays dense, or that cannot be shared; they keep their partners dense."""
    owners = owners_of_parameters(model)
    changed = True
    while changed:
        changed = False
        converted = {f"{name}.weight".lstrip(".") for s in candidates if not reasons[id(s.module)] for name in s.names}
        for site in candidates:
            module: Any = site.module
            if reasons[id(module)]:
                continue
            own = {f"{name}.{key}".lstrip(".") for name in site.names for key in ("weight", "bias")}
            others = [name for name in owners.get(id(module.weight), []) if name not in converted]
            biases = [name for name in owners.get(id(getattr(module, "bias", None)), []) if name not in own]
            partners = [s.module for s in candidates if getattr(s.module, "weight", None) is module.weight]
            if others:
                reasons[id(module)] = f"its weight is tied to {others[0]}, which stays dense"
            elif biases:
                reasons[id(module)] = f"its bias is tied to {biases[0]}"
            elif len({is_transposed(partner) for partner in partners}) > 1:
                reasons[id(module)] = "its weight is tied to a layer that uses it transposed"
            changed = changed or bool(reasons[id(module)])


def _make_layers(
    candidates: Sequence[Site],
    rules: Policy,
    reasons: dict[int, str],
    skip_if_no_gain: bool,
    progress: Progress | None,
    ready: Mapping[int, Network] | None = None,
) -> dict[int, NetworkLayer]:
    """Stand-ins by the id of their module; what gains nothing goes into `reasons` instead.

    A network that is `ready`, by the id of the dense weight, stands for its recipe.
    """
    layers: dict[int, NetworkLayer] = {}
    by_weight: dict[int, NetworkLayer] = {}
    targets = [site for site in candidates if not reasons[id(site.module)]]
    for done, site in enumerate(targets):
        if progress is not None:
            progress(done, len(targets), site.name)
        module: Any = site.module
        tied = by_weight.get(id(module.weight))
        made = (ready or {}).get(id(module.weight))
        recipe: Any = rules.recipe_for(site) if made is None else partial(_given, network=made)
        layer = _convert(site, recipe, tied)
        if skip_if_no_gain and layer.numel() >= module.weight.numel():
            reasons[id(module)] = f"no gain: {layer.numel():,} parameters in {layer.network!r}"
            continue
        if tied is not None:
            tie_cores(tied, layer)
        by_weight[id(module.weight)] = layers[id(module)] = layer
    return layers


def _given(_: Tensor, network: Network) -> Network:
    return network


def _convert(site: Site, recipe: Recipe, tied: NetworkLayer | None) -> NetworkLayer:
    """Make the stand-in of one module; errors name the layer."""
    module: Any = site.module
    where = f"tensorize: {site.name or '(model)'} ({type(module).__name__} {tuple(module.weight.shape)})"
    layer_class: Any = stand_in_for(module)
    try:
        if tied is not None:
            return layer_class.from_dense(module, lambda _: tied.network.detach())
        return layer_class.from_dense(module, recipe)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:  # a recipe is anybody's code: whatever it raises, say at which layer
        raise ValueError(f"{where}: the recipe raised {type(error).__name__}: {error}") from error


def _run_example(model: nn.Module, example: Any) -> dict[int, Shapes]:
    """Run the example once (evaluation mode, no gradient) and note what shapes every convertible layer sees."""
    if example is None:
        return {}
    shapes: dict[int, Shapes] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            shapes.setdefault(id(module), Shapes(tuple(args[0].shape), tuple(output.shape)))

    watched = [site.module for site in sites(model) if stand_in_for(site.module)]
    handles = [module.register_forward_hook(note) for module in watched]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def _row(site: Site, layer: NetworkLayer | None, why: str, seen: Shapes | None, spectra: bool) -> LayerRow:
    dense: Any = site.module
    stand_in = stand_in_for(dense)
    weight: Any = getattr(dense, "weight", None)
    known = isinstance(weight, Tensor) and not isinstance(weight, nn.parameter.UninitializedParameter)
    shape = tuple(weight.shape) if known else ()
    bias = dense.bias.numel() if isinstance(getattr(dense, "bias", None), Tensor) and known else 0
    count = (prod(shape) if known else 0) + bias
    flops_dense = stand_in.dense_flops(shape, seen) if stand_in is not None and known else 0
    row = LayerRow(
        name=site.name,
        kind=type(dense).__name__,
        shape=shape,
        status="kept",
        reason=why,
        format="dense",
        ranks=(),
        break_even_rank=None,
        params_dense=count,
        params=count,
        flops_dense=flops_dense,
        flops=flops_dense,
        error=None,
        output_bound=None,
        spectra={},
        cuts={},
    )
    if layer is None:
        return row
    net = layer.network.detach()
    reference = weight.detach().T if is_transposed(dense) else weight.detach()
    approximation = layer.weight.detach()
    values, cuts = _spectra(net, reference) if spectra and net.is_tree else ({}, {})
    return dataclasses.replace(
        row,
        status="converted",
        reason="",
        format=type(net).__name__,
        ranks=net.ranks,
        break_even_rank=break_even_rank(net, weight.numel()),
        params=numel(net) + bias,
        flops=layer.sample_flops(seen),
        error=relative_error(approximation, reference),
        output_bound=layer.output_bound(approximation - reference),
        spectra=values,
        cuts=cuts,
        floor=_floor(layer, seen),
        diagram=draw(net),
    )


def _floor(layer: NetworkLayer, seen: Shapes | None) -> float | None:
    """Floor of training (see `explain`) at the rows that the example brought, 1024 without one."""
    rows = 1024 if seen is None else max(1, prod(seen.input[:-1]))
    floor = layer_floor(layer, rows)
    return floor if floor is not None and layer._make_plan(rows).strategy == "merge" else None


def break_even_rank(net: Network, dense: int) -> int | None:
    """Largest common cap on the bonds at which the network has fewer than `dense` parameters; None if rank 1 has not.

    Bonds never exceed what their sides allow; with no bond to cap there is no such rank.

    Example:
        >>> from decompositions import LowRank
        >>> break_even_rank(LowRank.random(row_modes=(100,), col_modes=(100,), rank=2), 10_000)
        49
    """
    if not net.bonds:
        return None
    most = possible_ranks(net) if net.is_tree else (max(net.ranks),) * len(net.bonds)

    def count(rank: int) -> int:
        sizes = {**net.sizes, **{bond: min(rank, cap) for bond, cap in zip(net.bonds, most, strict=True)}}
        cores = [torch.empty([sizes[label] for label in leg], device="meta") for leg in net.legs]
        return numel(net._unchecked(cores, net.legs, net.rows, net.cols))

    low, high = 0, max(most)
    while low < high:  # count grows with the rank
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) < dense else (low, middle - 1)
    return low or None


def _spectra(net: Network, weight: Tensor) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Singular values of the dense weight at each bond of the network, with the rank that was kept.

    Bonds that cut the weight in the same way (both of LowRank) are shown once.
    """
    tensor = fold_matrix("tensorize", weight, net.row_modes, net.col_modes)
    values: dict[str, tuple[float, ...]] = {}
    cuts: dict[str, int] = {}
    shown: set[tuple[str, ...]] = set()
    for bond, rank in zip(net.bonds, net.ranks, strict=True):
        side, other = bond_sides(net, bond)
        if side in shown or other in shown or not side or not other:
            continue
        shown.add(side)
        unfolding = unfold(tensor, [net.outside.index(label) for label in side])
        unfolding = unfolding if unfolding.shape[0] <= unfolding.shape[1] else unfolding.mT
        if unfolding.shape[0] <= SPECTRUM_SIDE:
            squares = torch.linalg.eigvalsh(gram(unfolding)).flip(0).clamp_min(0)
            values[bond], cuts[bond] = tuple(squares.sqrt().tolist()), rank
    return values, cuts
