"""Rows of (nearly) largest volume: where to look at a matrix to know all of it."""

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from decompositions.linalg import accumulate_dtype, check_tensor


def maxvol(matrix: Inexact[Tensor, "n r"], tau: float = 0.05) -> Int[Tensor, "r"]:
    """Choose r rows of a tall matrix whose square submatrix has dominant volume.

    `|A A[rows]^-1| <= 1 + tau` entrywise, hence `‖A A[rows]^-1‖ <= sqrt(r (1 + (n - r) (1 + tau)^2))`; the volume
    `|det A[rows]|` is at least `(1 + tau)^-r r^(-r/2)` times the largest.
    Starts at the pivots of an LU factorization; a swap grows the volume by more than 1 + tau, so it ends.
    Cost: O(n r^2) for the start and O(n r) a swap.

    Args:
        matrix: (n, r) with n >= r, finite. Only its column space counts, so it is orthonormalized first; directions
            that a rank-deficient matrix lacks are filled in.
        tau: slack, > 0; smaller means more swaps. Below 100 machine epsilons it acts as that: rounding could cycle.

    Returns:
        Row numbers, in no particular order.

    Raises:
        ValueError: fewer rows than columns, NaN or infinity, tau <= 0.

    References:
        S. Goreinov, I. Oseledets, D. Savostyanov, E. Tyrtyshnikov, N. Zamarashkin, How to find a good submatrix, 2010.

    Example:
        >>> import torch
        >>> sorted(maxvol(torch.tensor([[1.0, 0.0], [0.1, 0.1], [0.0, 2.0]])).tolist())
        [0, 2]
    """
    check_tensor("maxvol", matrix, min_order=2)
    if matrix.ndim != 2 or matrix.shape[0] < matrix.shape[1]:
        raise ValueError(f"maxvol: expected a matrix with n >= r, got shape {tuple(matrix.shape)}; transpose it")
    if not tau > 0:
        raise ValueError(f"maxvol: tau must be positive, got {tau}")
    q = torch.linalg.qr(matrix.detach().to(accumulate_dtype(matrix.dtype))).Q
    permutation, _, _ = torch.linalg.lu(q)
    r, limit = matrix.shape[1], 1 + max(tau, 100 * torch.finfo(q.dtype).eps)
    rows = permutation.real.argmax(0)[:r].clone()
    while True:
        # solved anew for every pass over the swaps of one pass: rank-one updates alone would let errors grow
        coefficients = torch.linalg.solve(q[rows], q, left=False)
        swapped = False
        for _ in range(r):
            flat = int(coefficients.abs().argmax())
            i, j = divmod(flat, r)
            pivot = coefficients[i, j]
            if float(pivot.abs()) <= limit:
                break
            unit = torch.zeros(r, dtype=q.dtype, device=q.device)
            unit[j] = 1
            update = torch.outer(coefficients[:, j], (coefficients[i] - unit) / pivot)
            coefficients = coefficients - update
            rows[j] = i
            swapped = True
        if not swapped:
            return rows
