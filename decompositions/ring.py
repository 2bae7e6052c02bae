"""Tensor-ring decompositions: TR-SVD, with a tolerance kept, and alternating least squares."""

from collections.abc import Callable, Sequence
from math import ceil, inf, prod
from typing import Literal, cast

import torch
from jaxtyping import Inexact
from torch import Tensor
from torch.nn.functional import pad

from decompositions.als import Fit, Target, check_sweeps, finish, sweeps
from decompositions.formats.tensor_ring import TensorRing, ring_ranks
from decompositions.linalg import Method, check_kind, check_ranks, check_tol, full_precision
from decompositions.truncation import Truncation

Ranks = int | Sequence[int] | None


@full_precision
def tr_svd(
    x: Inexact[Tensor, "..."],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    axes: Sequence[int] | None = None,
    num_rows: int | None = None,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> TensorRing | tuple[TensorRing, float]:
    """TR-SVD: `X ≈ trace(G_1(i_1) ... G_d(i_d))`; the first SVD's rank is shared out over the two bonds of core 1.

    `‖X - X̂‖ <= tol ‖X‖`, the squared errors of the d - 1 cuts adding exactly. With ranks alone there is no bound
    against the best ring, nor need it be smaller than a train: the columns of the first cut are shared out in their
    order, blind to how they factor. A tensor that is a ring of small ranks is found by `tr_als`. Which axis comes
    first matters: `axes` turns or permutes the ring.
    Cost: that of a TT-SVD from one end, of a tensor that the second cut finds r_0 times wider.

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every bond, or d entries in ring order, the bond that closes the ring first.
        tol: relative Frobenius error.
        axes: ring order of the axes of x.
        num_rows: leading axes of x that are rows of the network; all by default.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        TensorRing; no gauge.

    Raises:
        ValueError: NaN or infinity, an empty mode, an impossible rank, axes that are not a permutation.

    References:
        Q. Zhao et al., 2016, arXiv 1606.05535, algorithm 1.

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> net, error = tr_svd(x, tol=1e-6, with_error=True)
        >>> net.ranks, error < 1e-6
        ((1, 2, 2), True)
    """
    ring = _ring("tr_svd", x, axes)
    if method == "randomized" and rank is None:
        raise ValueError("tr_svd: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    d = x.ndim
    caps = check_ranks("tr_svd", rank, ring_ranks([x.shape[k] for k in ring]))
    task = Truncation("tr_svd", x, cuts=max(1, d - 1), tol=tol, method=method, generator=generator)
    rest = task.work.permute(ring)
    if d == 1:
        return task.finish(TensorRing([rest], num_rows), with_error)
    sizes = rest.shape
    found = task.cut(rest.reshape(1, sizes[0], -1), min(sizes[0], prod(sizes[1:]), caps[0] * caps[1]))
    count = found.u.shape[1]
    closing, first = _share(count, caps[0], caps[1])
    u = pad(found.u, (0, closing * first - count))
    cores = [u.reshape(sizes[0], closing, first).movedim(1, 0)]
    rest = pad(found.rest[0], (0, 0, 0, closing * first - count)).reshape(closing, first, -1)
    rest = rest.movedim(0, -1)  # (first, n_2 ... n_d, closing): the train of the other cores
    for k in range(1, d - 1):
        left = rest.shape[0]
        rest = rest.reshape(1, left * sizes[k], -1)
        found = task.cut(rest, min(caps[k + 1], rest.shape[1], rest.shape[2]))
        cores.append(found.u.reshape(left, sizes[k], -1))
        rest = found.rest[0]
    cores.append(rest.reshape(rest.shape[0], sizes[-1], closing))
    cores = [core.to(found.u.dtype) for core in cores]
    return task.finish(TensorRing(cores, num_rows, ring), with_error)


def _share(count: int, most_closing: int, most_first: int) -> tuple[int, int]:
    """Two ranks, as equal as their caps allow, whose product holds `count` columns with the least left over.

    Example:
        >>> _share(12, 100, 100), _share(7, 100, 100), _share(12, 1, 100)
        ((3, 4), (2, 4), (1, 12))
    """
    pairs = [(closing, ceil(count / closing)) for closing in range(1, min(most_closing, count) + 1)]
    fits = [pair for pair in pairs if pair[1] <= most_first]
    return min(fits, key=lambda pair: (sum(pair), pair[0] * pair[1], pair)) if fits else (1, count)


def _ring(name: str, x: Tensor, axes: Sequence[int] | None) -> tuple[int, ...]:
    check_kind(name, x)
    ring = tuple(range(x.ndim)) if axes is None else tuple(axes)
    if sorted(ring) != list(range(x.ndim)):
        raise ValueError(f"{name}: axes must be a permutation of 0..{x.ndim - 1}, got {ring}")
    return ring


@full_precision
def tr_als(
    x: Inexact[Tensor, "..."],
    rank: int | Sequence[int],
    tol: float | None = None,
    *,
    start: Literal["tr_svd", "random"] = "tr_svd",
    restarts: int = 0,
    axes: Sequence[int] | None = None,
    num_rows: int | None = None,
    max_sweeps: int = 100,
    improvement: int | float = 1e-8,
    progress: Callable[[int, float], None] | None = None,
    with_fit: bool = False,
    generator: torch.Generator | None = None,
) -> TensorRing | tuple[TensorRing, Fit]:
    """A tensor ring of given ranks by alternating least squares (`als`), from TR-SVD or from random cores.

    The error never grows from sweep to sweep, and is no larger than that of a "tr_svd" start. No tolerance is
    guaranteed: the error reached is measured, and where it is above `tol` a TruncationWarning states it.
    Cost: O(d prod(n) r^2) a sweep and start, and eigenvalue problems of order r^2.

    Args:
        x: a tensor of any order >= 1.
        rank: rank of every bond, or d entries in ring order, the bond that closes the ring first. A "tr_svd" start
            takes what its cuts find where that is less, and fills up with small random entries.
        tol: relative Frobenius error at which to stop.
        start: "tr_svd" or "random".
        restarts: further, random, starts; the best result is kept.
        axes: ring order of the axes of x.
        num_rows: leading axes of x that are rows of the network; all by default.
        max_sweeps: upper bound on the sweeps of a start.
        improvement: stop a start when a sweep lowers the relative error by less.
        progress: called as (sweeps done, relative error) after each sweep.
        with_fit: return `(network, Fit)`.
        generator: of the random cores.

    Returns:
        TensorRing of exactly these ranks (as far as they are possible).

    Raises:
        ValueError: NaN or infinity, an impossible rank, counts or names that make no sense.

    References:
        Q. Zhao et al., 2016, arXiv 1606.05535, algorithm 3.

    Example:
        >>> import torch
        >>> from decompositions import TensorRing, to_dense
        >>> x = to_dense(TensorRing.random(row_modes=(5, 6, 7), rank=2, dtype=torch.float64))
        >>> net, fit = tr_als(x, 2, restarts=3, with_fit=True)
        >>> net.ranks, fit.error < tr_svd(x, 2, with_error=True)[1]
        ((2, 2, 2), True)
    """
    ring = _ring("tr_als", x, axes)
    check_tol("tr_als", tol)
    check_sweeps("tr_als", max_sweeps, improvement, restarts)
    if start not in ("tr_svd", "random"):
        raise ValueError(f"tr_als: start must be 'tr_svd' or 'random', got {start!r}")
    caps = check_ranks("tr_als", rank, ring_ranks([x.shape[k] for k in ring]))
    num_rows = x.ndim if num_rows is None else num_rows
    target = Target("tr_als", x)
    best: tuple[TensorRing, list[float], bool] | None = None
    ends: list[float] = []
    for first in (start, *["random"] * restarts):
        net = TensorRing.random(
            row_modes=tuple(x.shape),
            rank=tuple(caps),
            axes=ring,
            dtype=target.unit.dtype,
            device=x.device,
            generator=generator,
        )
        if first == "tr_svd":
            net = _filled(cast(TensorRing, tr_svd(target.unit, caps, axes=ring)), net)
        found = sweeps(target, net, tol, max_sweeps, improvement, progress)
        ends.append(found[1][-1])
        if best is None or found[1][-1] < best[1][-1]:
            best = found
        if tol is not None and min(ends, default=inf) <= tol:
            break
    assert best is not None
    made = TensorRing(best[0].cores, num_rows, ring)
    return finish("tr_als", made, x, tol, Fit(0.0, best[2], tuple(best[1]), tuple(ends)), with_fit)


def _filled(small: TensorRing, random: TensorRing) -> TensorRing:
    """The cores of the first in the corners of the second, whose other entries are small: room to grow into."""
    cores = []
    for part, core in zip(small.cores, random.cores, strict=True):
        size = float(part.abs().max()) / (float(core.abs().max()) or 1.0)
        made = core * (1e-3 * size)
        made[tuple(slice(n) for n in part.shape)] = part
        cores.append(made)
    return random.replace(cores)
