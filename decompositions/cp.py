"""CP decomposition by alternating least squares, tensorly's, with starts, restarts and an honest end."""

from math import inf
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.als import Fit, Target, check_sweeps, finish
from decompositions.formats.cp import CP
from decompositions.linalg import check_kind, check_tol, full_precision, gram, unfold
from decompositions.randomized import randomized_basis

STARTS = ("hosvd", "random")


@full_precision
def cp_als(
    x: Inexact[Tensor, "..."],
    rank: int,
    tol: float | None = None,
    *,
    start: Literal["hosvd", "random"] = "hosvd",
    restarts: int = 0,
    nonnegative: bool = False,
    num_rows: int | None = None,
    max_sweeps: int = 200,
    improvement: int | float = 1e-8,
    method: Literal["exact", "randomized"] = "exact",
    with_fit: bool = False,
    generator: torch.Generator | None = None,
) -> CP | tuple[CP, Fit]:
    """CP by alternating least squares: `X ≈ sum_r a_r b_r c_r ...`, each factor in turn the best for the others.

    No start is sure to find the best approximation (which may not exist), and no tolerance is guaranteed: the error
    reached is measured, and where it is above `tol` a TruncationWarning states it. With `restarts` random starts follow
    the first, and the best result is kept. Runs in double precision on a scaled copy of x.
    Cost: O(sweeps d rank prod(n)) for each start.

    Args:
        x: a real tensor of any order >= 1.
        rank: number of rank-one terms.
        tol: relative Frobenius error at which to stop (with `nonnegative` after a start only).
        start: "hosvd" (leading singular vectors of every unfolding, filled up by random columns) or "random".
        restarts: further, random, starts.
        nonnegative: keep all factors >= 0 (hierarchical ALS).
        num_rows: leading axes of x that are rows of the network; all by default.
        max_sweeps: upper bound on the sweeps of a start.
        improvement: stop a start when a sweep lowers the relative error by less.
        method: "randomized" takes sketches of the unfoldings for the "hosvd" start.
        with_fit: return `(network, Fit)`.
        generator: of the random starts and columns.

    Returns:
        CP whose factors have columns of equal norm in every mode.

    Raises:
        ValueError: NaN or infinity, an empty mode, a rank, count or name that makes no sense.
        TypeError: complex or integer input, a rank that is not an int.

    References:
        R. Harshman, UCLA Working Papers in Phonetics 1970; J. Kossaifi et al., TensorLy, JMLR 2019;
        N. Gillis, F. Glineur, Neural Computation 2012 (hierarchical ALS).

    Example:
        >>> import torch
        >>> from decompositions import CP, to_dense
        >>> x = to_dense(CP.random(row_modes=(5, 6, 7), rank=2, generator=torch.Generator().manual_seed(0)))
        >>> net, fit = cp_als(x, 2, with_fit=True)
        >>> net.ranks, fit.error < 1e-3, fit.converged
        ((2,), True, True)
    """
    check_kind("cp_als", x)
    if x.is_complex():
        raise TypeError(f"cp_als: expected a real tensor, got {x.dtype}; the least squares of its sweeps are real")
    check_tol("cp_als", tol)
    _check_options(rank, start, restarts, max_sweeps, improvement, method)
    target = Target("cp_als", x)
    if x.ndim == 1 or target.norm == 0:
        factors = [x.detach().clone()] if x.ndim == 1 else [x.new_zeros(n, rank) for n in x.shape]
        return finish("cp_als", CP(factors, num_rows), x, None, Fit(0.0, True, (0.0,), (0.0,)), with_fit)
    best: tuple[float, list[Tensor], list[float], bool] | None = None
    ends = []
    for first in (start, *["random"] * restarts):
        found = _sweeps(target.unit, int(rank), first, nonnegative, max_sweeps, improvement, tol, method, generator)
        ends.append(found[0])
        if best is None or found[0] < best[0]:
            best = found
        if tol is not None and best[0] <= tol:
            break
    assert best is not None
    _, factors, errors, converged = best
    if not factors:
        raise ValueError(
            f"cp_als: the sweeps must stay finite, got NaN or infinity from every start at rank {rank} of a tensor of "
            f"shape {tuple(x.shape)}; take a smaller rank, or restarts={restarts + 3}"
        )
    spread = target.norm ** (1 / x.ndim)
    fit = Fit(0.0, converged, tuple(errors), tuple(ends))
    return finish("cp_als", CP([f * spread for f in factors], num_rows), x, tol, fit, with_fit)


