"""Tensor trains from few entries."""

from collections.abc import Callable, Sequence
from math import inf, sqrt
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cross_approx.held_out import HeldOut
from cross_approx.maxvol import dominant_rows, more_rows
from cross_approx.reader import LimitReached, Reader, check_limits, open_source
from cross_approx.result import CrossResult, Sweep
from decompositions.formats.gauge import round as round_network
from decompositions.formats.tt import TT, chain_ranks
from decompositions.linalg import check_ranks, check_tol, safe_svd

Progress = Callable[[int, int, str], None]

KEPT = 2.0
"""How much larger the coefficient of another row has to be to displace a pivot of the sweep before."""


def tt_cross(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float = 1e-6,
    rank: int | Sequence[int] | None = None,
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    max_sweeps: int = 40,
    start: int | Int[Tensor, "p d"] = 2,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> CrossResult:
    """Tensor train from few entries: `A ≈ C_1 P_1^-1 C_2 P_2^-1 ... C_d` with fibers C_k and crossings P_k.

    Sweeps in both directions. At every bond the entries at (rows: pivots behind) x (one mode) x (columns: pivots ahead
    and a few more) are read; the rank is what their singular values show above the tolerance, the new pivots are rows
    of dominant volume of the left singular vectors, and more rows, of a rectangular maxvol, chosen at random and
    through the worst held-out entries, become the columns of the sweep back, so that the ranks can grow. Pivots are
    nested in the direction of the last sweep: the train equals A where all indices but the last are a pivot, and
    nothing is inverted but dominant submatrices of orthonormal bases. Where `rank` binds, up to twice as many
    pivots (4 more at least) are used and the train is rounded to it, which comes close to the best train of that rank
    (and interpolates no longer).

    What is promised: no entry is asked for twice and `max_evals` is never exceeded; `converged` only if the relative
    error on a fresh sample of `held_out` entries, none of which the cores were made from, is at most tol. Half of these
    are uniform: with k = held_out / 2, a region that holds the fraction 3 / k of the entries is missed with probability
    5 %. The others are near the largest values read. A peak that no entry read shows is not found by any such method.
    Cost: about `2 d n r^2` evaluations in all, O(d n r^3) operations a sweep.

    Args:
        source: a source (`shape, dtype, entries(index)`), a tensor, or a callable that takes an integer index (B, d)
            and returns (B,) values.
        shape: mode sizes; needed for a callable.
        tol: relative error to be met on held-out entries.
        rank: cap for every bond, or an entry for each.
        max_evals: entries asked for at most, held-out ones included.
        max_bytes: stop once so many bytes were read (looked at between batches).
        max_seconds: stop after so many seconds (looked at between batches).
        max_sweeps: sweeps at most, a sweep being one pass in one direction.
        start: number of start points, chosen among uniform samples by size, or the points themselves.
        held_out: entries of the last check; a fifth of it guides the sweeps.
        generator: of samples and of random columns.
        progress: called with (sweep, max_sweeps, text) after every sweep.

    Returns:
        CrossResult with a TT in the dtype of the source; `pivots[k]` are the index sets of bond k in the direction of
        the last sweep: (p, k + 1) leading indices, or (p, d - 1 - k) trailing ones. Where a limit ends the search it is
        the best so far.

    Raises:
        ValueError: a NaN or infinite entry (with its index), a shape that does not fit, limits below 1, an impossible
            rank, a start point outside.
        TypeError: not a source.

    References:
        I. Oseledets, E. Tyrtyshnikov, TT-cross approximation for multidimensional arrays, Linear Algebra Appl. 2010;
        A. Mikhalev, I. Oseledets, arXiv 1502.07838; D. Savostyanov, Linear Algebra Appl. 2014, arXiv 1305.1818.

    Example:
        >>> import torch
        >>> result = tt_cross(lambda i: 1 / (1.0 + i.double().sum(1)), shape=(20,) * 6, tol=1e-6)
        >>> result.converged, result.error <= 1e-6, result.evaluations < 100_000
        (True, True, True)
    """
    opened = open_source("tt_cross", source, shape)
    check_tol("tt_cross", tol)
    limits = {"max_evals": max_evals, "max_bytes": max_bytes, "max_seconds": max_seconds, "max_sweeps": max_sweeps}
    check_limits("tt_cross", **limits, held_out=held_out)
    sizes = tuple(int(n) for n in opened.shape)
    caps = check_ranks("tt_cross", rank, chain_ranks(sizes))
    points = _check_start("tt_cross", start, sizes)
    reader = Reader("tt_cross", opened, max_evals, max_bytes, max_seconds)
    monitor = HeldOut(reader, max(2, held_out // 5), generator)
    search = _Search(reader, monitor, float(tol), caps, generator)
    return run_search(search, points, held_out, max_sweeps, progress)


def run_search(
    search: "_Search", start: int | Tensor | None, held_out: int, max_sweeps: int, progress: Progress | None
) -> CrossResult:
    """Sweep until tol, a limit or a standstill; from start points, or (None) on from where the search is."""
    reason = f"max_sweeps = {max_sweeps}"
    try:
        if start is not None:
            search.begin(start)
        for number in range(1, max_sweeps + 1):
            search.sweep()
            if progress is not None:
                line = search.history[-1]
                text = f"error {line.error:.1e}, rank {line.rank}, {line.evaluations} evaluations"
                progress(number, max_sweeps, text)
            verdict = search.verdict(held_out)
            if verdict is not None:
                reason = verdict
                break
    except LimitReached as limit:
        reason = str(limit)
    return search.result(reason)


def _check_start(name: str, start: int | Tensor, sizes: tuple[int, ...]) -> int | Tensor:
    if isinstance(start, Tensor):
        fits = start.ndim == 2 and start.shape[1] == len(sizes) and len(start) > 0
        if not fits or start.is_floating_point() or bool(((start < 0) | (start.cpu() >= torch.tensor(sizes))).any()):
            raise ValueError(
                f"{name}: start points are rows of indices in range, expected (p, {len(sizes)}) integers below "
                f"{sizes}, got shape {tuple(start.shape)} of {start.dtype}"
            )
        return start.detach().cpu().long()
    if isinstance(start, bool) or not isinstance(start, Integral) or start < 1:
        raise ValueError(f"{name}: start must be a number of points >= 1 or the points, got {start!r}")
    return int(start)


class _Search:
    """The state between sweeps. Sets are kept in the order of the sweep: backward ones see the modes reversed."""

    def __init__(
        self, reader: Reader, monitor: HeldOut, tol: float, caps: list[int], generator: torch.Generator | None
    ) -> None:
        self.reader, self.monitor, self.generator = reader, monitor, generator
        self.order = len(reader.sizes)
        self.forward = True
        self.aim(tol, caps)
        self.pivots: dict[bool, list[Tensor]] = {}  # of the last sweep in either direction
        self.history: list[Sweep] = []
        self.best: tuple[float, int, list[Tensor], list[Tensor]] | None = None
        self.converged = False
        self.full = self.capped = self.at_floor = False

    def aim(self, tol: float, caps: list[int]) -> None:
        """What to reach from here on."""
        self.tol, self.caps = tol, caps
        self.cut = 0.5 * tol / sqrt(max(1, self.order - 1))  # relative to the root mean square of A

    def begin(self, start: int | Tensor) -> None:
        """Columns of the first sweep: the trailing indices of the start points."""
        self.monitor.refresh()
        if not isinstance(start, Tensor):
            start = self.monitor.index[self.monitor.values.abs().argsort(descending=True)[:start]]
        self.ahead = [_distinct(start[:, k:]) for k in range(self.order + 1)]

    def sweep(self) -> None:
        """One pass: cores, pivots behind, and the columns of the pass back."""
        sizes = self.reader.sizes if self.forward else self.reader.sizes[::-1]
        possible = chain_ranks(sizes)
        caps = [
            min(max(2 * cap, cap + 4), most)
            for cap, most in zip(self.caps, chain_ranks(self.reader.sizes), strict=True)
        ]
        caps = caps if self.forward else caps[::-1]
        scale = sqrt(self.monitor.mean_square())
        noise = 4 * torch.finfo(self.reader.dtype).eps
        kept = self.pivots.get(self.forward)
        worst = self._worst()
        behind = [torch.zeros(1, 0, dtype=torch.long)]
        columns, cores, full, capped, floors = [behind[0]], [], False, False, []
        for k in range(self.order - 1):
            values = self._block(behind[k], sizes[k], self.ahead[k + 1])
            u, s, _ = safe_svd(values)
            tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
            size, least = float(tails[0]), self.cut * scale * sqrt(values.numel())
            shown = max(1, int((tails > max(least, noise * size)).sum()))
            r = min(shown, caps[k])
            floors.append(least <= noise * size)
            capped |= r < shown or (r == values.shape[1] == caps[k] < possible[k])
            saturated = r == values.shape[1] and r < caps[k]
            full |= saturated
            choices = _grid(behind[k], sizes[k])
            weights = torch.ones(len(choices), 1, dtype=values.dtype)
            if kept is not None:
                weights[_member(choices, kept[k + 1])] = KEPT
            rows, _ = dominant_rows(weights * u[:, :r], 0.1)
            core = torch.linalg.solve(u[rows, :r], u[:, :r], left=False)
            cores.append(core.reshape(len(behind[k]), sizes[k], r))
            behind.append(choices[rows])
            room = min(len(choices), max(r, caps[k]) + 2)
            more = min(room, r + (max(2, r // 2) if saturated else 1))
            extra = [choices[more_rows(core, rows, 1.0, more, more)]]
            if r < caps[k]:
                extra.append(choices[torch.randint(len(choices), (1,), generator=self.generator)])
                extra.append(worst[:, : k + 1])
            columns.append(_distinct(torch.cat([behind[-1], *extra])))
        last = self._block(behind[-1], sizes[-1], torch.zeros(1, 0, dtype=torch.long))
        cores.append(last.reshape(len(behind[-1]), sizes[-1], 1))
        if not self.forward:
            cores = [core.permute(2, 1, 0) for core in reversed(cores)]
        if any(core.shape[2] > cap for core, cap in zip(cores[:-1], self.caps, strict=True)):
            capped, cores = True, _with_ends(round_network(TT(_without_ends(cores)), rank=tuple(self.caps)).cores)
        self.pivots[self.forward] = behind
        self.full, self.capped, self.at_floor = full, capped, all(floors)
        self._measure([core.to(self.reader.dtype) for core in cores], behind[1:])
        # the pass back sees the modes reversed: what was behind is ahead
        self.ahead = [columns[self.order - k].flip(1) if k else behind[0] for k in range(self.order)]
        self.ahead.append(behind[0])
        self.forward = not self.forward

    def verdict(self, held_out: int) -> str | None:
        """Why to stop, or None."""
        errors = [line.error for line in self.history]
        if errors[-1] <= self.tol:
            fresh = type(self.monitor)(self.reader, held_out, self.generator)
            fresh.refresh()
            cores = self._last
            error = fresh.relative(fresh.errors(cores))
            if error <= self.tol:
                self.converged = True
                self.best = (error, len(fresh.index), cores, self._last_pivots)
                return "the held-out error meets tol"
            self.monitor.join(fresh)
            self.history[-1] = self.history[-1]._replace(error=error)
            self.best = (error, len(fresh.index), cores, self._last_pivots)
            errors[-1] = error
        eps = torch.finfo(self.reader.dtype).eps
        stuck = len(errors) > 3 and min(errors[-3:]) > 0.7 * min(errors[:-3])
        if stuck and self.capped and not self.full:
            return "the rank cap binds"
        if stuck and (self.at_floor or min(errors) <= 1e3 * eps):
            return f"the noise floor of {self.reader.dtype}: more sweeps do not lower the error"
        if len(errors) > 12 and min(errors[-12:]) > 0.9 * min(errors[:-12]):
            return "stalled: twelve sweeps did not lower the error"
        if not (self.full or self.capped):
            self.cut /= 4  # nothing is left above the cut, and the error is: singular values below it matter
        return None

    def result(self, reason: str) -> CrossResult:
        """The best train so far."""
        if self.best is None:  # a limit ended the first sweep
            zeros = [torch.zeros(1, n, 1, dtype=self.reader.dtype) for n in self.reader.sizes]
            self.best = (inf, 0, zeros, [])
            reason += " before the first sweep ended: the network is zero"
        error, count, cores, pivots = self.best
        cores = [core.to(self.reader.source.device) for core in cores]
        return CrossResult(
            network=TT([core.contiguous() for core in _without_ends(cores)]),
            evaluations=self.reader.evaluations,
            bytes_read=self.reader.bytes_read,
            error=error,
            held_out=count,
            converged=self.converged,
            reason=reason,
            history=tuple(self.history),
            pivots=tuple(pivots),
        )

    def _measure(self, cores: list[Tensor], behind: list[Tensor]) -> None:
        self._last = cores
        self._last_pivots = behind if self.forward else [pivots.flip(1) for pivots in reversed(behind)]
        error, count = inf, 0
        try:
            self.monitor.refresh()
        finally:  # a limit may leave fewer entries, of which none was used
            self._errors = self.monitor.errors(cores)
            if len(self._errors):
                error, count = self.monitor.relative(self._errors), len(self._errors)
            line = Sweep(len(self.history) + 1, self.reader.evaluations, error, max([1, *self._ranks()]))
            self.history.append(line)
            if self.best is None or error <= self.best[0]:
                self.best = (error, count, cores, self._last_pivots)

    def _worst(self) -> Tensor:
        """The held-out entries of largest error, in the order of the sweep; they are used from here on."""
        if not self.history or self.monitor.exhausted or len(self._errors) != len(self.monitor.index):
            return torch.zeros(0, self.order, dtype=torch.long)
        largest = self._errors.topk(min(2, len(self._errors)))
        index = self.monitor.index[largest.indices[largest.values > 0]]
        return index if self.forward else index.flip(1)

    def _ranks(self) -> list[int]:
        return [core.shape[2] for core in self._last[:-1]]

    def _block(self, behind: Tensor, n: int, ahead: Tensor) -> Tensor:
        """Entries at behind x mode x ahead as a matrix (behind and mode, ahead)."""
        parts = []
        rows = _grid(behind, n)
        for part in rows.split(max(1, (1 << 18) // len(ahead))):
            index = torch.cat([part.repeat_interleave(len(ahead), 0), ahead.repeat(len(part), 1)], 1)
            parts.append(self.reader.read(index if self.forward else index.flip(1)))
        return torch.cat(parts).reshape(len(rows), len(ahead))


def _without_ends(cores: Sequence[Tensor]) -> list[Tensor]:
    """Cores of a train without the boundary ranks."""
    cores = [cores[0].squeeze(0), *cores[1:]]
    return [*cores[:-1], cores[-1].squeeze(-1)]


def _with_ends(cores: Sequence[Tensor]) -> list[Tensor]:
    cores = [cores[0].unsqueeze(0), *cores[1:]]
    return [*cores[:-1], cores[-1].unsqueeze(-1)]


def _grid(behind: Tensor, n: int) -> Tensor:
    """All rows of `behind` continued by all indices of one mode, the mode running faster."""
    mode = torch.arange(n).repeat(len(behind))[:, None]
    return torch.cat([behind.repeat_interleave(n, 0), mode], 1)


def _distinct(rows: Tensor) -> Tensor:
    return rows.unique(dim=0) if rows.shape[1] else rows[:1]


def _member(rows: Tensor, others: Tensor) -> Tensor:
    """Which rows are among the others."""
    _, number = torch.cat([others, rows]).unique(dim=0, return_inverse=True)
    return torch.isin(number[len(others) :], number[: len(others)])
