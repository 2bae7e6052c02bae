"""Tucker decompositions: HOSVD, sequentially truncated HOSVD, HOOI, and Tucker-2 of convolution kernels."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.bases import basis, project
from decompositions.formats.tucker import Tucker
from decompositions.linalg import Method, check_kind, check_ranks, frobenius, full_precision
from decompositions.truncation import Truncation

Ranks = int | Sequence[int] | None


@full_precision
def hosvd(
    x: Inexact[Tensor, "..."],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    modes: Sequence[int] | None = None,
    num_rows: int | None = None,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tucker | tuple[Tucker, float]:
    """Truncated higher-order SVD: factors are the dominant left singular vectors of every unfolding of x itself.

    `‖X - X̂‖ <= tol ‖X‖`; with ranks given, `‖X - X̂‖ <= sqrt(d) ‖X - best of those ranks‖`. Untruncated, the core is
    all-orthogonal with sorted slice norms. `st_hosvd` has the same guarantee and is faster.
    Cost: O(sum_k n_k prod(n)).

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every mode, or an entry for each of `modes`.
        tol: relative Frobenius error, spread over the modes in quadrature.
        modes: axes that get a factor; all by default.
        num_rows: leading axes that are rows of the network; all by default.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        Tucker with orthonormal factors; the core is the center.

    Raises:
        ValueError: NaN or infinity, an empty mode, an impossible rank, modes that are not axes.

    References:
        L. De Lathauwer, B. De Moor, J. Vandewalle, SIAM J. Matrix Anal. Appl. 2000, theorem 2 and property 10.

    Example:
        >>> import torch
        >>> hosvd(torch.ones(4, 5, 6), tol=1e-6).ranks
        (1, 1, 1)
    """
    task, axes, caps = _start("hosvd", x, rank, tol, modes, method, generator)
    factors = [task.cut(_slices(task.work, k), cap, ordered=True).u for k, cap in zip(axes, caps, strict=True)]
    core = task.work
    for k, u in zip(axes, factors, strict=True):
        core = _project(core, u, k)
    return task.finish(Tucker(core, [u.to(core.dtype) for u in factors], axes, num_rows), with_error)


@full_precision
def st_hosvd(
    x: Inexact[Tensor, "..."],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    modes: Sequence[int] | None = None,
    num_rows: int | None = None,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tucker | tuple[Tucker, float]:
    """Sequentially truncated HOSVD: each factor comes from the tensor already projected on the earlier ones.

    `‖X - X̂‖ <= tol ‖X‖`, the squared errors of the modes adding exactly; with ranks given,
    `‖X - X̂‖ <= sqrt(d) ‖X - best of those ranks‖`.
    Cost: O(n_1 prod(n)) for the first mode, less for each later one.

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every mode, or an entry for each of `modes`.
        tol: relative Frobenius error.
        modes: axes that get a factor, processed in this order; all by default.
        num_rows: leading axes that are rows of the network; all by default.
        method: "exact", "gram", "randomized" (needs rank) or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        Tucker with orthonormal factors; the core is the center.

    Raises:
        ValueError: NaN or infinity, an empty mode, an impossible rank, modes that are not axes.

    References:
        N. Vannieuwenhoven, R. Vandebril, K. Meerbergen, A new truncation strategy for the higher-order singular value
        decomposition, SIAM J. Sci. Comput. 2012, theorem 6.5.

    Example:
        >>> import torch
        >>> x = torch.einsum("i,j,k->ijk", torch.arange(1.0, 4), torch.ones(5), torch.ones(6))
        >>> net, error = st_hosvd(x, rank=1, with_error=True)
        >>> net.shape, error < 1e-6
        ((3, 5, 6), True)
    """
    task, axes, caps = _start("st_hosvd", x, rank, tol, modes, method, generator)
    core, factors = _sequential(task, axes, caps)
    return task.finish(Tucker(core, [u.to(core.dtype) for u in factors], axes, num_rows), with_error)


@full_precision
def hooi(
    x: Inexact[Tensor, "..."],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    modes: Sequence[int] | None = None,
    num_rows: int | None = None,
    max_sweeps: int = 20,
    improvement: float = 1e-7,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tucker | tuple[Tucker, float]:
    """Higher-order orthogonal iteration: ST-HOSVD, then each factor in turn refitted with the others fixed.

    The error never grows, so every guarantee of `st_hosvd` holds; the ranks are its ranks, less what the others make
    redundant (a rank above the product of all others).
    Cost: that of `st_hosvd` plus O(sweeps d prod(n) r).

    Args:
        x: a tensor of any order >= 1.
        rank: cap for every mode, or an entry for each of `modes`.
        tol: relative Frobenius error (chooses the ranks of the start).
        modes: axes that get a factor; all by default.
        num_rows: leading axes that are rows of the network; all by default.
        max_sweeps: upper bound on the number of sweeps.
        improvement: stop when a sweep lowers the squared error by less than this share of `‖X‖^2`.
        method: "exact", "gram" or "auto", which the refits follow; "randomized" (needs rank) for the start alone.
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        Tucker with orthonormal factors; the core is the center.

    Raises:
        ValueError: as `st_hosvd`; `max_sweeps` below 0.

    References:
        L. De Lathauwer, B. De Moor, J. Vandewalle, On the best rank-1 and rank-(R1,...,RN) approximation of
        higher-order tensors, SIAM J. Matrix Anal. Appl. 2000.

    Example:
        >>> import torch
        >>> hooi(torch.randn(4, 5, 6), rank=2).core.shape
        torch.Size([2, 2, 2])
    """
    if max_sweeps < 0:
        raise ValueError(f"hooi: max_sweeps must be at least 0, got {max_sweeps}")
    start = _start("hooi", x, rank, tol, modes, method, generator)
    return _iterate(start, num_rows, max_sweeps, improvement, with_error)


@full_precision
def tucker2(
    weight: Inexact[Tensor, "out in *kernel"],
    rank: Ranks = None,
    tol: float | None = None,
    *,
    method: Method = "auto",
    with_error: bool = False,
    generator: torch.Generator | None = None,
) -> Tucker | tuple[Tucker, float]:
    """Tucker-2 of a weight: factors for out and in alone, `K ≈ core x_out U x_in V`; HOOI with two modes.

    As a convolution: 1x1 (in -> r_in), k x k (r_in -> r_out), 1x1 (r_out -> out). `‖K - K̂‖ <= tol ‖K‖`.
    Cost: O((out + in) numel).

    Args:
        weight: (out, in, *kernel); a matrix works too.
        rank: cap for both, or (r_out, r_in).
        tol: relative Frobenius error.
        method: "exact", "gram" or "auto".
        with_error: return `(network, relative error)`.
        generator: of the randomized sketch.

    Returns:
        Tucker with rows = out and columns = (in, *kernel); the core is the center.

    Raises:
        ValueError: order below 2, NaN or infinity, an impossible rank.

    References:
        Y.-D. Kim et al., Compression of deep convolutional neural networks for fast and low power mobile
        applications, 2016, arXiv 1511.06530.

    Example:
        >>> import torch
        >>> tucker2(torch.randn(16, 8, 3, 3), rank=(4, 2)).core.shape
        torch.Size([4, 2, 3, 3])
    """
    check_kind("tucker2", weight, min_order=2)
    start = _start("tucker2", weight, rank, tol, (0, 1), method, generator)
    return _iterate(start, 1, 20, 1e-7, with_error)


def _iterate(
    start: tuple[Truncation, tuple[int, ...], list[int]],
    num_rows: int | None,
    max_sweeps: int,
    improvement: float,
    with_error: bool,
) -> Tucker | tuple[Tucker, float]:
    """ST-HOSVD, then refits of one factor at a time."""
    task, axes, caps = start
    core, factors = _sequential(task, axes, caps)
    fit = frobenius(core) ** 2
    refit: Method = "auto" if task.method == "randomized" else task.method  # a new sketch a sweep could lower the fit
    for _ in range(max_sweeps if len(axes) > 1 else 0):
        for position, k in enumerate(axes):
            projected = task.work
            for other, factor in zip(axes, factors, strict=True):
                if other != k:
                    projected = _project(projected, factor, other)
            width = factors[position].shape[1]
            x = _slices(projected, k)
            u = basis(x, cap=width, budget=None, tol=None, method=refit, precise=task.precise, approximate=False).u
            factors[position] = u
            core = _project(projected, u, k)
        previous, fit = fit, frobenius(core) ** 2
        if fit - previous <= improvement * task.norm**2:
            break
    return task.finish(Tucker(core, [u.to(core.dtype) for u in factors], axes, num_rows), with_error)


def _start(
    name: str,
    x: Tensor,
    rank: Ranks,
    tol: float | None,
    modes: Sequence[int] | None,
    method: Method,
    generator: torch.Generator | None,
) -> tuple[Truncation, tuple[int, ...], list[int]]:
    check_kind(name, x)
    axes = tuple(range(x.ndim)) if modes is None else tuple(modes)
    if len(set(axes)) != len(axes) or any(not 0 <= k < x.ndim for k in axes):
        raise ValueError(f"{name}: modes must be distinct axes in 0..{x.ndim - 1}, got {axes}")
    if method == "randomized" and rank is None:
        raise ValueError(f"{name}: method='randomized' needs a rank, got rank=None; use method='auto' with tol")
    # a mode cannot need more than its size, nor more than all the others together
    caps = check_ranks(name, rank, [min(x.shape[k], x.numel() // x.shape[k]) for k in axes], "mode")
    return Truncation(name, x, max(1, len(axes)), tol, method, generator), axes, caps


def _sequential(task: Truncation, axes: tuple[int, ...], caps: list[int]) -> tuple[Tensor, list[Tensor]]:
    core, factors = task.work, []
    for k, cap in zip(axes, caps, strict=True):
        found = task.cut(_slices(core, k), cap)
        core = found.rest.reshape(*core.shape[:k], -1, *core.shape[k + 1 :])
        factors.append(found.u)
    return core, factors


def _slices(x: Tensor, axis: int) -> Tensor:
    """`x` as (modes before, mode, modes after): a view where x is contiguous."""
    return x.reshape(prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :]))


def _project(x: Tensor, factor: Tensor, axis: int) -> Tensor:
    """Mode product `x x_axis factor^H`."""
    return project(factor, _slices(x, axis)).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
