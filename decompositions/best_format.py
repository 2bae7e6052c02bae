"""Which format holds a weight best in a given number of parameters: try them all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite, prod
from numbers import Real
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.als import als
from decompositions.cp import cp_als
from decompositions.formats.algebra import numel, to_dense
from decompositions.formats.cp import CP
from decompositions.formats.kronecker_sum import KroneckerSum
from decompositions.formats.low_rank import LowRank
from decompositions.formats.monarch import Monarch
from decompositions.formats.network import Network
from decompositions.formats.tensor_ring import TensorRing
from decompositions.formats.tt import TT
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.formats.tucker import Tucker
from decompositions.kronecker import kronecker_svd
from decompositions.linalg import check_finite, check_kind, fold_matrix, frobenius
from decompositions.low_rank import svd
from decompositions.monarch import monarch_projection
from decompositions.ring import tr_als
from decompositions.tt import tt_svd, ttm_svd
from decompositions.tucker import hooi

Modes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Trial:
    """One format at the largest rank that fits.

    Args:
        name: format and number of modes a side.
        error: relative Frobenius error of the (padded) weight.
        parameters: of the network.
        network: the network; None where not even rank 1 fits.
    """

    name: str
    error: float
    parameters: int
    network: Network | None


@dataclass(frozen=True)
class Trials:
    """All formats that were tried, the smallest error first."""

    budget: int
    dense: int
    rows: tuple[Trial, ...]

    @property
    def best(self) -> Network:
        """The network with the smallest error."""
        network = self.rows[0].network
        assert network is not None
        return network

    def __str__(self) -> str:
        head = f"{self.budget:,} parameters, {self.budget / self.dense:.1%} of {self.dense:,}"
        width = max(len(row.name) for row in self.rows)
        lines = [head, f"{'format':<{width}}  {'error':>7}  {'parameters':>10}  ranks"]
        for row in self.rows:
            ranks = "does not fit" if row.network is None else str(row.network.ranks)
            error = "" if row.network is None else f"{row.error:.4f}"
            lines.append(f"{row.name:<{width}}  {error:>7}  {row.parameters:>10,}  {ranks}")
        return "\n".join(lines)


def best_format(
    weight: Inexact[Tensor, "m *n"],
    budget: int | float,
    *,
    orders: Sequence[int] = (2, 3),
    sweeps: int = 10,
    generator: torch.Generator | None = None,
) -> Trials:
    """Decompose a weight in every format, at the largest equal ranks that a budget allows, and rank them by error.

    A matrix is folded into 2 and 3 (`orders`) balanced modes a side for the formats that need modes; a tensor of order
    3 or more keeps its axes where a format takes them, and is flattened to (first axis) x (others) elsewhere.
    Frobenius error is not accuracy after training: a Monarch or CP layer may train better than its error here suggests.
    Cost: every decomposition once; CP and rings take `sweeps` sweeps of least squares.

    Args:
        weight: (out, in) or (out, in, *kernel).
        budget: parameters that a network may hold, or (a float in (0, 1)) their share of those of the weight.
        orders: numbers of modes a side to try.
        sweeps: of the iterative decompositions.
        generator: of random starts.

    Returns:
        Trials: prints as a table; `best` is the network.

    Raises:
        ValueError: NaN or infinity, a budget that holds no format at rank 1.

    Example:
        >>> import torch
        >>> a, b = torch.randn(4, 4), torch.randn(8, 8)
        >>> trials = best_format(torch.kron(a, b), 80, orders=(2,))
        >>> type(trials.best).__name__ in ("KroneckerSum", "TTMatrix"), trials.rows[0].error < 1e-5
        (True, True)
    """
    check_kind("best_format", weight, min_order=2)
    check_finite("best_format", weight)
    if isinstance(budget, bool) or not isinstance(budget, Real) or not isfinite(budget) or budget <= 0:
        raise ValueError(f"best_format: budget must be a positive number, got {budget!r}")
    allowed = int(budget * weight.numel()) if isinstance(budget, float) and budget < 1 else int(budget)
    rows = [
        _trial(name, weight, allowed, format, modes, decompose)
        for name, format, modes, decompose in _candidates(weight, orders, sweeps, generator)
    ]
    if all(row.network is None for row in rows):
        least = min(row.parameters for row in rows)
        raise ValueError(
            f"best_format: the budget must hold rank 1 of some format, expected at least {least:,}, got {allowed:,}"
        )
    return Trials(allowed, weight.numel(), tuple(sorted(rows, key=lambda row: row.error)))


Decompose = Callable[[Tensor, int], Network]
Candidate = tuple[str, Any, Modes, Decompose]


def _candidates(
    weight: Tensor, orders: Sequence[int], sweeps: int, generator: torch.Generator | None
) -> list[Candidate]:
    out, width = weight.shape[0], prod(weight.shape[1:])
    found: list[Candidate] = [("LowRank", LowRank, ((out,), (width,)), lambda w, r: _network(svd(w, r)))]
    tensors: list[tuple[str, Modes]] = [(f" {d}+{d}", _balanced(out, width, d)) for d in orders]
    if weight.ndim > 2:
        tensors.append((" of its axes", ((out,), tuple(weight.shape[1:]))))
    swept: dict[str, Any] = {"max_sweeps": sweeps, "generator": generator}
    for text, modes in tensors:
        found += [
            ("Tucker" + text, Tucker, modes, _of_tensor(hooi, modes)),
            ("TT" + text, TT, modes, _of_tensor(tt_svd, modes)),
            ("CP" + text, CP, modes, _of_tensor(partial(cp_als, **swept), modes)),
            ("TensorRing" + text, TensorRing, modes, _of_tensor(partial(tr_als, **swept), modes)),
        ]
    for d in orders:
        text, modes = f" {d}+{d}", _balanced(out, width, d)
        many = partial(_kronecker, sweeps=sweeps, generator=generator)
        found += [
            ("TTMatrix" + text, TTMatrix, modes, _of_matrix(ttm_svd, modes)),
            ("Monarch" + text, Monarch, modes, _of_matrix(monarch_projection, modes)),
            ("KroneckerSum" + text, KroneckerSum, modes, _of_matrix(kronecker_svd if d == 2 else many, modes)),
        ]
    return found


def _network(result: Any) -> Network:
    net: Network = result
    return net


def _of_tensor(decompose: Callable[..., Any], modes: Modes) -> Decompose:
    rows = len(modes[0])
    return lambda w, rank: _network(decompose(fold_matrix("best_format", w, *modes), rank, num_rows=rows))


def _of_matrix(decompose: Callable[..., Any], modes: Modes) -> Decompose:
    return lambda weight, rank: _network(decompose(weight, modes[0], modes[1], rank))


def _balanced(out: int, width: int, order: int) -> Modes:
    """Balanced modes a side."""
    rows, cols = Network.default_modes((out, width), order)
    return rows, cols


def _kronecker(
    weight: Tensor,
    rows: tuple[int, ...],
    cols: tuple[int, ...],
    rank: int,
    *,
    sweeps: int,
    generator: torch.Generator | None,
) -> Network:
    """Three factors and more: least squares from random ones."""
    start = KroneckerSum.random(
        row_modes=rows, col_modes=cols, rank=rank, dtype=weight.dtype, device=weight.device, generator=generator
    )
    return _network(als(fold_matrix("best_format", weight, rows, cols), start, max_sweeps=sweeps))


def _trial(name: str, weight: Tensor, allowed: int, format: Any, modes: Modes, decompose: Decompose) -> Trial:
    """The format at the largest rank that fits, found by bisection over shapes alone."""

    def count(rank: int) -> int:
        return numel(format.skeleton(*modes, rank))

    if count(1) > allowed:
        return Trial(name, inf, count(1), None)
    low, high = 1, 2
    while count(high) <= allowed and count(high) > count(low):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= allowed else (low, middle)
    net = decompose(weight, low)
    target = fold_matrix("best_format", weight, net.row_modes, net.col_modes)
    error = frobenius(to_dense(net) - target) / (frobenius(target) or 1.0)
    return Trial(name, error, numel(net), net)
