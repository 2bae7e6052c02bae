"""Quantized tensor trains from few entries: axes of any size split into digits, their order chosen by a probe."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor

from cross_approx.digits import ORDERS, Quantization
from cross_approx.reading.folded import FoldedReader, RealEntries
from cross_approx.reading.reader import LimitReached, Reader, check_limits, open_source
from cross_approx.result import CrossResult
from cross_approx.tt import _check_start, _Search, run_search
from decompositions.formats.tt import chain_ranks
from decompositions.linalg import check_ranks, check_tol
from decompositions.progress import Progress, reporting

PROBE_TOL = 1e-4
"""The error at which orders of digits are compared, unless the tolerance is larger."""

PROBE_RANK = 8
"""Ranks of the comparison."""

PROBE_SWEEPS = 4
"""Sweeps of the comparison, for each order."""


def qtt_cross(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    order: Literal["auto", "C", "F", "interleaved"] | Quantization = "auto",
    tol: int | float = 1e-6,
    rank: int | Sequence[int] | None = None,
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    max_sweeps: int = 40,
    start: int | Int[Tensor, "p d"] = 2,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
    progress: bool | Progress | None = None,
) -> CrossResult:
    """Quantized tensor train (QTT) from few entries: `tt_cross` over the digits of the indices, axes of any size.

    Every axis is written in digits, see `Quantization.of`: exactly where its size has prime factors up to 13 alone,
    else padded to a product of factors up to 7. What is padded repeats the last value of the axis: it is never asked
    for, and no error is measured there. (Zeros instead gave up to twice the parameters; both are free.)

    order="auto" runs a small cross (rank 8, error 1e-4, four sweeps) for each order on one memory of entries, and goes
    on with the best: the one of fewest parameters among those that met that error, else the one of least error. A
    function may need more of the order chosen at a small tol: name the order where it is known.

    For functions, and data nearly of low rank. Where singular values fall slowly (images, measured volumes), what a
    cross leaves out grows at every one of the many bonds: `tt_svd` of `Quantization.split`, or a sketch of
    `split_digits`, reads all and is far better (MNI brain, rank 24: relative error 0.17 against 0.6).

    What is promised is what `tt_cross` promises: no entry is asked for twice, by the probe and by the search together;
    `max_evals` is never exceeded; `error` and `converged` are about a sample of the tensor's own entries. Exact at the
    true ranks: 1 for exponentials, 2 for a sine, p + 1 for polynomials of degree p (of one linear form of the
    indices). Cost: about `2 m n r^2` evaluations for m digits up to n; the probe up to three small crosses.

    Args:
        source: a source (`shape, dtype, entries(index)`), a tensor, or a callable that takes an integer index (B, d)
            and returns (B,) values.
        shape: sizes of the axes; needed for a callable.
        order: of the digits in the train: "C" (all of axis 0 first), "F" (of the last axis first), "interleaved" (the
            coarse ones of all axes first), "auto", or a Quantization of that shape.
        tol: relative error to be met on held-out entries.
        rank: cap for every bond, or an entry for each (of a train whose order is given).
        max_evals: entries asked for at most, those of the probe and held-out ones included.
        max_bytes: stop once so many bytes were read (looked at between batches).
        max_seconds: stop after so many seconds (looked at between batches).
        max_sweeps: sweeps at most after the probe.
        start: number of start points, or the points themselves, as indices of the axes.
        held_out: entries of the last check; a fifth of it guides the sweeps.
        generator: of samples and of random columns.
        progress: called with (sweep, max_sweeps, text) after every sweep that is not of the probe; True
            draws a bar on stderr.

    Returns:
        CrossResult with a TT over the digits and `quantization`, which maps indices to digits; `pivots` are in digits,
        and `history` begins with the sweeps of the probe in the order chosen. Where a limit ends the search or the
        probe it is the best so far.

    Raises:
        ValueError: a NaN or infinite entry (with its index), a shape that does not fit, limits below 1, an impossible
            rank, another order.
        TypeError: not a source.

    References:
        B. Khoromskij, O(d log N)-quantics approximation of N-d tensors, Constr. Approx. 2011; I. Oseledets,
        Constructive representation of functions in low-rank tensor formats, Constr. Approx. 2013.

    Example:
        >>> import torch
        >>> result = qtt_cross(lambda i: torch.sin(1e-4 * i.double().sum(1)), shape=(2**20, 1000), tol=1e-8)
        >>> result.converged, max(result.network.ranks), result.evaluations < 10_000
        (True, 2, True)
        >>> digits = result.quantization.digits(torch.tensor([[5, 7]]))
        >>> digits.shape[1] == len(result.network.cores)
        True
    """
    reports = reporting("qtt_cross", progress)
    opened = open_source("qtt_cross", source, shape)
    check_tol("qtt_cross", tol)
    check_limits(
        "qtt_cross",
        max_evals=max_evals,
        max_bytes=max_bytes,
        max_seconds=max_seconds,
        max_sweeps=max_sweeps,
        held_out=held_out,
    )
    sizes = tuple(int(n) for n in opened.shape)
    layouts = _layouts(sizes, order)
    points = _check_start("qtt_cross", start, sizes)
    if len(layouts) > 1 and rank is not None and not isinstance(rank, int):
        raise ValueError(f"qtt_cross: ranks of every bond need an order, expected order= or an int, got rank={rank}")
    caps = [check_ranks("qtt_cross", rank, chain_ranks(layout.sizes)) for layout in layouts]
    reader = Reader("qtt_cross", opened, max_evals, max_bytes, max_seconds, reserve=held_out)
    searches = []
    for layout, cap in zip(layouts, caps, strict=True):
        folded = FoldedReader(reader, layout.sizes, layout.index, layout.digits, "edge")
        monitor = RealEntries(folded, max(2, held_out // 5), generator)
        searches.append(_Search(folded, monitor, float(tol), cap, generator))
    starts = [points if isinstance(points, int) else layout.digits(points) for layout in layouts]
    best = 0
    if len(layouts) > 1:
        limited = _probe(searches, starts)
        if limited is not None:
            best = min(range(len(searches)), key=lambda k: _error(searches[k]))
            return replace(searches[best].result(limited), quantization=layouts[best])
        best = min(range(len(searches)), key=lambda k: _score(searches[k]))
        searches[best].aim(float(tol), caps[best])
    first = starts[best] if len(layouts) == 1 else None
    with reports as report:
        result = run_search(searches[best], first, held_out, max_sweeps, report)
    return replace(result, quantization=layouts[best])


def _layouts(sizes: tuple[int, ...], order: str | Quantization) -> list[Quantization]:
    """The quantizations to choose from; orders that are the same digits count once."""
    if isinstance(order, Quantization):
        if order.shape != sizes:
            raise ValueError(f"qtt_cross: the order must be a Quantization of shape {sizes}, got one of {order.shape}")
        return [order]
    if order == "auto":
        return list(dict.fromkeys(Quantization.of(sizes, name) for name in ORDERS))
    for name in ORDERS:
        if order == name:
            return [Quantization.of(sizes, name)]
    raise ValueError(
        f"qtt_cross: order must be 'auto', {', '.join(map(repr, ORDERS))} or a Quantization, got {order!r}"
    )


def _probe(searches: list[_Search], starts: list[int | Tensor]) -> str | None:
    """A few sweeps at low accuracy with every order; the limit that was reached, if any."""
    try:
        for search, start in zip(searches, starts, strict=True):
            search.aim(max(search.tol, PROBE_TOL), [min(cap, PROBE_RANK) for cap in search.caps])
            if search is not searches[0]:  # one held-out sample for all orders
                cast(RealEntries, search.monitor).take(cast(RealEntries, searches[0].monitor))
            search.begin(start)
            for _ in range(PROBE_SWEEPS):
                search.sweep()
                if search.history[-1].error <= search.tol:
                    break
    except LimitReached as limit:
        return str(limit)
    return None


def _score(search: _Search) -> tuple[bool, float]:
    """Smaller is better: the parameters of a train that is good enough, else its error."""
    met = _error(search) <= search.tol
    return not met, float(sum(core.numel() for core in search.best[2])) if met and search.best else _error(search)


def _error(search: _Search) -> float:
    return search.best[0] if search.best else inf
