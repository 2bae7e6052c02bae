"""Randomized range finding: subspace iteration, and a block Krylov space that measures what it has missed."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

PROBES = 8
"""Gaussian vectors that watch what a Krylov space has missed."""


def randomized_basis(
    matrix: Inexact[Tensor, "*batch m n"],
    rank: int,
    *,
    oversample: int = 16,
    power_iterations: int = 2,
    generator: torch.Generator | None = None,
) -> Inexact[Tensor, "*batch m k"]:
    """Orthonormal basis Q (`rank + oversample` columns at most) with `‖A - Q Q^H A‖` near the best of that rank.

    Y = (A A^H)^q A Ω with Gaussian Ω, re-orthonormalized after every product. In expectation the spectral error is
    below `(1 + 4 sqrt(2 min(m, n) / (rank - 1)))^(1/(2q+1))` times the best. Cost O(m n (rank + oversample) (2q + 2)).

    Args:
        matrix: m x n, float32 or better; of a stack of matrices each has its own basis, and all share Ω.
        rank: number of dominant directions wanted.
        oversample: additional directions of the sketch.
        power_iterations: q; 2 brings a spectrum that decays like 1/i within about 0.3 % of the best.
        generator: source of Ω; None is torch's global one.

    References:
        N. Halko, P.-G. Martinsson, J. Tropp, Finding structure with randomness, SIAM Review 2011, algorithm 4.4 and
        corollary 10.10, arXiv 0909.4061.

    Example:
        >>> import torch
        >>> a = torch.randn(50, 3) @ torch.randn(3, 40)
        >>> q = randomized_basis(a, 3)
        >>> bool(torch.linalg.norm(a - q @ (q.T @ a)) < 1e-3)
        True
    """
    m, n = matrix.shape[-2:]
    width = min(rank + oversample, m, n)
    if width == m:
        return torch.eye(m, dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], m, m)
    omega = torch.randn(n, width, dtype=matrix.dtype, device=matrix.device, generator=generator)
    q = torch.linalg.qr(matrix @ omega).Q
    for _ in range(power_iterations):
        q = torch.linalg.qr(matrix.mH @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    return q


class Krylov(NamedTuple):
    """A basis U of a block Krylov space of A A^H, and what is known of the rest. Vectors are rows: GEMM likes them.

    With P = 1 - U U^H and M = A A^H: `products` is U^H A, `inner` is U^H M U in double precision, `coupling` the
    triangle T of P M U = [0 ... 0, Q T] (of the last block alone), and `probe` is G^H (P M P)^`power` / size^(2 power)
    of Gaussian vectors G, where size = ‖A‖_F.
    """

    basis: Tensor
    products: Tensor
    inner: Tensor
    coupling: Tensor
    probe: Tensor
    power: int


def block_krylov(
    matrix: Inexact[Tensor, "m n"],
    block: int,
    *,
    limit: int,
    watch: int = 0,
    size: float,
    generator: torch.Generator | None = None,
) -> Iterator[Krylov]:
    """Grow an orthonormal basis of `span[AΩ, (A A^H) AΩ, (A A^H)^2 AΩ, ...]` by `block` vectors a time.

    Every step yields the space so far, at the price of two products of A with `block + PROBES` vectors: half of what
    subspace iteration pays for the same accuracy. The last product tells how far the space is from invariant
    (`coupling`); Gaussian vectors that stay outside of it (`probe`) tell how much may have been missed, which a
    residual cannot where a singular value is repeated more often than `block` times. It ends where the space is
    invariant up to rounding.

    Args:
        matrix: m x n, float32 or better.
        block: vectors of the start Ω.
        limit: largest dimension of the space.
        watch: dimension from which the probes run.
        size: ‖A‖_F, which scales the products.
        generator: source of Ω and the probes; None is torch's global one.

    References:
        C. Musco, C. Musco, Randomized block Krylov methods for stronger and faster approximate SVD, NeurIPS 2015,
        arXiv 1504.05477. G. Golub, F. Luk, M. Overton, A block Lanczos method, ACM TOMS 1981.

    Example:
        >>> import torch
        >>> a = torch.randn(50, 3) @ torch.randn(3, 40)
        >>> space = next(block_krylov(a, 4, limit=20, size=float(a.norm())))
        >>> bool(torch.linalg.norm(a - space.basis.T @ space.products) < 1e-3)
        True
    """
    m, n = matrix.shape
    gaussian = partial(torch.randn, generator=generator, dtype=matrix.dtype, device=matrix.device)
    omega = gaussian(block, n)
    new, _ = _orthonormal_rows(omega @ matrix.mH)
    double = torch.promote_types(matrix.dtype, torch.float64)
    most = max(block, min(limit, m, n))  # room for all rows at once: they are appended in place
    rows, images = new.new_empty(most, m), new.new_empty(most, n)
    exact = images if double == matrix.dtype else new.new_empty(most, n, dtype=double)
    inner = torch.zeros(0, 0, dtype=double, device=matrix.device)
    probe, power, held = new[:0], 0, 0
    while True:
        last, held = held, held + block
        rows[last:held] = new
        basis = rows[:held]
        if not power and held >= watch:
            probe = gaussian(PROBES, m)
            probe = _outside(probe, basis)
        image = torch.cat([new, probe]) @ matrix
        images[last:held] = image[:block]
        products = images[:held]
        exact[last:held] = image[:block]
        border = exact[last:held] @ exact[:held].mH
        inner = torch.nn.functional.pad(inner, (0, block, 0, block))
        inner[-block:], inner[:, -block:] = border, border.mH
        image = _outside((image / size**2) @ matrix.mH, basis)
        probe, power = image[block:], power + bool(len(probe))
        # normalized, projected again, normalized: orthogonal to the basis even where hardly anything is left
        new, first = _orthonormal_rows(image[:block])
        new, second = _orthonormal_rows(_outside(new, basis))
        coupling = second @ first
        yield Krylov(basis, products, inner, coupling * size**2, probe, power)
        invariant = float(coupling.abs().max()) <= 4 * torch.finfo(matrix.dtype).eps  # the next block would be noise
        if invariant or basis.shape[0] + block > min(limit, m, n):
            return


def _orthonormal_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q^H and R of x^H = Q R."""
    q, r = torch.linalg.qr(x.mH)
    return q.mH, r


def _outside(x: Tensor, basis: Tensor) -> Tensor:
    """Rows of x less their part in the span of the basis."""
    return x - (x @ basis.mH) @ basis
