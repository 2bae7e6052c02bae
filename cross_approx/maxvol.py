"""Rows of (nearly) largest volume: where to look at a matrix to know all of it."""

from itertools import count
from math import isfinite

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.maxvol_batch import dominant_rows_batch, more_rows_batch
from decompositions.linalg import accumulate_dtype, check_tensor

KEPT = 2.0
"""How much larger the coefficient of another row has to be to displace a pivot of the sweep before, in a cross."""


def maxvol(matrix: Inexact[Tensor, "*batch n r"], tau: int | float = 0.05) -> Int[Tensor, "*batch r"]:
    """Choose r rows of a tall matrix, or of each of a batch, whose square submatrix has dominant volume.

    `|A A[rows]^-1| <= 1 + tau` entrywise, hence `‖A A[rows]^-1‖ <= sqrt(r (1 + (n - r) (1 + tau)^2))`; the volume
    `|det A[rows]|` is at least `(1 + tau)^-r r^(-r/2)` times the largest.
    Starts at the pivots of an LU factorization. Then the rows with the largest coefficients, a few times r of them,
    are searched to the end by rank-one updates among themselves, and one product brings all coefficients up to date. A
    swap grows the volume by more than 1 + tau, so it ends. A batch swaps row by row, all its matrices at once: made for
    many small ones; which rows are found may differ from those of the matrices alone.
    Cost: O(n r^2) for the start and for a round; a handful of rounds is the rule.

    Args:
        matrix: (..., n, r) with n >= r, finite. Only its column space counts; directions that a rank-deficient matrix
            lacks are filled in.
        tau: slack, > 0; smaller means more swaps. Below 100 machine epsilons it acts as that: rounding could cycle.

    Returns:
        (..., r) row numbers, in no particular order.

    Raises:
        ValueError: fewer rows than columns, NaN or infinity, tau <= 0.

    References:
        S. Goreinov, I. Oseledets, D. Savostyanov, E. Tyrtyshnikov, N. Zamarashkin, How to find a good submatrix, 2010.

    Example:
        >>> import torch
        >>> sorted(maxvol(torch.tensor([[1.0, 0.0], [0.1, 0.1], [0.0, 2.0]])).tolist())
        [0, 2]
    """
    _check("maxvol", matrix, tau)
    if matrix.ndim > 2:
        *batch, n, r = matrix.shape
        return dominant_rows_batch(matrix.detach().reshape(-1, n, r), tau)[0].reshape(*batch, r)
    return dominant_rows(matrix.detach(), tau)[0]


def rect_maxvol(
    matrix: Inexact[Tensor, "*batch n r"],
    tau: int | float = 1.0,
    *,
    min_rows: int | None = None,
    max_rows: int | None = None,
) -> Int[Tensor, "*batch k"]:
    """Choose k >= r rows of a tall matrix from which every row is a combination with small coefficients.

    `‖A[i] A[rows]^+‖_2 <= tau` for every row i, unless `max_rows` ends the search; a chosen row has at most 1 anyway.
    Each row added is the one of largest norm so far, the one that grows `det(A[rows]^H A[rows])` most. tau = 1 takes
    about 1.2 r rows of a generic matrix, tau = 2 fewer. All matrices of a batch take as many as the slowest one needs.
    Cost: that of `maxvol` and O(n r) a row more.

    Args:
        matrix: (..., n, r) with n >= r, finite; only its column space counts.
        tau: largest norm of a row of coefficients, > 0 (below 1 takes rows that a square submatrix does not need).
        min_rows: take at least so many; r by default.
        max_rows: take at most so many; n by default.

    Returns:
        (..., k) row numbers, distinct: the r of `maxvol` first, then the others in the order in which they were added.

    Raises:
        ValueError: fewer rows than columns, NaN or infinity, tau <= 0, not r <= min_rows <= max_rows <= n.

    References:
        A. Mikhalev, I. Oseledets, Rectangular maximum-volume submatrices and their applications, Linear Algebra Appl.
        2018, arXiv 1502.07838, algorithm 3.

    Example:
        >>> import torch
        >>> rect_maxvol(torch.tensor([[2.0], [1.0], [1.9]]), 0.8).tolist()
        [0, 2]
    """
    _check("rect_maxvol", matrix, tau)
    *batch, n, r = matrix.shape
    low, high = r if min_rows is None else min_rows, n if max_rows is None else max_rows
    if not r <= low <= high <= n:
        raise ValueError(
            f"rect_maxvol: expected {r} <= min_rows <= max_rows <= {n} for a {n} x {r} matrix, "
            f"got min_rows={min_rows}, max_rows={max_rows}"
        )
    if batch:
        rows, coefficients = dominant_rows_batch(matrix.detach().reshape(-1, n, r), 0.05)
        rows = torch.cat([rows, more_rows_batch(coefficients, rows, tau, low, high)], 1)
        return rows.reshape(*batch, rows.shape[1])
    rows, coefficients = dominant_rows(matrix.detach(), 0.05)
    return torch.cat([rows, more_rows(coefficients, rows, tau, low, high)])


