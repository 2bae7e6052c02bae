"""Low rank in the norm of activations: the factor that holds them, and the best approximation of `W X`."""

import warnings
from math import isfinite
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

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


class ActivationFactor:
    """Upper triangle R of activations, `X^H X = R^H R` for X (tokens, n), by streaming QR: never a Gram matrix.

    All that a weighted decomposition needs of X, in n^2 numbers whatever the number of tokens. Chunks may come in any
    order and size; a unitary mixture of tokens changes nothing.
    Cost: 2 tokens n^2 multiplications, memory of R, of a pending block of n tokens, and of their QR.

    Args:
        features: n.
        dtype: of R; float32 by default, half types are computed in float32.
        device: of R.

    Raises:
        ValueError: fewer than one feature.

    References:
        J. Demmel, L. Grigori, M. Hoemmen, J. Langou, Communication-optimal parallel and sequential QR and LU
        factorizations, SIAM J. Sci. Comput. 2012 (TSQR); COALA, NeurIPS 2025, arXiv 2507.07580.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 4, dtype=torch.float64)
        >>> held = ActivationFactor(4, dtype=torch.float64)
        >>> for chunk in x.split(30):
        ...     held.update(chunk)
        >>> held.count, torch.allclose(held.factor.T @ held.factor, x.T @ x)
        (100, True)
    """

    def __init__(
        self, features: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        if isinstance(features, bool) or not isinstance(features, int) or features < 1:
            raise ValueError(f"ActivationFactor: features must be an int >= 1, got {features!r}")
        self.features: int = features
        self.count: int = 0
        """Tokens seen, those that were masked left out."""
        work = accumulate_dtype(torch.float32 if dtype is None else dtype)
        self._triangle: Tensor = torch.zeros(0, features, dtype=work, device=device)
        self._pending: list[Tensor] = []

    def update(self, x: Inexact[Tensor, "..."], mask: Bool[Tensor, "..."] | None = None) -> None:
        """Add activations (..., n); `mask` (...) says which tokens count.

        Raises:
            ValueError: another width, a mask of another shape, NaN or infinity; nothing was added then.
        """
        if x.ndim < 1 or x.shape[-1] != self.features:
            raise ValueError(
                f"ActivationFactor.update: the last axis must hold the features, expected {self.features}, got shape "
                f"{tuple(x.shape)}"
            )
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"ActivationFactor.update: the mask must have one entry a token, expected {tuple(x.shape[:-1])}, got "
                f"{tuple(mask.shape)}"
            )
        rows = x.detach().reshape(-1, self.features) if mask is None else x.detach()[mask]
        rows = rows.to(device=self._triangle.device, dtype=self._triangle.dtype)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                "ActivationFactor.update: activations must be finite, got NaN or infinity; calibrate in float32 or "
                "bfloat16, and look at the layer before"
            )
        self.count += len(rows)
        for part in rows.split(self.features):
            self._pending.append(part.clone())
            if sum(map(len, self._pending)) >= self.features:
                self._fold()

    def _fold(self) -> None:
        if self._pending:
            stacked = torch.cat([self._triangle, *self._pending])
            self._pending = []
            self._triangle = torch.linalg.qr(stacked, mode="r").R

    def merge(self, other: "ActivationFactor") -> None:
        """Add what another factor has seen (another worker's, another file's).

        Raises:
            ValueError: another number of features.
        """
        if other.features != self.features:
            raise ValueError(f"ActivationFactor.merge: expected {self.features} features as here, got {other.features}")
        seen = self.count + other.count
        self.update(other.factor)
        self._fold()
        self.count = seen

    @property
    def factor(self) -> Tensor:
        """R, (n, n) and upper triangular; rows of zeros where fewer than n tokens were seen."""
        self._fold()
        return torch.nn.functional.pad(self._triangle, (0, 0, 0, self.features - len(self._triangle)))

    def __repr__(self) -> str:
        return f"ActivationFactor({self.features} features, {self.count} tokens)"


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
    right = mu == "adaptive" or (
        isinstance(mu, Real) and not isinstance(mu, bool) and isfinite(float(mu)) and float(mu) >= 0
    )
    if not right:
        raise ValueError(f"weighted_low_rank: mu must be a number >= 0 or 'adaptive', got {mu!r}")
    flat = weight.detach().flatten(1)
    m, n = flat.shape
    held = factor.factor if isinstance(factor, ActivationFactor) else factor.detach()
    if held.ndim != 2 or held.shape[1] != n:
        raise ValueError(
            f"weighted_low_rank: the factor must have the width of the weight, expected (k, {n}), got "
            f"{tuple(held.shape)}"
        )
    check_finite("weighted_low_rank", held)
    (cap,) = check_ranks("weighted_low_rank", rank, [min(m, n)])
    work = torch.promote_types(accumulate_dtype(weight.dtype), accumulate_dtype(held.dtype))
    w, r = flat.to(work), held.to(device=flat.device, dtype=work)
    if len(r) > n:
        r = torch.linalg.qr(r, mode="r").R
    if not bool(r.any()):
        warnings.warn(
            "weighted_low_rank: no activations, or all of them zero: the plain truncated SVD of the weight was taken; "
            "calibrate on other data, or skip this layer",
            CalibrationWarning,
            stacklevel=2,
        )
        r, minimum_norm = torch.eye(n, dtype=work, device=w.device), False
    basis, error = _leading(w, r, cap, tol)
    if mu == "adaptive":
        rest = w - basis @ (basis.mH @ w)
        plain = float(torch.linalg.vector_norm(rest.double()))
        mu = (float(torch.linalg.vector_norm((rest @ r.mH).double())) / plain) ** 2 if plain > 0 else 0.0
    if mu:
        eye = torch.eye(n, dtype=work, device=w.device) * float(mu) ** 0.5
        basis, error = _leading(w, torch.linalg.qr(torch.cat([r, eye]), mode="r").R, cap, tol)
    if tol is not None and error > tol * (1 + 1e-6):
        warn_truncation("weighted_low_rank", error, tol, "the rank binds")
    inner = basis.mH @ w
    if minimum_norm:
        inner = inner @ _span(r)
    q, s = positive_qr(inner.mH)
    net = LowRank(basis.to(weight.dtype), s.mH.contiguous().to(weight.dtype), q.conj().to(weight.dtype))
    if not with_error:
        return net
    double = torch.promote_types(work, torch.float64)
    u, middle, v = (core.to(double) for core in net.cores)
    wide = r.to(double).mH
    whole = float(torch.linalg.vector_norm(w.to(double) @ wide)) or 1.0
    return net, float(torch.linalg.vector_norm((w.to(double) - u @ middle @ v.mT) @ wide)) / whole


