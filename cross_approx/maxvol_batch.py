"""Dominant rows of many matrices at once: the searches advance together, one swap or one row each."""

import torch
from torch import Tensor

from decompositions.linalg import accumulate_dtype


def dominant_rows_batch(matrices: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Rows (b, r) of dominant submatrices of (b, n, r), and all coefficients A A[rows]^-1.

    Each matrix swaps its own worst row until none of its coefficients passes the limit; those that are done wait.
    Cost: O(b n r) a swap, as many swaps as the slowest matrix needs; O(b n r^2) for the start.
    """
    a = matrices.to(accumulate_dtype(matrices.dtype))
    b, _, r = a.shape
    eps = torch.finfo(a.dtype).eps
    limit = 1 + max(tau, 100 * eps)
    rows, basis, growth = _pivots(a)
    bad = ~(growth <= 1e-2 / eps**0.5)
    if bool(bad.any()):
        # nearly dependent columns: an orthonormal basis also has the directions that are missing
        basis = torch.where(bad[:, None, None], torch.linalg.qr(a).Q, basis)
        rows = torch.where(bad[:, None], _pivots(basis)[0], rows)
    every = torch.arange(b, device=a.device)
    coefficients = _coefficients(basis, rows)
    fresh = True
    while True:
        for _ in range(max(1, r)):
            i, j = _divmod(coefficients.abs().flatten(1).argmax(1), r)
            pivot = coefficients[every, i, j]
            active = pivot.abs() > limit
            if not bool(active.any()):
                break
            fresh = False
            row = coefficients[every, i]  # a copy: indexed by tensors
            row[every, j] -= 1
            row = torch.where(active[:, None], row / torch.where(active, pivot, 1)[:, None], 0)
            coefficients = torch.baddbmm(coefficients, coefficients[every, :, j][:, :, None], row[:, None], alpha=-1)
            rows[every, j] = torch.where(active, i, rows[every, j])
        if fresh:
            return rows, coefficients
        # updates alone would let errors grow; what is returned is always computed anew
        coefficients, fresh = _coefficients(basis, rows), True


def more_rows_batch(coefficients: Tensor, rows: Tensor, tau: float, low: int, high: int) -> Tensor:
    """Rows (b, k) beyond `rows` (b, r), as `more_rows` finds them; all matrices take as many as the slowest needs."""
    b, _, r = coefficients.shape
    every = torch.arange(b, device=coefficients.device)
    inverse = torch.eye(r, dtype=coefficients.dtype, device=coefficients.device).repeat(b, 1, 1)
    squares = torch.linalg.vector_norm(coefficients, dim=2).square()
    open_ = torch.ones_like(squares, dtype=torch.bool)
    open_[every[:, None], rows] = False
    chosen: list[Tensor] = []
    while r + len(chosen) < high:
        if r + len(chosen) >= low and not bool((torch.where(open_, squares, -1.0) > tau**2).any()):
            break
        i = torch.where(open_, squares, -1.0).argmax(1)
        largest = squares[every, i]
        direction = (inverse @ coefficients[every, i].conj()[:, :, None])[:, :, 0]
        scaled = direction / (1 + largest)[:, None]
        inverse = inverse - direction[:, :, None] * scaled.conj()[:, None]
        squares = squares - (coefficients @ direction[:, :, None])[:, :, 0].abs().square() / (1 + largest)[:, None]
        open_[every, i] = False
        chosen.append(i)
    return torch.stack(chosen, 1) if chosen else rows[:, :0]


def _divmod(flat: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Row and column of positions in flattened matrices of r columns."""
    return flat.div(r, rounding_mode="floor"), flat.remainder(r)


def _coefficients(basis: Tensor, rows: Tensor) -> Tensor:
    square = basis.gather(1, rows[:, :, None].expand(-1, -1, basis.shape[2]))
    return torch.linalg.solve(square, basis, left=False)


def _pivots(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of partial pivoting (b, r), the factors L in the order of the rows, and the spread of the pivots (b,)."""
    b, n, r = a.shape
    every = torch.arange(b, device=a.device)
    packed, swaps, _ = torch.linalg.lu_factor_ex(a)
    order = torch.arange(n, device=a.device).repeat(b, 1)
    for k in range(r):
        other = swaps[:, k].long() - 1
        order[:, k], order[every, other] = order[every, other], order[:, k].clone()
    size = packed.diagonal(dim1=1, dim2=2).abs()
    growth = (torch.linalg.vector_norm(packed[:, :r].triu(), torch.inf, dim=1) / size).amax(1)
    packed = packed.tril(-1)
    packed.diagonal(dim1=1, dim2=2).fill_(1)
    lower = torch.empty_like(packed).scatter_(1, order[:, :, None].expand_as(packed), packed)
    return order[:, :r].clone(), lower, growth
