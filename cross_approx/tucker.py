"""Tucker tensors from few entries."""

from collections.abc import Sequence
from math import inf, prod, sqrt
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor
from torch.nn.functional import avg_pool1d

from cross_approx.maxvol import KEPT, dominant_rows
from cross_approx.reading.chunk_choice import ChunkChoice, KnownSource, choose_chunks, monitor_of
from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import LimitReached, Reader, check_limits, open_source
from cross_approx.reading.sampled_fit import fit_tucker
from cross_approx.reading.slabs import read_slabs, slab_basis
from cross_approx.result import CrossResult, Sweep
from decompositions.formats.tucker import Tucker
from decompositions.linalg import check_ranks, check_tol, safe_svd
from decompositions.progress import Progress, reporting

FIT_SWEEPS = 3
"""Sweeps of alternating least squares where the ranks are capped."""


def tucker_cross(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float = 1e-6,
    rank: int | Sequence[int] | None = None,
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    max_sweeps: int = 20,
    chunk_fraction: int | float | None = None,
    held_out: int = 1000,
    generator: torch.Generator | None = None,
    progress: bool | Progress | None = None,
) -> CrossResult:
    """Tucker tensor from few entries: `A ≈ A[I_1, ..., I_d] x_1 U_1 U_1[I_1]^-1 ... x_d U_d U_d[I_d]^-1`.

    A sweep reads fibers of every mode, through random places and through the worst held-out entries, twice as many as
    before where they are all independent. The rank of a mode is what their singular values show above the tolerance,
    U_k their left singular vectors, the pivots I_k rows of dominant volume of U_k. Once no rank grows, the core is read
    at the pivots: the network equals A on I_1 x ... x I_d, and A itself where A has these ranks.
    Where `rank` binds and the error is above tol, such a cross is several times worse than the best Tucker tensor of
    these ranks. Then slabs are read, one whole mode times about 2.5 r_k spread indices of the others (fewer where
    `max_evals` binds), factors are taken from their singular vectors, and core and factors are fitted to all of them
    by a few sweeps of least squares; the better one on held-out entries is returned.

    What is promised: no entry is asked for twice and `max_evals` is never exceeded; `converged` only if the relative
    error on a fresh sample of `held_out` entries, none of which the network was made from, is at most tol; see
    `CrossResult` for what such a sample sees.
    Cost: `sum n_k (r_k + 2..2 r_k) + prod(r_k)` evaluations and `O(n r^2)` operations a mode where the ranks are found;
    a fit reads `sum_k n_k prod_(l != k) 2.5 r_l` more.

    Args:
        source: a source (`shape, dtype, entries(index)`), anything `as_source` takes, or a callable that takes an
            integer index (B, d) and returns (B,) values.
        shape: mode sizes; needed for a callable.
        tol: relative error to be met on held-out entries.
        rank: cap for every mode, or an entry for each.
        max_evals: entries asked for at most, held-out ones included.
        max_bytes: stop once so many bytes were read (looked at between batches).
        max_seconds: stop after so many seconds (looked at between batches).
        max_sweeps: sweeps at most.
        chunk_fraction: part of the bytes of a chunked source that may be touched, as in `ChunkChoice`; pivots then stay
            in a few columns of chunks, and the uniform held-out entries come from some random chunks. None: all.
        held_out: entries of the last check; a fifth of it guides the sweeps.
        generator: of samples and fibers.
        progress: called with (sweep, max_sweeps, text) after every sweep; True draws a bar on stderr.

    Returns:
        CrossResult with a Tucker in the dtype of the source; `pivots[k]` is I_k. Where a limit ends the search it is
        the best so far.

    Raises:
        ValueError: a NaN or infinite entry (with its index), a shape that does not fit, limits below 1, an impossible
            rank, a chunk_fraction for a source without chunks or below the smallest cross.
        TypeError: not a source.

    References:
        I. Oseledets, D. Savostianov, E. Tyrtyshnikov, Tucker dimensionality reduction of three-dimensional arrays in
        linear time, SIAM J. Matrix Anal. Appl. 2008; C. Caiafa, A. Cichocki, Generalizing the column-row matrix
        decomposition to multi-way arrays, Linear Algebra Appl. 2010.

    Example:
        >>> import torch
        >>> result = tucker_cross(lambda i: 1 / (1.0 + i.double().sum(1)), shape=(60, 50, 40), tol=1e-6)
        >>> result.converged, result.error <= 1e-6, result.evaluations < 60 * 50 * 40 // 10
        (True, True, True)
    """
    reports = reporting("tucker_cross", progress)
    opened = open_source("tucker_cross", source, shape)
    check_tol("tucker_cross", tol)
    limits = {"max_evals": max_evals, "max_bytes": max_bytes, "max_seconds": max_seconds, "max_sweeps": max_sweeps}
    check_limits("tucker_cross", **limits, held_out=held_out)
    sizes = tuple(int(n) for n in opened.shape)
    caps = check_ranks("tucker_cross", rank, [min(n, prod(sizes) // n) for n in sizes], "mode")
    choice = choose_chunks("tucker_cross", opened, chunk_fraction, generator)
    reader = Reader(
        "tucker_cross", opened if choice is None else KnownSource(opened, choice), max_evals, max_bytes, max_seconds
    )
    search = _Search(reader, choice, float(tol), caps, held_out, generator)
    reason = f"max_sweeps = {max_sweeps}"
    with reports as report:
        try:
            search.begin()
            for number in range(1, max_sweeps + 1):
                search.sweep()
                report(number, max_sweeps, search.history[-1].text)
                verdict = search.verdict()
                if verdict is not None:
                    reason = verdict
                    break
        except LimitReached as limit:
            reason = str(limit)
    return search.result(reason if choice is None else reason + choice.reach)


def tucker_entries(
    core: Inexact[Tensor, "..."], factors: Sequence[Inexact[Tensor, "_n _r"]], index: Int[Tensor, "B d"]
) -> Inexact[Tensor, "B"]:
    """Entries of a Tucker tensor at the rows of `index`, in double precision. Cost: O(B prod(r)).

    Example:
        >>> import torch
        >>> tucker_entries(torch.ones(1, 1), [torch.arange(3.0)[:, None]] * 2, torch.tensor([[1, 2]])).tolist()
        [2.0]
    """
    double = torch.promote_types(core.dtype, torch.float64)
    parts = []
    for part in index.split(max(16, (1 << 22) // max(1, core.numel()))):
        row = core.to(double).expand(1, *core.shape)
        for k, factor in enumerate(factors):
            rows = factor.to(double)[part[:, k]]
            flat = row.reshape(len(row), factor.shape[1], -1)
            row = rows[:, None] @ flat if k else (rows @ flat[0])[:, None]
            row = row[:, 0]
        parts.append(row.reshape(len(part)))
    return torch.cat(parts)


Found = tuple[Tensor, list[Tensor], list[Tensor]]  # core, factors, pivots


def _errors_on(monitor: HeldOut, found: Found) -> Tensor:
    if not len(monitor.index):
        return torch.zeros(0, dtype=torch.float64)
    return (tucker_entries(found[0], found[1], monitor.index) - monitor.values).abs()


def _smooth(mass: Tensor) -> Tensor:
    """Positive and averaged over a quarter of the mode: fibers are few, so their mass is a hint and no map."""
    side = len(mass) // 8
    mass = avg_pool1d(mass[None], 2 * side + 1, 1, side, count_include_pad=False)[0]
    return mass + 0.02 * mass.mean() + 1e-300


class _Search:
    """The state between sweeps."""

    def __init__(
        self,
        reader: Reader,
        choice: ChunkChoice | None,
        tol: float,
        caps: list[int],
        held_out: int,
        generator: torch.Generator | None,
    ) -> None:
        self.reader, self.choice, self.tol, self.caps, self.generator = reader, choice, tol, caps, generator
        self.order, self.held_out = len(caps), held_out
        self.monitor = monitor_of(reader, max(2, held_out // 5), generator, choice)
        self.allowed = [torch.arange(n) for n in reader.sizes] if choice is None else choice.allowed
        self.cut = 0.5 * tol / sqrt(self.order)  # relative to the root mean square of A
        self.columns: list[Tensor] = []  # of every mode: places (m, d) of its fibers, the mode itself 0
        self.masses = [torch.ones(n, dtype=torch.float64) for n in reader.sizes]
        self.pivots = [torch.zeros(0, dtype=torch.long) for _ in caps]
        self.history: list[Sweep] = []
        self.best: tuple[float, int, Tensor, list[Tensor], list[Tensor]] | None = None
        self.converged = self.capped = self.at_floor = False

    def begin(self) -> None:
        """Fibers through the largest held-out entries and through one random place."""
        self.monitor.refresh()
        largest = self.monitor.index[self.monitor.values.abs().argsort(descending=True)[:1]]
        self.columns = [
            self._distinct(torch.cat([self._inside(largest, k), self._random(2)]), k) for k in range(self.order)
        ]

    def sweep(self) -> None:
        """Fibers until no rank grows, pivots, the core at the pivots."""
        worst = self._worst()
        if self.history:
            for k in range(self.order):
                more = torch.cat([self._inside(worst, k), self._random(2)])
                self.columns[k] = self._distinct(torch.cat([self.columns[k], more]), k)
        floors, bases = [], []
        self.capped = False
        for k in range(self.order):
            basis, at_floor, capped = self._fibers(k)
            floors.append(at_floor)
            bases.append(basis)
            self.capped |= capped
        factors = []
        for k, u in enumerate(bases):
            weights = torch.ones(len(self.allowed[k]), 1, dtype=torch.float64)
            weights[torch.isin(self.allowed[k], self.pivots[k])] = KEPT
            rows, _ = dominant_rows(weights * u[self.allowed[k]], 0.1)
            self.pivots[k] = self.allowed[k][rows]
            factors.append(torch.linalg.solve(u[self.pivots[k]], u, left=False))
        box = torch.cartesian_prod(*self.pivots).reshape(-1, self.order)
        core = self.reader.read(box).reshape([len(p) for p in self.pivots])
        self.at_floor = all(floors)
        self._measure(core, factors, list(self.pivots))

    def verdict(self) -> str | None:
        """Why to stop, or None."""
        errors = [line.error for line in self.history]
        if errors[-1] <= self.tol and self._confirmed():
            return "the held-out error meets tol" + ("" if self.reader.norm > 0 else "; every entry read is zero")
        errors = [line.error for line in self.history]
        eps = torch.finfo(self.reader.dtype).eps
        stuck = len(errors) > 3 and min(errors[-3:]) > 0.7 * min(errors[:-3])
        if self.capped:
            self._fit()
            return "the held-out error meets tol" if self.converged else "the rank cap binds"
        if stuck and (self.at_floor or min(errors) <= 1e3 * eps):
            return f"the noise floor of {self.reader.dtype}: more sweeps do not lower the error"
        if len(errors) > 12 and min(errors[-12:]) > 0.9 * min(errors[:-12]):
            return "stalled: twelve sweeps did not lower the error"
        self.cut /= 4  # the ranks do not grow any more, and the error is above tol: what is below the cut matters
        return None

    def result(self, reason: str) -> CrossResult:
        """The best network so far."""
        if self.best is None:  # a limit ended the first sweep
            core = torch.zeros([1] * self.order, dtype=self.reader.dtype)
            factors = [torch.zeros(n, 1, dtype=self.reader.dtype) for n in self.reader.sizes]
            self.best = (inf, 0, core, factors, [])
            reason += " before the first sweep ended: the network is zero"
        error, count, core, factors, pivots = self.best
        device = self.reader.source.device
        return CrossResult(
            network=Tucker(core.to(device), [factor.to(device).contiguous() for factor in factors]),
            evaluations=self.reader.evaluations,
            bytes_read=self.reader.bytes_read,
            error=error,
            held_out=count,
            converged=self.converged,
            reason=reason,
            history=tuple(self.history),
            pivots=tuple(pivots),
        )

    def _fibers(self, k: int) -> tuple[Tensor, bool, bool]:
        """Basis of mode k; more fibers as long as all of them are independent."""
        n, cap = self.reader.sizes[k], min(self.caps[k], len(self.allowed[k]))
        noise = 4 * torch.finfo(self.reader.dtype).eps
        possible = min(n, prod(self.reader.sizes) // n)
        while True:
            places = self.columns[k]
            index = places.repeat_interleave(n, 0)
            index[:, k] = torch.arange(n).repeat(len(places))
            values = self.reader.read(index).reshape(len(places), n).mT
            u, s, _ = safe_svd(values)
            self.masses[k] = _smooth(torch.linalg.vector_norm(values, dim=1).sqrt())
            tails = s.square().flip(0).cumsum(0).flip(0).sqrt()
            size = float(tails[0])
            least = self.cut * self.monitor.root_mean_square() * sqrt(values.numel())
            shown = max(1, int((tails > max(least, noise * size)).sum()))
            enough = min(possible, cap + max(2, cap // 4))
            if shown < len(places) - 1 or len(places) >= enough:
                r = min(shown, cap)
                return u[:, :r], least <= noise * size, r < shown
            before = len(places)
            more = min(len(places) + 1, enough - len(places) + 1)
            for _ in range(4):
                self.columns[k] = self._distinct(torch.cat([self.columns[k], self._random(more)]), k)
                if len(self.columns[k]) > before:
                    break
            else:  # there are no other fibers
                r = min(shown, cap)
                return u[:, :r], least <= noise * size, r < shown

    def _fit(self) -> None:
        """A network fitted to slabs, if the limits let it; it and the cross are compared on a fresh sample."""
        # fibers within few columns of chunks may have shown less than the caps
        ranks = [len(p) for p in self.pivots] if self.choice is None else self.caps
        fresh = monitor_of(self.reader, self.held_out, self.generator, self.choice)
        fresh.refresh()
        masses = self.masses if self.choice is None else self.choice.masses()
        blocks = read_slabs(self.reader, ranks, masses, self.choice, fresh)
        if blocks is None:
            return
        factors = [
            slab_basis(block, k, r, 0.1 * self.tol) for k, (block, r) in enumerate(zip(blocks, ranks, strict=True))
        ]
        core = torch.zeros([u.shape[1] for u in factors], dtype=blocks[0].values.dtype)
        core, factors = fit_tucker(blocks, core, factors, FIT_SWEEPS)
        cross, fitted = self._last, self._rounded(core, factors, [])
        found = [(fresh.relative(_errors_on(fresh, last)), len(fresh.index), *last) for last in (fitted, cross)]
        self.best = min(found, key=lambda entry: entry[0])
        self.converged = self.best[0] <= self.tol
        self.history.append(Sweep(len(self.history) + 1, self.reader.evaluations, found[0][0], max(core.shape)))

    def _rounded(self, core: Tensor, factors: list[Tensor], pivots: list[Tensor]) -> Found:
        return core.to(self.reader.dtype), [factor.to(self.reader.dtype) for factor in factors], pivots

    def _measure(self, core: Tensor, factors: list[Tensor], pivots: list[Tensor]) -> None:
        self._last = self._rounded(core, factors, pivots)
        error, count = inf, 0
        try:
            self.monitor.refresh()
        finally:  # a limit may leave fewer entries, of which none was used
            self._errors = _errors_on(self.monitor, self._last)
            if len(self._errors):
                error, count = self.monitor.relative(self._errors), len(self._errors)
            self.history.append(Sweep(len(self.history) + 1, self.reader.evaluations, error, max(core.shape)))
            if self.best is None or error <= self.best[0]:
                self.best = (error, count, *self._last)

    def _confirmed(self) -> bool:
        """Whether tol is met on a fresh sample, which joins the old one where it is not."""
        fresh = monitor_of(self.reader, self.held_out, self.generator, self.choice)
        fresh.refresh()
        error = fresh.relative(_errors_on(fresh, self._last))
        self.best = (error, len(fresh.index), *self._last)
        self.converged = error <= self.tol
        if not self.converged:
            self.monitor.join(fresh)
            self._errors = _errors_on(self.monitor, self._last)
            self.history[-1] = self.history[-1]._replace(error=error)
        return self.converged

    def _worst(self) -> Tensor:
        """The held-out entries of largest error; they are used from here on."""
        if not self.history or self.monitor.exhausted or len(self._errors) != len(self.monitor.index):
            return torch.zeros(0, self.order, dtype=torch.long)
        largest = self._errors.topk(min(2, len(self._errors)))
        return self.monitor.index[largest.indices[largest.values > 0]]

    def _inside(self, places: Tensor, k: int) -> Tensor:
        """Those through which a fiber of mode k stays in the columns of the pivots."""
        keep = torch.ones(len(places), dtype=torch.bool)
        for axis in range(self.order):
            if axis != k and self.choice is not None:
                keep &= torch.isin(places[:, axis], self.allowed[axis])
        return places[keep]

    def _random(self, count: int) -> Tensor:
        return torch.stack([a[torch.randint(len(a), (count,), generator=self.generator)] for a in self.allowed], 1)

    @staticmethod
    def _distinct(places: Tensor, k: int) -> Tensor:
        places = places.clone()
        places[:, k] = 0
        return places.unique(dim=0)