def _leading(w: Tensor, r: Tensor, cap: int, tol: float | None) -> tuple[Tensor, float]:
    """Leading left singular vectors of `w r^H`, at most `cap`, and the relative tail."""
    u, s, _ = safe_svd(w @ r.mH)
    squares = s.double().square()
    total = float(squares.sum())
    rank = min(cap, len(s))
    if tol is not None:
        rank = min(rank, truncation_rank(squares, tol**2 * total, len(s)))
    error = (float(squares[rank:].sum()) / (total or 1.0)) ** 0.5
    alive = int((s > s[0] * max(w.shape) * torch.finfo(s.dtype).eps).sum())
    wanted = rank if tol is not None else cap
    if alive >= wanted:
        return u[:, :rank], error
    # the data are held; what rank is left goes to what W has beside
    u = u[:, :alive]
    more, _, _ = safe_svd(w - u @ (u.mH @ w))
    basis, _ = positive_qr(torch.cat([u, more[:, : wanted - alive]], 1))
    return basis, error


def _span(r: Tensor) -> Tensor:
    """Projector on the span of the activations, to rounding."""
    _, s, vh = safe_svd(r)
    kept = vh[s > s[0] * max(r.shape) * torch.finfo(s.dtype).eps]
    return kept.mH @ kept
