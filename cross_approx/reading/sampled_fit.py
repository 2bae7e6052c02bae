"""Tucker tensors and trains fitted to all entries read: alternating least squares on product sets of indices."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Inexact, Int, Shaped
from torch import Tensor

RIDGE = 1e-3
"""Of the least-squares problems, relative to their average diagonal."""

ITERATIONS = 30
"""Of conjugate gradients for one core, which starts from the core it had."""


@dataclass(frozen=True)
class Block:
    """Entries at a product of index sets, with weights: `min sum w |a - â|^2`.

    Args:
        sets: one index set a mode.
        values: entries at their product, zero where the weight says that nothing is known.
        weights: of the entries, broadcast against the values; None is one everywhere.

    Example:
        >>> import torch
        >>> block = Block((torch.arange(2), torch.tensor([4])), torch.ones(2, 1))
        >>> block.weights is None
        True
    """

    sets: tuple[Int[Tensor, "_p"], ...]
    values: Inexact[Tensor, "..."]
    weights: Inexact[Tensor, "..."] | None = None

    def weighted(self, x: Tensor) -> Tensor:
        """`w x`."""
        return x if self.weights is None else self.weights * x


def mode_product(x: Shaped[Tensor, "..."], matrix: Shaped[Tensor, "m n"], axis: int) -> Shaped[Tensor, "..."]:
    """`x x_axis matrix`.

    Example:
        >>> import torch
        >>> mode_product(torch.ones(2, 3), torch.ones(4, 3), 1).shape
        torch.Size([2, 4])
    """
    return torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)


def _products(x: Tensor, matrices: list[Tensor], skip: int | None = None) -> Tensor:
    for k, matrix in enumerate(matrices):
        if k != skip:
            x = mode_product(x, matrix, k)
    return x


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, iterations: int = ITERATIONS
) -> Tensor:
    """Solve `operator(x) = right`, the operator positive definite, to a relative residual of 1e-13 or `iterations`.

    Example:
        >>> import torch
        >>> conjugate_gradients(lambda x: 2 * x, torch.ones(3), torch.zeros(3)).tolist()
        [0.5, 0.5, 0.5]
    """
    x = start
    rest = right - operator(x)
    step, square = rest, float(torch.linalg.vector_norm(rest)) ** 2
    enough = (1e-13 * float(torch.linalg.vector_norm(right))) ** 2
    for _ in range(iterations):
        if square <= enough:
            break
        image = operator(step)
        length = square / float(torch.vdot(step.flatten(), image.flatten()).real)
        x = x + length * step
        rest = rest - length * image
        square, before = float(torch.linalg.vector_norm(rest)) ** 2, square
        step = rest + square / before * step
    return x


def fit_tucker(
    blocks: list[Block],
    core: Inexact[Tensor, "..."],
    factors: list[Inexact[Tensor, "_n _r"]],
    sweeps: int,
) -> tuple[Tensor, list[Tensor]]:
    """Core and factors in turn, each the least-squares fit to the blocks with the others fixed, by a small ridge.

    The ridge of the core draws it to zero and that of a factor to the factor before, so that what the blocks do not
    show stays as it was. Cost of a sweep: `O(ITERATIONS r N + d r^2 N)` for N entries.

    Returns:
        The core and orthonormal factors.
    """
    factors = list(factors)
    for k, factor in enumerate(factors):
        factors[k], upper = torch.linalg.qr(factor)
        core = mode_product(core, upper, k)
    core = _fit_core(blocks, core, factors, 3 * ITERATIONS)
    for _ in range(sweeps):
        for k in range(core.ndim):
            factor = _fit_factor(blocks, core, factors, k)
            factors[k], upper = torch.linalg.qr(factor)
            core = mode_product(core, upper, k)
        core = _fit_core(blocks, core, factors, ITERATIONS)
    return core, factors


def _density(blocks: list[Block], sizes: list[int]) -> float:
    """Average of the diagonal of the normal equations of a core between orthonormal factors."""
    known = sum(b.values.numel() if b.weights is None else float(b.weights.real.sum()) for b in blocks)
    return known / prod(sizes)


def _fit_core(blocks: list[Block], core: Tensor, factors: list[Tensor], iterations: int) -> Tensor:
    rows = [[u[s] for u, s in zip(factors, block.sets, strict=True)] for block in blocks]
    back = [[u.mH for u in parts] for parts in rows]
    ridge = RIDGE * _density(blocks, [len(u) for u in factors])

    def operator(x: Tensor) -> Tensor:
        out = ridge * x
        for block, up, down in zip(blocks, rows, back, strict=True):
            out = out + _products(block.weighted(_products(x, up)), down)
        return out

    right = torch.zeros_like(core)
    for block, down in zip(blocks, back, strict=True):
        right = right + _products(block.weighted(block.values), down)
    return conjugate_gradients(operator, right, core, iterations)


def _fit_factor(blocks: list[Block], core: Tensor, factors: list[Tensor], k: int) -> Tensor:
    """All rows of one factor: small normal equations, each of its own where weights differ."""
    n, r = factors[k].shape
    normal = torch.zeros(n, r * r, dtype=core.dtype)
    right = torch.zeros(n, r, dtype=core.dtype)
    for block in blocks:
        rows = [u[s] for u, s in zip(factors, block.sets, strict=True)]
        design = _products(core, rows, skip=k).movedim(k, -1).reshape(-1, r)  # (columns, r)
        values = block.weighted(block.values).movedim(k, 0).reshape(len(block.sets[k]), -1)
        right[block.sets[k]] += values @ design.conj()
        if block.weights is None:
            normal[block.sets[k]] += (design.mT @ design.conj()).reshape(1, r * r)
            continue
        weights = block.weights.expand_as(block.values).movedim(k, 0).reshape(len(block.sets[k]), -1)
        few = max(1, (1 << 22) // (r * r))
        for part, some in zip(design.split(few), weights.split(few, dim=1), strict=True):
            squares = (part[:, :, None] * part.conj()[:, None]).reshape(-1, r * r)
            normal[block.sets[k]] += some.to(core.dtype) @ squares
    matrices = normal.reshape(n, r, r)
    ridge = RIDGE * float(matrices.diagonal(dim1=1, dim2=2).real.mean())
    if ridge == 0.0:  # a zero core: nothing to fit to
        return factors[k]
    matrices = matrices + ridge * torch.eye(r, dtype=core.dtype)
    # rows are on the left: u N = b
    return torch.linalg.solve(matrices.mT, (right + ridge * factors[k])[..., None])[..., 0]


def fit_train(blocks: list[Block], cores: list[Inexact[Tensor, "_r _n _s"]], sweeps: int) -> list[Tensor]:
    """Cores of a train in turn, each the least-squares fit to the blocks with the others orthonormal.

    Cost of a sweep: `O(ITERATIONS d r N)` for N entries.

    Returns:
        Cores (r, n, s); the first one is the center.
    """
    cores = list(cores)
    d = len(cores)
    for k in reversed(range(d - 1)):
        _move(cores, k + 1, k)
    for _ in range(sweeps):
        for k in range(d):
            cores[k] = fit_train_core(blocks, cores, k, ITERATIONS)
            if k < d - 1:
                _move(cores, k, k + 1)
        for k in reversed(range(d - 1)):
            _move(cores, k + 1, k)
            cores[k] = fit_train_core(blocks, cores, k, ITERATIONS)
    return cores


def _move(cores: list[Tensor], here: int, there: int) -> None:
    """Make a core orthonormal towards its neighbour, which takes the rest."""
    r, n, s = cores[here].shape
    if there > here:
        q, upper = torch.linalg.qr(cores[here].reshape(r * n, s))
        cores[here] = q.reshape(r, n, -1)
        cores[there] = torch.tensordot(upper, cores[there], 1)
    else:
        q, upper = torch.linalg.qr(cores[here].reshape(r, n * s).mH)
        cores[here] = q.mH.reshape(-1, n, s)
        cores[there] = torch.tensordot(cores[there], upper.mH, 1)


def fit_train_core(blocks: list[Block], cores: list[Tensor], k: int, iterations: int) -> Tensor:
    """Core k, the others orthonormal towards it."""
    ridge = RIDGE * _density(blocks, [core.shape[1] for core in cores])
    parts = []
    for block in blocks:
        left, right = cores[0].new_ones(1, 1), cores[0].new_ones(1, 1)
        for core, indices in zip(cores[:k], block.sets[:k], strict=True):
            left = torch.tensordot(left, core[:, indices], 1).reshape(-1, core.shape[2])
        for core, indices in zip(reversed(cores[k + 1 :]), reversed(block.sets[k + 1 :]), strict=True):
            right = torch.tensordot(core[:, indices], right, 1).reshape(core.shape[0], -1)
        shape = (len(left), len(block.sets[k]), right.shape[1])
        weights = None if block.weights is None else block.weights.expand_as(block.values).reshape(shape)
        parts.append((Block((block.sets[k],), block.values.reshape(shape), weights), left, right))

    def adjoint(part: tuple[Block, Tensor, Tensor], x: Tensor, out: Tensor) -> None:
        block, left, right = part
        small = torch.tensordot(torch.tensordot(left.mH, x, 1), right.mH, 1)
        out.index_add_(1, block.sets[0], small)

    def operator(x: Tensor) -> Tensor:
        out = ridge * x
        for part in parts:
            block, left, right = part
            image = torch.tensordot(torch.tensordot(left, x[:, block.sets[0]], 1), right, 1)
            adjoint(part, block.weighted(image), out)
        return out

    right_side = torch.zeros_like(cores[k])
    for part in parts:
        adjoint(part, part[0].weighted(part[0].values), right_side)
    return conjugate_gradients(operator, right_side, cores[k], iterations)
