"""Truncated singular value decomposition."""

from numbers import Integral
from typing import Literal, overload

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.low_rank import LowRank
from decompositions.linalg import Method, check_kind, check_ranks, full_precision, positive_qr, safe_svd
from decompositions.truncation import Truncation


@overload
def svd(
    matrix: Tensor,
    rank: int | None = None,
    tol: float | None = None,
    *,
    method: Method = "auto",
    with_error: Literal[False] = False,
    generator: torch.Generator | None = None,
) -> LowRank: ...
@overload
def svd(
    matrix: Tensor,
    rank: int | None = None,
    tol: float | None = None,
    *,
    method: Method = "auto",
    with_error: Literal[True],
    generator: torch.Generator | None = None,
) -> tuple[LowRank, float]: ...
@full_precision
def svd(
    matrix: Inexact[Tensor, "m *n"],
    rank: int | None = None,
    tol: float | None = None,
    *,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> LowRank | tuple[LowRank, float]:
    """Truncated SVD, `A ≈ U S V^T` with orthonormal U and conj(V) and a diagonal S in descending order.

    With `tol`, `‖A - U S V^T‖ <= tol ‖A‖`, in float32 too, and the rank is the smallest whose tail fits (exact and Gram
    methods); near the precision of the dtype room is left for rounding, so that a few more may be kept. With `rank`
    the error is the least possible (Eckart-Young; "randomized": near it). With both the smaller rank wins, and a
    TruncationWarning states the error if it binds.
    Cost: O(m n min(m, n)) exact and Gram (a GEMM and one small eigenproblem), O(m n rank) randomized.

    Args:
        matrix: (m, n), or a tensor whose first axis is the rows and whose others are taken as the columns.
        rank: cap for the rank.
        tol: relative Frobenius error.
        method: "exact" (LAPACK SVD), "gram" (eigenvectors of A A^H in double precision), "randomized" (needs `rank`),
            or "auto": Gram for wide or tall matrices where it loses no accuracy, exact otherwise.
        with_error: return `(network, relative error)`, measured in double precision.
        generator: of the randomized sketch.

    Returns:
        LowRank(U, S, V); the center of the gauge is S.

    Raises:
        ValueError: NaN or infinity, an empty axis, a rank below 1, "randomized" without a rank.
        TypeError: integer input.

    References:
        C. Eckart, G. Young, Psychometrika 1936; N. Halko et al., arXiv 0909.4061 ("randomized").

    Example:
        >>> import torch
        >>> a = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
        >>> net, error = svd(a, rank=2, with_error=True)
        >>> net.ranks, round(error, 4)
        ((2, 2), 0.2182)
    """
    check_kind("svd", matrix, min_order=2)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, Integral)):
        raise TypeError(f"svd: rank must be an int or None, got {rank!r}")
    if method == "randomized" and rank is None:
        raise ValueError("svd: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    flat = matrix.flatten(1)
    task = Truncation("svd", flat, cuts=1, tol=tol, method=method, generator=generator)
    work = task.work
    m, n = work.shape
    (cap,) = check_ranks("svd", rank, [min(m, n)])
    u, s, v = thin_svd(task, work, cap)
    return task.finish(LowRank(u, torch.diag(s.to(u.dtype)), v), with_error)


def thin_svd(
    task: Truncation, work: Inexact[Tensor, "m n"], cap: int
) -> tuple[Inexact[Tensor, "m k"], Inexact[Tensor, "k"], Inexact[Tensor, "n k"]]:
    """The only cut of a task: orthonormal U and conj(V), and the singular values in descending order."""
    wide = work if work.shape[0] <= work.shape[1] else work.mT
    found = task.cut(wide[None], cap)
    # rest = u^H A is k x n: its own small SVD makes both sides orthonormal and S diagonal
    q, r = positive_qr(found.rest[0].mH.to(found.u.dtype))
    u, s, vh = safe_svd(r.mH)
    left, right = found.u @ u, (vh @ q.mH).mT
    return (left, s, right) if work.shape[0] <= work.shape[1] else (right, s, left)
