"""Pretrained models made smaller: ranks chosen for all layers together by what calibration data say they are worth."""

import dataclasses
import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf, prod, sqrt
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from decompositions import ActivationFactor, LowRank, Network
from decompositions.knapsack import Frontier
from decompositions.progress import Progress
from tnlayers.compression.baselines import METHODS
from tnlayers.compression.calibration import Calibration, LayerStatistics
from tnlayers.compression.candidates import Candidate, Problem
from tnlayers.compression.collect import collect
from tnlayers.compression.policies import POLICIES, choose
from tnlayers.compression.problems import Weighed, problem_of, statistics_of, weigh
from tnlayers.convert import parameter_count, tensorize
from tnlayers.frontier import FrontierPoint
from tnlayers.report import LayerRow, Report
from tnlayers.surgery import Site, replace, sites

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Kept shares at which a report shows what the one calibration predicts."""

Method = Callable[[Tensor, LayerStatistics, int], LowRank]


def compress(
    model: nn.Module,
    *,
    keep: float | None = None,
    max_error: float | None = None,
    max_params: int | None = None,
    speed: int | float | None = None,
    calibration: Calibration | None = None,
    targets: Sequence[Any] | str | None = None,
    exclude: Sequence[Any] = (),
    formats: Sequence[str] | str = ("low_rank", "tucker"),
    ranks: str = "auto",
    method: str | Method = "weighted",
    mu: float | Literal["adaptive"] = 0.0,
    multiple: int = 1,
    sequential: bool = False,
    batches: Iterable[Any] | None = None,
    blocks: Sequence[str] | None = None,
    dry_run: bool = False,
    spectra: bool = True,
    example_input: Any = None,
    weighed: Weighed | None = None,
    progress: Progress | None = None,
) -> Report:
    """Replace weights of a trained model, in place, by smaller networks that change its outputs least.

    Every targeted weight W offers candidates: itself, and networks of several formats and ranks with their squared
    error `‖L (W - W') R^H‖^2 / tokens`, where R is the factor of its inputs and L that of the gradients at its outputs
    (each as far as the calibration holds it; see `WeightedSpectrum`). One candidate a weight is chosen for all
    together. Ratio words: `keep` is the share of the numbers in the targeted weights that stays; the report prints the
    share of the whole model beside it. A layer stays dense where its network would be no smaller, or where its weight
    is tied to one that is not targeted. Tied weights stay tied. If anything fails, the model is as it was.
    The predicted error is of first order: with ranks="loss", `sqrt(sum of errors / power)` of what the calibration
    preserves, `‖dz‖ / ‖z‖` (of logits `sqrt(2 KL)` a label). It leaves out that tokens depend on one another and that
    inputs do on gradients, second order, and that ranks and networks were fitted to the same tokens: on
    all-MiniLM-L6-v2 it is a quarter (keep=0.9) to a half (0.7 and less) of what is measured.

    Args:
        model: any module; see `tensorize` for the layers that can be replaced.
        keep: share of the targeted weights' numbers to keep, in (0, 1].
        max_error: instead: predicted relative error of the outputs; with other ranks than "loss", the root mean square
            of the layers' relative errors.
        max_params: instead: parameters of the whole model.
        speed: instead: how many times fewer multiplications the targeted layers do (on the calibration's tokens).
        calibration: from `collect`; without one, plain errors of the weights count, relative to each weight.
        targets: name patterns or module types; every layer of the calibration, or of the model, by default.
        exclude: name patterns or module types to leave alone.
        formats: families of networks: "low_rank", "tucker" (kernels), "ttm", "kronecker".
        ranks: "loss" (least predicted error of the outputs, needs gradients), "knapsack" (least sum of relative
            errors), "energy", "welore", "effective", "uniform" (see `policies.choose`); "auto" is "loss" with
            gradients and "uniform" without.
        method: how a low-rank network is made: "weighted", or a baseline for comparison: "plain", "asvd", "svd_llm",
            "output_pca", "utilized_rank", "fisher"; or a callable (weight, statistics, rank) -> LowRank. Ranks are
            chosen as for "weighted"; tables stay weighted (but for "plain"), as do the other formats.
        mu: ridge of the inputs, in units of their mean square; "adaptive" takes it from the errors at the chosen rank,
            `(‖L (W - W'_0) R^H‖ / ‖L (W - W'_0)‖)^2`. Inputs that are a diagonal (tables, wide layers) go without.
        multiple: low ranks are multiples of it; a layer without one below break-even stays dense.
        sequential: after every block of layers the inputs of the next are collected again, as the smaller model makes
            them, from `batches`; ranks stay as they were chosen, and tied weights keep their first statistics.
        batches: calibration data for that, a re-iterable.
        blocks: name prefixes that make a block; by default the children of the longest `nn.ModuleList` or
            `nn.Sequential`.
        dry_run: change nothing, make no network: the report is the plan.
        spectra: keep singular values for the report's figures.
        example_input: see `tensorize`.
        weighed: what `weigh` made of this model, in place of calibration, targets, exclude, formats and multiple.
        progress: called as (done, total, name).

    Returns:
        Report, with `frontier`: the predicted error at five budgets from the one calibration.

    Raises:
        ValueError: not exactly one goal; a goal out of reach; a pattern that matches nothing; a calibration of another
            model; "loss" without gradients.

    References:
        U. Parkina, M. Rakhuba, COALA, NeurIPS 2025, arXiv 2507.07580.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> x = torch.randn(200, 6) @ torch.randn(6, 32)
        >>> held = tnlayers.collect(model, x.split(50), gradients=True)
        >>> report = tnlayers.compress(model, keep=0.5, calibration=held)
        >>> report.targeted[1] <= 0.5 * report.targeted[0], report.error < 0.5
        (True, True)
    """
    data = calibration if weighed is None else weighed.held
    _check(keep, max_error, max_params, speed, ranks, method, mu, sequential, batches, data)
    if weighed is None:
        weighed = weigh(
            model, calibration, targets=targets, exclude=exclude, formats=formats, multiple=multiple,
            by_speed=speed is not None, progress=progress,
        )  # fmt: skip
    elif weighed.by_speed != (speed is not None):
        raise ValueError("compress: speed needs what was weighed by_speed=True, and the other goals what was not")
    groups, problems, options, held = weighed.groups(model), weighed.problems, weighed.options, weighed.held
    policy = ranks if ranks != "auto" else "loss" if held.has_gradients else "uniform"
    if policy == "loss" and not held.has_gradients:
        raise ValueError("compress: ranks='loss' needs gradients; collect(..., gradients=True), or take 'knapsack'")
    whole, targeted = parameter_count(model), weighed.targeted
    budget, allowed = _goal(keep, max_error, max_params, speed, problems, whole, targeted, held, policy)
    table = weighed.table(policy)
    chosen = choose(policy, problems, options, budget, allowed, table)
    picked = [option[i] for option, i in zip(options, chosen, strict=True)]
    maker = _Maker(method, mu, held)
    curve = _frontier(problems, options, policy, whole, targeted, held, table) if speed is None else ()
    title = f"compress ({'plan' if dry_run else policy})"
    if dry_run:
        rows = [
            _planned(site, pick, problem)
            for group, pick, problem in zip(groups, picked, problems, strict=True)
            for site in group
        ]
        report = Report(tuple(rows), whole, whole - targeted + _numbers(picked, problems), title=title)
    else:
        rows, picked = _replace(
            model, groups, problems, picked, maker, held, sequential, batches, blocks, spectra, example_input, progress,
            weighed.kept,
        )  # fmt: skip
        report = Report(tuple(rows), whole, parameter_count(model), title=title)
    lost = [c.error for c in picked]
    return dataclasses.replace(
        report,
        rows=tuple(_enriched(report.rows, groups, problems, picked, spectra)),
        targeted=(targeted, report.params - (whole - targeted)),
        frontier=curve,
        error=_relative(lost, problems, policy, held),
    )


class _Maker(NamedTuple):
    """Makes the network of a candidate: by the candidate itself, or by a baseline."""

    method: str | Method
    mu: float | Literal["adaptive"]
    held: Calibration

    def __call__(self, problem: Problem, candidate: Candidate, layer: LayerStatistics | None) -> Network:
        assert candidate.make is not None
        if candidate.format == "low_rank" and self.method == "plain":
            return METHODS["plain"](problem.weight.detach().flatten(1), LayerStatistics(""), candidate.ranks[0])
        if self.method == "weighted" or candidate.format != "low_rank" or layer is None or problem.table:
            return candidate.make(self._regular(problem, candidate))
        recipe = METHODS[self.method] if isinstance(self.method, str) else self.method
        return recipe(problem.weight.detach().flatten(1), layer, candidate.ranks[0])

    def _regular(self, problem: Problem, candidate: Candidate) -> Problem:
        """The problem with a ridge on its inputs."""
        inputs = problem.inputs
        if not self.mu or inputs is None or inputs.ndim == 1 or not bool(inputs.any()):
            return problem
        if self.mu == "adaptive":
            net = candidate.make(problem)  # type: ignore[misc]
            plain = dataclasses.replace(problem, inputs=None)
            rest = plain.error(net)
            mu = problem.error(net) / rest if rest > 0 else 0.0
        else:
            mu = float(self.mu) * float(inputs.double().square().sum()) / inputs.shape[1]
        eye = torch.eye(inputs.shape[1], dtype=inputs.dtype, device=inputs.device) * sqrt(mu)
        return dataclasses.replace(problem, inputs=torch.linalg.qr(torch.cat([inputs, eye]), mode="r").R)


def _check(
    keep: Any, max_error: Any, max_params: Any, speed: Any, ranks: str, method: Any, mu: Any, sequential: bool,
    batches: Any, calibration: Any,
) -> None:  # fmt: skip
    goals = {"keep": keep, "max_error": max_error, "max_params": max_params, "speed": speed}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"compress: give exactly one of {', '.join(goals)}, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if (
        isinstance(value, bool)
        or not isinstance(value, Real)
        or not 0 < float(value) < inf
        or (name == "keep" and float(value) > 1)
    ):
        limit = "a number in (0, 1]" if name == "keep" else "a finite number > 0"
        raise ValueError(f"compress: {name} must be {limit}, got {value!r}")
    if ranks not in POLICIES:
        raise ValueError(f"compress: ranks must be one of {', '.join(POLICIES)}, got {ranks!r}")
    if isinstance(method, str) and method != "weighted" and method not in METHODS:
        raise ValueError(
            f"compress: method must be one of weighted, {', '.join(METHODS)}, or a callable, got {method!r}"
        )
    if mu != "adaptive" and (isinstance(mu, bool) or not isinstance(mu, Real) or not float(mu) >= 0):
        raise ValueError(f"compress: mu must be a number >= 0 or 'adaptive', got {mu!r}")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"compress: calibration must come from collect, got {type(calibration).__name__}")
    if calibration is None and method not in ("weighted", "plain"):
        raise ValueError(f"compress: method={method!r} goes by a calibration, got none; collect one")
    if sequential and (calibration is None or calibration.mode == "none"):
        raise ValueError(
            "compress: sequential=True needs a calibration of the inputs, got none; collect one with mode='factor'"
        )
    if sequential and (batches is None or isinstance(batches, Tensor) or iter(batches) is batches):
        raise ValueError("compress: sequential=True collects again after every block; give batches=, a list")


def _goal(
    keep: float | None, max_error: float | None, max_params: int | None, speed: int | float | None,
    problems: Sequence[Problem], whole: int, targeted: int, held: Calibration, policy: str,
) -> tuple[int | None, float | None]:  # fmt: skip
    """Budget of all prices, or what the sum of the errors may be."""
    if keep is not None:
        return int(keep * targeted), None
    if max_params is not None:
        return int(max_params) - (whole - targeted), None
    if speed is not None:
        return int(sum(problem.whole_price for problem in problems) / speed), None
    assert max_error is not None
    most = float(max_error) * float(max_error)
    return None, most * (held.power if policy == "loss" else len(problems))


def _relative(lost: Sequence[float], problems: Sequence[Problem], policy: str, held: Calibration) -> float:
    """Predicted relative error: of the outputs, or the root mean square of the layers' own."""
    if policy == "loss" and held.power > 0:
        return sqrt(sum(lost) / held.power)
    shares = [error / (problem.total or 1.0) for error, problem in zip(lost, problems, strict=True)]
    return sqrt(sum(shares) / max(1, len(shares)))


def _frontier(
    problems: Sequence[Problem], options: Sequence[Sequence[Candidate]], policy: str, whole: int, targeted: int,
    held: Calibration, table: Frontier | None,
) -> tuple[FrontierPoint, ...]:  # fmt: skip
    """What five budgets would give."""
    points = []
    for keep in BUDGETS:
        try:
            chosen = choose(policy, problems, options, int(keep * targeted), table=table)
        except ValueError:  # below rank 1 everywhere
            continue
        picked = [option[i] for option, i in zip(options, chosen, strict=True)]
        now = whole - targeted + sum(c.price for c in picked)
        points.append(FrontierPoint(keep, now, _relative([c.error for c in picked], problems, policy, held)))
    return tuple(points)


def _replace(
    model: nn.Module, groups: Sequence[Sequence[Site]], problems: Sequence[Problem], picked: Sequence[Candidate],
    maker: _Maker, held: Calibration, sequential: bool, batches: Any, blocks: Sequence[str] | None, spectra: bool,
    example: Any, progress: Progress | None, kept: Mapping[str, str],
) -> tuple[list[LayerRow], list[Candidate]]:  # fmt: skip
    """Networks into the model, block by block where that is asked for; on any error the old modules come back.

    Returns rows in model order, and the candidates with the errors of the networks that were made.
    """
    places = {site.name: k for k, site in enumerate(sites(model))}
    measured = list(picked)
    order = _blocks(model, groups, blocks) if sequential else [list(range(len(groups)))]
    rows: dict[str, LayerRow] = {}
    done = 0
    try:
        for number, block in enumerate(order):
            policy = {}
            fresh = held
            if number:
                names = [name for k in block for site in groups[k] for name in site.names[:1]]
                fresh = collect(model, batches, [glob.escape(name) for name in names], held.mode, dtype=_dtype(held))
            for k in block:
                if progress is not None:
                    progress(done, len(groups), groups[k][0].name)
                done += 1
                if picked[k].make is None:
                    continue
                problem = problems[k]
                if number and len(groups[k]) == 1:
                    again = problem_of(groups[k], fresh)
                    if again.inputs is not None:
                        problem = dataclasses.replace(problem, inputs=again.inputs, tokens=again.tokens)
                net = maker(problem, picked[k], statistics_of(groups[k][0], held))
                if maker.method != "weighted" or maker.mu or sequential:
                    measured[k] = picked[k]._replace(error=problems[k].error(net))
                for site in groups[k]:
                    policy[glob.escape(site.name)] = partial(_given, network=net)
            if policy:
                made = tensorize(model, policy, spectra=spectra, example_input=example)
                rows |= {row.name: row for row in made.rows if row.status == "converted"}
                last = made
        if not rows:
            last = tensorize(model, {type(groups[0][0].module): _never}, exclude=("*",), spectra=False)
    except BaseException:
        for group in groups:
            for site in group:
                if "" not in site.names:
                    replace(model, site, site.module)
        raise
    wanted = {site.name for group in groups for site in group}
    found = [rows.get(row.name, _why(row, wanted, kept)) for row in _all_rows(last, rows)]
    return sorted(found, key=lambda row: places[row.name]), measured


def _dtype(held: Calibration) -> torch.dtype:
    """Of a calibration's factors."""
    made = [layer.inputs.factor.dtype for layer in held.layers.values() if isinstance(layer.inputs, ActivationFactor)]
    return made[0] if made else torch.float32


def _numbers(picked: Sequence[Candidate], problems: Sequence[Problem]) -> int:
    """Numbers that candidates hold."""
    pairs = zip(picked, problems, strict=True)
    return sum(p.weight.numel() if c.make is None else c.price // p.price for c, p in pairs)


def _all_rows(last: Report, rows: dict[str, LayerRow]) -> list[LayerRow]:
    """Layers that an earlier block replaced are no candidates of the last report."""
    names = {row.name for row in last.rows}
    return [*(row for name, row in rows.items() if name not in names), *last.rows]


def _why(row: LayerRow, wanted: set[str], kept: Mapping[str, str]) -> LayerRow:
    """Reason of a layer that stays dense."""
    if row.name in kept:
        return dataclasses.replace(row, reason=kept[row.name])
    if row.name not in wanted:
        return dataclasses.replace(row, reason=row.reason if row.reason != "no rule matches" else "not targeted")
    if row.reason in ("no rule matches", "excluded"):
        return dataclasses.replace(row, reason="within this budget it is worth more dense")
    return row


def _given(_: Tensor, network: Network) -> Network:
    return network


def _never(_: Tensor) -> Network:
    raise AssertionError("excluded")


def _blocks(model: nn.Module, groups: Sequence[Sequence[Site]], blocks: Sequence[str] | None) -> list[list[int]]:
    """Numbers of the groups in each block, in model order; what lies in no block is one of its own."""
    prefixes = list(blocks) if blocks is not None else default_blocks(model)
    found: dict[str, list[int]] = {}
    for k, group in enumerate(groups):
        name = group[0].name
        own = next((p for p in prefixes if name == p or name.startswith(f"{p}.")), "")
        found.setdefault(own or f"alone: {name}", []).append(k)
    unknown = [p for p in prefixes if p not in found] if blocks is not None else []
    if unknown:
        raise ValueError(f"compress: every block must hold a target, got {unknown[:3]} without one")
    return list(found.values())


def default_blocks(model: nn.Module) -> list[str]:
    """Names of the children of the longest list of modules: the repeated blocks of a model.

    Example:
        >>> default_blocks(nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}))
        ['layers.0', 'layers.1']
    """
    lists = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    if not lists:
        return []
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{k}".lstrip(".") for k in range(len(longest))]


def _planned(site: Site, pick: Candidate, problem: Problem) -> LayerRow:
    """Row of a dry run."""
    module: Any = site.module
    bias = module.bias.numel() if isinstance(getattr(module, "bias", None), Tensor) else 0
    count, shape = module.weight.numel() + bias, tuple(module.weight.shape)
    if pick.make is None:
        return LayerRow(
            site.name, type(module).__name__, shape, "kept", "within this budget it is worth more dense",
            params_dense=count, params=count,
        )  # fmt: skip
    return LayerRow(
        site.name, type(module).__name__, shape, "converted", format=pick.format, ranks=pick.ranks,
        params_dense=count, params=pick.price // problem.price + bias,
    )  # fmt: skip


def _enriched(
    rows: Sequence[LayerRow], groups: Sequence[Sequence[Site]], problems: Sequence[Problem],
    picked: Sequence[Candidate], spectra: bool,
) -> list[LayerRow]:  # fmt: skip
    """Rows with what the calibration says of them."""
    lost = sum(pick.error for pick in picked) or 1.0
    known = {
        site.name: (problem, pick)
        for group, problem, pick in zip(groups, problems, picked, strict=True)
        for site in group[:1]
    }
    made = []
    for row in rows:
        if row.name not in known:
            made.append(row)
            continue
        problem, pick = known[row.name]
        m, n = problem.matrix.shape
        values = tuple(problem.spectrum.values.double().tolist()) if spectra and pick.make is not None else ()
        bond = next(iter(row.cuts), "0") if pick.format == "low_rank" else "matrix"
        made.append(
            dataclasses.replace(
                row,
                weighted={bond: values} if values else {},
                cuts=row.cuts or ({bond: pick.ranks[0]} if pick.format == "low_rank" else {}),
                weighted_error=sqrt(pick.error / problem.total) if problem.total else 0.0,
                share=pick.error / lost,
                break_even_rank=row.break_even_rank or (prod((m, n)) - 1) // (m + n) or None,
            )
        )
    return made
