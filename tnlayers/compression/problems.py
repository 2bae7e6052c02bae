"""From a calibration to what each weight can become, and what that costs and loses."""

import glob
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decompositions.knapsack import Frontier
from decompositions.progress import Progress
from decompositions.weighted import CalibrationWarning
from tnlayers.compression.activations import kind_of
from tnlayers.compression.calibration import ActivationScale, Calibration, LayerStatistics, Uses
from tnlayers.compression.candidates import Candidate, Problem, candidates, check_formats
from tnlayers.compression.collect import targets_of
from tnlayers.compression.policies import frontier
from tnlayers.convert import reasons_against
from tnlayers.surgery import Site, is_transposed, sites


@dataclass(frozen=True)
class Weighed:
    """Every targeted weight of a model with its candidates: the spectra are computed once, for every budget.

    Args:
        names: of the layers of each weight.
        problems: what each weight is worth.
        options: what each can become.
        held: the calibration.
        by_speed: whether prices are multiplications; they are numbers otherwise.
        kept: why layers that were targeted stay dense all the same, by name.
        marks: sum and norm of each weight when it was weighed.

    Example:
        >>> import tnlayers
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> held = tnlayers.collect(model, [torch.randn(20, 8)], gradients=True)
        >>> weighed = tnlayers.weigh(model, held)
        >>> import copy
        >>> reports = [tnlayers.compress(copy.deepcopy(model), keep=k, weighed=weighed) for k in (0.5, 0.75)]
        >>> [report.targeted[1] <= k * 96 for report, k in zip(reports, (0.5, 0.75))]
        [True, True]
    """

    names: tuple[tuple[str, ...], ...]
    problems: tuple[Problem, ...]
    options: tuple[tuple[Candidate, ...], ...]
    held: Calibration
    by_speed: bool = False
    kept: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[tuple[float, float], ...] = ()

    @cached_property
    def _by_error(self) -> Frontier:
        return frontier(self.options)

    @cached_property
    def _by_share(self) -> Frontier:
        return frontier(self.options, [problem.total or 1.0 for problem in self.problems])

    def table(self, policy: str) -> Frontier | None:
        """The frontier that a policy reads, made once; None for one that reads none."""
        return {"loss": lambda: self._by_error, "knapsack": lambda: self._by_share}.get(policy, lambda: None)()

    @property
    def targeted(self) -> int:
        """Numbers in the targeted weights."""
        return sum(problem.weight.numel() for problem in self.problems)

    def groups(self, model: nn.Module) -> list[list[Site]]:
        """The layers in a model, which must have the very weights that were weighed.

        Raises:
            ValueError: another model, or one whose weights have changed.
        """
        found = {name: site for site in sites(model) for name in site.names}
        missing = [name for names in self.names for name in names if name not in found]
        if missing:
            raise ValueError(f"compress: the model must be the one that was weighed, got one without {missing[0]}")
        groups = [[found[name] for name in names] for names in self.names]
        for group, problem, mark in zip(groups, self.problems, self.marks, strict=True):
            weight = _oriented(group[0])
            same = weight.shape == problem.weight.shape and torch.equal(weight, problem.weight.to(weight))
            if not same or _mark(weight) != mark:  # of one model, both are changed in place
                raise ValueError(
                    f"compress: the model must have the weights that were weighed, got others at {group[0].name}; "
                    "weigh again"
                )
        return groups


