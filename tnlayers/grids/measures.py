"""How far a compressed grid is from its source: all entries box by box, or a stated number of them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, log10, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from cross_approx import Source
from decompositions.progress import Progress
from tnlayers.grids.blocks import boxes, decode_block, decode_entries
from tnlayers.grids.store import Grid

BOX_ENTRIES = 1 << 21
LEAST = 1e-140
"""Entries that are all smaller than this are refused: squares of them, or of their errors, vanish."""


@dataclass(frozen=True)
class Measures:
    """Errors of a compressed grid on `entries` entries of its source (all where `whole`).

    PSNR is `20 log10((high - low) / rms error)` over the range of these entries. An empty volume makes it look good
    where the relative error is large, so both are given, and the PSNR of the foreground: of entries other than
    `background`, with the same range.

    Args:
        entries: compared.
        whole: whether these are all.
        relative_error: `‖A - Â‖ / ‖A‖` over them.
        rms_error: root mean square of the difference.
        max_error: largest absolute difference.
        psnr: in dB.
        foreground_psnr: in dB; None where there is no foreground.
        foreground: number of entries that are not background.
        background: the value.
        low: smallest value.
        high: largest value.
        norm: of the entries compared.

    Example:
        >>> import torch
        >>> from cross_approx import as_source
        >>> from decompositions import TT
        >>> grid = Grid(TT([torch.ones(2, 1), torch.ones(1, 2)]), (2, 2))
        >>> compare_grid(as_source(torch.tensor([[1.0, 1.0], [1.0, 0.0]])), grid).max_error
        1.0
    """

    entries: int
    whole: bool
    relative_error: float
    rms_error: float
    max_error: float
    psnr: float
    foreground_psnr: float | None
    foreground: int
    background: float | None
    low: float
    high: float
    norm: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: None for what is not finite."""
        return {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in asdict(self).items()}

    def text(self) -> str:
        """One line."""
        where = "all entries" if self.whole else f"{self.entries} entries drawn at random"
        fore = "" if self.foreground_psnr is None else f", foreground {self.foreground_psnr:.2f} dB"
        psnr = "no PSNR (one value has no range)" if self.psnr == -inf else f"PSNR {self.psnr:.2f} dB{fore}"
        return f"relative error {self.relative_error:.4g}, {psnr}, max error {self.max_error:.4g} ({where})"


class Sums:
    """Sums over pairs of blocks, in double precision."""

    def __init__(self, background: float | None = 0.0) -> None:
        self.background = background
        self.entries = self.foreground = 0
        self.errors = self.squares = self.foreground_errors = self.largest = 0.0
        self.low, self.high = inf, -inf

    def add(self, exact: Tensor, made: Tensor | None = None) -> None:
        """Take a block of the source, and the same block decoded."""
        if exact.numel() == 0:
            return
        exact = exact.double()
        low, high = (float(v) for v in torch.aminmax(exact))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.entries += exact.numel()
        self.squares += float(exact.square().sum())
        if made is None:
            return
        error = (made.double() - exact).abs()
        squared = error.square()
        self.largest = max(self.largest, float(error.max()))
        self.errors += float(squared.sum())
        inside = torch.ones_like(exact, dtype=torch.bool) if self.background is None else exact != self.background
        self.foreground += int(inside.sum())
        self.foreground_errors += float(squared[inside].sum())

    def measures(self, whole: bool) -> Measures:
        """What the sums say."""
        span = self.high - self.low
        count = max(1, self.entries)
        fore = None if not self.foreground else _psnr(span, self.foreground_errors / self.foreground)
        largest = max(abs(self.low), abs(self.high))
        if self.entries and 0 < largest < LEAST:
            raise ValueError(
                f"grid: squares of the entries must fit double precision, got values up to {largest:.3g}; scale them"
            )
        relative = sqrt(self.errors / self.squares) if self.squares else (inf if self.errors else 0.0)
        return Measures(
            self.entries, whole, relative, sqrt(self.errors / count), self.largest, _psnr(span, self.errors / count),
            fore, self.foreground, self.background, self.low, self.high, sqrt(self.squares),
        )  # fmt: skip


def _psnr(span: float, mean_square: float) -> float:
    if mean_square == 0:
        return inf
    return 20 * log10(span) - 10 * log10(mean_square) if span > 0 else -inf


def tolerance_of_psnr(psnr: float, low: float, high: float, mean_square: float) -> float:
    """Relative error that a PSNR means: `(high - low) 10^(-psnr / 20) / sqrt(mean square of the entries)`.

    Example:
        >>> tolerance_of_psnr(20.0, 0.0, 1.0, 0.25)
        0.2
    """
    return (high - low) * 10 ** (-psnr / 20) / sqrt(mean_square) if mean_square > 0 else 0.0


def compare_grid(
    source: Source,
    grid: Grid,
    *,
    background: float | None = 0.0,
    entries: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Measures:
    """Compare a grid with its source, box by box, or on entries drawn uniformly.

    Memory: a few boxes of 2^21 entries (one chunk of the source where that is more). Cost: one reading of the source
    and one decoding; with `entries` those entries (of a chunked source: the chunks they are in).

    Args:
        source: of the same shape.
        grid: compressed.
        background: value that is not foreground; None: there is none.
        entries: how many to draw; None for all.
        generator: of the draw.
        progress: called with (boxes done, boxes, text).

    Raises:
        ValueError: shapes that differ.
    """
    if tuple(source.shape) != grid.shape:
        raise ValueError(f"grid compare: the source must have the shape {grid.shape}, got {tuple(source.shape)}")
    sums = Sums(background)
    if entries is not None and entries < prod(grid.shape):
        index = draw_entries(grid.shape, entries, generator)
        done = 0
        for part in index.split(1 << 16):
            sums.add(source.entries(part), decode_entries(grid.network, grid.quantization, part))
            done += len(part)
            if progress is not None:
                progress(done, entries, "verify")
        return sums.measures(False)
    for box in walk(source, "compare", progress):
        sums.add(source.slab(box).cpu(), decode_block(grid.network, grid.shape, grid.quantization, box))
    return sums.measures(True)


def statistics(
    source: Source,
    *,
    entries: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Measures:
    """Range and norm of a source, over all entries or some; errors are 0."""
    sums = Sums(None)
    if entries is not None and entries < prod(source.shape):
        sums.add(source.entries(draw_entries(source.shape, entries, generator)).cpu())
        return sums.measures(False)
    for box in walk(source, "range", progress):
        sums.add(source.slab(box).cpu())
    return sums.measures(True)


def draw_entries(shape: Sequence[int], count: int, generator: torch.Generator | None) -> Tensor:
    """Indices drawn uniformly, in the order of the grid, so that neighbours share chunks."""
    index = torch.stack([torch.randint(n, (count,), generator=generator) for n in shape], 1)
    for axis in reversed(range(len(shape))):
        index = index[index[:, axis].argsort(stable=True)]
    return index


def walk(source: Source, what: str, progress: Progress | None) -> Iterator[tuple[slice, ...]]:
    """Boxes of a source, with progress."""
    every = list(boxes(source.shape, BOX_ENTRIES, source.chunks))
    for k, box in enumerate(every):
        yield box
        if progress is not None:
            progress(k + 1, len(every), what)
