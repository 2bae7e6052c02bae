"""Unfoldings, sign-fixed QR and truncated bases: the dense linear algebra under every decomposition."""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from math import hypot, isfinite, prod, sqrt
from numbers import Integral, Real
from typing import Literal, ParamSpec, TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor

Method = Literal["auto", "exact", "gram", "randomized"]
METHODS = ("auto", "exact", "gram", "randomized")

BLOCK = 1 << 18
"""Entries of one block of a long product on a CPU (2 MiB in float64 stay in cache); 64 times as many on a GPU."""

RUN = 4096
"""Terms that are summed in single precision; the sums of the runs are added in double precision."""


P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with autocast off: QR, SVD and norms in a training step keep the precision of their input."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = (getattr(value, "device", None) for value in (*args, *kwargs.values()))
        device = next((device.type for device in devices if isinstance(device, torch.device)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


class TruncationWarning(UserWarning):
    """A decomposition did not reach the tolerance asked for; the message states the error it reached."""


def unfold(x: Inexact[Tensor, "..."], modes: Sequence[int] | int) -> Inexact[Tensor, "grouped rest"]:
    """Matrix whose rows are the given modes and whose columns are the others, both in their order.

    Example:
        >>> import torch
        >>> unfold(torch.zeros(2, 3, 4), 1).shape
        torch.Size([3, 8])
    """
    modes = (modes,) if isinstance(modes, int) else tuple(modes)
    rest = [k for k in range(x.ndim) if k not in modes]
    return x.permute(*modes, *rest).reshape(prod(x.shape[k] for k in modes), prod(x.shape[k] for k in rest))


def fold(
    matrix: Inexact[Tensor, "grouped rest"], modes: Sequence[int] | int, shape: Sequence[int]
) -> Inexact[Tensor, "..."]:
    """Inverse of `unfold`: `fold(unfold(x, modes), modes, x.shape)` equals x.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 4)
        >>> torch.equal(fold(unfold(x, (2, 0)), (2, 0), x.shape), x)
        True
    """
    modes = (modes,) if isinstance(modes, int) else tuple(modes)
    order = [*modes, *(k for k in range(len(shape)) if k not in modes)]
    inverse = [order.index(k) for k in range(len(shape))]
    return matrix.reshape([shape[k] for k in order]).permute(inverse)


def fold_matrix(
    name: str, weight: Inexact[Tensor, "m *n"], row_modes: Sequence[int], col_modes: Sequence[int]
) -> Inexact[Tensor, "..."]:
    """The matrix (first axis) x (others) padded with zero rows and columns, as a tensor (*row_modes, *col_modes).

    Raises:
        ValueError: modes whose products are smaller than the matrix.

    Example:
        >>> import torch
        >>> fold_matrix("doc", torch.ones(3, 5), (2, 2), (2, 3)).shape
        torch.Size([2, 2, 2, 3])
    """
    m, n = weight.shape[0], prod(weight.shape[1:])
    rows, cols = prod(row_modes), prod(col_modes)
    if rows < m or cols < n:
        raise ValueError(
            f"{name}: the modes must cover the matrix, expected products >= {m} x {n}, "
            f"got row_modes={tuple(row_modes)} ({rows}) and col_modes={tuple(col_modes)} ({cols})"
        )
    padded = torch.nn.functional.pad(weight.flatten(1), (0, cols - n, 0, rows - m))
    return padded.reshape(*row_modes, *col_modes)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which QR, SVD, Gram products and inner products run: float32 for the half types, else the same."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def work_dtype(dtype: torch.dtype, tol: float | None) -> torch.dtype:
    """Dtype in which a truncation by `tol` is sound: double where single precision would spend the tolerance itself."""
    dtype = accumulate_dtype(dtype)
    if tol is None or tol >= 1e-4:
        return dtype
    return {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(dtype, dtype)


def usable_tol(tol: float, dtype: torch.dtype, cuts: int) -> float:
    """`tol` less what rounding the cores to their dtype may add."""
    return max(tol - 4 * (cuts + 1) * torch.finfo(dtype).eps, 0.1 * tol)


def is_tight(tol: float, dtype: torch.dtype, cuts: int) -> bool:
    """Whether rounding to `dtype` may spend the tolerance, so that the error has to be measured.

    The half types always are: float16 loses small cores to underflow, whatever the tolerance.
    """
    return dtype in (torch.float16, torch.bfloat16) or tol < 10 * (cuts + 1) * torch.finfo(dtype).eps


def direct_sum(first: Tensor, second: Tensor, axes: Sequence[int]) -> Tensor:
    """Place two tensors corner to corner along `axes`; the other axes are shared.

    Example:
        >>> import torch
        >>> direct_sum(torch.ones(1, 2), torch.ones(1, 1), [0, 1]).tolist()
        [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    def pad(x: Tensor, other: Tensor, before: bool) -> Tensor:
        widths = [0] * (2 * x.ndim)  # F.pad lists the last axis first
        for axis in axes:
            widths[2 * (x.ndim - 1 - axis) + (0 if before else 1)] = other.shape[axis]
        return torch.nn.functional.pad(x, widths)

    return pad(first, second, before=False) + pad(second, first, before=True)


def check_kind(name: str, x: Tensor, *, min_order: int = 1) -> None:
    """Refuse what no decomposition can take by type and shape: no tensor, integers, empty modes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"{name}: expected a floating or complex tensor, got {x.dtype}; convert it with x.to(torch.float32)"
        )
    if x.ndim < min_order:
        raise ValueError(f"{name}: expected a tensor of order >= {min_order}, got shape {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name}: every mode size must be at least 1, got shape {tuple(x.shape)}")


def check_tensor(name: str, x: Tensor, *, min_order: int = 1) -> None:
    """Refuse what no decomposition can take: wrong types, empty modes, NaN, infinity."""
    check_kind(name, x, min_order=min_order)
    check_finite(name, x)


def check_finite(name: str, x: Inexact[Tensor, "..."]) -> float:
    """Refuse NaN and infinity by name; otherwise the largest magnitude of a component, in one pass, without a copy."""
    entries = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
    low, high = map(float, torch.aminmax(entries))  # NaN comes through
    if not (isfinite(low) and isfinite(high)):
        nans = int(torch.isnan(x).sum())
        infs = int((~torch.isfinite(x)).sum()) - nans
        raise ValueError(f"{name}: entries must be finite, got {nans} NaN and {infs} infinite of {x.numel()}")
    return max(abs(low), abs(high))


def check_tol(name: str, tol: float | None) -> None:
    """Refuse a tolerance that is not a relative error."""
    if tol is not None and (isinstance(tol, bool) or not (isinstance(tol, Real) and isfinite(tol) and tol >= 0)):
        raise ValueError(f"{name}: tol must be a finite relative error >= 0, got {tol!r}")


def check_ranks(name: str, rank: int | Sequence[int] | None, possible: Sequence[int], bond: str = "bond") -> list[int]:
    """One cap per bond: an int caps every bond, a sequence names each and must be possible, None leaves all free."""
    if rank is None:
        return list(possible)
    if isinstance(rank, (bool, str)) or not isinstance(rank, (Integral, Sequence)):
        raise TypeError(f"{name}: rank must be an int, a sequence of ints or None, got {rank!r}")
    if isinstance(rank, Integral):
        if rank < 1:
            raise ValueError(f"{name}: rank must be at least 1, got {rank}")
        return [min(int(rank), most) for most in possible]
    if len(rank) != len(possible):
        raise ValueError(
            f"{name}: rank needs one entry per {bond}, expected {len(possible)}, got {len(rank)} (rank={tuple(rank)})"
        )
    for k, (r, most) in enumerate(zip(rank, possible, strict=True)):
        if isinstance(r, bool) or not isinstance(r, Integral):
            raise TypeError(f"{name}: rank entries must be ints, got {r!r} for {bond} {k}")
        if not 1 <= r <= most:
            raise ValueError(
                f"{name}: rank of {bond} {k} must be in 1..{most} (the most its unfolding can have), got {r}; "
                "an int rank is a cap for all"
            )
    return [int(r) for r in rank]


def positive_qr(
    matrix: Inexact[Tensor, "*batch m n"],
) -> tuple[Inexact[Tensor, "*batch m k"], Inexact[Tensor, "*batch k n"]]:
    """Reduced QR with a non-negative diagonal of R, which makes it unique for full column rank.

    Half precision is factored in float32 and cast back.

    Example:
        >>> import torch
        >>> q, r = positive_qr(-torch.eye(2))
        >>> r.diagonal().tolist()
        [1.0, 1.0]
    """
    q, r = torch.linalg.qr(matrix.to(accumulate_dtype(matrix.dtype)))
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    phase = torch.where(diagonal == 0, torch.ones_like(diagonal), torch.sgn(diagonal))
    return (q * phase.unsqueeze(-2)).to(matrix.dtype), (r * phase.conj().unsqueeze(-1)).to(matrix.dtype)


def safe_svd(matrix: Inexact[Tensor, "*batch m n"]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `U, S, V^H` of a finite matrix; retried on a triangle in double precision where LAPACK gives up.

    It gives up with an error (divide and conquer on graded matrices) or silently, with NaN (one build of MKL, on
    nearly diagonal matrices with repeated values).
    """
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if bool(torch.isfinite(s.sum())):
            return u, s, vh
    except torch.linalg.LinAlgError:
        pass
    if matrix.ndim > 2:
        u, s, vh = zip(*(safe_svd(one) for one in matrix), strict=True)
        return torch.stack(u), torch.stack(s), torch.stack(vh)
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = safe_svd(matrix.mH)
        return vh.mH, s, u.mH
    double = torch.promote_types(matrix.dtype, torch.float64)
    q, r = torch.linalg.qr(matrix.to(double))
    turn = torch.linalg.qr(torch.cos(torch.arange(r.numel(), device=r.device, dtype=double)).reshape(r.shape)).Q
    u, s, vh = torch.linalg.svd(r @ turn, full_matrices=False)  # turned: neither triangular nor diagonal
    if not bool(torch.isfinite(s.sum())):
        raise torch.linalg.LinAlgError(f"safe_svd: LAPACK found no SVD of a {tuple(matrix.shape)} matrix")
    return (q @ u).to(matrix.dtype), s.to(matrix.real.dtype), (vh @ turn.mH).to(matrix.dtype)


def truncation_rank(squares: Tensor, budget: float, cap: int) -> int:
    """Smallest k whose discarded squared singular values sum to at most `budget`, within 1..cap.

    `squares` are in descending order; sums run from the small end in float64, where nothing is absorbed.
    """
    tails = torch.flip(torch.cumsum(torch.flip(squares.double().clamp_min(0), (0,)), 0), (0,))  # tails[k]: drop k.. on
    fits = int((tails > budget).sum())
    return max(1, min(fits, cap))


def blocks(x: Inexact[Tensor, "p m q"], entries: int = BLOCK, least: int = 64) -> Iterator[tuple[slice, slice]]:
    """Cut the first and the last axis so that a block holds about `entries`, and `least` columns if there are."""
    p, m, q = x.shape
    room = max(least, (entries if x.device.type == "cpu" else 64 * entries) // m)
    columns = min(q, room)
    slices = max(1, room // columns)
    for i in range(0, p, slices):
        for j in range(0, q, columns):
            yield slice(i, i + slices), slice(j, j + columns)


def side_by_side(block: Inexact[Tensor, "p m q"]) -> Inexact[Tensor, "m columns"]:
    """The slices of a block as one matrix: a view where p or q is 1, a copy of the block otherwise."""
    return block.movedim(1, 0).reshape(block.shape[1], -1)


def gram(x: Inexact[Tensor, "*p m n"], *, single: bool = False) -> Inexact[Tensor, "m m"]:
    """`sum_p A_p A_p^H` accumulated in double precision, by blocks: the tensor is never copied whole.

    Relative to the trace its error is about 1e-16 (single-precision entries are exact in double precision). With
    `single` runs of 4096 terms are summed in the input's dtype, twice as fast: in float32 an error of about 1e-8, and
    up to 1e-6 where the entries take few values (rounding has a bias there).
    Cost: m^2 n p multiplications; by symmetry five eighths of them for m >= 256, all for m < 64.

    Args:
        x: a matrix, or the slices (p, m, n) of a tensor whose middle mode is meant.
        single: multiply in the input's dtype.

    Example:
        >>> import torch
        >>> gram(torch.ones(2, 3, 4)).tolist()[0]
        [8.0, 8.0, 8.0]
    """
    x = x if x.ndim == 3 else x[None]
    m = x.shape[1]
    double = torch.promote_types(x.dtype, torch.float64)
    total = torch.zeros(m, m, dtype=double, device=x.device)
    for batch in _runs(x) if single else (x[first, :, last].to(double) for first, last in blocks(x)):
        if batch.shape[0] > 1 and batch.shape[2] < 64:
            batch = side_by_side(batch)[None]
        _add_lower(total, batch, max(64, m // 4))
    lower = total.tril(-1)
    return lower + lower.mH + total.diagonal().diag()


def _add_lower(total: Tensor, batch: Tensor, least: int) -> None:
    """Add the lower triangle of `sum_p A_p A_p^H`, by halves of at least `least` rows, and more near the diagonal."""
    half = batch.shape[1] // 2
    if len(total) < least:
        total += _summed(batch, batch, total.dtype)
        return
    upper, lower = batch[:, :half], batch[:, half:]
    _add_lower(total[:half, :half], upper, least)
    _add_lower(total[half:, half:], lower, least)
    total[half:, :half] += _summed(lower, upper, total.dtype)


def _summed(a: Tensor, b: Tensor, double: torch.dtype) -> Tensor:
    return a[0] @ b[0].mH if len(a) == 1 else torch.bmm(a, b.mH).sum(0, dtype=double)


def _runs(x: Tensor) -> Iterator[Tensor]:
    """Views (batch, m, at most `RUN` columns) that cover x, of a size at which a batch of products is small."""
    m, q = x.shape[1:]
    most = max(1, 64 * BLOCK // m**2)
    if q <= RUN:
        yield from x.split(max(1, min(most, RUN * 64 // q)))
        return
    whole = q // RUN * RUN
    for piece in x:
        yield from piece[:, :whole].unflatten(1, (-1, RUN)).movedim(1, 0).split(most)
        if whole < q:
            yield piece[None, :, whole:]


def triangle(x: Inexact[Tensor, "*p m n"]) -> Inexact[Tensor, "m m"]:
    """Lower triangle L of `[A_1 ... A_p] = L Q` in double precision, without Q, by blocks.

    Nothing is squared: the singular values of L are those of A to 1e-16 of the largest.
    Cost: twice that of `gram` in multiplications, four to eight times in time.

    References:
        J. Demmel, L. Grigori, M. Hoemmen, J. Langou, Communication-optimal parallel and sequential QR and LU
        factorizations, SIAM J. Sci. Comput. 2012.

    Example:
        >>> import torch
        >>> triangle(torch.tensor([[3.0, 4.0]])).abs().tolist()
        [[5.0]]
    """
    x = x if x.ndim == 3 else x[None]
    double = torch.promote_types(x.dtype, torch.float64)
    m = x.shape[1]
    r = torch.zeros(0, m, dtype=double, device=x.device)
    for first, last in blocks(x, least=2 * m):
        r = torch.linalg.qr(torch.cat([r, side_by_side(x[first, :, last]).to(double).mH]), mode="r").R
    return torch.nn.functional.pad(r, (0, 0, 0, m - r.shape[0])).mH


def frobenius(x: Inexact[Tensor, "..."]) -> float:
    """`‖x‖` in one fast pass: runs of 256 squares are summed in the dtype itself, the runs in double precision."""
    flat = x.detach().reshape(-1)
    flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    whole = flat.numel() // 256 * 256
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1).double()
    return hypot(float(torch.linalg.vector_norm(runs)), float(torch.linalg.vector_norm(flat[whole:].double())))


def gram_is_safe(dtype: torch.dtype, tol: float | None) -> bool:
    """Whether a double-precision Gram matrix resolves what is asked of a matrix of this dtype.

    Its eigenvalues carry an error of about 1e-16 of the largest, so singular values below 1e-8 are noise: harmless for
    single precision, not for float64 unless the tolerance is well above.
    """
    if dtype in (torch.float32, torch.complex64):
        return True
    return tol is not None and tol >= 1e-5


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """`‖exact - approximation‖ / ‖exact‖` in double precision; the absolute error where exact is zero."""
    double = torch.complex128 if exact.is_complex() else torch.float64
    difference = float(torch.linalg.vector_norm(approximation.to(double) - exact.to(double)))
    size = float(torch.linalg.vector_norm(exact.to(double)))
    return difference / size if size > 0 else difference


def warn_truncation(name: str, error: float, tol: float, reason: str) -> None:
    """Say, with the number and at the caller's line, that the tolerance was not reached."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("decompositions."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{name}: the tolerance was not reached, expected relative error <= {tol:.3g}, got {error:.3g} ({reason})",
        TruncationWarning,
        stacklevel=level,
    )


def spectral_bound(matrix: Tensor) -> float:
    """Largest singular value, in double precision; the Frobenius norm where that would be too dear."""
    if min(matrix.shape) > 2048:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.promote_types(matrix.dtype, torch.float64)))
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    return sqrt(max(0.0, float(torch.linalg.eigvalsh(gram(wide))[-1])))
