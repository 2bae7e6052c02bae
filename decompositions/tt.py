"""Tensor-train decompositions of tensors and matrices."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import balanced_modes
from decompositions.formats.tt import TT, chain_ranks, chain_shapes
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.linalg import Method, check_kind, check_ranks, fold_matrix, full_precision, positive_qr
from decompositions.truncation import Truncation

Ranks = int | Sequence[int] | None


@full_precision
def tt_svd(
    x: Inexact[Tensor, "..."],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    modes: Sequence[int] | int | None = None,
    axes: Sequence[int] | None = None,
    num_rows: int | None = None,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> TT | tuple[TT, float]:
    """TT-SVD: `X(i_1, ..., i_d) ≈ G_1(i_1) ... G_d(i_d)` by d - 1 truncated bases, from both ends toward the middle.

    `‖X - X̂‖ <= tol ‖X‖`, the squared errors of the cuts adding exactly; with ranks given,
    `‖X - X̂‖ <= sqrt(d - 1) ‖X - best of those ranks‖`. Exact where the ranks suffice.
    Cost: a product of the tensor with a matrix as small as its smaller end, twice, then of what is left of it.

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every bond, or d - 1 entries in chain order.
        tol: relative Frobenius error.
        modes: fold x first, any length being padded with zeros: all of it to the given modes, in the order of its
            entries, or (an int b) every axis to as many modes of size b as its length takes (QTT for b = 2).
        axes: chain order of the axes of x (folded ones, with `modes`); (1, 2, 3, 0) makes the chain in, kh, kw, out of
            a convolution kernel.
        num_rows: leading axes of x that are rows of the network; all by default.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        TT whose cores are isometries toward the last one, the center.

    Raises:
        ValueError: NaN or infinity, an empty mode, an impossible rank, axes that are not a permutation.

    References:
        I. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 2011, algorithm 1 and theorem 2.2.

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> net, error = tt_svd(x, tol=1e-6, with_error=True)
        >>> net.ranks, error < 1e-6
        ((2, 2), True)
        >>> wave = torch.sin(torch.linspace(0, 9, 1000, dtype=torch.float64))
        >>> qtt = tt_svd(wave, tol=1e-10, modes=2)
        >>> len(qtt.shape), max(qtt.ranks)
        (10, 3)
    """
    check_kind("tt_svd", x)
    if modes is not None:
        x = _folded(x, modes)
    chain = tuple(range(x.ndim)) if axes is None else tuple(axes)
    if sorted(chain) != list(range(x.ndim)):
        raise ValueError(f"tt_svd: axes must be a permutation of 0..{x.ndim - 1}, got {chain}")
    task, cores = split_chain("tt_svd", x, x.permute(chain), rank, tol, method, generator)
    return task.finish(TT(cores, num_rows, chain), with_error)


@full_precision
def ttm_svd(
    weight: Inexact[Tensor, "m *n"],
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    rank: Ranks = None,
    tol: float | None = None,
    *,
    order: int = 3,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> TTMatrix | tuple[TTMatrix, float]:
    """TT-SVD of a matrix with row mode k and column mode k in one core.

    `‖W - Ŵ‖ <= tol ‖W‖` as for `tt_svd`. Modes whose products exceed the width pad the matrix with zero rows and
    columns (any width works, primes too); the error of the unpadded part is at most that of the whole.
    Cost: that of `tt_svd` on modes m_k n_k.

    Args:
        weight: (out, in); a convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        row_modes: modes of the rows, product at least m; None chooses balanced ones.
        col_modes: modes of the columns, product at least n, as many as row modes; None chooses balanced ones (of a
            kernel: balanced modes of in, then the kernel sizes, beside row modes 1).
        rank: cap for every bond, or an entry for each.
        tol: relative Frobenius error.
        order: number of modes to choose where they are not given.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error of the padded matrix)`.
        generator: of the randomized sketch.

    Returns:
        TTMatrix whose cores are isometries toward the last one.

    Raises:
        ValueError: products smaller than the matrix, lengths that differ, NaN or infinity, an impossible rank.

    References:
        I. Oseledets, SIAM J. Matrix Anal. Appl. 2010; A. Novikov et al., 2015, arXiv 1509.06569.

    Example:
        >>> import torch
        >>> net = ttm_svd(torch.eye(12), row_modes=(3, 4), col_modes=(3, 4), tol=1e-6)
        >>> net.ranks, ttm_svd(torch.randn(13, 7), rank=2, order=2).shape
        ((1,), (3, 5, 1, 7))
    """
    check_kind("ttm_svd", weight, min_order=2)
    rows, cols = matrix_modes(tuple(weight.shape), row_modes, col_modes, order)
    padded = fold_matrix("ttm_svd", weight, rows, cols)
    if len(rows) != len(cols):
        raise ValueError(
            f"ttm_svd: row_modes and col_modes pair up, expected equal lengths, got {rows} and {cols}; fill with ones"
        )
    d = len(rows)
    paired = [k for pair in zip(range(d), range(d, 2 * d), strict=True) for k in pair]
    tensor = padded.permute(paired)
    tensor = tensor.reshape([i * j for i, j in zip(rows, cols, strict=True)])
    task, cores = split_chain("ttm_svd", tensor, tensor, rank, tol, method, generator)
    shapes = chain_shapes(list(zip(rows, cols, strict=True)), [core.shape[-1] for core in cores[:-1]])
    net = TTMatrix([core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)])
    return task.finish(net, with_error, target=padded.detach())


def _folded(x: Tensor, modes: Sequence[int] | int) -> Tensor:
    """Fold a tensor to modes, or every axis to modes of one size, with zeros where it ends."""
    if isinstance(modes, int):
        if modes < 2:
            raise ValueError(f"tt_svd: modes of one size must have at least 2 entries, got modes={modes}")
        counts = [next(d for d in range(1, n + 1) if modes**d >= n) for n in x.shape]
        ends = [end for n, d in zip(reversed(x.shape), reversed(counts), strict=True) for end in (0, modes**d - n)]
        return torch.nn.functional.pad(x, ends).reshape([modes] * sum(counts))
    if prod(modes) < x.numel() or min(modes) < 1:
        raise ValueError(
            f"tt_svd: the modes must hold the tensor, expected a product >= {x.numel()}, got modes={tuple(modes)} "
            f"({prod(modes)})"
        )
    return torch.nn.functional.pad(x.flatten(), (0, prod(modes) - x.numel())).reshape(tuple(modes))


def matrix_modes(
    shape: tuple[int, ...], row_modes: Sequence[int] | None, col_modes: Sequence[int] | None, order: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Complete the modes that were not given, with as many as the given side has."""
    if col_modes is not None:
        rows = balanced_modes(shape[0], len(col_modes)) if row_modes is None else tuple(row_modes)
        return rows, tuple(col_modes)
    if row_modes is not None:
        order = max(1, len(row_modes) - len(shape[2:]))
    rows, cols = TTMatrix.default_modes(shape, order)
    return (rows if row_modes is None else tuple(row_modes)), cols


def split_chain(
    name: str,
    x: Inexact[Tensor, "..."],
    chain: Inexact[Tensor, "..."],
    rank: Ranks,
    tol: float | None,
    method: Method,
    generator: torch.Generator | None,
) -> tuple[Truncation, list[Tensor]]:
    """Cut `chain` (x with its axes in chain order) at the end that is smaller, until every bond is cut.

    Each cut projects the tensor that the earlier ones left on a subspace of its own columns or rows: orthogonal
    projections that commute, so that the squared errors add as they do from left to right.

    Returns:
        The truncation, which knows the scale of the cores and the error, and the cores of a TT.

    Raises:
        ValueError: NaN or infinity, an empty mode, an impossible rank, a randomized method without one.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 3, 4)
        >>> task, cores = split_chain("doc", x, x, 1, None, "auto", None)
        >>> [tuple(core.shape) for core in cores]
        [(2, 1), (1, 3, 1), (1, 4)]
    """
    if method == "randomized" and rank is None:
        raise ValueError(f"{name}: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    sizes = tuple(chain.shape)
    caps = check_ranks(name, rank, chain_ranks(sizes))
    task = Truncation(name, chain, max(1, len(sizes) - 1), tol, method, generator)
    first, last = 0, len(sizes) - 1  # the cores not yet split off, with the ranks of the bonds around them
    before, after = 1, 1
    rest, heads, tails = task.work.reshape(1, -1), [], []
    while first < last:
        if before * sizes[first] <= sizes[last] * after:
            found = task.cut(rest.reshape(1, before * sizes[first], -1), caps[first])
            heads.append(found.u.to(rest.dtype).reshape(before, sizes[first], -1))
            before, first = found.u.shape[1], first + 1
        else:
            found = task.cut(rest.reshape(-1, sizes[last] * after, 1), caps[last - 1])
            tails.append(found.u.to(rest.dtype).mT.reshape(-1, sizes[last], after))
            after, last = found.u.shape[1], last - 1
        rest = found.rest
    cores = [*heads, rest.reshape(before, sizes[first], after), *reversed(tails)]
    for k in range(first, len(cores) - 1):  # the center moves to the end of the chain
        q, r = positive_qr(cores[k].flatten(0, 1))
        cores[k] = q.unflatten(0, cores[k].shape[:2])
        cores[k + 1] = torch.tensordot(r, cores[k + 1], dims=1)
    if caps:
        cores[0], cores[-1] = cores[0].squeeze(0), cores[-1].squeeze(-1)
    else:
        cores = [cores[0].reshape(sizes)]
    task.x = x
    return task, cores
