"""Matrices from some of their rows and columns."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import LimitReached, Reader, open_source
from cross_approx.result import CrossResult, Sweep
from decompositions.formats.low_rank import LowRank
from decompositions.linalg import check_ranks, check_tol

QUIET = 3
"""So many crosses in a row that change little end the search, if the held-out error agrees."""


def skeleton(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float = 1e-6,
    rank: int | None = None,
    pivoting: Literal["rook", "full"] = "rook",
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
) -> CrossResult:
    """Skeleton (CUR) of a matrix: `A ≈ A[:, J] A[I, J]^-1 A[I, :]`, rows I and columns J found one cross at a time.

    Each pivot is the largest entry of its row and of its column of the residual ("rook", found by walking from a random
    column, or from the worst held-out entry), or of the whole residual ("full"). The crosses are eliminated as in LU
    factorization, so that no submatrix is inverted and the left factor has entries of magnitude <= 1. Equal to A on the
    rows I and the columns J; exact at the true rank.

    `converged` only if the relative error on a fresh sample of `held_out` entries that were not read for a cross is at
    most tol (see `CrossResult` for what a sample can see); with "full" the error is exact, over all entries.
    Cost: about `2 r (m + n)` evaluations and O(r^2 (m + n)) operations; "full": m n evaluations and O(m n r).

    Args:
        source: a source of order 2, a matrix, or a callable that takes an integer index (B, 2) and returns (B,) values.
        shape: (m, n); needed for a callable.
        tol: relative error to be met.
        rank: cap.
        pivoting: "rook" or "full".
        max_evals: entries asked for at most, held-out ones included.
        max_bytes: stop once so many bytes were read.
        max_seconds: stop after so many seconds.
        held_out: entries of the last check.
        generator: of start columns and samples.

    Returns:
        CrossResult with LowRank(U, 1, V): U unit lower triangular in the order of the pivots; `pivots` = (I, J) in the
        order found. Where a limit ends the search it is what was found so far.

    Raises:
        ValueError: not of order 2, a NaN or infinite entry (with its index), limits below 1, rank below 1.
        TypeError: not a source.

    References:
        S. Goreinov, E. Tyrtyshnikov, N. Zamarashkin, A theory of pseudoskeleton approximations, Linear Algebra Appl.
        1997; M. Bebendorf, Approximation of boundary element matrices, Numer. Math. 2000.

    Example:
        >>> import torch
        >>> result = skeleton(lambda i: 1 / (1.0 + i.double().sum(1)), shape=(300, 400), tol=1e-8)
        >>> result.converged, result.network.ranks[0] < 25, result.evaluations < 300 * 400 // 4
        (True, True, True)
    """
    opened = open_source("skeleton", source, shape)
    check_tol("skeleton", tol)
    sizes = tuple(int(n) for n in opened.shape)
    if len(sizes) != 2:
        raise ValueError(f"skeleton: expected a matrix, got shape {sizes}; tt_cross takes any order")
    if pivoting not in ("rook", "full"):
        raise ValueError(f"skeleton: pivoting must be 'rook' or 'full', got {pivoting!r}")
    for name, limit in (("max_evals", max_evals), ("max_bytes", max_bytes), ("max_seconds", max_seconds)):
        if limit is not None and not limit > 0:
            raise ValueError(f"skeleton: {name} must be positive, got {limit}")
    if not held_out > 0:
        raise ValueError(f"skeleton: held_out must be positive, got {held_out}")
    (cap,) = check_ranks("skeleton", rank, [min(sizes)])
    reader = Reader("skeleton", opened, max_evals, max_bytes, max_seconds)
    cross = _Cross(reader, cap, float(tol), held_out, generator)
    try:
        reason = cross.search_all() if pivoting == "full" else cross.walk()
    except LimitReached as limit:
        reason = str(limit)
        cross.measure()
    return cross.result(reason)


class _Cross:
    """The crosses eliminated so far, `A ≈ left @ right`."""

    def __init__(self, reader: Reader, cap: int, tol: float, held_out: int, generator: torch.Generator | None) -> None:
        self.reader, self.cap, self.tol, self.held_out, self.generator = reader, cap, tol, held_out, generator
        self.m, self.n = reader.sizes
        self.left = torch.zeros(self.m, 0, dtype=torch.float64)
        self.right = torch.zeros(0, self.n, dtype=torch.float64)
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.square = 0.0
        self.monitor = HeldOut(reader, max(2, held_out // 5), generator)
        self.error, self.count = float("inf"), 0
        self.history: list[Sweep] = []

    def walk(self) -> str:
        """Rook pivoting until the held-out error meets tol, or nothing more is to be found."""
        self.monitor.refresh()
        self.left, self.right = (factor.to(self.monitor.values.dtype) for factor in (self.left, self.right))
        floor = 4 * torch.finfo(self.reader.dtype).eps
        quiet, failed = 0, 0
        j = int(self.monitor.index[self.monitor.values.abs().argmax(), 1])
        while True:
            i, j, column, row = self._rook(j)
            size = float(column[i].abs())
            if size > floor * self.reader.largest_value and len(self.rows) < self.cap:
                self._eliminate(i, j, column, row)
                step = float(torch.linalg.vector_norm(self.left[:, -1]) * torch.linalg.vector_norm(self.right[-1]))
                quiet = quiet + 1 if step <= self.tol * self.square**0.5 else 0
            else:
                quiet += 1
            if quiet < QUIET and len(self.rows) < self.cap:
                j = int(torch.randint(self.n, (1,), generator=self.generator))
                continue
            errors = self.measure()
            if self.error <= self.tol:
                self.monitor = HeldOut(self.reader, self.held_out, self.generator)
                errors = self.measure()
                if self.error <= self.tol:
                    return "the held-out error meets tol"
            if len(self.rows) == self.cap:
                return "the rank cap binds"
            failed = failed + 1 if size <= floor * self.reader.largest_value else 0
            errors_so_far = [line.error for line in self.history]
            near_floor = min(errors_so_far) <= 1e3 * torch.finfo(self.reader.dtype).eps
            stuck = len(errors_so_far) > 4 and min(errors_so_far[-4:]) > 0.7 * min(errors_so_far[:-4])
            if failed > QUIET or (near_floor and stuck):
                return f"the noise floor of {self.reader.dtype}: more crosses do not lower the error"
            j = int(self.monitor.index[errors.argmax(), 1])

    def search_all(self) -> str:
        """Full pivoting on the residual of the whole matrix."""
        index = torch.cartesian_prod(torch.arange(self.m), torch.arange(self.n))
        rest = self.reader.read(index).reshape(self.m, self.n)
        size = float(torch.linalg.vector_norm(rest))
        floor = 4 * torch.finfo(self.reader.dtype).eps * self.reader.largest_value
        reason = "the rank cap binds"
        while True:
            self.error = float(torch.linalg.vector_norm(rest)) / size if size > 0 else 0.0
            self.count = rest.numel()
            self._record()
            if self.error <= self.tol:
                return "the error over all entries meets tol"
            i, j = divmod(int(rest.abs().argmax()), self.n)
            if float(rest[i, j].abs()) <= floor:
                return f"the noise floor of {self.reader.dtype}: more crosses do not lower the error"
            if len(self.rows) == self.cap:
                return reason
            column, row = rest[:, j].clone(), rest[i].clone()
            self._eliminate(i, j, column, row)
            rest = rest - torch.outer(self.left[:, -1], row)
            rest[i], rest[:, j] = 0, 0

    def measure(self) -> Tensor:
        """Held-out error of the factors as they are returned."""
        with suppress(LimitReached):  # fewer held-out entries then
            self.monitor.refresh()
        cores = [core.to(self.reader.dtype) for core in (self.left[None], self.right[..., None])]
        errors = self.monitor.errors(cores)
        self.error, self.count = self.monitor.relative(errors), len(errors)
        self._record()
        return errors

    def result(self, reason: str) -> CrossResult:
        """What was found."""
        left, right = self.left, self.right
        if not self.rows:  # nothing but zeros
            left, right = left.new_zeros(self.m, 1), right.new_zeros(1, self.n)
        dtype, device = self.reader.dtype, self.reader.source.device
        middle = torch.eye(left.shape[1], dtype=dtype, device=device)
        return CrossResult(
            network=LowRank(left.to(device, dtype), middle, right.mT.to(device, dtype).contiguous()),
            evaluations=self.reader.evaluations,
            bytes_read=self.reader.bytes_read,
            error=self.error,
            held_out=self.count,
            converged=self.error <= self.tol and "meets tol" in reason,
            reason=reason,
            history=tuple(self.history),
            pivots=(torch.tensor(self.rows, dtype=torch.long), torch.tensor(self.columns, dtype=torch.long)),
        )

    def _record(self) -> None:
        self.history.append(Sweep(len(self.history) + 1, self.reader.evaluations, self.error, max(1, len(self.rows))))

    def _rook(self, j: int) -> tuple[int, int, Tensor, Tensor]:
        """Walk from column j to an entry that is the largest of its row and of its column of the residual."""
        column = self._column(j)
        i = int(column.abs().argmax())
        row = self._row(i)
        for _ in range(10):
            better = int(row.abs().argmax())
            if not float(row[better].abs()) > float(row[j].abs()):
                break
            j = better
            column = self._column(j)
            above = int(column.abs().argmax())
            if not float(column[above].abs()) > float(column[i].abs()):
                break
            i = above
            row = self._row(i)
        return i, j, column, row

    def _column(self, j: int) -> Tensor:
        index = torch.stack([torch.arange(self.m), torch.full((self.m,), j)], 1)
        column = self.reader.read(index) - (self.left @ self.right[:, j])
        column[self.rows] = 0  # exactly
        return column

    def _row(self, i: int) -> Tensor:
        index = torch.stack([torch.full((self.n,), i), torch.arange(self.n)], 1)
        row = self.reader.read(index) - self.left[i] @ self.right
        row[self.columns] = 0
        return row

    def _eliminate(self, i: int, j: int, column: Tensor, row: Tensor) -> None:
        left, right = column / column[i], row
        dtype = right.dtype
        before = (self.left.to(dtype).mH @ left) * (self.right.to(dtype) @ right.conj()).conj()
        one = float(torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right)) ** 2
        self.square = max(0.0, self.square + one + 2 * float(before.sum().real))
        self.left = torch.cat([self.left.to(dtype), left[:, None]], 1)
        self.right = torch.cat([self.right.to(dtype), right[None]])
        self.rows.append(i)
        self.columns.append(j)
