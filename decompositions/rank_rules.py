"""Rules that read a rank off singular values: a share of the energy, or what stands above the noise (EVBMF)."""

from math import exp, isfinite, log, sqrt
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Inexact
from torch import Tensor


def energy_rank(values: Inexact[Tensor, "n"], energy: int | float = 0.99) -> int:
    """Least rank that keeps a share of the squared norm.

    Args:
        values: singular values, descending.
        energy: share in (0, 1].

    Raises:
        ValueError: a share outside.

    Example:
        >>> import torch
        >>> energy_rank(torch.tensor([3.0, 1.0, 0.1]), 0.95)
        2
    """
    if not (isinstance(energy, Real) and 0 < energy <= 1):
        raise ValueError(f"energy_rank: energy must be in (0, 1], got {energy!r}")
    squares = values.double().square()
    total = float(squares.sum())
    if total == 0:
        return 1
    kept = squares.cumsum(0) / total
    return max(1, min(len(values), int((kept < energy * (1 - 1e-12)).sum()) + 1))


def evbmf_rank(values: Inexact[Tensor, "n"], shape: tuple[int, int], noise: int | float | None = None) -> int:
    """Rank by the analytic solution of empirical variational Bayes matrix factorization: what stands above the noise.

    With `alpha = m / n` for m <= n, a singular value is kept where `sigma^2 > n noise^2 (1 + tau)(1 + alpha / tau)`,
    `tau = 2.5129 sqrt(alpha)`; the variance of the noise minimizes the free energy if it is not given.
    It finds the true rank of a low-rank matrix in white noise; trained weights often have no such gap.

    Args:
        values: all singular values of the matrix, descending.
        shape: of the matrix.
        noise: standard deviation of an entry's noise, if known.

    Returns:
        The rank; 0 where all is noise.

    Raises:
        ValueError: a shape that does not fit the values.

    References:
        S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, Global analytic solution of fully-observed variational
        Bayesian matrix factorization, JMLR 2013, section 5 and appendix.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> w = torch.randn(60, 3, generator=g) @ torch.randn(3, 80, generator=g) + torch.randn(60, 80, generator=g)
        >>> evbmf_rank(torch.linalg.svdvals(w), (60, 80))
        3
    """
    from scipy.optimize import minimize_scalar

    m, n = sorted(shape)
    if len(values) != m or m < 1:
        raise ValueError(f"evbmf_rank: a {shape} matrix has {m} singular values, got {len(values)}")
    squares = values.detach().double().square().cpu().numpy()
    if not np.isfinite(squares).all():
        raise ValueError("evbmf_rank: singular values must be finite, got NaN or infinity")
    if squares[0] == 0:
        return 0
    alpha = m / n
    tau = 2.5129 * sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    if noise is None:
        scaled = squares / squares[0]

        def energy(logarithm: float) -> float:
            x = np.maximum(scaled / (n * exp(logarithm)), 1e-300)
            high = x > edge
            above = x[high]
            root = above - (1 + alpha)
            t = 0.5 * (root + np.sqrt(np.maximum(root**2 - 4 * alpha, 0)))
            extra = np.log(t + 1) + alpha * np.log(t / alpha + 1) - t
            return float((x - np.log(x)).sum() + extra.sum())

        upper = scaled.sum() / (m * n)
        most = max(0, min(int(np.ceil(m / (1 + alpha))) - 1, m) - 1)  # ranks above are never found
        rest = scaled[most + 1 :]
        lower = max(float(rest[0]) / (n * edge), float(rest.mean()) / n) if len(rest) else 0.0
        lower = min(max(lower, 1e-30), upper)
        grid = np.linspace(log(lower), log(upper), 64)  # the energy has kinks: look everywhere, then closer
        at = min(grid, key=energy)
        width = (grid[-1] - grid[0]) / 63 if upper > lower else 0.0
        if width > 0:
            closer: Any = minimize_scalar(energy, bounds=(at - width, at + width), method="bounded")
            at = closer.x if closer.fun <= energy(at) else at
        variance = exp(at) * squares[0]
    else:
        if not (isinstance(noise, Real) and isfinite(noise) and noise >= 0):
            raise ValueError(f"evbmf_rank: noise must be a finite number >= 0, got {noise!r}")
        variance = float(noise) ** 2
    return int((squares > n * variance * edge).sum())
