"""Dominant bases of unfoldings, by the cheapest method whose accuracy is enough for what is asked.

An unfolding is given as slices x of shape (p, m, q): the mode of size m in the middle, the modes before and after it
grouped. Of a contiguous tensor that is a view, so that no unfolding is copied.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.linalg import (
    BLOCK,
    RUN,
    Method,
    blocks,
    frobenius,
    gram,
    gram_is_safe,
    safe_svd,
    side_by_side,
    triangle,
    truncation_rank,
)
from decompositions.randomized import Krylov, block_krylov, randomized_basis

SINGLE_GRAM_ERROR = 1e-6
"""What rounding may add to a sum of eigenvalues of a float32 Gram matrix, relative to the trace (measured: 1e-8 to
6e-7, the latter for constants)."""

ENOUGH = 1.005
"""Certified ratio of a Krylov space's error to the best of that rank; the true ratio is nearer to 1 by ten or more."""

UNLIKELY = 0.5
"""What chi-squared with 8 degrees of freedom (one for each probe) stays below once in 7,000 draws."""


class Basis(NamedTuple):
    """An isometry `u` (m, k), the coordinates `rest = u^H x` (p, k, q), and the squared norm of `x - u rest`."""

    u: Tensor
    rest: Tensor
    discarded: float


def basis(
    x: Inexact[Tensor, "p m q"],
    *,
    cap: int,
    budget: float | None,
    tol: float | None,
    method: Method = "auto",
    precise: bool = False,
    approximate: bool = True,
    generator: torch.Generator | None = None,
) -> Basis:
    """Orthonormal basis of the dominant column space of an unfolding: `A ≈ u (u^H A)`.

    "auto" takes, in this order, what is allowed:
    - a block Krylov space, where the rank is far below the size and a certificate shows an error within `ENOUGH` of
      the best (its start is fixed, so that two calls agree);
    - a Gram matrix in the input's dtype, where perturbation theory shows that it loses less than 0.1 %;
    - a Gram matrix in double precision, where the tolerance leaves room for squaring;
    - the triangle of a blocked QR and its SVD; and an SVD of what is not long.

    Args:
        x: slices (p, m, q) of the unfolding m x (p q), finite.
        cap: largest number of columns of u.
        budget: squared Frobenius norm that may be discarded; None keeps `cap` columns.
        tol: the relative tolerance behind the budget, which decides how accurate the method has to be.
        method: "exact", "gram" (in double precision), "randomized" (needs a rank), or "auto".
        precise: compute u in double precision, whatever the dtype of x; `rest` keeps the dtype.
        approximate: whether "auto" may lose the fraction of a percent that its first two methods may.
        generator: of the randomized sketch.
    """
    p, m, q = x.shape
    long = 2 * m <= p * q
    cap = min(cap, m, p * q)
    if method == "randomized":
        return _sketched(x, cap, budget, tol, precise, generator)
    if method == "auto" and approximate and not precise:
        if min(m, p * q) >= 256 and cap > 0 and (found := _from_krylov(x, cap, budget, 32 if long else 8)):
            return found
        worth = x.numel() >= 4 * BLOCK and m >= 16 and (tol is None or tol >= 1e-3)  # small ones cost nothing anyway
        if long and worth and _multiplies_in_full(x) and (found := _from_single_gram(x, cap, budget)):
            return found
    if method == "gram" or (method == "auto" and long and gram_is_safe(x.dtype, tol)):
        squares, vectors = _descending(gram(x))
    elif long:
        vectors, s, _ = torch.linalg.svd(triangle(x))
        squares = s.square()
    else:
        return _from_svd(x, cap, budget, precise)
    k = cap if budget is None else truncation_rank(squares, budget, cap)
    u = vectors[:, :k] if precise else vectors[:, :k].to(x.dtype)
    return Basis(u, project(u, x), float(squares[k:].clamp_min(0).sum()))


def project(u: Inexact[Tensor, "m k"], x: Inexact[Tensor, "p m q"]) -> Inexact[Tensor, "p k q"]:
    """`u^H x` in the dtype of x; multiplied in the dtype of u, by blocks, where that is wider."""
    if u.dtype == x.dtype:
        if x.shape[0] > 1 and x.shape[2] < 16:  # slices too thin for a GEMM each
            return (u.mH @ side_by_side(x)).unflatten(1, (x.shape[0], x.shape[2])).movedim(1, 0).contiguous()
        q = x.shape[2]
        if x.shape[0] == 1 and q % RUN == 0 and q >= 16 * RUN and u.shape[1] <= 32 and x.device.type == "cpu":
            # a product with few rows and very many columns: runs of columns as a batch take two thirds of the time
            runs = u.mH @ x[0].unflatten(1, (-1, RUN)).movedim(1, 0)
            return runs.movedim(0, 1).reshape(1, -1, q)
        return u.mH @ x
    rest = x.new_empty(x.shape[0], u.shape[1], x.shape[2])
    for first, last in blocks(x):
        rest[first, :, last] = (u.mH @ x[first, :, last].to(u.dtype)).to(x.dtype)
    return rest


