"""Gradients through a cross: pivots are found without, and the entries at them are differentiated."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite, nan
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from cross_approx.frozen import FrozenCross, frozen_cross, singular_ratio
from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import BATCH, LARGEST, Reader, open_source
from cross_approx.result import CrossResult
from cross_approx.sources.source import as_source
from cross_approx.tt import tt_cross
from decompositions.formats.tt import TT
from decompositions.linalg import check_tol
from decompositions.progress import Progress


class SingularCrossing(ValueError):
    """The tensor has changed so that its frozen pivots no longer carry its rank: new ones are needed.

    Example:
        >>> issubclass(SingularCrossing, ValueError)
        True
    """


def differentiable_cross(
    source: Any,
    *,
    shape: Sequence[int] | None = None,
    tol: int | float = 1e-6,
    rank: int | Sequence[int] | None = None,
    pivots: Sequence[Int[Tensor, "r k"]] | None = None,
    batch: int = BATCH,
    checkpoint: bool = False,
    held_out: int | None = None,
    max_evals: int | None = None,
    max_bytes: int | None = None,
    max_seconds: int | float | None = None,
    max_sweeps: int = 40,
    start: int | Int[Tensor, "p d"] = 2,
    generator: torch.Generator | None = None,
    progress: bool | Progress | None = None,
) -> CrossResult:
    """Tensor train through the entries of a cross, differentiable in these entries: `C_k = V_k S_k^-1`, `C_d = V_d`.

    V_k are the entries at (pivots before mode k) x mode k x (pivots after), `S_k` the rows of V_k at the next pivots.
    The pivots are found by `tt_cross` without gradients and are constants afterwards. With G = dL/dC and
    `Y = G S^-H`, `dL/dV = Y`, and `-C^H Y` is added to the selected rows; no inverse is formed, and the forward solve
    is with an orthonormal basis of V_k. Gradients of any order exist. They are those of the interpolant at these
    pivots: where the pivots would change, the loss has a kink that they do not see.

    The train equals the tensor on the whole cross, and everywhere if the ranks are the tensor's. A core has the
    identity at the selected rows and no entry above 1.01 when the pivots are new.
    Cost: `sum_k r_{k-1} n_k r_k` evaluations with gradient, nothing else is kept; O(d n r^3) operations. Finding the
    pivots: those of `tt_cross`. The solves run in double precision.

    Args:
        source: a tensor (its gradient is sparse, in the entries read), a callable (B, d) -> (B,), or a source whose
            `entries` keep gradients.
        shape: mode sizes; needed for a callable.
        tol: relative error to be met on held-out entries.
        rank: cap for every bond, or an entry for each.
        pivots: those of an earlier result: leading index sets of bonds 1 ... d - 1, (r_k, k), then trailing ones,
            (r_k, d - k). None searches.
        batch: entries evaluated in one call at most.
        checkpoint: keep no intermediate results of a call, and repeat it in the backward pass.
        held_out: entries read without gradient to measure `error`; 1000 after a search, otherwise none.
        max_evals, max_bytes, max_seconds, max_sweeps: of the search.
        start, generator, progress: of `tt_cross`.

    Returns:
        CrossResult with a TT in the dtype of the values. `pivots` can be given to a later call; `error` is that of this
        interpolant (NaN where nothing was held out).

    Raises:
        ValueError: an entry that is not finite, pivots that do not fit; `SingularCrossing` where given pivots do not
            carry the rank any more.
        TypeError: not a source.

    References:
        M. Usvyatsov, A. Makarova, R. Ballester-Ripoll, M. Rakhuba, A. Krause, K. Schindler, Cherry-picking gradients:
        learning low-rank embeddings of visual data via differentiable cross-approximation, ICCV 2021, arXiv 2105.14250.

    Example:
        >>> import torch
        >>> scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> result = differentiable_cross(lambda i: torch.sin(scale * i.sum(1)), shape=(8, 8, 8), tol=1e-10)
        >>> total = torch.einsum("ia,ajb,bk->", *result.network.cores)  # the sum of all entries, and its derivative
        >>> total.backward()
        >>> result.network.ranks, bool(scale.grad.isfinite())
        ((2, 2), True)
    """
    name = "differentiable_cross"
    check_tol(name, tol)
    _check_count(name, "batch", batch, 1)
    if held_out is not None:
        _check_count(name, "held_out", held_out, 0)
    count = (1000 if pivots is None else 0) if held_out is None else held_out
    if callable(source) and not hasattr(source, "entries") and shape is not None:
        source = _Field(source, tuple(shape))
    opened = as_source(source, shape=shape) if isinstance(source, Tensor) else open_source(name, source, shape)
    evaluations = 0
    bytes_before = getattr(opened, "bytes_read", None)
    search, cut = None, 0.0
    if pivots is None:
        with torch.no_grad():
            search = tt_cross(
                opened,
                tol=tol / 3,  # the interpolant adds to the error of the train that it takes its pivots from
                rank=rank,
                max_evals=max_evals,
                max_bytes=max_bytes,
                max_seconds=max_seconds,
                max_sweeps=max_sweeps,
                start=start,
                held_out=max(2, count),
                generator=generator,
                progress=progress,
            )
        evaluations += search.evaluations
        cut = max(tol / 30, 4 * torch.finfo(search.network.dtype).eps)
        cross = frozen_cross(search.network, cut)
    else:
        if rank is not None:
            raise ValueError(f"{name}: the pivots fix the ranks, expected rank=None with pivots=, got {rank}")
        cross = FrozenCross.of_pivots(name, pivots, opened.shape)
    while True:
        values = _values(name, opened, cross, batch, checkpoint)
        evaluations += cross.numel
        try:
            network = TT(_cores(name, values, cross))
            break
        except SingularCrossing:
            if search is None or max(r for r, _, _ in cross.blocks) == 1:
                raise
            cut *= 4  # directions at the noise floor of the entries: the train has them, the crossing does not
            cross = frozen_cross(search.network, cut)
    error, compared = nan, 0
    if count:
        reader = _Sampled(name, opened, cross, values.detach(), batch)
        monitor = HeldOut(reader, max(2, count), generator)
        with torch.no_grad():
            monitor.refresh()
            error = monitor.relative(monitor.errors(_with_ends([core.detach().cpu() for core in network.cores])))
        compared = len(monitor.index)
        evaluations += reader.evaluations
    size = evaluations * values.element_size()
    return CrossResult(
        network=network,
        evaluations=evaluations,
        bytes_read=size if bytes_before is None else opened.bytes_read - bytes_before,
        error=error,
        held_out=compared,
        converged=error <= tol,
        reason=_reason(search, error, tol),
        history=() if search is None else search.history,
        pivots=cross.pivots,
    )


class DifferentiableCross:
    """`differentiable_cross` of a tensor that changes from call to call, with pivots that are kept while they serve.

    A call returns the train of the tensor as it is now. New pivots are searched, starting from the old ones, at every
    `every`-th call, where a crossing has become singular, and where the error passes `max_error`. The ranks follow the
    tensor, up and down.

    Args:
        shape: mode sizes.
        tol, rank, batch, checkpoint, generator: as in `differentiable_cross`.
        every: calls between two searches; None searches only when it has to.
        max_error: largest relative error on `held_out` fresh entries, which are then read in every call. At least
            `tol`.
        held_out: entries that measure the error.
        **limits: of a search: max_evals, max_bytes, max_seconds, max_sweeps.

    Attributes:
        result: of the last call, its network without gradient.
        calls: number of calls.
        searches: number of searches.
        evaluations: entries asked for so far.

    Example:
        >>> import torch
        >>> a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> optimizer = torch.optim.Adam([a], lr=0.1)
        >>> cross = DifferentiableCross((20, 20, 20), tol=1e-6, every=50)
        >>> for _ in range(100):  # the mean over the grid of 1 / (1 + a (i + j + k)) shall be 0.05
        ...     network = cross(lambda i: 1 / (1 + a * i.sum(1)))
        ...     loss = (torch.einsum("ia,ajb,bk->", *network.cores) / 8000 - 0.05).square()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> cross.searches, loss.item() < 1e-5
        (2, True)
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        tol: int | float = 1e-6,
        rank: int | Sequence[int] | None = None,
        every: int | None = 20,
        max_error: int | float | None = None,
        held_out: int = 200,
        batch: int = BATCH,
        checkpoint: bool = False,
        generator: torch.Generator | None = None,
        **limits: Any,
    ) -> None:
        name = "DifferentiableCross"
        check_tol(name, tol)
        if every is not None:
            _check_count(name, "every", every, 1)
        _check_count(name, "held_out", held_out, 2)
        if max_error is not None and not (isfinite(max_error) and max_error >= tol):
            raise ValueError(f"{name}: max_error must be at least tol = {tol:g}, got {max_error}; searches aim at tol")
        unknown = sorted(limits.keys() - {"max_evals", "max_bytes", "max_seconds", "max_sweeps"})
        if unknown:
            raise TypeError(f"{name}: expected limits of a search (max_evals, max_bytes, ...), got {unknown[0]}")
        self.shape = tuple(shape)
        self.every, self.max_error, self.held_out = every, max_error, held_out
        self._found: dict[str, Any] = {"tol": tol, "rank": rank, "held_out": held_out, **limits}
        self._common: dict[str, Any] = {"batch": batch, "checkpoint": checkpoint, "generator": generator}
        self._tol = tol
        self._pivots: tuple[Tensor, ...] | None = None
        self.result: CrossResult | None = None
        self.calls = self.searches = self.evaluations = 0

    def __call__(self, source: Any) -> TT:
        """The train of a tensor, a source or a callable of this shape, with gradients."""
        shape = self.shape
        due = self._pivots is None or (self.every is not None and self.calls % self.every == 0)
        self.calls += 1
        result = None
        if not due:
            held_out = 0 if self.max_error is None else self.held_out
            try:
                result = differentiable_cross(
                    source, shape=shape, tol=self._tol, pivots=self._pivots, held_out=held_out, **self._common
                )
                self.evaluations += result.evaluations
            except SingularCrossing:
                self.evaluations += self._cross().numel
            if result is not None and self.max_error is not None and not result.error <= self.max_error:
                result = None
        if result is None:
            start = 2 if self._pivots is None or len(shape) < 2 else self._cross().points()
            result = differentiable_cross(source, shape=shape, start=start, **self._found, **self._common)
            self.searches += 1
            self.evaluations += result.evaluations
        self._pivots = result.pivots
        # the graph belongs to the caller
        self.result = replace(result, network=TT([core.detach() for core in result.network.cores]))
        network: Any = result.network
        return network

    def state_dict(self) -> dict[str, Any]:
        """Pivots and counters, tensors and numbers only."""
        counters = {"calls": self.calls, "searches": self.searches, "evaluations": self.evaluations}
        return {"pivots": None if self._pivots is None else list(self._pivots), **counters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one of the same shape was.

        Raises:
            ValueError: pivots of another shape.
        """
        if state["pivots"] is not None:
            FrozenCross.of_pivots("DifferentiableCross", state["pivots"], self.shape)
        self._pivots = None if state["pivots"] is None else tuple(state["pivots"])
        self.calls, self.searches, self.evaluations = (state[key] for key in ("calls", "searches", "evaluations"))

    def _cross(self) -> FrozenCross:
        return FrozenCross.of_pivots("DifferentiableCross", self._pivots or (), self.shape)


class _Interpolation(torch.autograd.Function):
    """`C = V S^-1` with S = V[rows], computed from an orthonormal basis of V: its factor R cancels."""

    @staticmethod
    def forward(fibers: Tensor, rows: Tensor) -> Tensor:
        basis = torch.linalg.qr(fibers).Q
        core = torch.linalg.solve(basis[rows], basis, left=False)
        core[rows] = torch.eye(len(rows), dtype=core.dtype, device=core.device)
        return core

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # differentiable operations on saved tensors: derivatives of any order follow
        fibers, rows, core = ctx.saved_tensors
        moved = torch.linalg.solve(fibers[rows].mH, grads[0], left=False)
        return moved.index_add(0, rows, core.mH @ moved, alpha=-1), None


def interpolation(fibers: Inexact[Tensor, "m r"], rows: Int[Tensor, "r"]) -> Inexact[Tensor, "m r"]:
    """`V V[rows]^-1`, differentiable to any order; the identity at `rows`. V[rows] must not be singular.

    Example:
        >>> fibers = torch.tensor([[2.0, 0.0], [0.0, 4.0], [1.0, 1.0]])
        >>> interpolation(fibers, torch.tensor([0, 1]))
        tensor([[1.0000, 0.0000],
                [0.0000, 1.0000],
                [0.5000, 0.2500]])
    """
    core: Tensor = _Interpolation.apply(fibers, rows)
    return core


def _values(name: str, source: Any, cross: FrozenCross, batch: int, checkpoint: bool) -> Tensor:
    """The entries of the cross, with gradient."""
    parts = []
    for index in cross.batches(batch):
        placed = index.to(source.device)
        asked = checkpoint and torch.is_grad_enabled()
        values = recompute(source.entries, placed, use_reentrant=False) if asked else source.entries(placed)
        bad = (~torch.isfinite(values.detach())).nonzero()[:, 0]
        if len(bad):
            at = int(bad[0])
            raise ValueError(
                f"{name}: entries must be finite, got {values[at].item()} at index {tuple(index[at].tolist())} "
                f"({len(bad)} of {len(index)} in this batch)"
            )
        parts.append(values)
    values = torch.cat(parts)
    return values if values.is_floating_point() or values.is_complex() else values.to(torch.get_default_dtype())


def _cores(name: str, values: Tensor, cross: FrozenCross) -> list[Tensor]:
    """Interpolating cores from the values of the cross, without the boundary ranks."""
    double = values.to(torch.promote_types(values.dtype, torch.float64))
    blocks = cross.blocks
    cores, last = [], len(blocks) - 1
    for k, part in enumerate(double.split([r * n * s for r, n, s in blocks])):
        r, n, s = blocks[k]
        core = part
        if k < last:
            fibers, rows = part.reshape(r * n, s), cross.rows(k).to(values.device)
            if not bool(fibers.detach().any()):
                # a zero tensor: any core interpolates, and none has a derivative
                core = torch.zeros_like(fibers).index_put(
                    (rows, torch.arange(s, device=rows.device)), fibers.new_ones(s)
                )
            else:
                ratio = singular_ratio(fibers.detach()[rows])
                if not ratio > torch.finfo(values.dtype).eps:
                    raise SingularCrossing(
                        f"{name}: the {s} x {s} crossing of bond {k} must not be singular, got singular values of "
                        f"ratio {ratio:.1e}; the tensor has changed, search new pivots (pivots=None)"
                    )
                core = interpolation(fibers, rows)
        shape = ((r,) if k else ()) + (n,) + ((s,) if k < last else ())
        cores.append(core.reshape(shape).to(values.dtype))
    return cores


class _Field:
    """A function as a source whose dtype is seen in its first values: no entry but those of the cross is asked for."""

    chunks = None
    device = torch.device("cpu")

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.function, self.shape, self.dtype = function, shape, torch.get_default_dtype()

    def entries(self, index: Int[Tensor, "B d"]) -> Inexact[Tensor, "B"]:
        """Values at the rows of `index`, with their gradients."""
        values = self.function(index)
        if not isinstance(values, Tensor) or values.shape != (len(index),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"differentiable_cross: a function takes indices (B, d) and returns a tensor (B,), expected "
                f"({len(index)},), got {got}"
            )
        self.dtype, self.device = values.dtype, values.device
        return values


class _Sampled(Reader):
    """A reader that knows the entries of a cross, so that none of them is held out."""

    def __init__(self, name: str, source: Any, cross: FrozenCross, values: Tensor, batch: int) -> None:
        super().__init__(name, source)
        index = torch.cat(list(cross.batches(batch)))
        values = values.cpu().to(torch.promote_types(values.dtype, torch.float64))
        keys, checks = self._keys(index)
        order = keys.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = keys[order[1:]] != keys[order[:-1]]
        order = order[first]  # blocks share their crossings
        index, values = index[order], values[order]
        self._runs.append((keys[order], checks[order], values, torch.ones(len(order), dtype=torch.bool)))
        magnitudes = values.abs()
        self.sum_squares = float(magnitudes.square().sum())
        top = magnitudes.topk(min(LARGEST, len(magnitudes)))
        self.largest, self._largest_sizes = index[top.indices], top.values


def _with_ends(cores: Sequence[Tensor]) -> list[Tensor]:
    cores = [cores[0].unsqueeze(0), *cores[1:]]
    return [*cores[:-1], cores[-1].unsqueeze(-1)]


def _reason(search: CrossResult | None, error: float, tol: float) -> str:
    if search is None:
        return "the pivots were given"
    if search.converged and not error <= tol:
        return "the interpolant does not meet tol on entries held out; give a smaller one"
    return search.reason


def _check_count(name: str, what: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise ValueError(f"{name}: {what} must be an integer >= {least}, got {count!r}")
