"""From a calibration to what each weight is worth: the factors of all the uses of a weight, in one orientation."""

import warnings
from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions.weighted import CalibrationWarning
from tnlayers.activations import kind_of
from tnlayers.calibration import ActivationScale, Calibration, LayerStatistics, Uses
from tnlayers.candidates import Problem
from tnlayers.surgery import Site, is_transposed


class _Use(NamedTuple):
    """One use of a weight: factors of its rows and of its columns, and the squared size of its effect."""

    rows: Tensor | None
    columns: Tensor | None
    energy: float
    tokens: int


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
    gradients come back to its rows. A table and a matrix of one weight: the squares of their factors are added, each
    relative to its size, and errors are scaled so that the whole weight is worth the sum of both.

    Args:
        group: its layers.
        held: the calibration.
        multiple: of ranks.
        by_speed: numbers are priced by how often they are multiplied.

    Raises:
        ValueError: factors of other widths than the weight.
    """
    site = group[0]
    weight: Any = site.module.weight
    weight = weight.detach().T if is_transposed(site.module) else weight.detach()
    table = any(kind_of(member.module) == "table" for member in group)
    uses = [_use(member, held, weight) for member in group]
    seen = [use for use in uses if use is not None]
    rows, columns, scale, tokens = None, None, 1.0, sum(use.tokens for use in seen)
    if len(seen) == 1:
        rows, columns, _, _ = seen[0]
    elif seen:
        rows = _together([use.rows for use in seen])
        columns = _together([use.columns for use in seen])
    price, dense_price = 1, None
    if by_speed:
        price = max(1, tokens)
        dense_price = weight.numel() * sum(use.tokens for use, m in zip(seen, group, strict=False) if not _is_table(m))
    inputs, outputs = (rows, columns) if table else (columns, rows)
    problem = Problem(weight, inputs, outputs, table, max(1, tokens), scale, price, dense_price, multiple)
    if len(seen) > 1 and problem.total > 0:
        problem = problem.scaled(sum(use.energy for use in seen) / problem.total)
    return problem


def comparable(problems: Sequence[Problem], groups: Sequence[Sequence[Site]]) -> list[Problem]:
    """Errors of weights that no gradient reached, scaled to the median of the others: they must be added.

    Warns:
        CalibrationWarning: of a weight that the calibration knows nothing of.
    """
    known = sorted(p.total for p in problems if p.outputs is not None and p.total > 0)
    middle = known[len(known) // 2] if known else 1.0
    made = []
    for problem, group in zip(problems, groups, strict=True):
        if problem.outputs is None:
            if problem.inputs is None:
                warnings.warn(
                    f"compress: the calibration knows nothing of {group[0].name or '(model)'}: its plain error counts, "
                    "as much as that of a layer in the middle; calibrate on data that reach it, or exclude it",
                    CalibrationWarning,
                    stacklevel=3,
                )
            problem = problem.scaled(middle / (problem.total or 1.0))
        made.append(problem)
    return made


def _is_table(site: Site) -> bool:
    return kind_of(site.module) == "table"


def _use(site: Site, held: Calibration, weight: Tensor) -> _Use | None:
    """What one layer says of its weight; None if it saw nothing."""
    layer = statistics_of(site, held)
    if layer is None or not layer.tokens or layer.inputs is None:
        return None
    gradients = None if layer.gradients is None else _factor(layer.gradients)
    inputs = _factor(layer.inputs)
    rows, columns = (inputs, gradients) if _is_table(site) else (gradients, inputs)
    for what, factor, width in (("rows", rows, len(weight)), ("columns", columns, weight[0].numel())):
        if factor is not None and factor.shape[-1] != width:
            raise ValueError(
                f"compress: the calibration must be of this model, expected {width} {what} at {site.name}, got "
                f"{factor.shape[-1]}"
            )
    rows, columns = (None if f is None else f.to(weight.device) for f in (rows, columns))
    matrix = weight.flatten(1).to(torch.float32 if weight.dtype.itemsize < 4 else weight.dtype)
    if rows is not None:
        matrix = rows.to(matrix).unsqueeze(1) * matrix if rows.ndim == 1 else rows.to(matrix) @ matrix
    if columns is not None:
        matrix = matrix * columns.to(matrix) if columns.ndim == 1 else matrix @ columns.to(matrix).mH
    return _Use(rows, columns, float(matrix.double().square().sum()) / layer.tokens, layer.tokens)


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
