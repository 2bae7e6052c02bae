"""Maps onto matrices with orthonormal columns, and back: Cayley, exponential, Householder.

For `A^H = -A` both `cayley` and `exponential` give an orthogonal (unitary) matrix near `I + A`; `householder` takes any
matrix to one with orthonormal columns. `torch.nn.utils.parametrizations.orthogonal` trains with the same three; here
they are functions with inverses, batched and differentiable.
"""

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.linalg import full_precision


def skew(x: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """`(X - X^H) / 2`, the nearest skew-Hermitian matrix.

    Example:
        >>> import torch
        >>> skew(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    return (x - x.mH) / 2


def _check_skew(name: str, a: Tensor) -> None:
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"{name}: expected square matrices, got {tuple(a.shape)}")
    size, defect = float(a.detach().abs().max()) if a.numel() else 0.0, a.detach() + a.detach().mH
    if defect.numel() and not float(defect.abs().max()) <= 100 * torch.finfo(a.dtype).eps * max(1.0, size):
        raise ValueError(
            f"{name}: expected A^H = -A, got a defect of {float(defect.abs().max()):.3g}; skew(x) = (x - x^H) / 2"
        )


def _check_orthonormal(name: str, q: Tensor, *, square: bool) -> None:
    if q.ndim < 2 or q.shape[-2] < q.shape[-1] or (square and q.shape[-1] != q.shape[-2]):
        raise ValueError(f"{name}: expected {'square' if square else 'tall'} matrices, got {tuple(q.shape)}")
    gram = q.detach().mH @ q.detach()
    defect = gram - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if defect.numel() and not float(defect.abs().max()) <= 1e3 * torch.finfo(q.dtype).eps:
        raise ValueError(f"{name}: expected orthonormal columns, got a defect of {float(defect.abs().max()):.3g}")


@full_precision
def cayley(a: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Cayley transform `Q = (I - A/2)^-1 (I + A/2)` of a skew-Hermitian matrix; Q has no eigenvalue -1.

    Agrees with the exponential to second order. Cost: one linear solve.

    Raises:
        ValueError: matrices that are not square, or not skew-Hermitian.

    Example:
        >>> import torch
        >>> q = cayley(torch.tensor([[0.0, 2.0], [-2.0, 0.0]]))
        >>> torch.allclose(q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
        True
    """
    _check_skew("cayley", a)
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(one - a / 2, one + a / 2)


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
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    smallest = torch.linalg.svdvals((q + one).detach())[..., -1]
    if smallest.numel() and not float(smallest.min()) > 1e2 * torch.finfo(q.dtype).eps:
        raise ValueError("inverse_cayley: expected no eigenvalue -1, got one; multiply a column by -1 first")
    return skew(2 * torch.linalg.solve(q + one, q - one, left=False))


@full_precision
def exponential(a: Inexact[Tensor, "*batch n n"]) -> Inexact[Tensor, "*batch n n"]:
    """Matrix exponential of a skew-Hermitian matrix: the geodesic from the identity with velocity A.

    Raises:
        ValueError: matrices that are not square, or not skew-Hermitian.

    Example:
        >>> import math, torch
        >>> q = exponential(torch.tensor([[0.0, math.pi / 2], [-math.pi / 2, 0.0]]))
        >>> torch.allclose(q, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
        True
    """
    _check_skew("exponential", a)
    return torch.linalg.matrix_exp(a)


@full_precision
def inverse_exponential(q: Inexact[Tensor, "n n"]) -> Inexact[Tensor, "n n"]:
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
    triangle, z = (torch.from_numpy(part) for part in schur(q.detach().cpu().numpy(), output="complex"))
    angles = torch.angle(triangle.diagonal())
    if len(angles) and float(angles.abs().max()) > torch.pi - 1e3 * torch.finfo(q.dtype).eps:
        raise ValueError("inverse_exponential: expected no eigenvalue -1, got one; multiply a column by -1 first")
    logarithm = (z * (1j * angles)) @ z.mH
    return skew((logarithm if q.is_complex() else logarithm.real).to(dtype=q.dtype, device=q.device))


@full_precision
def householder(x: Inexact[Tensor, "*batch n k"]) -> Inexact[Tensor, "*batch n k"]:
    """Product of k reflections `H_1 ... H_k`, its first k columns, each times the sign on the diagonal of x.

    `H_j = I - tau v v^H` with `v = (0, ..., 0, 1, x_{j+1,j}, ..., x_{n,j})` and `tau = 2 / ‖v‖^2`: what stands below
    the diagonal of x is free. Zeros there make the reflection of one axis.

    Args:
        x: tall; the entries above the diagonal have no say.

    Raises:
        ValueError: matrices that are not tall.

    Example:
        >>> import torch
        >>> q = householder(torch.randn(5, 3))
        >>> torch.allclose(q.T @ q, torch.eye(3), atol=1e-5)
        True
    """
    if x.ndim < 2 or x.shape[-2] < x.shape[-1]:
        raise ValueError(f"householder: expected tall matrices, got {tuple(x.shape)}")
    v = x.tril(-1)
    tau = 2 / (1 + (v * v.conj()).real.sum(-2))
    signs = torch.where(x.diagonal(dim1=-2, dim2=-1).real < 0, -1.0, 1.0).to(x.dtype)
    return torch.linalg.householder_product(v, tau.to(x.dtype)) * signs.unsqueeze(-2)


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
    if q.is_complex():
        raise ValueError("inverse_householder: expected a real matrix, got a complex one; use inverse_cayley")
    _check_orthonormal("inverse_householder", q, square=False)
    n, k = q.shape[-2:]
    rest, x = q.clone(), torch.zeros_like(q)
    for j in range(k):
        column = rest[..., j:, j]
        sign = torch.where(column[..., 0] < 0, -1.0, 1.0).to(q.dtype)
        v = torch.cat([column[..., :1] + sign.unsqueeze(-1), column[..., 1:]], -1)
        v = v / v[..., :1]
        tau = 2 / v.square().sum(-1)
        tail = rest[..., j:, j:]
        reflected = tail - tau[..., None, None] * v.unsqueeze(-1) * (v.unsqueeze(-2) @ tail)
        rest = torch.cat([rest[..., :j], torch.cat([rest[..., :j, j:], reflected], -2)], -1)
        x = torch.cat([x[..., :j], _column(n, j, v, -sign).unsqueeze(-1), x[..., j + 1 :]], -1)
    return x


def _column(n: int, j: int, v: Tensor, sign: Tensor) -> Tensor:
    """Column j of x: zeros, the sign, and the reflection's vector below it."""
    return torch.cat([v.new_zeros(*v.shape[:-1], j), sign.unsqueeze(-1), v[..., 1:]], -1)
