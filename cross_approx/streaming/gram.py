"""Tucker and tensor trains of a source too large for memory, by Gram matrices summed in passes over its chunks."""

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import torch
from jaxtyping import Inexact
from torch import Tensor

from cross_approx.result import CrossResult
from cross_approx.streaming.frames import Chain, Frame, Star, project_box
from cross_approx.streaming.passes import (
    BOX_BYTES,
    Box,
    BoxGrid,
    Passes,
    PassState,
    Sums,
    decode_box,
    pieces,
    squared_norm,
)
from decompositions.formats.network import Network
from decompositions.formats.tt import chain_ranks
from decompositions.linalg import (
    check_ranks,
    check_tol,
    full_precision,
    gram,
    gram_is_safe,
    triangle,
    truncation_rank,
    usable_tol,
)
from decompositions.progress import Progress

MEMORY_BYTES = 1 << 28
"""What a projected tensor, or a Gram matrix, may take."""

SINGLE_NOISE = 1e-6
"""What rounding may add to sums of eigenvalues of a Gram matrix in single precision, relative to the trace."""


def tucker_gram(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float | None = None,
    rank: int | Sequence[int] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    box_bytes: int = BOX_BYTES,
    prefetch: bool | None = None,
    progress: bool | Progress | None = None,
    resume: PassState | None = None,
) -> CrossResult:
    """Tucker decomposition of a source of any size: ST-HOSVD whose Gram matrices are summed chunk by chunk.

    A pass that reads whole rows of chunks along mode k one after another sums `A_(k) A_(k)^H` exactly, off-diagonal
    blocks included, and keeps no more than one row. The next pass projects: as soon as the tensor projected on the
    factors found fits into `memory_bytes` the rest happens in memory. So most grids take two passes, one that fits
    takes one, and at most d + 1 are made.

    `‖A - Â‖ <= tol ‖A‖`, the squared errors of the modes adding exactly; with ranks given,
    `‖A - Â‖ <= sqrt(d) ‖A - best of those ranks‖` up to rounding. `error` is that of all entries:
    `‖A‖^2 - ‖core‖^2` in double precision, and where that difference cancels (below about 3e-6 in float64, 1e-4 in
    float32) one more pass measures the residual itself.
    Gram matrices are summed in double precision; of float32 in runs of 4096 terms in single precision where what is
    asked leaves room for its noise, and the pass is repeated if it turns out not to. Where even double precision would
    lose what is asked (float64 and tol below 1e-5 or None), triangles of blocked QR take their place: nothing squared.
    Cost: n_k^2 N / n_k multiplications for the first mode (three quarters by symmetry), r N for each projection of N
    entries. Memory: `memory_bytes` about twice, a row of chunks, two boxes, the source's own cache.

    Args:
        source: anything `as_source` takes.
        shape: mode sizes; needed for a callable.
        tol: relative Frobenius error.
        rank: cap for every mode, or an entry for each.
        memory_bytes: largest projected tensor that is held, and largest Gram matrix.
        box_bytes: bytes read at a time, where chunks are not larger.
        prefetch: a thread reads ahead; None where there are chunks. It changes no bit of the result.
        progress: called with (boxes done, boxes of this pass, text); True draws a bar a pass on stderr.
        resume: a `PassState` that keeps the sums, so that a pass that was stopped goes on.

    Returns:
        CrossResult with a Tucker network in the dtype of the source, factors orthonormal up to its rounding; `history`
        has a line a pass, its error infinite until one is known. `converged` is true where no tol is given.

    Raises:
        PassError: a chunk could not be read; it names the chunk, and its `state` goes on where it stopped.
        ValueError: missing or non-finite values, an impossible rank, neither tol nor rank, memory_bytes too small.

    References:
        N. Vannieuwenhoven, R. Vandebril, K. Meerbergen, SIAM J. Sci. Comput. 2012; G. Ballard, A. Klinvex, T. Kolda,
        TuckerMPI, ACM TOMS 2020, arXiv 1901.06043.

    Example:
        >>> import torch
        >>> x = torch.einsum("i,j,k->ijk", torch.arange(1.0, 9), torch.ones(9), torch.arange(1.0, 8))
        >>> result = tucker_gram(x, tol=1e-3, memory_bytes=1024)
        >>> result.network.ranks, result.converged, result.error < 1e-3
        ((1, 1, 1), True, True)
    """
    passes = Passes(
        "tucker_gram",
        source,
        shape=shape,
        options=(tol, rank, memory_bytes),
        box_bytes=box_bytes,
        prefetch=prefetch,
        progress=progress,
        resume=resume,
    )
    sizes = passes.sizes
    possible = [min(n, prod(sizes) // n) for n in sizes]
    caps = _check("tucker_gram", tol, rank, possible, memory_bytes, "mode")
    return _Task(passes, Star(sizes, caps, free=rank is None), tol, memory_bytes, caps, possible).run()


def tt_gram(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float | None = None,
    rank: int | Sequence[int] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    box_bytes: int = BOX_BYTES,
    prefetch: bool | None = None,
    progress: bool | Progress | None = None,
    resume: PassState | None = None,
) -> CrossResult:
    """Tensor train of a source of any size: TT-SVD from both ends, its Gram matrices summed chunk by chunk.

    As `tucker_gram`: passes cut the first and the last modes off, the smaller Gram matrix first, until the tensor
    projected on both ends fits into `memory_bytes`; the train of that is found in memory.

    `‖A - Â‖ <= tol ‖A‖`; with ranks given, `‖A - Â‖ <= sqrt(d - 1) ‖A - best of those ranks‖` up to rounding. `error`
    and precision are as in `tucker_gram`.
    Cost: (r n)^2 N_k / (r n) multiplications for a cut with r n rows of N_k entries, r N for each projection.

    Args:
        source, shape, tol, memory_bytes, box_bytes, prefetch, progress, resume: as in `tucker_gram`.
        rank: cap for every bond, or d - 1 entries.

    Returns:
        CrossResult with a TT in the dtype of the source; see `tucker_gram`.

    Raises:
        PassError: a chunk could not be read; it names the chunk, and its `state` goes on where it stopped.
        ValueError: missing or non-finite values, an impossible rank, neither tol nor rank, memory_bytes too small.

    References:
        I. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 2011, algorithm 1 and theorem 2.2.

    Example:
        >>> import torch
        >>> x = torch.arange(6.0)[:, None, None] + torch.arange(7.0)[:, None] + torch.arange(8.0)
        >>> result = tt_gram(x, tol=1e-3, memory_bytes=1024)
        >>> result.network.ranks, result.error < 1e-3
        ((2, 2), True)
    """
    passes = Passes(
        "tt_gram",
        source,
        shape=shape,
        options=(tol, rank, memory_bytes),
        box_bytes=box_bytes,
        prefetch=prefetch,
        progress=progress,
        resume=resume,
    )
    sizes = passes.sizes
    possible = chain_ranks(sizes)
    caps = _check("tt_gram", tol, rank, possible, memory_bytes, "bond")
    return _Task(passes, Chain(sizes, caps), tol, memory_bytes, caps, possible).run()


def _check(name: str, tol: float | None, rank: Any, possible: list[int], memory_bytes: int, bond: str) -> list[int]:
    check_tol(name, tol)
    if tol is None and rank is None:
        raise ValueError(f"{name}: expected tol, rank or both, got neither; pass tol=1e-3")
    if not memory_bytes >= 1:
        raise ValueError(f"{name}: memory_bytes must be at least 1, got {memory_bytes}")
    return check_ranks(name, rank, possible, bond)


class _Task:
    """Cuts by passes until the projected tensor fits into memory, then the rest."""

    def __init__(
        self, passes: Passes, frame: Frame, tol: float | None, memory_bytes: int, caps: list[int], possible: list[int]
    ) -> None:
        self.passes, self.frame, self.tol, self.memory_bytes, self.caps = passes, frame, tol, memory_bytes, caps
        self.possible = possible
        self.device, self.work, self.double = passes.source.device, passes.work, passes.double
        self.discarded = 0.0
        self.aim = None if tol is None else usable_tol(float(tol), passes.source.dtype, len(caps))

    @full_precision
    def run(self) -> CrossResult:
        while prod(size for _, size in self.frame.axes()) * self.work.itemsize > self.memory_bytes:
            self.cut(*self.next_cut())
        held, total, lost = self.gather()
        budget = None if self.aim is None else max(0.0, self.aim**2 * total - lost)
        square = squared_norm(held)
        inner = self.frame.inside(
            self.passes.name, held, None if budget is None else sqrt(budget / square) if square else 0.0
        )
        net = self.frame.whole(inner)
        net = net.replace([core.to(self.passes.source.dtype).contiguous() for core in net.cores])
        if not all(bool(torch.isfinite(core).all()) for core in net.cores):
            raise ValueError(f"{self.passes.name}: the cores do not fit {net.dtype}, norm {sqrt(total):.3g}; scale it")
        square = lost + _distance(inner, held)
        exact = (
            not self.frame.covered() and self.work == self.passes.source.dtype
        )  # nothing cancels, nothing is rounded
        if exact:
            error = sqrt(square / total) if total > 0 else 0.0
        else:
            error = self.passes.error_of(net, square, total)
        return self.passes.result(net, error, self.reason(net, error), self.tol)

    def reason(self, net: Network, error: float) -> str:
        """Why it ended as it did."""
        if self.tol is None:
            return "the ranks asked for"
        if error <= self.tol:
            return "the error of all entries meets tol"
        most = zip(net.ranks, self.caps, self.possible, strict=True)
        bound = [k for k, (r, cap, possible) in enumerate(most) if r == cap < possible]
        if bound:
            return f"the rank cap binds at {', '.join(map(str, bound))}"
        return f"{net.dtype} resolves no less"

    def next_cut(self) -> tuple[int, int]:
        """The first cut whose Gram matrix and whose row of chunks fit."""
        needs = []
        for mode, cap in self.frame.choices():
            grid = self.passes.grid((*self.frame.covered(), mode))
            first, last = self.frame.rows(mode)
            side = prod(size for _, size in self.frame.axes()[first : last + 1])
            row = prod(n if k in (None, mode) else grid.extent(k) for k, n in self.frame.axes())
            needs.append(max(side**2, row if grid.group > 1 else 0) * self.double.itemsize)
            if needs[-1] <= self.memory_bytes:
                return mode, cap
        least = min([*needs, prod(size for _, size in self.frame.axes()) * self.work.itemsize])
        raise ValueError(
            f"{self.passes.name}: memory_bytes must hold a Gram matrix and a row of chunks, or the projected tensor, "
            f"expected at least {least} after {len(self.frame.covered())} cuts, got {self.memory_bytes}"
        )

    def cut(self, mode: int, cap: int) -> None:
        """One pass for the basis of a mode."""
        started = bool(self.frame.covered())
        safe = gram_is_safe(self.work, self.tol)
        small = self.tol is not None and self.tol**2 < 20 * SINGLE_NOISE * self.frame.cuts_left()
        single = self.work in (torch.float32, torch.complex64) and not small and not started
        single = single and torch.get_float32_matmul_precision() == "highest"
        squares, vectors, total = self.spectrum(mode, single, safe)
        if single and not _trusted(
            squares, cap, None if self.aim is None else self.aim**2 * total / self.frame.cuts_left()
        ):
            squares, vectors, total = self.spectrum(mode, False, safe)
        rank = min(cap, len(squares))
        if self.aim is not None:
            budget = max(0.0, self.aim**2 * total - self.lost(total, float(squares.sum()))) / self.frame.cuts_left()
            rank = truncation_rank(squares, budget, cap)
        self.discarded += float(squares[rank:].sum())
        self.passes.note(float("inf"), rank)
        self.frame.add(mode, vectors[:, :rank].contiguous())

    def lost(self, total: float, kept: float) -> float:
        """What the projection lost: the difference of norms, or what the cuts dropped where that difference cancels."""
        difference = total - kept if self.frame.covered() else 0.0
        return difference if difference > 1e-12 * total else min(self.discarded, 1e-12 * total)

    def spectrum(self, mode: int, single: bool, safe: bool) -> tuple[Tensor, Tensor, float]:
        """Squared singular values and left singular vectors of the projected unfolding, and `‖A‖^2`, by a pass."""
        frame, started = self.frame, bool(self.frame.covered())
        inner = (*frame.covered(), mode)
        axes = frame.axes()
        first, last = frame.rows(mode)
        side = prod(size for _, size in axes[first : last + 1])
        group = self.passes.grid(inner).group

        def begin(grid: BoxGrid) -> Sums:
            real = torch.zeros((), dtype=torch.float64, device=self.device)
            matrix = torch.zeros(side, side, dtype=self.double, device=self.device)
            return {"matrix": matrix, "total": real, "seen": torch.zeros((), dtype=torch.int64)}

        def step(sums: Sums, box: Box, values: Tensor) -> None:
            if started:
                part, square = project_box(frame, values, box, self.double)
                sums["total"] += square
            else:
                part = values.to(self.work)
            sums["seen"] += 1
            if group > 1:
                if int(sums["seen"]) % group == 1:
                    shape = [n if k in (None, mode) else box[k].stop - box[k].start for k, n in axes]
                    sums["row"] = part.new_zeros(shape)
                sums["row"][tuple(box[k] if k == mode else slice(None) for k, _ in axes)] += part
                if int(sums["seen"]) % group:
                    return
                part = sums.pop("row")
            slices = part.reshape(prod(part.shape[:first]), side, -1)
            if safe:
                sums["matrix"] += _gram(slices, single)
            else:
                new = triangle(slices)
                sums["matrix"] = triangle(torch.cat([sums["matrix"], new], 1))

        sums = self.passes.sweep(f"Gram matrix of mode {mode}", inner, begin, step)
        if safe:
            squares, vectors = torch.linalg.eigh(sums["matrix"])
            squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
        else:
            vectors, s, _ = torch.linalg.svd(sums["matrix"])
            squares = s.square()
        return squares, vectors, float(sums["total"]) if started else float(squares.sum())

    def gather(self) -> tuple[Tensor, float, float]:
        """The projected tensor, `‖A‖^2`, and the squared norm of what the projection lost, by a pass."""
        frame, axes = self.frame, self.frame.axes()
        inner = frame.covered()
        group = self.passes.grid(inner).group

        def begin(grid: BoxGrid) -> Sums:
            real = torch.zeros((), dtype=torch.float64, device=self.device)
            held = torch.empty([size for _, size in axes], dtype=self.work, device=self.device)
            return {"held": held, "total": real, "kept": real.clone(), "seen": torch.zeros((), dtype=torch.int64)}

        def step(sums: Sums, box: Box, values: Tensor) -> None:
            part, square = project_box(frame, values, box, self.double)
            sums["total"] += square
            sums["seen"] += 1
            if group > 1:
                if int(sums["seen"]) % group != 1:
                    part = sums["row"].add_(part)
                if int(sums["seen"]) % group:
                    sums["row"] = part
                    return
                sums.pop("row")
            sums["kept"] += squared_norm(part)
            sums["held"][tuple(slice(None) if k is None else box[k] for k, _ in axes)] = part.to(self.work)

        sums = self.passes.sweep("projection", inner, begin, step)
        total, kept = float(sums["total"]), float(sums["kept"])
        if not 0 <= total < float("inf"):
            raise ValueError(f"{self.passes.name}: squares must fit double precision, got a sum of {total}; scale it")
        return sums["held"], total, self.lost(total, kept)


def _gram(slices: Inexact[Tensor, "p m q"], single: bool) -> Inexact[Tensor, "m m"]:
    """The Gram matrix; in double precision after all where squares leave the range of single precision."""
    if single:
        matrix = gram(slices, single=True)
        if 1e-20 <= float(matrix.diagonal().real.sum()) <= 1e30:
            return matrix
    return gram(slices)


def _trusted(squares: Tensor, cap: int, budget: float | None) -> bool:
    """Whether the noise of single precision changes hardly anything of what is left out."""
    noise = SINGLE_NOISE * float(squares.sum())
    rank = cap if budget is None else truncation_rank(squares, budget, cap)
    if rank >= len(squares):
        return True
    left, gap = float(squares[rank:].sum()), float(squares[rank - 1] - squares[rank])
    # Davis and Kahan: what the leading eigenvectors hold less than the best
    loss = noise * min(sqrt(2 * rank), 2 * sqrt(2) * noise / gap if gap > 4 * noise else float("inf"))
    return loss <= 1e-3 * (left - noise)


def _distance(net: Network, exact: Tensor) -> float:
    """`‖exact - net‖^2` by pieces, in double precision."""
    wide = net.to(torch.promote_types(exact.dtype, torch.float64))
    square, box = 0.0, tuple(slice(0, n) for n in exact.shape)
    # a decoded piece has its axes in another order: small ones are read across within the cache
    for part, x in pieces(box, exact, count=-(-exact.numel() // (1 << 17))):
        square += squared_norm(x.to(wide.dtype) - decode_box(wide, part))
    return square