def _check_options(
    rank: int, start: str, restarts: int, max_sweeps: int, improvement: int | float, method: str
) -> None:
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise TypeError(f"cp_als: rank must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"cp_als: rank must be at least 1, got {rank}")
    check_sweeps("cp_als", max_sweeps, improvement, restarts)
    if start not in STARTS:
        raise ValueError(f"cp_als: start must be one of {STARTS}, got {start!r}")
    if method not in ("exact", "randomized"):
        raise ValueError(f"cp_als: method must be 'exact' or 'randomized', got {method!r}")


def _sweeps(
    x: Tensor,
    rank: int,
    start: str,
    nonnegative: bool,
    max_sweeps: int,
    improvement: int | float,
    tol: float | None,
    method: str,
    generator: torch.Generator | None,
) -> tuple[float, list[Tensor], list[float], bool]:
    """One start of tensorly's ALS: final error, balanced factors, errors of the sweeps, whether it converged."""
    import tensorly
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import non_negative_parafac_hals, parafac

    factors = _first_factors(x, rank, start, method, generator)
    begin = CPTensor((x.new_ones(rank), [factor.abs() if nonnegative else factor for factor in factors]))
    options: dict[str, Any] = {
        "rank": rank,
        "n_iter_max": max_sweeps,
        "init": begin,
        "tol": max(improvement, 1e-300),  # 0 would leave the errors out
        "return_errors": True,
    }

    def stop(_: Any, error: Any) -> bool:
        return tol is not None and float(error) <= tol

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        if nonnegative:
            found, errors = non_negative_parafac_hals(x, **options)
        else:
            try:
                found, errors = parafac(x, callback=stop, **options)
            except torch.linalg.LinAlgError:  # more terms than the tensor has: its normal equations are singular
                found, errors = parafac(x, callback=stop, l2_reg=1e-10, **options)
    weights, factors = found
    errors = [float(error) for error in errors]
    if not all(bool(torch.isfinite(factor).all()) for factor in factors):
        return inf, [], errors, False
    converged = len(errors) < max_sweeps or (len(errors) > 1 and abs(errors[-2] - errors[-1]) < improvement)
    return errors[-1], _balanced(list(factors), weights), errors, converged


def _first_factors(x: Tensor, rank: int, start: str, method: str, generator: torch.Generator | None) -> list[Tensor]:
    """Leading singular vectors of every unfolding, filled up by random columns; or those alone."""
    factors = []
    for k, n in enumerate(x.shape):
        columns = torch.randn(n, rank, dtype=x.dtype, generator=generator).to(x.device)
        if start == "hosvd":
            matrix = unfold(x, k)
            most = min(rank, *matrix.shape)
            if method == "randomized":
                basis = randomized_basis(matrix, most, generator=generator)
                leading = basis @ _leading(basis.mT @ matrix, most)
            else:
                leading = _leading(matrix, most)
            columns = torch.cat([leading, columns[:, leading.shape[1] :]], 1)
        factors.append(columns)
    return factors


def _leading(matrix: Tensor, count: int) -> Tensor:
    return torch.linalg.eigh(gram(matrix)).eigenvectors.flip(1)[:, :count]


def _balanced(factors: list[Tensor], weights: Tensor | None) -> list[Tensor]:
    """Spread the norm of every term evenly over its vectors."""
    norms = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in factors])
    total = norms.log().sum(0) if weights is None else norms.log().sum(0) + weights.abs().log()
    even = (total / len(factors)).exp()  # 0 where a term vanishes
    made = [factor / norm.clamp_min(1e-300) * even for factor, norm in zip(factors, norms, strict=True)]
    if weights is not None:
        made[0] = made[0] * torch.sgn(weights)
    return made