def _descending(hermitian: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(hermitian)
    return values.flip(0), vectors.flip(1)


def _from_svd(x: Tensor, cap: int, budget: float | None, precise: bool) -> Basis:
    matrix = side_by_side(x)
    if precise:
        matrix = matrix.to(torch.promote_types(x.dtype, torch.float64))
    u, s, vh = safe_svd(matrix)
    squares = s.double().square()
    k = cap if budget is None else truncation_rank(squares, budget, cap)
    rest = (s[:k, None] * vh[:k]).to(x.dtype)
    return Basis(u[:, :k], _slices(rest, x), float(squares[k:].sum()))


def _slices(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix k x (p q) as slices (p, k, q): the inverse of `side_by_side`."""
    return matrix.unflatten(1, (x.shape[0], x.shape[2])).movedim(1, 0)


def _sketched(
    x: Tensor, cap: int, budget: float | None, tol: float | None, precise: bool, generator: torch.Generator | None
) -> Basis:
    matrix = side_by_side(x)
    if precise:
        matrix = matrix.to(torch.promote_types(x.dtype, torch.float64))
    u = randomized_basis(matrix, cap, generator=generator)
    small = u.mH @ matrix
    inner = basis(small[None], cap=cap, budget=budget, tol=tol, method="exact")
    lost = max(0.0, frobenius(matrix) ** 2 - frobenius(small) ** 2) + inner.discarded
    return Basis(u @ inner.u.to(u.dtype), _slices(inner.rest[0].to(x.dtype), x), lost)


# --- a Gram matrix in single precision ---


def _multiplies_in_full(x: Tensor) -> bool:
    """Whether products of x keep single precision: not where TF32 or bfloat16 was allowed, nor for the wider types."""
    return x.dtype in (torch.float32, torch.complex64) and torch.get_float32_matmul_precision() == "highest"


def _from_single_gram(x: Tensor, cap: int, budget: float | None) -> Basis | None:
    """Basis from a Gram matrix in single precision, or None where it cannot be trusted with what is asked.

    An error E of the Gram matrix moves sums of eigenvalues by at most `noise`. The k leading eigenvectors then hold
    less energy than the best by at most `‖E‖ min(sqrt(2k), 2 sqrt(2) ‖E‖ / gap)` (Davis and Kahan).
    """
    squares, vectors = _descending(gram(x, single=True))
    noise = SINGLE_GRAM_ERROR * float(squares.clamp_min(0).sum())
    k = cap
    if budget is not None:
        if budget < 20 * noise:
            return None
        k = truncation_rank(squares, budget - noise, cap)
        if k > 1 and float(squares[k - 1 :].sum()) <= budget + noise:
            return None  # one column less might fit
    u = vectors[:, :k].to(x.dtype)
    discarded = float(squares[k:].sum()) + noise
    if budget is None or discarded > budget:  # the rank is given: as good as the best
        if k == x.shape[1]:
            return None
        gap = float(squares[k - 1] - squares[k])
        lost = noise * min(sqrt(2 * k), 2 * sqrt(2) * noise / gap if gap > 4 * noise else sqrt(2 * k))
        if lost > 5e-4 * _sampled_energy(x, vectors[:, k:].to(x.dtype)):
            return None
    return Basis(u, project(u, x), discarded)


def _sampled_energy(x: Tensor, directions: Tensor) -> float:
    """Estimate of `‖directions^H x‖^2` from some blocks of x (eight of them, or all), free of cancellation."""
    every = list(blocks(x, BLOCK // 8))
    chosen = [side_by_side(x[first, :, last]) for first, last in every[:: max(1, len(every) // 8)]]
    energy = sum(frobenius(directions.mH @ block) ** 2 for block in chosen)
    return energy * (x.shape[0] * x.shape[2] / sum(block.shape[1] for block in chosen))


# --- a Krylov space with a certificate ---


def _from_krylov(x: Tensor, cap: int, budget: float | None, share: int) -> Basis | None:
    """Basis from a block Krylov space, or None where none of a dimension well below the matrix's is certified."""
    matrix = side_by_side(x)
    m = min(matrix.shape)
    fixed = budget is None or cap * share <= m
    if budget is None and not fixed:
        return None
    block = max(8, cap // 2) if fixed else 16
    limit = min(4 * cap + 4 * block, m // 3) if fixed else m // (share // 2)
    size = frobenius(matrix)
    total = size**2
    if size == 0 or limit < 2 * block:
        return None
    generator = torch.Generator(x.device).manual_seed(0)
    for space in block_krylov(
        matrix, block, limit=limit, watch=3 * cap // 2 if fixed else 0, size=size, generator=generator
    ):
        energies = space.inner.diagonal().real
        missing, newest = total - float(energies.sum()), float(energies[-block:].sum())
        if budget is not None and space.basis.shape[0] <= cap and missing > budget + 1e-6 * total:
            if not fixed and missing - budget > newest * (limit - len(energies)) / block:
                return None  # at this pace the space would be too large
            continue
        # probes need two steps to tell anything; nothing can be missed where hardly anything is missing
        telling = space.power > 1 or (len(energies) >= cap and missing < _cancelled(matrix, total))
        if telling and (found := _certified(matrix, space, cap, budget, total)):
            vectors, k, lost = found
            u = space.basis.mH @ vectors[:, :k].to(x.dtype)
            return Basis(u, _slices(vectors[:, :k].to(x.dtype).mH @ space.products, x), lost)
    return None


def _certified(
    matrix: Tensor, space: Krylov, cap: int, budget: float | None, total: float
) -> tuple[Tensor, int, float] | None:
    """Ritz vectors, how many of them, and the energy they leave, if that is near the least possible.

    What is left is measured, so that a budget is kept whatever the certificate says; the certificate says that no
    other basis of this size (or, with a budget, one column less) would do.
    """
    outside = total - float(space.inner.trace().real)
    if outside < _cancelled(matrix, total):
        outside = _residual(matrix, space)
    if budget is not None and outside > budget and space.basis.shape[0] <= cap:
        return None
    values, vectors = _descending(space.inner)
    values = values.clamp_min(0)
    k = cap if budget is None else truncation_rank(values, budget - outside, cap)
    left = float(values[k:].sum()) + outside
    rounding = (4 * torch.finfo(matrix.dtype).eps) ** 2 * total  # what a matrix of exactly rank k leaves
    if rounding < left < 1e-12 * total:
        return None  # the smaller Ritz values are noise of the Gram matrix they come from
    if k >= len(values):
        enough = k == cap and left <= rounding
    elif budget is None or left > budget:
        enough = _missed(values, vectors, space, k, outside, total) <= max((1 - ENOUGH**-2) * left, rounding)
    elif k > 1:
        shorter = left + float(values[k - 1])
        enough = shorter - _missed(values, vectors, space, k - 1, outside, total) > budget
    else:
        enough = True
    return (vectors, k, left) if enough else None


def _cancelled(matrix: Tensor, total: float) -> float:
    """Size below which a difference of two sums near `total` is too inaccurate."""
    return 4 * sqrt(torch.finfo(matrix.dtype).eps) * total


def _residual(matrix: Tensor, space: Krylov) -> float:
    """`‖A - U U^H A‖^2` by blocks of rows: no cancellation."""
    rows = max(1, (1 << 20) // matrix.shape[1])
    parts = zip(matrix.split(rows), space.basis.split(rows, dim=1), strict=True)
    return sum(frobenius(torch.addmm(part, u.mH, space.products, alpha=-1)) ** 2 for part, u in parts)


def _missed(values: Tensor, vectors: Tensor, space: Krylov, k: int, outside: float, total: float) -> float:
    """Upper bound for the energy that the best k-dimensional space holds beyond the k leading Ritz vectors.

    M = A A^H in the Ritz vectors and their complement is [[Θ, R^H], [R, C]]. The sum of its k largest eigenvalues
    exceeds that of Θ by at most what 2 x 2 matrices [[θ_i, ρ_i], [ρ_i, c_i]] do, with the norms ρ_i of the residual R
    and the k largest eigenvalues c of C, in ascending order. Those are the next Ritz values, or lie outside of the
    space. There `sum_j ‖C^q g_j‖^2`, about `sum_i λ_i^(2q)` times chi-squared, bounds them: s of them are worst where
    they are equal.
    """
    residual = space.coupling.to(vectors.dtype) @ vectors[-len(space.coupling) :, :k]
    rho = torch.linalg.vector_norm(residual, dim=0)
    following = values[k : 2 * k]
    inside = torch.nn.functional.pad(following, (0, k - len(following))).flip(0)
    count = torch.arange(k + 1, dtype=values.dtype, device=values.device).unsqueeze(1)  # s, one row each
    moment = frobenius(space.probe) ** 2 / UNLIKELY
    beyond = total * (moment / count.clamp_min(1)) ** (1 / (2 * space.power))
    place = torch.arange(k, 0, -1, dtype=values.dtype, device=values.device)
    half = (torch.where(place <= count, torch.maximum(beyond, inside), inside) - values[:k]) / 2
    return min(outside, float((half + torch.hypot(half, rho)).sum(1).max()))
