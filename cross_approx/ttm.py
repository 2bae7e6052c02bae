"""TT-matrices from few entries of a matrix."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from cross_approx.digits import Quantization
from cross_approx.reading.folded import FoldedReader, RealEntries
from cross_approx.reading.reader import Reader, check_limits, open_source
from cross_approx.result import CrossResult
from cross_approx.sources.views import merge_tail
from cross_approx.tt import _check_start, _Search, run_search
from decompositions.formats.modes import check_paired
from decompositions.formats.tt import TT, chain_ranks, chain_shapes
from decompositions.formats.tt_matrix import TTMatrix
from decompositions.linalg import check_ranks, check_tol
from decompositions.progress import Progress, reporting
from decompositions.tt import matrix_modes


def ttm_cross(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    order: int = 3,
    tol: int | float = 1e-6,
    rank: int | Sequence[int] | None = None,
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    max_sweeps: int = 40,
    start: int | Int[Tensor, "p 2"] = 2,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
    progress: bool | Progress | None = None,
) -> CrossResult:
    """TT-matrix from few entries: `W(i_1..i_d, j_1..j_d) ≈ G_1(i_1, j_1) ... G_d(i_d, j_d)` by `tt_cross` over pairs.

    Modes are those of `ttm_svd`: where their products exceed the matrix it is padded with zero rows and columns, which
    are never asked for, and on which no error is measured. So the part of the network outside the matrix is arbitrary
    (near zero where the sweeps saw it): cut it off.

    What is promised is what `tt_cross` promises: no entry is asked for twice, `max_evals` is never exceeded, `error`
    and `converged` are about a sample of the matrix's own entries. Exact at the true ranks.
    Cost: about `2 r^2 sum_k m_k n_k` evaluations and O(r^3 sum_k m_k n_k) operations a sweep.

    Args:
        source: a source of a matrix (out, in), a tensor, or a callable that takes an integer index (B, 2) and returns
            (B,) values. A convolution kernel (out, in, *kernel) is taken as the matrix out x (in kernel).
        shape: needed for a callable.
        row_modes: modes of the rows, product at least m; None chooses balanced ones.
        col_modes: modes of the columns, product at least n, as many as row modes; None chooses balanced ones (of a
            kernel: balanced modes of in, then the kernel sizes, beside row modes 1).
        order: number of modes to choose where they are not given.
        tol: relative error to be met on held-out entries.
        rank: cap for every bond, or an entry for each.
        max_evals: entries asked for at most, held-out ones included.
        max_bytes: stop once so many bytes were read (looked at between batches).
        max_seconds: stop after so many seconds (looked at between batches).
        max_sweeps: sweeps at most.
        start: number of start points, or the points themselves, as (row, column).
        held_out: entries of the last check; a fifth of it guides the sweeps.
        generator: of samples and of random columns.
        progress: called with (sweep, max_sweeps, text) after every sweep; True draws a bar on stderr.

    Returns:
        CrossResult with a TTMatrix in the dtype of the source; `pivots` are index sets of the pairs, `i_k n_k + j_k`.
        Where a limit ends the search it is the best so far.

    Raises:
        ValueError: fewer than two axes, products smaller than the matrix, lengths that differ, a NaN or infinite entry
            (with its index), limits below 1, an impossible rank.
        TypeError: not a source.

    References:
        I. Oseledets, SIAM J. Matrix Anal. Appl. 2010; I. Oseledets, E. Tyrtyshnikov, TT-cross approximation for
        multidimensional arrays, Linear Algebra Appl. 2010.

    Example:
        >>> import torch
        >>> result = ttm_cross(lambda i: torch.cos(0.01 * (i[:, 0] - i[:, 1]).double()), shape=(1000, 900), tol=1e-8)
        >>> result.converged, result.network.ranks, result.network.shape
        (True, (2, 2), (10, 10, 10, 9, 10, 10))
    """
    reports = reporting("ttm_cross", progress)
    opened = open_source("ttm_cross", source, shape)
    check_tol("ttm_cross", tol)
    check_limits(
        "ttm_cross",
        max_evals=max_evals,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        max_sweeps=max_sweeps,
        held_out=held_out,
    )
    sizes = tuple(int(n) for n in opened.shape)
    if len(sizes) < 2:
        raise ValueError(f"ttm_cross: expected a matrix (out, in) or a kernel (out, in, *kernel), got shape {sizes}")
    rows, cols = matrix_modes(sizes, row_modes, col_modes, order)
    check_paired("ttm_cross", rows, cols)
    m, n = sizes[0], prod(sizes[1:])
    if min(*rows, *cols) < 1 or prod(rows) < m or prod(cols) < n:
        raise ValueError(
            f"ttm_cross: the modes must cover the matrix, expected products >= {m} x {n}, "
            f"got row_modes={tuple(rows)} ({prod(rows)}) and col_modes={tuple(cols)} ({prod(cols)})"
        )
    points = _check_start("ttm_cross", start, (m, n))
    pairs = list(zip(rows, cols, strict=True))
    modes = [i * j for i, j in pairs]
    caps = check_ranks("ttm_cross", rank, chain_ranks(modes))
    layout = Quantization((m, n), tuple((axis, pair[axis]) for pair in pairs for axis in (0, 1)))
    second = torch.tensor(cols)

    def fold(index: Tensor) -> Tensor:
        digits = layout.digits(index)
        return digits[:, 0::2] * second + digits[:, 1::2]

    def unfold(index: Tensor) -> Tensor:
        return layout.index(torch.stack([index // second, index % second], 2).flatten(1))

    matrix = opened if len(sizes) == 2 else merge_tail(opened)
    reader = Reader("ttm_cross", matrix, max_evals, max_bytes, max_seconds, reserve=held_out)
    folded = FoldedReader(reader, modes, unfold, fold, "zero")
    monitor = RealEntries(folded, max(2, held_out // 5), generator)
    search = _Search(folded, monitor, float(tol), caps, generator)
    first = points if isinstance(points, int) else fold(points)
    with reports as report:
        result = run_search(search, first, held_out, max_sweeps, report)
    cores = cast(TT, result.network).cores
    shapes = chain_shapes(pairs, [core.shape[-1] for core in cores[:-1]])
    net = TTMatrix([core.reshape(shape) for core, shape in zip(cores, shapes, strict=True)])
    return replace(result, network=net)