def weigh(
    model: nn.Module,
    calibration: Calibration | None = None,
    *,
    targets: Sequence[Any] | str | None = None,
    exclude: Sequence[Any] = (),
    formats: Sequence[str] | str = ("low_rank", "tucker"),
    multiple: int = 1,
    by_speed: bool = False,
    progress: Progress | None = None,
) -> Weighed:
    """Spectra and candidates of every targeted weight; for several budgets from one calibration.

    Args:
        model: see `compress`, as for the others.
        calibration: from `collect`.
        targets: name patterns or module types.
        exclude: name patterns or module types to leave alone.
        formats: families of networks.
        multiple: low ranks are multiples of it.
        by_speed: prices are multiplications on the calibration's tokens, for `compress(speed=)`.
        progress: called as (done, total, name).

    Raises:
        ValueError: see `compress`.

    Example:
        >>> len(weigh(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))).problems)
        2
    """
    formats = check_formats("compress", formats)
    if isinstance(multiple, bool) or not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"compress: multiple must be an int >= 1, got {multiple!r}")
    if targets is None and calibration is not None:
        targets = [glob.escape(name) or "*" for name in calibration.layers]
        names = {name for site in sites(model) for name in site.names}
        missing = [name for name in calibration.layers if name not in names]
        if missing:
            raise ValueError(
                f"compress: the calibration must be of this model, got one with {len(missing)} layers that it has "
                f"not: {', '.join(missing[:3])}"
            )
    wanted = targets_of("compress", model, targets, exclude)
    kept = reasons_against(model, wanted)
    if len(kept) == len(wanted):
        name, reason = next(iter(kept.items()))
        raise ValueError(
            f"compress: the model must have a layer that can be replaced, got none ({name or 'the model itself'}: "
            f"{reason}); look at targets"
        )
    wanted = [site for site in wanted if site.name not in kept]
    if by_speed and calibration is None:
        raise ValueError("compress: speed counts multiplications on the tokens of a calibration, got none; collect one")
    held = Calibration("none") if calibration is None else calibration
    groups = groups_of(wanted)
    for group in groups:
        weight = _oriented(group[0])
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"compress: weights must be finite, got NaN or infinity at {group[0].name or '(model)'}")
    problems = [problem_of(group, held, multiple=multiple, by_speed=by_speed) for group in groups]
    if calibration is not None:
        _warn(problems, groups)
    if held.has_gradients:
        problems = _comparable(problems)
    options = []
    for k, (group, problem) in enumerate(zip(groups, problems, strict=True)):
        if progress is not None:
            progress(k, len(groups), f"spectrum of {group[0].name or '(model)'}")
        options.append(tuple(candidates(problem, formats)))
    names_of = tuple(tuple(site.name for site in group) for group in groups)
    marks = tuple(_mark(problem.weight) for problem in problems)
    return Weighed(names_of, tuple(problems), tuple(options), held, by_speed, kept, marks)


class _Use(NamedTuple):
    """One use of a weight: factors of its rows and of its columns, what their product is divided by, and its calls."""

    rows: Tensor | None
    columns: Tensor | None
    tokens: int
    table: bool
    calls: int


def groups_of(wanted: Sequence[Site]) -> list[list[Site]]:
    """Layers of one weight together.

    Example:
        >>> from torch import nn
        >>> from tnlayers.surgery import sites
        >>> model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
        >>> model[1].weight = model[0].weight
        >>> [[site.name for site in group] for group in groups_of(sites(model)[1:])]
        [['0', '1']]
    """
    found: dict[int, list[Site]] = {}
    for site in wanted:
        found.setdefault(id(site.module.weight), []).append(site)
    return list(found.values())


def statistics_of(site: Site, held: Calibration) -> LayerStatistics | None:
    """What the calibration holds of a layer, under any of its names."""
    return next((held.layers[name] for name in site.names if name in held.layers), None)


