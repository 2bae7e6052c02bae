"""Tucker-2, TT-matrix and Kronecker sums in the norm of activations: starts for `weighted_als`."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.activation_factor import ActivationFactor
from decompositions.als import check_sweeps
from decompositions.formats.algebra import to_dense
from decompositions.formats.kronecker_sum import KroneckerSum
from decompositions.formats.network import Network
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.formats.tucker import Tucker
from decompositions.kronecker import kronecker_svd
from decompositions.linalg import check_finite, check_kind, check_tol, full_precision, warn_truncation
from decompositions.tt import ttm_svd
from decompositions.tucker import tucker2
from decompositions.weighted import check_mu
from decompositions.weighted_als import Metric, metric_of, refine

N = TypeVar("N", bound=Network)
Mu = int | float | Literal["adaptive"]
Ranks = int | Sequence[int] | None

_STEP = 1.6
"""Factor between tolerances that are tried."""

_FINEST = 1e-12
"""Least tolerance that is tried; below it all ranks are taken."""

_TRIAL = 3
"""Sweeps after which the better start goes on alone."""

_ENOUGH = 1e-4
"""Share of the error that a sweep has to gain."""


@full_precision
def weighted_tucker2(
    kernel: Inexact[Tensor, "out in *kernel"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    *,
    rank: Ranks = None,
    tol: float | None = None,
    mu: Mu = 0.0,
    max_sweeps: int = 20,
    with_error: bool = False,
) -> Tucker | tuple[Tucker, float]:
    """Tucker-2 of a convolution kernel that is right on its activations: least `‖(K - K') X‖^2 + mu ‖K - K'‖^2`.

    X are the patches, unfolded. The error is never above that of `tucker2` at the same ranks. Exact by a change of
    variables where `X^H X` is a Kronecker product over channels and kernel positions, up to what `tucker2` itself
    is (HOOI); otherwise the better of that start and of `tucker2` is refined by `weighted_als`.
    Cost: `max_sweeps` sweeps of `weighted_als` and three of a second start; with `tol` for up to a dozen sets of ranks.

    Args:
        kernel: (out, in, *kernel); a matrix works too.
        factor: of the patches, n = in * prod(kernel) features, channel outermost as in `torch.nn.functional.unfold`.
        rank: cap for both, or (r_out, r_in).
        tol: relative weighted error; the ranks are the cheapest that were tried, not the least possible.
        mu: weight of the plain error, or "adaptive" (see `weighted_low_rank`).
        max_sweeps: upper bound on the number of sweeps.
        with_error: return `(network, ‖(W - W') X‖ / ‖W X‖)`.

    Returns:
        Tucker with orthonormal factors; the core is the center.

    Raises:
        ValueError: NaN or infinity, a factor of another width, neither rank nor tol, a mu that is negative.

    References:
        Y.-D. Kim et al., 2016, arXiv 1511.06530, for the format; COALA, arXiv 2507.07580, for the norm.

    Example:
        >>> import torch
        >>> kernel, patches = torch.randn(8, 4, 3, 3), torch.randn(200, 36)
        >>> weighted_tucker2(kernel, patches, rank=(3, 2)).core.shape
        torch.Size([3, 2, 3, 3])
    """
    check_kind("weighted_tucker2", kernel, min_order=2)
    rows, cols = kernel.shape[:1], kernel.shape[1:]
    return _fit("weighted_tucker2", kernel, factor, _tucker2, rows, cols, rank, tol, mu, max_sweeps, with_error)


@full_precision
def weighted_ttm(
    weight: Inexact[Tensor, "m *n"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    *,
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    rank: Ranks = None,
    tol: float | None = None,
    mu: Mu = 0.0,
    order: int = 2,
    max_sweeps: int = 20,
    with_error: bool = False,
) -> TTMatrix | tuple[TTMatrix, float]:
    """TT-matrix of a weight that is right on its activations: least `‖(W - W') X‖^2 + mu ‖W - W'‖^2`.

    The error is never above that of `ttm_svd` at the same ranks and modes. Exact by a change of variables where
    `X^H X` is a Kronecker product over the column modes, up to what `ttm_svd` itself is (quasi-optimal); otherwise the
    better of that start and of `ttm_svd` is refined by `weighted_als`.
    Cost: as `weighted_tucker2`, a core a pair of modes.

    Args:
        weight: (out, in); a convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        row_modes: modes of the rows, product at least m; None chooses as `ttm_svd` does.
        col_modes: modes of the columns, product at least n, as many as row modes.
        rank: cap for every bond, or an entry for each.
        tol: relative weighted error; the ranks are the cheapest that were tried, not the least possible.
        mu: weight of the plain error, or "adaptive" (see `weighted_low_rank`).
        order: number of modes to choose where they are not given.
        max_sweeps: upper bound on the number of sweeps.
        with_error: return `(network, ‖(W - W') X‖ / ‖W X‖)`, of the padded matrix.

    Returns:
        TTMatrix whose cores are isometries toward the first one.

    Raises:
        ValueError: NaN or infinity, modes or a factor that do not fit, neither rank nor tol, a mu that is negative.

    References:
        I. Oseledets, SIAM J. Matrix Anal. Appl. 2010, for the format; COALA, arXiv 2507.07580, for the norm.

    Example:
        >>> import torch
        >>> net = weighted_ttm(torch.randn(12, 12), torch.randn(50, 12), row_modes=(3, 4), col_modes=(3, 4), rank=2)
        >>> net.ranks
        (2,)
    """
    check_kind("weighted_ttm", weight, min_order=2)
    check_finite("weighted_ttm", weight)
    made = cast("TTMatrix", ttm_svd(weight, row_modes, col_modes, rank=1, order=order))  # for its modes
    rows, cols = made.row_modes, made.col_modes
    recipe = cast("Callable[..., TTMatrix]", _on_matrices(ttm_svd, rows, cols))
    return _fit("weighted_ttm", weight, factor, recipe, rows, cols, rank, tol, mu, max_sweeps, with_error)


@full_precision
def weighted_kronecker(
    weight: Inexact[Tensor, "m *n"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    *,
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    rank: int | None = None,
    tol: float | None = None,
    mu: Mu = 0.0,
    max_sweeps: int = 20,
    with_error: bool = False,
) -> KroneckerSum | tuple[KroneckerSum, float]:
    """A sum of r Kronecker products that is right on the activations: least `‖(W - W') X‖^2 + mu ‖W - W'‖^2`.

    The error is never above that of `kronecker_svd` at the same rank and modes. The optimum, by a change of variables,
    where `X^H X` is a Kronecker product over the two column modes; otherwise the better of that start and of
    `kronecker_svd` is refined by `weighted_als`.
    Cost: as `weighted_tucker2`, with two cores.

    Args:
        weight: (out, in); a convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        row_modes: two modes of the rows, product at least m; None chooses as `kronecker_svd` does.
        col_modes: two modes of the columns, product at least n.
        rank: cap for the number of terms.
        tol: relative weighted error; the rank is the least that was tried, not the least possible.
        mu: weight of the plain error, or "adaptive" (see `weighted_low_rank`).
        max_sweeps: upper bound on the number of sweeps.
        with_error: return `(network, ‖(W - W') X‖ / ‖W X‖)`, of the padded matrix.

    Returns:
        KroneckerSum whose second factor is an isometry of its terms.

    Raises:
        ValueError: NaN or infinity, modes or a factor that do not fit, neither rank nor tol, a mu that is negative.

    References:
        C. Van Loan, N. Pitsianis, 1993, for the format; COALA, arXiv 2507.07580, for the norm.

    Example:
        >>> import torch
        >>> a, b = torch.randn(3, 2), torch.randn(4, 5)
        >>> net, error = weighted_kronecker(
        ...     torch.kron(a, b), torch.randn(60, 10), row_modes=(3, 4), col_modes=(2, 5), rank=1, with_error=True
        ... )
        >>> net.ranks, error < 1e-5
        ((1,), True)
    """
    check_kind("weighted_kronecker", weight, min_order=2)
    check_finite("weighted_kronecker", weight)
    made = cast("KroneckerSum", kronecker_svd(weight, row_modes, col_modes, rank=1))  # for its modes
    rows, cols = made.row_modes, made.col_modes
    recipe = cast("Callable[..., KroneckerSum]", _on_matrices(_kronecker, rows, cols))
    return _fit("weighted_kronecker", weight, factor, recipe, rows, cols, rank, tol, mu, max_sweeps, with_error)


def _tucker2(x: Tensor, **keywords: Any) -> Tucker:
    return cast("Tucker", tucker2(x, **keywords))


def _kronecker(x: Tensor, *, rank: Ranks = None, **keywords: Any) -> KroneckerSum:
    """One bond: its rank may come as a tuple."""
    one = rank[0] if isinstance(rank, Sequence) else rank
    return cast("KroneckerSum", kronecker_svd(x, rank=one, **keywords))


def _on_matrices(recipe: Callable[..., object], rows: Sequence[int], cols: Sequence[int]) -> Callable[..., object]:
    """A recipe of matrices with given modes, for tensors of these modes."""
    fixed = partial(recipe, row_modes=rows, col_modes=cols)
    return lambda x, **keywords: fixed(x.reshape(prod(rows), prod(cols)), **keywords)


def _fit(
    name: str,
    weight: Tensor,
    factor: ActivationFactor | Tensor,
    recipe: Callable[..., N],
    rows: Sequence[int],
    cols: Sequence[int],
    rank: Ranks,
    tol: float | None,
    mu: Mu,
    max_sweeps: int,
    with_error: bool,
) -> N | tuple[N, float]:
    """The best of what `weighted_als` makes of two starts, at given ranks or at the cheapest found for a tolerance."""
    check_tol(name, tol)
    check_mu(name, mu)
    check_sweeps(name, max_sweeps, 0)
    if rank is None and tol is None:
        raise ValueError(f"{name}: give a rank or a tol, got neither")
    metric = metric_of(name, weight, factor, 0.0 if mu == "adaptive" else float(mu), rows, cols)
    if mu == "adaptive":
        net, error = _at(metric, recipe, rank, tol, max_sweeps)
        plain = float(torch.linalg.vector_norm(metric.target - to_dense(net)))
        if error > 0:
            metric = metric_of(name, weight, factor, (error / plain) ** 2, rows, cols)
    net, error = _at(metric, recipe, rank, tol, max_sweeps)
    error = metric.relative(error)
    if tol is not None and error > tol * (1 + 1e-6):
        warn_truncation(name, error, tol, "the rank binds")
    made = net.to(weight.dtype)
    return (made, metric.on_data(made)) if with_error else made


def _at(metric: Metric, recipe: Callable[..., N], rank: Ranks, tol: float | None, max_sweeps: int) -> tuple[N, float]:
    """Networks at the ranks asked for, or at ranks of tolerances around `tol`, and the absolute error."""
    stretch = _stretch(metric)
    if tol is None:
        return _better(metric, recipe, stretch, rank, max_sweeps)
    stretched = _stretched(metric, stretch)
    most = None if rank is None else recipe(metric.target, rank=rank).ranks
    seen: dict[tuple[int, ...], tuple[N, float]] = {}

    def fits(tolerance: float) -> bool:
        ranks = recipe(stretched, tol=tolerance).ranks
        if most is not None:
            ranks = tuple(min(pair) for pair in zip(ranks, most, strict=True))
        if ranks not in seen:
            seen[ranks] = _better(metric, recipe, stretch, ranks, max_sweeps)
        return metric.relative(seen[ranks][1]) <= tol

    level, loosen = max(tol, _FINEST), fits(max(tol, _FINEST))
    for _ in range(12):
        level = level * _STEP if loosen else level / _STEP
        if not _FINEST < level < 1 or fits(level) != loosen:
            break
    if not any(metric.relative(error) <= tol for _, error in seen.values()):
        ranks = recipe(metric.target).ranks if most is None else most
        seen[ranks] = _better(metric, recipe, stretch, ranks, max_sweeps)
    good = [found for found in seen.values() if metric.relative(found[1]) <= tol]
    if not good:
        return min(seen.values(), key=lambda found: found[1])
    return min(good, key=lambda found: (sum(core.numel() for core in found[0].cores), found[1]))


def _better(
    metric: Metric, recipe: Callable[..., N], stretch: Sequence[Tensor], rank: Ranks, max_sweeps: int
) -> tuple[N, float]:
    """Refine the plain decomposition, and that of the stretched weight mapped back; the better of the two."""
    starts = [recipe(metric.target, rank=rank), _relaxed(recipe(_stretched(metric, stretch), rank=rank), stretch)]
    trials = [refine(metric, start, min(_TRIAL, max_sweeps), _ENOUGH) for start in starts]
    net, error = min(trials, key=lambda found: found[1])
    return refine(metric, net, max_sweeps - _TRIAL, _ENOUGH) if max_sweeps > _TRIAL else (net, error)


def _stretch(metric: Metric) -> list[Tensor]:
    """A root K of the Gram matrix of every column mode: `K_1 ⊗ K_2 ...` is a norm that formats can be mapped through.

    Partial traces: exact where the whole is a Kronecker product. They make starts only, so that what is small may be
    raised to what can be inverted.
    """
    coupling = metric.gram.reshape(*metric.cols, *metric.cols)
    order, roots = len(metric.cols), []
    for k, size in enumerate(metric.cols):
        traced = coupling
        for j in reversed([j for j in range(order) if j != k]):
            traced = traced.diagonal(dim1=j, dim2=j + traced.ndim // 2).sum(-1)
        values, vectors = torch.linalg.eigh(traced)
        largest = float(values[-1]) or 1.0
        root = (values / largest).clamp_min(1e-12).sqrt()
        assert root.shape == (size,)
        roots.append(root.unsqueeze(1) * vectors.mH)
    return roots


def _stretched(metric: Metric, stretch: Sequence[Tensor]) -> Tensor:
    """`W (K_1 ⊗ K_2 ...)^H`."""
    made, first = metric.target, metric.target.ndim - len(stretch)
    for k, root in enumerate(stretch):
        made = torch.tensordot(made, root.conj(), ([first + k], [1])).movedim(-1, first + k)
    return made


def _relaxed(net: N, stretch: Sequence[Tensor]) -> N:
    """Undo the stretch of the columns on the cores that carry them."""
    cores = list(net.cores)
    for label, root in zip(net.cols, stretch, strict=True):
        (k,) = (k for k, leg in enumerate(net.legs) if label in leg)
        axis = net.legs[k].index(label)
        inverse = torch.linalg.inv(root.mH)  # a well-conditioned start; what it loses the sweeps make up for
        cores[k] = torch.tensordot(cores[k], inverse, ([axis], [0])).movedim(-1, axis)
    return net.replace(cores)
