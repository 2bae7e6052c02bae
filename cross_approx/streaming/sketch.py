"""Tucker and tensor trains of a source too large for memory, from random sketches made in one or two passes."""

import warnings
from collections.abc import Sequence
from math import prod, sqrt
from typing import Any

import opt_einsum
import torch
from jaxtyping import Inexact
from torch import Tensor

from cross_approx.result import CrossResult
from cross_approx.streaming.frames import Chain, Frame, Star, contract, project_box
from cross_approx.streaming.passes import BOX_BYTES, Box, BoxGrid, Passes, PassState, Sums, pieces, squared_norm
from decompositions.formats.algebra import to_dense
from decompositions.formats.gauge import orthogonalize
from decompositions.formats.gauge import round as round_network
from decompositions.formats.network import Network
from decompositions.formats.tt import TT, chain_ranks
from decompositions.formats.tucker import Tucker
from decompositions.linalg import TruncationWarning, check_ranks, check_tol, frobenius, full_precision
from decompositions.progress import Progress
from decompositions.tucker import st_hosvd

PROBES = 32
"""Random rank-one functionals by which one pass estimates the norm of its residual."""

WORK = 1 << 22
"""Largest number of entries of an intermediate product, where one index of a mode has fewer."""


@full_precision
def tucker_sketch(
    source: Any,
    rank: int | Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    tol: int | float | None = None,
    passes: int = 2,
    oversampling: int | None = None,
    samples: int = 4096,
    generator: torch.Generator | None = None,
    box_bytes: int = BOX_BYTES,
    prefetch: bool | None = None,
    progress: bool | Progress | None = None,
    resume: PassState | None = None,
) -> CrossResult:
    """Tucker decomposition from random sketches: `V_k = A_(k) Ω_k` and, in one pass, `H = A x_1 Φ_1 ... x_d Φ_d`.

    Factors are orthonormal bases Q_k of the V_k, of k = rank + oversampling columns. Two passes project exactly,
    `W = A x_k Q_k^H`; one pass solves for the core, `W = H x_k (Φ_k Q_k)^+` with Φ_k of s = 2 k + 1 rows (the identity
    where that is no less than the mode). W is then truncated to `rank` by ST-HOSVD. The columns of Ω_k are products of
    one Gaussian vector a mode (Khatri-Rao), Φ_k is Gaussian; from order 3 on Φ_d contains the vectors of mode d (less
    work; errors measured side by side are the same). What is stored is of the size of the factors and cores.

    With τ_k the norm of what rank ρ leaves of unfolding k, and before truncation,
    `E ‖A - W x_k Q_k‖^2 <= (1 + ρ / (k - ρ - 1)) sum_k τ_k^2` for any ρ < k - 1, and twice that in one pass, if Ω_k
    is Gaussian, which it is at order 2. For products of Gaussians no such constants are proved; the tests sample the
    bound there too. Truncation to `rank` adds at most `sqrt(d)` times the best error of W. Exact at the true rank.

    `error` of two passes is that of all entries, `‖A‖^2 - ‖core‖^2`, or measured by a third pass where this cancels.
    One pass can only estimate: the larger one of the errors on `samples` entries drawn uniformly (good to
    1 / sqrt(samples) for noise, blind to a region that holds the fraction 3 / samples with probability 5 %) and on
    `PROBES` random rank-one functionals of the residual (blind to nothing, good to about 15 % for noise).
    Cost: about `2 N (k + s + PROBES)` operations in one pass (`k` more at order 2); two passes: `2 N (2 k)`,
    then `2 N k` in double precision.
    Memory: the sketches, three boxes, their products, the source's own cache.

    Args:
        source: anything `as_source` takes.
        rank: cap for every mode, or an entry for each.
        shape: mode sizes; needed for a callable.
        tol: relative error: two passes truncate further where it allows; both compare `error` with it.
        passes: 1 or 2.
        oversampling: further columns; None takes as many as the rank, at least 8: one pass then has about 1.03 to
            1.6 times the error of ST-HOSVD where the spectrum decays, and 2.4 times in noise; half as many further
            columns give 1.4 to 2.0 times and 3.4 times.
        samples: entries kept for the estimate of one pass.
        generator: of the seed that every random matrix comes from.
        box_bytes, prefetch, progress, resume: as in `tucker_gram`.

    Returns:
        CrossResult with a Tucker network in the dtype of the source, factors orthonormal up to its rounding.
        `converged` is true where no tol is given; `held_out` is the number of sampled entries in one pass.

    Raises:
        PassError: a chunk could not be read; it names the chunk, and its `state` goes on where it stopped.
        ValueError: missing or non-finite values, an impossible rank, passes other than 1 and 2.

    References:
        Y. Sun, Y. Guo, C. Luo, J. Tropp, M. Udell, Low-rank Tucker approximation of a tensor from streaming data, SIAM
        J. Math. Data Sci. 2020, algorithms 4.1 to 4.3 and theorems 5.1 and 5.2, arXiv 1904.10951.

    Example:
        >>> import torch
        >>> x = torch.arange(9.0)[:, None, None] + torch.arange(7.0)[:, None] * torch.arange(8.0)
        >>> result = tucker_sketch(x, 2, passes=1, generator=torch.Generator().manual_seed(0))
        >>> result.network.ranks, result.error < 1e-5, result.evaluations == x.numel()
        ((2, 2, 2), True, True)
    """
    task = _Sketch(
        "tucker_sketch", source, shape, rank, tol, passes, oversampling, samples, generator,
        box_bytes, prefetch, progress, resume,
    )  # fmt: skip
    sizes, d = task.sizes, len(task.sizes)
    caps = check_ranks("tucker_sketch", rank, [min(n, prod(sizes) // n) for n in sizes], "mode")
    widths = [min(task.wider(r), n, prod(sizes) // n) for r, n in zip(caps, sizes, strict=True)]
    width = max(widths)
    omega = [task.gaussian(n, width) for n in sizes]
    heights = [min(2 * k + 1, n) for k, n in zip(widths, sizes, strict=True)]
    extent = task.passes.grid(()).extent(0)
    phi = [task.eye(n) if p == n else task.gaussian(n, p) / sqrt(p) for p, n in zip(heights, sizes, strict=True)]

    first = width  # row of z with which Φ_d begins: it shares Ω's, but for order 2, whose bound needs independence
    if d > 2 and width <= heights[-1] < sizes[-1]:
        first, phi[-1] = 0, torch.cat([omega[-1], phi[-1][:, width:] * sqrt(heights[-1])], 1)

    def begin(sums: Sums) -> None:
        for k, n in enumerate(sizes):
            sums[f"factor {k}"] = task.zeros(n, width)
        if passes == 1:
            sums["core"] = task.zeros(heights[-1], *heights[:-1])  # the last mode is contracted first
            if d > 1:
                sums["row"] = task.zeros(heights[-1], extent, *heights[1:-1])

    def step(sums: Sums, box: Box, x: Tensor, start: int) -> None:
        local = [m[s] for m, s in zip(omega, box, strict=True)]
        columns = [local[-1]]
        if passes == 1:
            columns = [*columns[: first > 0], phi[-1][box[-1]], task.signs[-1][box[-1]]]
        rows = x.reshape(-1, x.shape[-1])
        z = (torch.cat(columns, 1).mT @ rows.mT).reshape(-1, *x.shape[:-1])
        sums[f"factor {d - 1}"][box[-1]] += (products_of_columns(local[:-1], x).mT @ rows).mT
        for k in range(d - 1):
            part = khatri_rao(z[:width], [m if j != k else None for j, m in enumerate(local[:-1])])
            sums[f"factor {k}"][box[k]] += part.mT
        if passes == 1:
            inner = z[first : first + heights[-1]]
            for k in reversed(range(1, d - 1)):
                inner = contract(inner, phi[k][box[k]], k + 1)
            if d > 1:
                sums["row"][:, box[0].start - start : box[0].stop - start] += inner
            else:
                sums["core"] += inner
            task.probe(sums, z[first + heights[-1] :], box)

    def close(sums: Sums, first: slice) -> None:
        """Contract the first mode once for all boxes that share its part."""
        if passes == 1 and d > 1:
            row = sums["row"][:, : first.stop - first.start].to(task.work)
            sums["core"] += contract(row, phi[0][first], 1)
            sums["row"].zero_()

    sums = task.first(begin, step, width + (heights[-1] + PROBES if passes == 1 else 0), width, close)
    bases = [torch.linalg.qr(sums[f"factor {k}"][:, :w]).Q for k, w in enumerate(widths)]
    if passes == 2:
        frame = Star(sizes, caps)
        for k, q in enumerate(bases):
            frame.add(k, q)
        core, total = task.project(frame)
    else:
        core, total = sums["core"].movedim(0, -1), float(sums["total"])
        for k, q in enumerate(bases):
            core = contract(core, torch.linalg.pinv(phi[k].to(task.double).mT @ q).mH, k)
    caps = possible(caps, core, range(d))
    inner, lost = task.truncated(core, total, lambda tol: st_hosvd(core, caps, tol), lambda net: core - to_dense(net))
    factors = [q @ u for q, u in zip(bases, inner.factors, strict=True)]
    return task.finish(Tucker(inner.core, factors), sums, total, lost, caps)


@full_precision
def tt_sketch(
    source: Any,
    rank: int | Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    tol: int | float | None = None,
    passes: int = 2,
    oversampling: int | None = None,
    samples: int = 4096,
    generator: torch.Generator | None = None,
    box_bytes: int = BOX_BYTES,
    prefetch: bool | None = None,
    progress: bool | Progress | None = None,
    resume: PassState | None = None,
) -> CrossResult:
    """Tensor train from sketches on both sides: `Ψ_k = (L_(k-1) x I x R_k) A`, `Ω_k = L_k A R_k`.

    One pass gives `A ≈ Ψ_1 Ω_1^+ Ψ_2 Ω_2^+ ... Ψ_d` (generalized Nyström at every bond), rounded to `rank`. R_k has
    rank + oversampling columns and L_k twice as many rows and one more; both are products of one Gaussian vector a mode
    (Khatri-Rao), nested, so that Ω_k follows from Ψ_k. Two passes orthogonalize that train toward its middle core, put
    there the exact projection of A, than which no core is better with the same bases, and truncate it beside that core
    (the bonds farther away are truncated before).

    Exact at the true rank up to rounding. For d = 3 and two passes the bases are those of a randomized range finder for
    the first mode and nearly so for the last; for more modes no bound with constants is known for this structure.
    `error` is found, or estimated, as in `tucker_sketch`.
    Cost: about `2 N (k + l)` operations a pass, l = 2 k + 1. Memory: d sketches l n k in double precision, three boxes,
    their products, the source's own cache.

    Args:
        source, shape, tol, passes, oversampling, samples, generator: as in `tucker_sketch`.
        rank: cap for every bond, or d - 1 entries.
        box_bytes, prefetch, progress, resume: as in `tucker_gram`.

    Returns:
        CrossResult with a TT in the dtype of the source; see `tucker_sketch`.

    Raises:
        PassError: a chunk could not be read; it names the chunk, and its `state` goes on where it stopped.
        ValueError: missing or non-finite values, an impossible rank, passes other than 1 and 2.

    References:
        D. Kressner, B. Vandereycken, R. Voorhaar, Streaming tensor train approximation, SIAM J. Sci. Comput. 2023,
        arXiv 2208.02600.

    Example:
        >>> import torch
        >>> x = torch.arange(9.0)[:, None, None] + torch.arange(7.0)[:, None] + torch.arange(8.0)
        >>> result = tt_sketch(x, 2, generator=torch.Generator().manual_seed(0))
        >>> result.network.ranks, result.error < 1e-5
        ((2, 2), True)
    """
    task = _Sketch(
        "tt_sketch", source, shape, rank, tol, passes, oversampling, samples, generator,
        box_bytes, prefetch, progress, resume,
    )  # fmt: skip
    sizes, d = task.sizes, len(task.sizes)
    caps = check_ranks("tt_sketch", rank, chain_ranks(sizes))
    widths = [min(task.wider(r), most) for r, most in zip(caps, chain_ranks(sizes), strict=True)]
    width = max([1, *widths])
    height = 2 * width + 1
    right, left = [task.gaussian(n, width) for n in sizes], [task.gaussian(n, height) for n in sizes]

    def begin(sums: Sums) -> None:
        for k, n in enumerate(sizes):
            ends = ([height] if k else []), ([width] if k < d - 1 else [])
            sums[f"core {k}"] = task.zeros(*ends[0], n, *ends[1])

    def step(sums: Sums, box: Box, x: Tensor, start: int) -> None:
        rows, columns = ([m[s] for m, s in zip(ms, box, strict=True)] for ms in (left, right))
        ends = products_of_columns(rows[:-1], x).mT @ x.reshape(-1, x.shape[-1])
        sums[f"core {d - 1}"][..., box[-1]] += ends if d > 1 else ends[0]
        last = torch.cat([columns[-1], task.signs[-1][box[-1]]], 1) if passes == 1 else columns[-1]
        z = (last.mT @ x.reshape(-1, x.shape[-1]).mT).reshape(-1, *x.shape[:-1])
        if passes == 1:
            task.probe(sums, z[width:], box)
        z = z[:width]
        for k in reversed(range(d - 1)):
            if k == 0:
                sums["core 0"][box[0]] += z.mT
            else:
                part = products_of_columns(rows[:k], x).mT @ z.flatten(1, k)
                sums[f"core {k}"][:, box[k]] += part.movedim(0, -1)
                z = khatri_rao(z, [None] * k + [columns[k]])

    sums = task.first(begin, step, width + PROBES * (passes == 1), height)
    cores = [sums["core 0"] if d == 1 else sums["core 0"][:, : widths[0]]]
    for k in range(1, d):
        psi, before = sums[f"core {k - 1}"], left[k - 1].to(task.double)
        omega = before.mT @ psi if k == 1 else torch.einsum("is,siu->su", before, psi)
        cut = 10 * height * torch.finfo(task.work).eps
        inverse = torch.linalg.pinv(omega[:, : widths[k - 1]], rtol=cut)
        core = torch.tensordot(inverse, sums[f"core {k}"], dims=1)
        cores.append(core[..., : widths[k]] if k < d - 1 else core)
    train, total = TT(cores), float(sums["total"])
    caps = [min(pair) for pair in zip(caps, train.ranks, strict=True)]
    if passes == 1 or d == 1:
        return task.finish(round_network(train, caps) if caps else train, sums, total, 0.0, caps)
    # cuts beside the middle core stay within the spaces projected on, others would not: those are made before
    middle = d // 2
    near = [k for k in (middle - 1, middle) if k < d - 1]
    train = round_network(train, [train.ranks[k] if k in near else cap for k, cap in enumerate(caps)])
    cores = list(orthogonalize(train, middle).cores)
    frame = Chain(sizes, caps)
    frame.left = [core if k else core.unsqueeze(0) for k, core in enumerate(cores[:middle])]
    frame.right = [core if k else core.unsqueeze(-1) for k, core in enumerate(reversed(cores[middle + 1 :]))]
    held, total = task.project(frame)
    axes = (0, held.ndim - 1)[: len(near)]
    ranks = possible([caps[k] for k in near], held, axes)
    inner, lost = task.truncated(
        held, total, lambda tol: st_hosvd(held, ranks, tol, modes=axes), lambda net: held - to_dense(net)
    )
    cores[middle] = inner.core
    cores[middle - 1] = torch.tensordot(cores[middle - 1], inner.factors[0], dims=1)
    if len(near) == 2:
        cores[middle + 1] = torch.tensordot(inner.factors[1].mT, cores[middle + 1], dims=1)
    return task.finish(TT(cores), sums, total, lost, caps)


def khatri_rao(z: Inexact[Tensor, "s ..."], matrices: Sequence[Tensor | None]) -> Inexact[Tensor, "s ..."]:
    """Contract axis j + 1 of z with column s of matrix j, for each s; the axes of None, neighbours, stay.

    Example:
        >>> import torch
        >>> khatri_rao(torch.ones(2, 3, 4), [torch.ones(3, 2), None]).tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    matrices = list(matrices)
    while matrices and (rows := matrices[0]) is not None:
        matrices.pop(0)
        z = torch.bmm(rows.mT[:, None], z.flatten(2) if z.ndim > 2 else z[..., None])[:, 0].reshape(-1, *z.shape[2:])
    while matrices and (columns := matrices.pop()) is not None:
        z = torch.bmm(z.reshape(z.shape[0], -1, z.shape[-1]), columns.mT[..., None]).reshape(z.shape[:-1])
    return z


def products_of_columns(matrices: Sequence[Tensor], like: Inexact[Tensor, "..."]) -> Inexact[Tensor, "n s"]:
    """Khatri-Rao product: column s is the outer product of columns s, flattened; of no matrices a one.

    Example:
        >>> import torch
        >>> products_of_columns([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])], torch.ones(())).mT
        tensor([[ 3.,  5.,  6., 10.]])
    """
    product = like.new_ones(1, 1)
    for k, matrix in enumerate(matrices):
        product = matrix if k == 0 else (product[:, None] * matrix).flatten(0, 1)
    return product


def possible(caps: Sequence[int], core: Inexact[Tensor, "..."], axes: Sequence[int]) -> list[int]:
    """Caps that unfoldings of a tensor can have.

    Example:
        >>> possible([3, 3], torch.zeros(5, 2), (0, 1))
        [2, 2]
    """
    return [min(cap, core.shape[k], core.numel() // core.shape[k]) for cap, k in zip(caps, axes, strict=True)]


def functionals(net: Network, vectors: Sequence[Inexact[Tensor, "n z"]] | Sequence[Tensor]) -> Inexact[Tensor, "z"]:
    """`<Â, v_1z ⊗ ... ⊗ v_dz>` for each z; integer vectors (z,) are indices, and so entries.

    Example:
        >>> import torch
        >>> from decompositions import LowRank
        >>> net = LowRank(torch.eye(3, 2), torch.eye(2), torch.ones(4, 2))
        >>> functionals(net, [torch.tensor([0, 2]), torch.tensor([1, 1])]).tolist()
        [1.0, 0.0]
    """
    place = {label: k for k, label in enumerate(net.outside)}
    operands: list[Any] = []
    for core, leg in zip(net.cores, net.legs, strict=True):
        labels = list(leg)
        for label in [label for label in leg if label in place]:
            v = vectors[place[label]]
            axis = labels.index(label)
            moved = core.movedim(axis, 0)
            core = moved[v] if v.ndim == 1 else torch.tensordot(v.to(core.dtype), moved, dims=([0], [0]))
            labels.pop(axis)
            labels.insert(0, "z")
        operands += [core, labels]
    return opt_einsum.contract(*operands, ["z"])


class _Sketch:
    """What both formats share: random matrices, the first pass, the projection, the error."""

    def __init__(
        self, name: str, source: Any, shape: Any, rank: Any, tol: Any, passes: int, oversampling: int | None,
        samples: int, generator: torch.Generator | None, box_bytes: int, prefetch: bool | None,
        progress: bool | Progress | None, resume: PassState | None,
    ) -> None:  # fmt: skip
        check_tol(name, tol)
        if passes not in (1, 2):
            raise ValueError(f"{name}: passes must be 1 or 2, got {passes}")
        for what, number, least in (("oversampling", oversampling, 2), ("samples", samples, 1)):
            if number is not None and number < least:
                raise ValueError(f"{name}: {what} must be at least {least}, got {number}")
        seed = int(torch.randint(2**62, (), generator=generator))
        options = (str(rank), tol, passes, oversampling, samples)
        self.passes = Passes(
            name, source, shape=shape, options=options, seed=seed, box_bytes=box_bytes, prefetch=prefetch,
            progress=progress, resume=resume,
        )  # fmt: skip
        self.count, self.tol, self.oversampling = passes, tol, oversampling
        self.sizes, self.work, self.double = self.passes.sizes, self.passes.work, self.passes.double
        self.device = self.passes.source.device
        self.random = torch.Generator().manual_seed(self.passes.state.seed)
        self.index = torch.stack([torch.randint(n, (samples,), generator=self.random) for n in self.sizes], 1)
        self.signs = [
            (torch.randint(2, (n, PROBES), generator=self.random) * 2 - 1).to(self.device, self.work)
            for n in self.sizes
        ]

    def wider(self, rank: int) -> int:
        """Columns of a sketch."""
        return rank + (max(8, rank) if self.oversampling is None else self.oversampling)

    def gaussian(self, n: int, columns: int) -> Tensor:
        """Random matrix; single and double precision see the same numbers."""
        return torch.randn(n, columns, generator=self.random, dtype=torch.float64).to(self.device, self.work)

    def eye(self, n: int) -> Tensor:
        """The identity: of a mode that a sketch would not shorten."""
        return torch.eye(n, dtype=self.work, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """Sums are in double precision."""
        return torch.zeros(shape, dtype=self.double, device=self.device)

    def first(self, begin: Any, step: Any, columns: int, rows: int, close: Any = None) -> Sums:
        """The sketching pass; boxes are cut so that no product with so many columns or rows is large.

        `close(sums, part of the first mode)` follows the last of the boxes that share it.
        """
        grid = self.passes.grid(())
        group = len(grid) // len(grid.axes[0])

        def start(grid: BoxGrid) -> Sums:
            sums = {"total": torch.zeros((), dtype=torch.float64), "probes": self.zeros(PROBES)}
            sums["samples"], sums["seen"] = self.zeros(len(self.index)), torch.zeros((), dtype=torch.int64)
            begin(sums)
            return sums

        def add(sums: Sums, box: Box, values: Tensor) -> None:
            low, high = (torch.tensor([getattr(s, end) for s in box]) for end in ("start", "stop"))
            here = ((self.index >= low) & (self.index < high)).all(1)
            local = (self.index[here] - low).to(self.device)
            sums["samples"][here] = values[tuple(local.unbind(1))].to(self.double)
            sums["total"] += frobenius(values) ** 2
            most = values.numel() // values.shape[-1] * max(columns, rows)
            whole = (values.ndim - 1,) if values.ndim > 1 else ()
            for part, x in pieces(box, values, whole, -(-most // WORK)):
                step(sums, part, x.to(self.work), box[0].start)
            sums["seen"] += 1
            if close is not None and int(sums["seen"]) % group == 0:
                close(sums, box[0])

        return self.passes.sweep("sketch", (), start, add)

    def probe(self, sums: Sums, z: Tensor, box: Box) -> None:
        """Add a box to the functionals, the last mode contracted already."""
        sums["probes"] += khatri_rao(z, [m[s] for m, s in zip(self.signs[:-1], box, strict=False)])

    def project(self, frame: Frame) -> tuple[Tensor, float]:
        """The tensor in the bases of a frame, and `‖A‖^2`, by a pass."""

        def start(grid: BoxGrid) -> Sums:
            held = self.zeros(*(size for _, size in frame.axes()))
            return {"held": held, "total": torch.zeros((), dtype=torch.float64)}

        def add(sums: Sums, box: Box, values: Tensor) -> None:
            part, square = project_box(frame, values, box, self.double)
            sums["total"] += square
            sums["held"][tuple(slice(None) if k is None else box[k] for k, _ in frame.axes())] += part

        sums = self.passes.sweep("projection", frame.covered(), start, add)
        return sums["held"], float(sums["total"])

    def truncated(self, core: Tensor, total: float, cut: Any, difference: Any) -> tuple[Any, float]:
        """`cut(None)`, to the caps, or to smaller ranks that meet the tolerance; and `‖A - Â‖^2` after two passes.

        What the projection lost and what the truncation loses are orthogonal.
        """
        kept = squared_norm(core)
        lost = max(0.0, total - kept)
        net = cut(None)
        square = lost + squared_norm(difference(net))
        if self.count == 2 and self.tol is not None and kept > 0:
            most = (float(self.tol) * (1 - 1e-6)) ** 2 * total
            if square < most:
                with warnings.catch_warnings():  # the error is known here
                    warnings.simplefilter("ignore", TruncationWarning)
                    smaller = cut(sqrt((most - lost) / kept))
                enough = lost + squared_norm(difference(smaller))
                if enough <= most:
                    net, square = smaller, enough
        return net, square

    def finish(self, net: Any, sums: Sums, total: float, square: float, caps: Sequence[int]) -> CrossResult:
        """Cast, and find the error or estimate it."""
        net = net.replace([c.to(self.passes.source.dtype).contiguous() for c in net.cores])
        if not all(bool(torch.isfinite(core).all()) for core in net.cores):
            raise ValueError(f"{self.passes.name}: the cores do not fit {net.dtype}, norm {sqrt(total):.3g}; scale it")
        if self.count == 2:
            error, held_out, how = self.passes.error_of(net, square, total), None, "the error of all entries"
        else:
            wide = net.to(self.double)
            entries = functionals(wide, self.index.to(self.device).unbind(1)) - sums["samples"]
            probes = functionals(wide, self.signs) - sums["probes"]
            squares = [float(entries.abs().square().mean()) * prod(self.sizes), float(probes.abs().square().mean())]
            error = sqrt(max(squares) / total) if total > 0 else sqrt(max(squares))
            held_out, how = len(self.index), "the estimated error"
        if self.tol is None:
            reason = f"the ranks asked for, with {how}"
        elif error <= self.tol:
            reason = f"{how} meets tol"
        else:
            bound = [k for k, (r, cap) in enumerate(zip(net.ranks, caps, strict=True)) if r == cap]
            reason = f"{how} misses tol: " + (
                f"the rank binds at {', '.join(map(str, bound))}" if bound else "rounding"
            )
        return self.passes.result(net, error, reason, self.tol, held_out)
