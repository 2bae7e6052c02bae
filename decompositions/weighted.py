"""Low rank in the norm of activations: the best approximation of `W X`, and its bounds."""

import warnings
from math import inf, isfinite, sqrt
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.activation_factor import ActivationFactor as ActivationFactor
from decompositions.formats.low_rank import LowRank
from decompositions.linalg import (
    accumulate_dtype,
    check_finite,
    check_kind,
    check_ranks,
    check_tol,
    positive_qr,
    safe_svd,
    truncation_rank,
    warn_truncation,
)


class CalibrationWarning(UserWarning):
    """Activations say too little; the message states what was done instead."""


def weighted_low_rank(
    weight: Inexact[Tensor, "m *n"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    *,
    rank: int | None = None,
    tol: float | None = None,
    mu: int | float | Literal["adaptive"] = 0.0,
    minimum_norm: bool = False,
    with_error: bool = False,
) -> LowRank | tuple[LowRank, float]:
    """The W' of given rank with the least `‖(W - W') X‖^2 + mu ‖W - W'‖^2`, without an inverse.

    With U_r the leading left singular vectors of `W R^H` (of `W [R; sqrt(mu) I]^H`), `W' = U_r U_r^H W`: W' X is the
    best approximation of W X of rank r (Eckart-Young), also where X is singular. "adaptive" takes
    `mu = (‖(W - W'_0) X‖ / ‖W - W'_0‖)^2` of the solution at mu = 0, so that both terms weigh alike.
    `tol` bounds the relative error of the objective, `‖(W - W') [R; sqrt(mu) I]^H‖ <= tol ‖W [R; sqrt(mu) I]^H‖`, by
    the least rank. Where several W' are as good (X of fewer directions than n), this one keeps what W has in the
    directions without data as far as U_r allows, and rank that the data do not need goes to the rest of W;
    `minimum_norm` drops what is beside the data.
    Without any activation (a factor of zeros) the plain truncated SVD of W is returned, with a CalibrationWarning.
    Cost: an SVD of an m x n matrix, and a QR of 2n x n for mu > 0.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`, such as the activations themselves.
        rank: cap for the rank.
        tol: relative error of the objective.
        mu: weight of the plain error, >= 0, in units of squared activations; or "adaptive".
        minimum_norm: project W' on the span of the activations.
        with_error: return `(network, ‖(W - W') X‖ / ‖W X‖)`.

    Returns:
        LowRank(U, S, V) with orthonormal U and V; S is square, not diagonal.

    Raises:
        ValueError: NaN or infinity; a factor of another width; neither rank nor tol; a mu that is negative.

    References:
        U. Parkina, M. Rakhuba, COALA: numerically stable and efficient framework for context-aware low-rank
        approximation, NeurIPS 2025, arXiv 2507.07580.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 6) @ torch.diag(torch.tensor([9.0, 5.0, 1.0, 0.1, 0.1, 0.1]))
        >>> w = torch.randn(8, 6)
        >>> net, error = weighted_low_rank(w, x, rank=3, with_error=True)
        >>> net.ranks, error < 0.05
        ((3, 3), True)
    """
    check_kind("weighted_low_rank", weight, min_order=2)
    check_finite("weighted_low_rank", weight)
    check_tol("weighted_low_rank", tol)
    if rank is None and tol is None:
        raise ValueError("weighted_low_rank: give a rank or a tol, got neither")
    check_mu("weighted_low_rank", mu)
    flat = weight.detach().flatten(1)
    m, n = flat.shape
    held = weighting("weighted_low_rank", factor, n)
    (cap,) = check_ranks("weighted_low_rank", rank, [min(m, n)])
    # the factor is as good as its dtype; what is done with it must not add to that where its spectrum is steep
    eps = torch.finfo(torch.promote_types(accumulate_dtype(weight.dtype), accumulate_dtype(held.dtype))).eps
    work = torch.promote_types(torch.promote_types(weight.dtype, held.dtype), torch.float64)
    w, r = flat.to(work), upper(held.to(flat.device, accumulate_dtype(held.dtype))).to(work)
    if not bool(r.any()):
        warnings.warn(
            "weighted_low_rank: no activations, or all of them zero: the plain truncated SVD of the weight was taken; "
            "calibrate on other data, or skip this layer",
            CalibrationWarning,
            stacklevel=2,
        )
        r, minimum_norm = torch.eye(n, dtype=work, device=w.device), False
    basis, error = _leading(w, r, cap, tol, eps)
    if mu == "adaptive":
        rest = w - basis @ (basis.mH @ w)
        plain = float(torch.linalg.vector_norm(rest))
        mu = (float(torch.linalg.vector_norm(rest @ r.mH)) / plain) ** 2 if plain > 0 else 0.0
    if mu:
        basis, error = _leading(w, damped(r, float(mu)), cap, tol, eps)
    if tol is not None and error > tol * (1 + 1e-6):
        warn_truncation("weighted_low_rank", error, tol, "the rank binds")
    inner = basis.mH @ w
    if minimum_norm:
        inner = inner @ _span(r, eps)
    q, s = positive_qr(inner.mH)
    net = LowRank(basis.to(weight.dtype), s.mH.contiguous().to(weight.dtype), q.conj().to(weight.dtype))
    if not with_error:
        return net
    u, middle, v = (core.to(work) for core in net.cores)
    whole = float(torch.linalg.vector_norm(w @ r.mH)) or 1.0
    return net, float(torch.linalg.vector_norm((w - u @ middle @ v.mT) @ r.mH)) / whole


def regularization_bound(
    weight: Inexact[Tensor, "m *n"],
    factor: ActivationFactor | Inexact[Tensor, "k n"],
    rank: int,
    mu: int | float,
) -> float:
    """How far mu may take the result of `weighted_low_rank`: a bound of `‖W'_mu - W'_0‖`.

    `‖W'_mu - W'_0‖ <= 2 sqrt(2) mu ‖W W^H‖_F ‖W‖_2 / g` with the gap `g = sigma_r(W X)^2 - sigma_{r+1}(W X)^2`: linear
    in mu. Both are projections of W on the leading eigenvectors of `W (X^H X + mu I) W^H`, and these turn by no more
    (Davis and Kahan, in the form that needs the gap at mu = 0 alone). inf where the gap is rounding: W'_0 is then one
    of many. Computed in double precision, from the factor given.
    Cost: an SVD of `W R^H`, and one of W.

    Args:
        weight: (m, n), or a kernel (m, *n) taken as the matrix m x n.
        factor: of the activations; or any (k, n) matrix F with `F^H F = X^H X`.
        rank: r.
        mu: weight of the plain error, >= 0.

    Raises:
        ValueError: NaN or infinity; a factor of another width; a rank below 1; a mu that is negative.

    References:
        Y. Yu, T. Wang, R. Samworth, A useful variant of the Davis-Kahan theorem for statisticians, Biometrika 2015,
        theorem 2; the constants for this use are our own.

    Example:
        >>> import torch
        >>> w, x = torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)
        >>> round(regularization_bound(w, x, 1, 0.01), 4)
        0.0777
    """
    name = "regularization_bound"
    check_kind(name, weight, min_order=2)
    check_finite(name, weight)
    if mu == "adaptive":
        raise ValueError(f"{name}: mu must be a number >= 0, got 'adaptive'; give the number that it became")
    check_mu(name, mu)
    flat = weight.detach().flatten(1)
    m, n = flat.shape
    held = weighting(name, factor, n)
    (r,) = check_ranks(name, rank, [min(m, n)])
    double = torch.promote_types(torch.promote_types(flat.dtype, held.dtype), torch.float64)
    w = flat.to(double)
    on_data = torch.linalg.svdvals(w @ upper(held.to(device=w.device, dtype=double)).mH).square()
    squares = torch.zeros(m + 1, dtype=on_data.dtype, device=w.device)
    squares[: len(on_data)] = on_data
    if r >= m or mu == 0:
        return 0.0  # U_r spans everything
    gap = float(squares[r - 1] - squares[r])
    if gap <= 8 * max(m, n) * torch.finfo(torch.float64).eps * float(squares[0]):
        return inf
    plain = torch.linalg.svdvals(w)
    return 2 * sqrt(2) * float(mu) * float(torch.linalg.vector_norm(plain.square())) * float(plain[0]) / gap


def check_mu(name: str, mu: object) -> None:
    """Refuse a weight of the plain error that is neither a number >= 0 nor "adaptive"."""
    number = isinstance(mu, Real) and not isinstance(mu, bool) and isfinite(float(mu)) and float(mu) >= 0
    if not number and mu != "adaptive":
        raise ValueError(f"{name}: mu must be a number >= 0 or 'adaptive', got {mu!r}")


def weighting(name: str, factor: ActivationFactor | Tensor, width: int) -> Tensor:
    """The matrix (k, width) that a caller gave as weights of one side.

    Raises:
        ValueError: another width, NaN or infinity.
    """
    held = factor.factor if isinstance(factor, ActivationFactor) else factor.detach()
    if held.ndim != 2 or held.shape[1] != width:
        raise ValueError(
            f"{name}: the factor must have the width of the weight, expected (k, {width}), got {tuple(held.shape)}"
        )
    if len(held) == 0:  # no activation at all
        return held.new_zeros(1, width)
    check_finite(name, held)
    return held


def upper(r: Tensor) -> Tensor:
    """At most n rows with the same `R^H R`."""
    return torch.linalg.qr(r, mode="r").R if r.shape[0] > r.shape[1] else r


def damped(r: Tensor, mu: float) -> Tensor:
    """Upper triangle of `[R; sqrt(mu) I]`."""
    eye = torch.eye(r.shape[1], dtype=r.dtype, device=r.device) * mu**0.5
    return torch.linalg.qr(torch.cat([r, eye]), mode="r").R


def _left_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U and the singular values; a wide matrix is reduced to a triangle first."""
    u, s, _ = safe_svd(torch.linalg.qr(matrix.mH, mode="r").R.mH if matrix.shape[0] < matrix.shape[1] else matrix)
    return u, s


def _leading(w: Tensor, r: Tensor, cap: int, tol: float | None, eps: float) -> tuple[Tensor, float]:
    """Leading left singular vectors of `w r^H`, at most `cap`, and the relative tail; below `eps` is noise."""
    u, s = _left_singular(w @ r.mH)
    squares = s.square()
    total = float(squares.sum())
    rank = min(cap, len(s))
    if tol is not None:
        rank = min(rank, truncation_rank(squares, tol**2 * total, len(s)))
    error = (float(squares[rank:].sum()) / (total or 1.0)) ** 0.5
    alive = int((s > s[0] * max(w.shape) * eps).sum())
    wanted = rank if tol is not None else cap
    if alive >= wanted:
        return u[:, :rank], error
    # the data are held; what rank is left goes to what W has beside
    return completed(u[:, :alive], w, wanted), error


def completed(basis: Tensor, w: Tensor, rank: int) -> Tensor:
    """Orthonormal columns: those given, and the leading left singular vectors of what they leave of `w`."""
    more, _ = _left_singular(w - basis @ (basis.mH @ w))
    made, _ = positive_qr(torch.cat([basis, more[:, : rank - basis.shape[1]]], 1))
    return made


def _span(r: Tensor, eps: float) -> Tensor:
    """Projector on the span of the activations, to rounding."""
    _, s, vh = safe_svd(r)
    kept = vh[s > s[0] * max(r.shape) * eps]
    return kept.mH @ kept