def _check(name: str, matrix: Tensor, tau: int | float) -> None:
    check_tensor(name, matrix, min_order=2)
    if matrix.shape[-2] < matrix.shape[-1]:
        raise ValueError(f"{name}: expected (..., n, r) with n >= r, got shape {tuple(matrix.shape)}; transpose it")
    if not (tau > 0 and isfinite(tau)):
        raise ValueError(f"{name}: tau must be positive, got {tau}")


def dominant_rows(matrix: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The rows of `maxvol`, and all coefficients A A[rows]^-1."""
    a = matrix.to(accumulate_dtype(matrix.dtype))
    r = a.shape[1]
    eps = torch.finfo(a.dtype).eps
    limit = 1 + max(tau, 100 * eps)
    rows, lower, growth = _pivots(a)
    basis = lower
    if not growth <= 1e-2 / eps**0.5:
        # nearly dependent columns: an orthonormal basis also has the directions that are missing
        basis = torch.linalg.qr(a).Q
        rows, _, _ = _pivots(basis)
    coefficients = torch.linalg.solve(basis[rows], basis, left=False)
    for number in count(1):
        largest, which = coefficients.abs().amax(1).topk(min(len(coefficients), 8 * r))
        if float(largest[0]) <= limit:
            break
        # rows that are close to the limit now may pass it after the first swaps
        candidates = torch.cat([rows, which[largest > 0.8 * limit]])
        better = candidates[_swap(coefficients[candidates], limit)]
        changed = (better != rows).nonzero()[:, 0]
        rows = better
        if number % 16:
            step = coefficients[rows[changed]]
            square = step[:, changed].clone()
            step[torch.arange(len(changed), device=rows.device), changed] -= 1
            left = coefficients[:, changed]
            coefficients.addmm_(left, torch.linalg.solve(square, step), alpha=-1)  # all swaps of the round at once
        else:  # updates alone would let errors grow
            coefficients = torch.linalg.solve(basis[rows], basis, left=False)
    return rows, coefficients


def _pivots(a: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows of partial pivoting, the factor L in the order of the rows of a, and the spread of the pivots."""
    n, r = a.shape
    packed, swaps, _ = torch.linalg.lu_factor_ex(a)
    order = torch.arange(n)
    for k, other in enumerate((swaps.long() - 1).tolist()):
        order[[k, other]] = order[[other, k]]
    order = order.to(a.device)
    size = packed.diagonal().abs()
    growth = float((torch.linalg.vector_norm(packed[:r].triu(), torch.inf, dim=0) / size).max())
    packed.tril_(-1).diagonal().fill_(1)
    lower = torch.empty_like(packed).index_copy_(0, order, packed)
    return order[:r].clone(), lower, growth


def _swap(coefficients: Tensor, limit: float) -> Tensor:
    """Rows of a dominant submatrix of a small matrix whose first r rows are the identity, by rank-one updates."""
    r = coefficients.shape[1]
    rows = torch.arange(r, device=coefficients.device)
    start = coefficients
    for _ in range(50):  # anew after every r swaps; what is left at the end is left to the caller's next round
        for _ in range(r):
            i, j = divmod(int(coefficients.abs().argmax()), r)
            pivot = coefficients[i, j]
            if not float(pivot.abs()) > limit:
                return rows
            row = coefficients[i].clone()
            row[j] -= 1
            coefficients = torch.addr(coefficients, coefficients[:, j], row / pivot, alpha=-1)
            rows[j] = i
        coefficients = torch.linalg.solve(start[rows], start, left=False)
    return rows


def more_rows(coefficients: Tensor, rows: Tensor, tau: float, low: int, high: int) -> Tensor:
    """Rows beyond `rows`, at which the coefficients are the identity: the largest norm first, `low` to `high` in all.

    With B the coefficients and S the rows chosen, row i of A A[S]^+ has the squared norm `b_i M b_i^H` for
    `M = (B_S^H B_S)^-1`; a row more is a rank-one change of M.
    """
    r = coefficients.shape[1]
    inverse = torch.eye(r, dtype=coefficients.dtype, device=coefficients.device)
    squares = torch.linalg.vector_norm(coefficients, dim=1).square()
    open_ = torch.ones(len(squares), dtype=torch.bool, device=squares.device)
    open_[rows] = False
    chosen: list[int] = []
    while len(rows) + len(chosen) < high:
        i = int(torch.where(open_, squares, -1.0).argmax())
        largest = float(squares[i])
        if len(rows) + len(chosen) >= low and largest <= tau**2:
            break
        direction = inverse @ coefficients[i].conj()
        inverse = inverse - torch.outer(direction, direction.conj()) / (1 + largest)
        squares = squares - (coefficients @ direction).abs().square() / (1 + largest)
        open_[i] = False
        chosen.append(i)
    return torch.tensor(chosen, dtype=torch.long, device=coefficients.device)
