"""The nearest sum of Kronecker products."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.kronecker_sum import KroneckerSum
from decompositions.formats.modes import balanced_modes
from decompositions.linalg import Method, check_kind, check_ranks, fold_matrix, full_precision
from decompositions.low_rank import thin_svd
from decompositions.truncation import Truncation


@full_precision
def kronecker_svd(
    weight: Inexact[Tensor, "m *n"],
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    rank: int | None = None,
    tol: float | None = None,
    *,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> KroneckerSum | tuple[KroneckerSum, float]:
    """The best sum of r Kronecker products of two matrices, `W ≈ sum_r A_r ⊗ B_r`, by an SVD of W rearranged.

    The matrix with rows (i_1, j_1) and columns (i_2, j_2) has rank r exactly where W is such a sum, so that
    Eckart-Young holds: `‖W - Ŵ‖ <= tol ‖W‖` with the fewest terms, and with `rank` the least error of all sums of r
    terms. Modes whose products exceed the width pad the matrix with zero rows and columns.
    For more than two factors start from random ones: `als(x, KroneckerSum.random(...))`.
    Cost: O(m n min(m_1 n_1, m_2 n_2)).

    Args:
        weight: (out, in); a convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        row_modes: two modes of the rows, product at least m; None chooses balanced ones.
        col_modes: two modes of the columns, product at least n; None chooses balanced ones (of a kernel: its channels
            and its sizes).
        rank: cap for the number of terms.
        tol: relative Frobenius error.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error of the padded matrix)`.
        generator: of the randomized sketch.

    Returns:
        KroneckerSum with terms in the order of their norms; the A_r are orthogonal to one another, the B_r too, and
        both factors of a term have the same norm.

    Raises:
        ValueError: products smaller than the matrix, NaN or infinity, a rank below 1.

    References:
        C. Van Loan, N. Pitsianis, Approximation with Kronecker products, 1993.

    Example:
        >>> import torch
        >>> a, b = torch.randn(3, 2), torch.randn(4, 5)
        >>> net, error = kronecker_svd(torch.kron(a, b), (3, 4), (2, 5), tol=1e-5, with_error=True)
        >>> net.ranks, error < 1e-5
        ((1,), True)
    """
    check_kind("kronecker_svd", weight, min_order=2)
    out, width = weight.shape[0], prod(weight.shape[1:])
    rows = tuple(balanced_modes(out, 2) if row_modes is None else row_modes)
    if col_modes is None:
        inside = prod(weight.shape[2:])
        col_modes = (weight.shape[1], inside) if inside > 1 else balanced_modes(width, 2)
    cols = tuple(col_modes)
    if len(rows) != 2 or len(cols) != 2:
        raise ValueError(
            f"kronecker_svd: a sum of products of two factors needs two modes a side, got row_modes={rows} and "
            f"col_modes={cols}; for more factors use als(x, KroneckerSum.random(...))"
        )
    (m, p), (n, q) = rows, cols
    padded = fold_matrix("kronecker_svd", weight, rows, cols)
    arranged = padded.movedim(2, 1).reshape(m * n, p * q)
    task = Truncation("kronecker_svd", arranged, cuts=1, tol=tol, method=method, generator=generator)
    if method == "randomized" and rank is None:
        raise ValueError("kronecker_svd: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    (cap,) = check_ranks("kronecker_svd", rank, [min(arranged.shape)])
    u, s, v = thin_svd(task, task.work, cap)
    root = s.sqrt().to(u.dtype)
    net = KroneckerSum([(u * root).mT.reshape(-1, m, n), (v * root).mT.reshape(-1, p, q)])
    task.x = weight
    return task.finish(net, with_error, target=padded.detach())
