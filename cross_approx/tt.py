"""Tensor trains from few entries."""

from collections.abc import Sequence
from contextlib import suppress
from math import inf, sqrt
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cross_approx.maxvol import KEPT, dominant_rows, more_rows
from cross_approx.reading.chunk_choice import ChunkChoice, KnownSource, choose_chunks, monitor_of
from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import Entries, LimitReached, Reader, check_limits, norm, open_source
from cross_approx.reading.slabs import fit_capped_train
from cross_approx.result import CrossResult, Sweep
from decompositions.formats.gauge import round as round_network
from decompositions.formats.tt import TT, chain_ranks
from decompositions.linalg import check_ranks, check_tol, safe_svd
from decompositions.progress import Progress, reporting

PROBES = 6
"""Rows, at least, in which a further column is compared with what the others say about it before it is read."""


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
    chunk_fraction: int | float | None = None,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
    progress: bool | Progress | None = None,
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

    A column beyond the nested ones is compared in a few rows with what those say about it, and read whole only where
    it differs.

    What is promised: no entry is asked for twice and `max_evals` is never exceeded; `converged` only if the relative
    error on a sample of `held_out` entries, which neither made the cores nor guided the search, is at most tol. Half of
    these are uniform: with k = held_out / 2, a region that holds the fraction 3 / k of the entries is missed with
    probability 5 %. The others are near the largest values read. A peak that no entry read shows is not found by any
    such method. An end without convergence states the error on such a sample too: up to a quarter of `max_evals` is
    kept for it; where time or bytes are used up the sample is the one that guided the search, as `held_out` of the
    result shows.
    Cost: about `2 d n r^2` evaluations in all, O(d n r^3) operations a sweep.

    Args:
        source: a source (`shape, dtype, entries(index)`), a tensor, or a callable that takes an integer index (B, d)
            and returns (B,) values.
        shape: mode sizes; needed for a callable.
        tol: relative error to be met on held-out entries.
        rank: cap for every bond, or an entry for each.
        max_evals: entries asked for at most, held-out ones included.
        max_bytes: stop once so many bytes were read (looked at between batches).
        max_seconds: stop after so many seconds (looked at between batches, which are made small enough for it).
        max_sweeps: sweeps at most, a sweep being one pass in one direction.
        start: number of start points, chosen among uniform samples by size, or the points themselves.
        chunk_fraction: part of the bytes of a chunked source that may be touched, as in `ChunkChoice`: pivots stay in a
            few columns of chunks, and the uniform held-out entries come from some random chunks. Where `rank` binds the
            train is then fitted to slabs, as `tucker_cross` does. None: all.
        held_out: entries of the last check; a fifth of it guides the sweeps.
        generator: of samples and of random columns.
        progress: called with (sweep, max_sweeps, text) after every sweep; True draws a bar on stderr.

    Returns:
        CrossResult with a TT in the dtype of the source; `pivots[k]` are the index sets of bond k in the direction of
        the last sweep: (p, k + 1) leading indices, or (p, d - 1 - k) trailing ones. Where a limit ends the search it is
        the best so far.

    Raises:
        ValueError: a NaN or infinite entry (with its index), a shape that does not fit, limits below 1, an impossible
            rank, a start point outside.
        TypeError: not a source, a count that is no integer, values of another dtype than before.

    References:
        I. Oseledets, E. Tyrtyshnikov, TT-cross approximation for multidimensional arrays, Linear Algebra Appl. 2010;
        A. Mikhalev, I. Oseledets, arXiv 1502.07838; D. Savostyanov, Linear Algebra Appl. 2014, arXiv 1305.1818.

    Example:
        >>> import torch
        >>> result = tt_cross(lambda i: 1 / (1.0 + i.double().sum(1)), shape=(20,) * 6, tol=1e-6)
        >>> result.converged, result.error <= 1e-6, result.evaluations < 100_000
        (True, True, True)
    """
    reports = reporting("tt_cross", progress)
    opened = open_source("tt_cross", source, shape)
    check_tol("tt_cross", tol)
    limits = {"max_evals": max_evals, "max_bytes": max_bytes, "max_seconds": max_seconds, "max_sweeps": max_sweeps}
    check_limits("tt_cross", **limits, held_out=held_out)
    sizes = tuple(int(n) for n in opened.shape)
    caps = check_ranks("tt_cross", rank, chain_ranks(sizes))
    points = _check_start("tt_cross", start, sizes)
    choice = choose_chunks("tt_cross", opened, chunk_fraction, generator)
    known = opened if choice is None else KnownSource(opened, choice)
    reader = Reader("tt_cross", known, max_evals, max_bytes, max_seconds, reserve=held_out)
    monitor = monitor_of(reader, max(2, held_out // 5), generator, choice)
    search = _Search(reader, monitor, float(tol), caps, generator, choice)
    with reports as report:
        return run_search(search, points, held_out, max_sweeps, report)


def run_search(
    search: "_Search", start: int | Tensor | None, held_out: int, max_sweeps: int, report: Progress
) -> CrossResult:
    """Sweep until tol, a limit or a standstill; from start points, or (None) on from where the search is."""
    reason = f"max_sweeps = {max_sweeps}"
    try:
        if start is not None:
            search.begin(start)
        for number in range(1, max_sweeps + 1):
            search.sweep()
            report(number, max_sweeps, search.history[-1].text)
            verdict = search.verdict(held_out)
            if verdict is not None:
                reason = verdict
                break
    except LimitReached as limit:
        reason = str(limit)
    if not search.converged:
        search.check(held_out)
    return search.result(reason if search.choice is None else reason + search.choice.reach)


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
        self,
        reader: Entries,
        monitor: HeldOut,
        tol: float,
        caps: list[int],
        generator: torch.Generator | None,
        choice: ChunkChoice | None = None,
    ) -> None:
        self.reader, self.monitor, self.generator = reader, monitor, generator
        self.order = len(reader.sizes)
        self.choice = choice
        self.forward = True
        self.aim(tol, caps)
        self.pivots: dict[bool, list[Tensor]] = {}  # of the last sweep in either direction
        self.history: list[Sweep] = []
        self.best: tuple[float, int, list[Tensor], list[Tensor]] | None = None
        self.converged = False
        self.full = self.capped = self.at_floor = self.checked = False

    def aim(self, tol: float, caps: list[int]) -> None:
        """What to reach from here on."""
        self.tol, self.caps = tol, caps
        self.cut = 0.5 * tol / sqrt(max(1, self.order - 1))  # relative to the root mean square of A

    def begin(self, start: int | Tensor) -> None:
        """Columns of the first sweep: the trailing indices of the start points."""
        self.monitor.refresh()
        if not isinstance(start, Tensor):
            # those near large values first: the uniform half stays a uniform sample
            sizes = self.monitor.values.abs()
            order = sizes.argsort(descending=True)
            order = order[(~self.monitor.near[order]).to(torch.uint8).argsort(stable=True)]
            start = self.monitor.index[order[:start]]
        start = start if self.choice is None else self.choice.snap(start)
        self.ahead = [_distinct(start[:, k:]) for k in range(self.order + 1)]
        self.sure = [len(ahead) for ahead in self.ahead]  # so many of them are read whatever the others look like

    def sweep(self) -> None:
        """One pass: cores, pivots behind, and the columns of the pass back."""
        sizes = self.reader.sizes if self.forward else self.reader.sizes[::-1]
        possible = chain_ranks(sizes)
        caps = [
            min(max(2 * cap, cap + 4), most)
            for cap, most in zip(self.caps, chain_ranks(self.reader.sizes), strict=True)
        ]
        caps = self.caps if self.choice is not None else caps  # then slabs serve for what is beyond
        caps = caps if self.forward else caps[::-1]
        scale = self.monitor.root_mean_square()
        noise = torch.finfo(self.reader.dtype).eps
        kept = self.pivots.get(self.forward)
        worst = self._worst()
        behind = [torch.zeros(1, 0, dtype=torch.long)]
        columns, cores, full, capped, floors = [behind[0]], [], False, False, []
        for k in range(self.order - 1):
            values, passed_over = self._columns(behind[k], sizes[k], self.ahead[k + 1], self.sure[k + 1], scale)
            u, s, _ = safe_svd(values)
            first = float(s[0]) or 1.0
            tails = first * (s / first).square().flip(0).cumsum(0).flip(0).sqrt()
            size, least = float(tails[0]), self.cut * scale * sqrt(values.numel())
            shown = max(1, int((tails > max(least, noise * size)).sum()))
            choices = _grid(behind[k], sizes[k])
            inside = self._inside(choices[:, -1], k)
            r = min(shown, caps[k], len(inside))
            floors.append(least <= noise * size)
            capped |= r < shown or (self.choice is None and r == values.shape[1] == caps[k] < possible[k])
            saturated = r == values.shape[1] and r < caps[k] and not passed_over
            full |= saturated
            weights = torch.ones(len(choices), 1, dtype=values.dtype)
            if kept is not None:
                weights[_member(choices, kept[k + 1])] = KEPT
            places, _ = dominant_rows((weights * u[:, :r])[inside], 0.1)
            rows = inside[places]
            core = torch.linalg.solve(u[rows, :r], u[:, :r], left=False)
            cores.append(core.reshape(len(behind[k]), sizes[k], r))
            behind.append(choices[rows])
            room = min(len(inside), max(r, caps[k]) + 2)
            more = min(room, r + (max(2, r // 2) if saturated else 1))
            extra = [choices[inside[more_rows(core[inside], places, 1.0, more, more)]]]
            if r < caps[k]:
                extra.append(choices[inside[torch.randint(len(inside), (1,), generator=self.generator)]])
                extra.append(worst[:, : k + 1])
            if sizes[k] == 1:  # nothing to choose from here: what the bond before had to offer goes on
                extra.append(_grid(columns[k], 1))
            others = _distinct(torch.cat(extra))
            columns.append(torch.cat([behind[-1], others[~_member(others, behind[-1])]]))
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
        self.sure = [len(behind[self.order - k]) if k else 1 for k in range(self.order)] + [1]
        self.forward = not self.forward

    def verdict(self, held_out: int) -> str | None:
        """Why to stop, or None."""
        errors = [line.error for line in self.history]
        if errors[-1] <= self.tol:
            # no entry of the monitor has guided the search before the second sweep: it is a fresh sample till then
            clean = len(self.history) == 1 and not self.monitor.exhausted
            wanted = held_out - clean * len(self.monitor.index)
            short = wanted > self.reader.left
            fresh = self._fresh(wanted)
            self.monitor.join(fresh)
            sample = self.monitor if clean and not fresh.exhausted else fresh
            error = sample.relative(sample.errors(self._last))
            self.best = (error, len(sample.index), self._last, self._last_pivots)
            if error <= self.tol:
                if short and not fresh.exhausted:
                    return f"max_evals = {self.reader.max_evals}: tol is met, on fewer held-out entries than asked for"
                self.converged = True
                unseen = "" if self.reader.norm > 0 else "; every entry read is zero"
                return "the held-out error meets tol" + unseen
            self.history[-1] = self.history[-1]._replace(error=error)
            errors[-1] = error
        eps = torch.finfo(self.reader.dtype).eps
        stuck = len(errors) > 3 and min(errors[-3:]) > 0.7 * min(errors[:-3])
        if self.choice is not None and self.capped:
            self._fit(held_out)
            return "the held-out error meets tol" if self.converged else "the rank cap binds"
        if stuck and self.capped and not self.full:
            return "the rank cap binds"
        if stuck and min(errors) <= (sqrt(eps) if self.at_floor else min(1e3 * eps, 0.1 * sqrt(eps))):
            return f"the noise floor of {self.reader.dtype}: more sweeps do not lower the error"
        if len(errors) > 12 and min(errors[-12:]) > 0.9 * min(errors[:-12]):
            return "stalled: twelve sweeps did not lower the error"
        best = min(self.history, key=lambda line: line.error)
        if len(self.history) - best.sweep >= 3 and self.history[-1].evaluations > 10 * max(best.evaluations, 10_000):
            return (
                f"stalled: ten times the {best.evaluations} evaluations of sweep {best.sweep} did not lower its error, "
                f"{best.error:.1e}; noise or a jump of that size does this"
            )
        if not (self.full or self.capped):
            self.cut /= 4  # nothing is left above the cut, and the error is: singular values below it matter
        return None

    def check(self, held_out: int) -> None:
        """The error of the best train, least among several on the monitor, against a fresh sample: the larger one."""
        if self.best is None or self.checked:
            return
        with suppress(LimitReached):
            fresh = self._fresh(held_out)
            if len(fresh.index) >= min(held_out, self.best[1]):
                cores = self.best[2]
                error = max(self.best[0], fresh.relative(fresh.errors(cores)))
                self.best = (error, len(fresh.index), cores, self.best[3])

    def _fresh(self, count: int) -> HeldOut:
        """A new sample of so many entries, or of what `max_evals` leaves."""
        fresh = self.monitor.anew(max(2, min(count, self.reader.left)))
        with self.reader.whole_limit():
            fresh.refresh()
        return fresh

    def _fit(self, held_out: int) -> None:
        """The train fitted to slabs; it and the cross are compared on a fresh sample."""
        assert self.choice is not None
        fresh = self._fresh(held_out)
        fitted = fit_capped_train(self.reader, self.caps, self._last, self.choice, fresh)
        if fitted is None:
            return
        found = [([core.to(self.reader.dtype) for core in fitted], []), (self._last, self._last_pivots)]
        measured = [(fresh.relative(fresh.errors(cores)), len(fresh.index), cores, pivots) for cores, pivots in found]
        self.best, self.checked = min(measured, key=lambda entry: entry[0]), True
        self.converged = self.best[0] <= self.tol
        line = self.history[-1]
        self.history.append(Sweep(line.sweep + 1, self.reader.evaluations, self.best[0], max(self.caps)))

    def _inside(self, indices: Tensor, k: int) -> Tensor:
        """Which rows are allowed to be pivots of the bond after the k-th mode of the sweep."""
        if self.choice is None:
            return torch.arange(len(indices))
        allowed = self.choice.allowed[k if self.forward else self.order - 1 - k]
        return torch.isin(indices, allowed).nonzero()[:, 0]

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
        if not self.history or len(self._errors) != len(self.monitor.index):
            return torch.zeros(0, self.order, dtype=torch.long)
        largest = self._errors.topk(min(2, len(self._errors)))
        index = self.monitor.index[largest.indices[largest.values > 0]]
        index = index if self.choice is None else self.choice.snap(index)
        return index if self.forward else index.flip(1)

    def _ranks(self) -> list[int]:
        return [core.shape[2] for core in self._last[:-1]]

    def _columns(self, behind: Tensor, n: int, ahead: Tensor, sure: int, scale: float) -> tuple[Tensor, bool]:
        """Entries at the first `sure` columns and at those others that these do not explain; whether one was left out.

        What the others hold is looked at in a few rows only: the dominant ones, which say what it should be elsewhere,
        and some where that is compared. A column left out for chance agreement is offered by later sweeps again.
        """
        values = self._block(behind, n, ahead[:sure])
        if sure == len(ahead):
            return values, False
        u, s, _ = safe_svd(values)
        noise = torch.finfo(self.reader.dtype).eps
        floor = max(self.cut * scale, noise * norm(s) / sqrt(values.numel()))
        r = max(1, int((s > floor * sqrt(values.numel())).sum()))
        rows, coefficients = dominant_rows(u[:, :r], 0.1)
        choices = _grid(behind, n)
        probes = max(PROBES, r // 2)
        order = torch.randperm(len(choices), generator=self.generator)
        order = order[~torch.isin(order, rows)]
        large = values[order].abs().amax(1).argsort(descending=True)[: probes // 2]
        probed = torch.cat([order[large], order[: probes - len(large)]]).unique()
        found = self._block_at(choices[torch.cat([rows, probed])], ahead[sure:])
        off = (found[len(rows) :] - coefficients[probed] @ found[: len(rows)]).abs()
        new = (off > floor).any(0) if len(probed) else torch.zeros(found.shape[1], dtype=torch.bool)
        if bool(new.any()):
            values = torch.cat([values, self._block(behind, n, ahead[sure:][new])], 1)
        return values, not bool(new.all())

    def _block(self, behind: Tensor, n: int, ahead: Tensor) -> Tensor:
        """Entries at behind x mode x ahead as a matrix (behind and mode, ahead)."""
        return self._block_at(_grid(behind, n), ahead)

    def _block_at(self, rows: Tensor, ahead: Tensor) -> Tensor:
        parts = []
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
