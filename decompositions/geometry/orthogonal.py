"""Maps onto matrices with orthonormal columns, and back: Cayley, exponential, Householder.

For `A^H = -A` both `cayley` and `exponential` give an orthogonal (unitary) matrix near `I + A`; `householder` takes any
matrix to one with orthonormal columns. `torch.nn.utils.parametrizations.orthogonal` trains with the same three; here
they are functions with inverses, batched and differentiable. Half precision is computed in float32 and cast back.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.linalg import accumulate_dtype, check_finite, full_precision

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)


def skew(x: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """`(X - X^H) / 2`, the nearest skew-Hermitian matrix.

    Raises:
        TypeError: no tensor, or one of integers.
        ValueError: matrices that are not square.

    Example:
        >>> import torch
        >>> skew(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    _check_shape("skew", x, square=True)
    return (x - x.mH) / 2


def _check_shape(name: str, x: Tensor, *, square: bool) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name}: expected a floating or complex tensor, got {got}; convert it with x.to(torch.float32)"
        )
    if x.ndim < 2 or x.shape[-2] < x.shape[-1] or (square and x.shape[-1] != x.shape[-2]):
        raise ValueError(f"{name}: expected {'square' if square else 'tall'} matrices, got {tuple(x.shape)}")


def _slack(dtype: torch.dtype, factor: float) -> float:
    """Defect let pass: a multiple of eps. A half type is no scratch space: its matrices are exact ones, rounded."""
    return (4 if dtype in _HALF else factor) * torch.finfo(dtype).eps


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulate_dtype(x.dtype))


def _check_skew(name: str, a: Tensor) -> float:
    """Refuse what is not skew-Hermitian; the largest magnitude of an entry."""
    _check_shape(name, a, square=True)
    wide = _wide(a.detach())
    size, defect = _largest(wide), _largest(wide + wide.mH)
    if not defect <= _slack(a.dtype, 100) * max(1.0, size):
        raise ValueError(f"{name}: expected A^H = -A, got a defect of {defect:.3g}; skew(x) = (x - x^H) / 2")
    return size


def _defect(q: Tensor) -> float:
    """Largest entry of `Q^H Q - I`."""
    wide = _wide(q.detach())
    return _largest(wide.mH @ wide - torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device))


def _check_orthonormal(name: str, q: Tensor, *, square: bool) -> None:
    _check_shape(name, q, square=square)
    defect = _defect(q)
    if not defect <= _slack(q.dtype, 1e3):
        raise ValueError(f"{name}: expected orthonormal columns, got a defect of {defect:.3g}")


def _check_reached(name: str, q: Tensor, size: float) -> None:
    """Refuse a result that is not orthogonal: rounding grows with the norm of A, which is at most n times its size."""
    eps = torch.finfo(q.dtype).eps
    if q.shape[-1] * size * eps > 1e-3 and not _defect(q) <= 1e3 * eps:
        raise ValueError(
            f"{name}: the entries of A are too large for {q.dtype}, expected at most about {1e-3 / eps:.0e} / n, got "
            f"{size:.3g}; use double precision or scale A"
        )