def problem_of(group: Sequence[Site], held: Calibration, *, multiple: int = 1, by_speed: bool = False) -> Problem:
    """A weight with the factors of all its uses.

    The rows of a table are picked, and gradients come back to its columns; a matrix takes inputs at its columns, and
    gradients come back to its rows. Where a weight has several uses (layers that share it, a table and a matrix), the
    squares of their factors are added, each relative to its size, and errors are scaled so that the whole weight is
    worth the sum of its uses.

    Args:
        group: its layers.
        held: the calibration.
        multiple: of ranks.
        by_speed: numbers are priced by how often they are multiplied; picking a row of a table multiplies those of
            one side alone, and none of a dense one.

    Raises:
        ValueError: factors of other widths than the weight.
    """
    weight = _oriented(group[0])
    table = any(kind_of(member.module) == "table" for member in group)
    uses = [_use(member, held, weight) for member in group]
    seen = [use for use in uses if use is not None]
    rows, columns, tokens = None, None, sum(use.tokens for use in seen)
    if len(seen) == 1:
        rows, columns = seen[0].rows, seen[0].columns
    elif seen:
        rows = _together([use.rows for use in seen])
        columns = _together([use.columns for use in seen])
    price, dense_price = 1, None
    if by_speed:
        m, n = len(weight), weight[0].numel()
        calls, picks = (sum(use.calls for use in seen if use.table == is_table) for is_table in (False, True))
        price = max(1, calls + -(-picks * n // (m + n)))
        dense_price = weight.numel() * calls
    inputs, outputs = (rows, columns) if table else (columns, rows)
    problem = Problem(weight, inputs, outputs, table, max(1, tokens), 1.0, price, dense_price, multiple)
    if len(seen) > 1 and problem.total > 0:
        problem = problem.scaled(sum(_energy(weight, use) for use in seen) / problem.total)
    return problem


def _energy(weight: Tensor, use: _Use) -> float:
    """Squared size of what a use makes of its weight."""
    double = torch.promote_types(weight.dtype, torch.float64)
    matrix = weight.flatten(1).to(double)
    if use.rows is not None:
        rows = use.rows.to(double)
        matrix = rows.unsqueeze(1) * matrix if rows.ndim == 1 else rows @ matrix
    if use.columns is not None:
        columns = use.columns.to(double)
        matrix = matrix * columns if columns.ndim == 1 else matrix @ columns.mH
    return float(torch.linalg.vector_norm(matrix)) ** 2 / use.tokens


def _mark(weight: Tensor) -> tuple[float, float]:
    """Numbers that tell whether a weight was changed since."""
    double = torch.promote_types(weight.dtype, torch.float64)
    return float(abs(weight.sum(dtype=double))), float(torch.linalg.vector_norm(weight, dtype=double))


def _comparable(problems: Sequence[Problem]) -> list[Problem]:
    """Errors of weights that no gradient reached, scaled to the median of the others: they must be added."""
    known = sorted(p.total for p in problems if p.outputs is not None and p.total > 0)
    middle = known[len(known) // 2] if known else 1.0
    return [p if p.outputs is not None else p.scaled(middle / (p.total or 1.0)) for p in problems]


def _warn(problems: Sequence[Problem], groups: Sequence[Sequence[Site]]) -> None:
    """Say where the data say nothing, or too little."""
    unknown = [g[0].name for p, g in zip(problems, groups, strict=True) if p.inputs is None and p.outputs is None]
    if unknown:
        warnings.warn(
            f"compress: the calibration knows nothing of {len(unknown)} layers ({', '.join(unknown[:3])}): their plain "
            "errors count, as much as those of a layer in the middle; calibrate on data that reach them, or exclude "
            "them (as what is read without a call: out_proj of nn.MultiheadAttention)",
            CalibrationWarning,
            stacklevel=4,
        )
    few = [
        g[0].name
        for p, g in zip(problems, groups, strict=True)
        if p.inputs is not None and p.inputs.ndim == 2 and p.tokens < p.inputs.shape[1]
    ]
    if few:
        warnings.warn(
            f"compress: {len(few)} layers saw fewer tokens than they have features ({', '.join(few[:3])}): what their "
            "data do not show counts nothing; calibrate on more, or give mu='adaptive'",
            CalibrationWarning,
            stacklevel=4,
        )


def _oriented(site: Site) -> Tensor:
    """The weight as a recipe sees it."""
    weight: Any = site.module.weight
    made: Tensor = weight.detach().T if is_transposed(site.module) else weight.detach()
    return made


def _is_table(site: Site) -> bool:
    return kind_of(site.module) == "table"


def _use(site: Site, held: Calibration, weight: Tensor) -> _Use | None:
    """What one layer says of its weight; None if it saw nothing, or nothing but zeros."""
    layer = statistics_of(site, held)
    if layer is None or not layer.tokens:
        return None
    gradients = None if layer.gradients is None else _factor(layer.gradients)
    inputs = None if layer.inputs is None else _factor(layer.inputs)
    if gradients is not None and not bool(gradients.any()):
        gradients = None
    if (inputs is None and gradients is None) or (inputs is not None and not bool(inputs.any())):
        return None
    rows, columns = (inputs, gradients) if _is_table(site) else (gradients, inputs)
    for what, factor, width in (("rows", rows, len(weight)), ("columns", columns, weight[0].numel())):
        if factor is not None and factor.shape[-1] != width:
            raise ValueError(
                f"compress: the calibration must be of this model, expected {width} {what} at {site.name}, got "
                f"{factor.shape[-1]}"
            )
    rows, columns = (None if f is None else f.to(weight.device) for f in (rows, columns))
    # without inputs the gradients alone are a sum over tokens, of what inputs of unit covariance do
    tokens = layer.tokens if inputs is not None else 1
    return _Use(rows, columns, tokens, _is_table(site), layer.tokens // int(getattr(site.module, "groups", 1)))


def _factor(statistic: Any) -> Tensor:
    """Triangle, or the diagonal of one."""
    if isinstance(statistic, Uses):
        return statistic.smoothed.sqrt()
    if isinstance(statistic, ActivationScale):
        return statistic.squares.sqrt()
    made: Tensor = statistic.factor
    return made


def _together(factors: Sequence[Tensor | None]) -> Tensor | None:
    """One factor whose square is the mean of the squares of several, each divided by its size."""
    given = [f for f in factors if f is not None and bool(f.any())]
    if not given:
        return None
    given = [f / torch.linalg.vector_norm(f) / sqrt(len(given)) for f in given]
    if all(f.ndim == 1 for f in given):
        return torch.stack([f.square() for f in given]).sum(0).sqrt()
    full = [torch.diag(f) if f.ndim == 1 else f for f in given]
    work = max((f.dtype for f in full), key=lambda dtype: dtype.itemsize)
    return torch.linalg.qr(torch.cat([f.to(work) for f in full]), mode="r").R
