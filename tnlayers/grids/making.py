"""Networks of a grid: by reading it whole, in passes, or from few of its entries."""

import importlib
import warnings
from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, Literal

import torch

from cross_approx import CrossResult, Quantization, Source
from cross_approx.digits import ORDERS, Order
from decompositions.formats.algebra import numel
from decompositions.formats.network import Network
from decompositions.linalg import TruncationWarning
from decompositions.progress import Progress
from decompositions.tt import tt_svd
from decompositions.tucker import st_hosvd

FORMATS = ("tucker", "tt", "qtt")
METHODS = ("auto", "dense", "gram", "sketch", "cross")
DENSE_BYTES = 1 << 30
"""A grid whose entries take at most so much memory is read whole by method auto."""
ELSEWHERE = {
    ("tucker", "cross"): "tucker_cross",
    ("tt", "cross"): "tt_cross",
    ("qtt", "cross"): "qtt_cross",
    ("tucker", "gram"): "tucker_gram",
    ("tt", "gram"): "tt_gram",
    ("tucker", "sketch"): "tucker_sketch",
    ("tt", "sketch"): "tt_sketch",
}
"""Functions of cross_approx; "dense" is here."""
BITS = {"none": 32.0, "int8": 8.0, "planes": 0.75}
"""Bits of a number of the network in the file, with planes about the least seen on volumes."""


def chosen_method(source: Source, format: str, method: str, dense_bytes: int = DENSE_BYTES) -> str:
    """The method that "auto" stands for: dense where the grid fits, else gram, and cross for quantized trains.

    Raises:
        ValueError: a format or a method that is not known, or a pair that does not go together.

    Example:
        >>> import torch
        >>> from cross_approx import as_source
        >>> chosen_method(as_source(torch.zeros(2, 2)), "tucker", "auto")
        'dense'
    """
    if format not in FORMATS:
        raise ValueError(f"grid compress: --format must be one of {', '.join(FORMATS)}, got {format!r}")
    if method not in METHODS:
        raise ValueError(f"grid compress: --method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "auto":
        fits = prod(source.shape) * source.dtype.itemsize <= dense_bytes
        method = "dense" if fits else "cross" if format == "qtt" else "gram"
    if method != "dense" and (format, method) not in ELSEWHERE:
        known = sorted(m for f, m in ELSEWHERE if f == format)
        raise ValueError(f"grid compress: --format {format} takes --method dense, {', '.join(known)}, got {method}")
    return method


def make_network(
    source: Source,
    format: str,
    method: str,
    *,
    tol: float | None = None,
    rank: int | None = None,
    order: Order | Literal["auto"] = "auto",
    limits: dict[str, Any] | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> tuple[CrossResult, Quantization | None]:
    """A network of the grid, and the digits of a quantized one.

    Args:
        source: of the entries.
        format: "tucker", "tt" or "qtt".
        method: "dense" (read whole, ST-HOSVD or TT-SVD), "gram", "sketch", "cross".
        tol: relative error.
        rank: cap of every bond.
        order: of the digits.
        limits: `max_evals`, `max_bytes`, `max_seconds` of crosses.
        generator: of samples and sketches.
        progress: of the method.

    Raises:
        ValueError: a sketch without rank; limits that the method does not take; a method that is not installed.
    """
    given = {name: value for name, value in (limits or {}).items() if value is not None}
    if given and method != "cross":
        raise ValueError(f"grid compress: --{next(iter(given)).replace('_', '-')} is for --method cross, got {method}")
    if method == "dense":
        return _dense(source, format, tol, rank, order)
    function: Any = getattr(importlib.import_module("cross_approx"), ELSEWHERE[format, method], None)
    if function is None:
        raise ValueError(f"grid compress: {ELSEWHERE[format, method]} is not there; take --method dense")
    options: dict[str, Any] = {"progress": progress}
    if method == "sketch":
        if rank is None:
            raise ValueError("grid compress: --method sketch needs --rank, got none; gram takes a tolerance alone")
        return function(source, rank, generator=generator, **options), None
    if tol is not None:
        options["tol"] = tol
    if rank is not None:
        options["rank"] = rank
    if method == "cross":
        options |= {"generator": generator, **given}
    if format == "qtt":
        result = function(source, order=order, **options)
        return result, result.quantization
    return function(source, **options), None


def _dense(
    source: Source, format: str, tol: float | None, rank: int | None, order: Order | Literal["auto"]
) -> tuple[CrossResult, Quantization | None]:
    """All entries, then an SVD; the error is exact."""
    before = source.bytes_read
    x = source.slab(tuple(slice(None) for _ in source.shape)).cpu()
    layout = None
    caps: Any = rank
    if format == "tucker":
        if rank is not None:
            caps = [min(rank, n, prod(x.shape) // n) for n in x.shape]
        net, error = _with_error(st_hosvd, x, caps, tol)
    else:
        found = []
        orders: tuple[Order, ...] = ORDERS if order == "auto" else (order,)
        for name in orders if format == "qtt" else orders[:1]:
            layout = Quantization.of(tuple(x.shape), name) if format == "qtt" else None
            folded = x if layout is None else layout.split(x)
            if rank is not None:
                caps = [min(rank, prod(folded.shape[:k]), prod(folded.shape[k:])) for k in range(1, folded.ndim)]
            found.append((*_with_error(tt_svd, folded, caps, tol), layout))
        # the smallest of equal tolerance, the most exact of equal ranks
        net, error, layout = min(found, key=lambda one: numel(one[0]) if rank is None else one[1])
    read = source.bytes_read - before
    met = tol is None or error <= tol
    count = prod(source.shape)
    return CrossResult(net, count, read, error, count, met, "all entries were read"), layout


def _with_error(decompose: Any, x: torch.Tensor, caps: Any, tol: float | None) -> tuple[Network, float]:
    with warnings.catch_warnings():  # the error is measured on the file anyhow
        warnings.simplefilter("ignore", TruncationWarning)
        net, error = decompose(x, rank=caps, tol=tol, with_error=True)
    return net, float(error)


def rank_for_bytes(shape: Sequence[int], format: str, coding: str, nbytes: int) -> int:
    """The largest rank whose network, coded, may come down to so many bytes; above it there is no need to look.

    Example:
        >>> rank_for_bytes((100, 100, 100), "tt", "none", 4 * (2 * 100 * 5 + 100 * 25))
        5
    """
    sizes = tuple(shape)

    def count(rank: int) -> int:
        caps = [min(rank, n) for n in sizes]
        if format == "tucker":
            return prod(caps) + sum(n * r for n, r in zip(sizes, caps, strict=True))
        inner = [min(rank, prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]
        return sum(a * n * b for a, n, b in zip([1, *inner], sizes, [*inner, 1], strict=True))

    rank, most = 1, max(sizes) if format == "tucker" else round(sqrt(prod(sizes))) + 1
    while rank < most and count(rank + 1) * BITS[coding] / 8 <= nbytes:
        rank += 1
    return rank