@full_precision
def cayley(a: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Cayley transform `Q = (I - A/2)^-1 (I + A/2)` of a skew-Hermitian matrix; Q has no eigenvalue -1.

    Agrees with the exponential to second order. Cost: one linear solve.

    Raises:
        TypeError: no tensor, or one of integers.
        ValueError: matrices that are not square, or not skew-Hermitian; entries so large that rounding loses the `I`.

    Example:
        >>> import torch
        >>> q = cayley(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        >>> torch.allclose(q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
        True
    """
    size, half = _check_skew("cayley", a), _wide(a) / 2
    one = torch.eye(a.shape[-1], dtype=half.dtype, device=a.device)
    q, failed = torch.linalg.solve_ex(one - half, one + half)
    _check_reached("cayley", torch.where(failed[..., None, None] > 0, torch.nan, q.detach()), size)
    return q.to(a.dtype)


@full_precision
def inverse_cayley(q: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """The skew-Hermitian A with `cayley(A) = Q`: `A = 2 (Q - I)(Q + I)^-1`.

    Raises:
        ValueError: Q is not orthogonal, or has the eigenvalue -1, which no A reaches.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> torch.allclose(inverse_cayley(cayley(a)), a, atol=1e-6)
        True
    """
    _check_orthonormal("inverse_cayley", q, square=True)
    wide = _wide(q)
    one = torch.eye(q.shape[-1], dtype=wide.dtype, device=q.device)
    smallest = torch.linalg.svdvals((wide + one).detach())
    if smallest.numel() and not float(smallest.min()) > _slack(q.dtype, 100):
        raise ValueError("inverse_cayley: expected no eigenvalue -1, got one; multiply a column by -1 first")
    return skew(2 * torch.linalg.solve(wide + one, wide - one, left=False)).to(q.dtype)


@full_precision
def exponential(a: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Matrix exponential of a skew-Hermitian matrix: the geodesic from the identity with velocity A.

    Raises:
        TypeError: no tensor, or one of integers.
        ValueError: matrices that are not square, or not skew-Hermitian; entries so large that rounding loses the angle.

    Example:
        >>> import math, torch
        >>> q = exponential(torch.tensor([[0.0, math.pi / 2], [-math.pi / 2, 0.0]]))
        >>> torch.allclose(q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
        True
    """
    size = _check_skew("exponential", a)
    q = torch.linalg.matrix_exp(_wide(a))
    _check_reached("exponential", q, size)
    return q.to(a.dtype)


@full_precision
def inverse_exponential(q: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Principal logarithm of an orthogonal (unitary) matrix: skew-Hermitian, eigenvalues within (-i pi, i pi).

    By the Schur form, diagonal for a normal matrix, of scipy; not differentiable. Cost: 25 n^3.

    Raises:
        ValueError: Q is not orthogonal, or has the eigenvalue -1 (determinant -1, or a rotation by half a turn, whose
            logarithm is not unique).

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> torch.allclose(inverse_exponential(exponential(a)), a, atol=1e-6)
        True
    """
    from scipy.linalg import schur

    _check_orthonormal("inverse_exponential", q, square=True)
    if not q.numel():
        return torch.zeros_like(q)
    flat = _wide(q.detach()).reshape(-1, *q.shape[-2:]).cpu().resolve_conj().numpy()
    pairs = [schur(matrix, output="complex") for matrix in flat]  # scipy's own batches are newer than what we require
    triangle, z = (torch.stack([torch.from_numpy(part) for part in side]) for side in zip(*pairs, strict=True))
    angles = torch.angle(triangle.diagonal(dim1=-2, dim2=-1))
    if _largest(angles) > torch.pi - _slack(q.dtype, 1e3):
        raise ValueError("inverse_exponential: expected no eigenvalue -1, got one; multiply a column by -1 first")
    logarithm = ((z * (1j * angles).unsqueeze(-2)) @ z.mH).reshape(q.shape)
    return skew(logarithm if q.is_complex() else logarithm.real).to(dtype=q.dtype, device=q.device)


@full_precision
def householder(x: Inexact[Tensor, "*batch n k"]) -> Inexact[Tensor, "*batch n k"]:
    """Product of k reflections `H_1 ... H_k`, its first k columns, each times the sign on the diagonal of x.

    `H_j = I - tau v v^H` with `v = (0, ..., 0, 1, x_{j+1,j}, ..., x_{n,j})` and `tau = 2 / ‖v‖^2`: what stands below
    the diagonal of x is free. Zeros there make the reflection of one axis. The product is `I - W S^-1 W^H` with the
    normalized vectors W and the upper triangle S of `W^H W`, its diagonal halved: nothing overflows.

    Args:
        x: tall; the entries above the diagonal have no say.

    Raises:
        TypeError: no tensor, or one of integers.
        ValueError: matrices that are not tall; NaN or infinity below the diagonal.

    References:
        T. Joffrain, T. M. Low, E. S. Quintana-Orti, R. van de Geijn, F. Van Zee, Accumulating Householder
        transformations, revisited, ACM Trans. Math. Softw. 2006.

    Example:
        >>> import torch
        >>> q = householder(torch.randn(5, 3))
        >>> torch.allclose(q.T @ q, torch.eye(3), atol=1e-5)
        True
    """
    _check_shape("householder", x, square=False)
    below = _wide(x).tril(-1)
    if below.numel():
        check_finite("householder", below)
    n, k = x.shape[-2:]
    one = torch.eye(n, k, dtype=below.dtype, device=x.device)
    # the size cancels, so that its derivative has no say; squares of entries of 1e20 leave the range of float32
    size = below.detach().abs().amax(-2, keepdim=True).clamp_min(1) if n else below.real
    w = below / size + one / size
    w = w / torch.linalg.vector_norm(w, dim=-2, keepdim=True)
    s = (w.mH @ w).triu(1) + one[:k] / 2
    q = one - w @ torch.linalg.solve_triangular(s, w[..., :k, :].mH, upper=True)
    signs = torch.where(x.diagonal(dim1=-2, dim2=-1).real < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs.unsqueeze(-2)).to(x.dtype)


@full_precision
def inverse_householder(q: Inexact[Tensor, "*batch n k"]) -> Inexact[Tensor, "*batch n k"]:
    """An x with `householder(x) = Q`, for real Q with orthonormal columns.

    Each reflection takes a column to minus its unit vector on the side where nothing cancels; the sign goes to the
    diagonal of x.

    Raises:
        ValueError: columns that are not orthonormal; complex matrices (their phases have no place in x).

    Example:
        >>> import torch
        >>> q = torch.linalg.qr(torch.randn(5, 3)).Q
        >>> torch.allclose(householder(inverse_householder(q)), q, atol=1e-5)
        True
    """
    if isinstance(q, Tensor) and q.is_complex():
        raise ValueError("inverse_householder: expected a real matrix, got a complex one; use inverse_cayley")
    _check_orthonormal("inverse_householder", q, square=False)
    n, k = q.shape[-2:]
    rest = _wide(q)
    x = torch.zeros_like(rest)
    for j in range(k):
        column = rest[..., j:, j]
        sign = torch.where(column[..., 0] < 0, -1.0, 1.0).to(rest.dtype)
        v = torch.cat([column[..., :1] + sign.unsqueeze(-1), column[..., 1:]], -1)
        v = v / v[..., :1]
        tau = 2 / v.square().sum(-1)
        tail = rest[..., j:, j:]
        reflected = tail - tau[..., None, None] * v.unsqueeze(-1) * (v.unsqueeze(-2) @ tail)
        rest = torch.cat([rest[..., :j], torch.cat([rest[..., :j, j:], reflected], -2)], -1)
        x = torch.cat([x[..., :j], _column(n, j, v, -sign).unsqueeze(-1), x[..., j + 1 :]], -1)
    return x.to(q.dtype)


def _column(n: int, j: int, v: Tensor, sign: Tensor) -> Tensor:
    """Column j of x: zeros, the sign, and the reflection's vector below it."""
    return torch.cat([v.new_zeros(*v.shape[:-1], j), sign.unsqueeze(-1), v[..., 1:]], -1)
