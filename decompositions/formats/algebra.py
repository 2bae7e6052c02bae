"""Generic functions of a network: what it stands for, what it does to a vector, sums, products, norms.

One implementation from labels serves every format; a format may register a faster or type-keeping path beside its class
(`functools.singledispatch`), and the generic path stays as its oracle.
"""

from functools import singledispatch
from math import prod
from typing import TypeVar

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.gauge import orthogonalize
from decompositions.formats.network import Labels, Network
from decompositions.formats.plan import Plan, bucket, plan_apply, plan_dense, plan_path, run
from decompositions.formats.program import multiply
from decompositions.linalg import accumulate_dtype, direct_sum, full_precision

N = TypeVar("N", bound=Network)

COMPILE_BATCH = 1024
"""Rows that a bare `apply` plans for while it is traced (the batch may be symbolic there)."""


@singledispatch
def to_dense(net: Network) -> Tensor:
    """Contract the network to the dense tensor of shape `row_modes + col_modes`.

    Cost: that of opt_einsum's contraction path. For a weight of shape (out, in) see `to_matrix`.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, to_dense
        >>> to_dense(LowRank(torch.eye(2), torch.eye(2), torch.ones(3, 2))).shape
        torch.Size([2, 3])
    """
    return run(plan_dense(net).steps, net.cores)


def to_matrix(net: Network) -> Tensor:
    """Return the dense tensor as a matrix (product of row modes, product of col modes).

    Example:
        >>> import torch
        >>> from decompositions import TTMatrix, to_matrix
        >>> to_matrix(TTMatrix.random(row_modes=(2, 3), col_modes=(4, 5), rank=2)).shape
        torch.Size([6, 20])
    """
    return to_dense(net).reshape(prod(net.row_modes), prod(net.col_modes))


def apply(
    net: Network, x: Inexact[Tensor, "*batch_and_cols"], *, plan: Plan | None = None
) -> Inexact[Tensor, "*batch_and_rows"]:
    """Multiply: `y[..., rows] = sum over cols of W[rows, cols] x[..., cols]` (y = x W^T).

    Args:
        net: a network with column labels.
        x: its last axes are the column modes, `(*batch, *col_modes)`; the batch may be empty.
        plan: one of `plan_apply(net, batch)`; made (and remembered by shapes) when absent.

    Returns:
        `(*batch, *row_modes)`.

    Raises:
        ValueError: the last axes of x are not the column modes, or the network has none.

    Example:
        >>> import torch
        >>> from decompositions import LowRank, apply
        >>> net = LowRank.random(row_modes=(3,), col_modes=(5,), rank=2)
        >>> apply(net, torch.ones(7, 5)).shape
        torch.Size([7, 3])
    """
    modes = net.col_modes
    if not modes:
        raise ValueError(
            f"apply: the network needs column modes, got rows {net.row_modes} only; see `as_operator(net, num_rows)`"
        )
    if tuple(x.shape[-len(modes) :]) != modes:
        raise ValueError(
            f"apply: the last axes of x must be the column modes, expected (..., {', '.join(map(str, modes))}), "
            f"got {tuple(x.shape)}; a flat x needs x.unflatten(-1, {modes})"
        )
    batch_shape = tuple(x.shape[: x.ndim - len(modes)])
    batch = prod(batch_shape)
    if plan is None:
        plan = plan_apply(net, COMPILE_BATCH if torch.compiler.is_compiling() else bucket(batch))[0]
    y = multiply(plan, x.reshape(batch, *modes), net.cores)
    return y.reshape(*batch_shape, *net.row_modes)


@singledispatch
def transpose(net: Network) -> Network:
    """Exchange rows and columns: `W[cols, rows]`, without conjugation and without moving data.

    Example:
        >>> from decompositions import TT, transpose
        >>> transpose(TT.random(row_modes=(2,), col_modes=(3, 4), rank=2)).shape
        (3, 4, 2)
    """
    return net.replace(rows=net.cols, cols=net.rows)


def as_operator(net: N, num_rows: int) -> N:
    """Split the dense axes anew: the first `num_rows` are rows, the others columns.

    Example:
        >>> from decompositions import TT, as_operator
        >>> as_operator(TT.random(row_modes=(2, 3, 4), rank=2), 1).col_modes
        (3, 4)
    """
    if not 0 <= num_rows <= net.order:
        raise ValueError(f"as_operator: num_rows must be in 0..{net.order} (the order), got {num_rows}")
    return net.replace(rows=net.outside[:num_rows], cols=net.outside[num_rows:])


@singledispatch
def numel(net: Network) -> int:
    """Count the parameters of the format.

    Example:
        >>> from decompositions import TT, numel
        >>> numel(TT.random(row_modes=(4, 4, 4), rank=2))
        32
    """
    return sum(core.numel() for core in net.cores)


def add(a: N, b: Network) -> N:
    """Sum of two networks with the same labels and modes: `A + B`, ranks add.

    Cores become block-diagonal along their bonds. Cost: copies. Follow with `round` to remove what is redundant.

    Raises:
        ValueError: structures or modes differ, or a core has no summed bond (then the sum is not such a network).

    Example:
        >>> from decompositions import TT, add
        >>> a = TT.random(row_modes=(4, 4, 4), rank=2)
        >>> add(a, a).ranks
        (4, 4)
    """
    if (a.legs, a.rows, a.cols) != (b.legs, b.rows, b.cols):
        raise ValueError(f"add: networks must have the same labels, expected {a.equation}, got {b.equation}")
    if a.shape != b.shape:
        raise ValueError(f"add: networks must have the same modes, expected {a.shape}, got {b.shape}")
    if len(a.cores) == 1:
        return a.replace([a.cores[0] + b.cores[0]])
    outside = set(a.outside)
    cores = []
    for k, (first, second, leg) in enumerate(zip(a.cores, b.cores, a.legs, strict=True)):
        if outside.issuperset(leg) or _is_detached(a, k):
            raise ValueError(
                f"add: every core must be joined to the others by summed bonds, got core {k} with legs {leg} "
                f"of {a.equation}; add the dense tensors instead"
            )
        cores.append(direct_sum(first, second, [axis for axis, label in enumerate(leg) if label not in outside]))
    return a.replace(cores)


def _is_detached(net: Network, start: int) -> bool:
    """Whether the summed bonds leave some core unreachable from `start`."""
    outside = set(net.outside)
    reached, frontier = {start}, [start]
    while frontier:
        bonds = set(net.legs[frontier.pop()]) - outside
        for k, leg in enumerate(net.legs):
            if k not in reached and bonds.intersection(leg):
                reached.add(k)
                frontier.append(k)
    return len(reached) < len(net.cores)


def scale(net: N, factor: float | complex | Tensor) -> N:
    """Multiply the represented tensor by a number (into the smallest core).

    Example:
        >>> from decompositions import TT, norm, scale
        >>> net = TT.random(row_modes=(4, 4), rank=2, std=1.0)
        >>> round(norm(scale(net, 0.5)).item(), 5)
        2.0
    """
    if isinstance(factor, complex) and not net.dtype.is_complex:
        raise TypeError(f"scale: a network of {net.dtype} needs a real factor, got {factor}; convert it with net.to")
    smallest = min(range(len(net.cores)), key=lambda k: net.cores[k].numel())
    return net.replace([core * factor if k == smallest else core for k, core in enumerate(net.cores)])


@full_precision
def inner(a: Network, b: Network) -> Tensor:
    """Frobenius inner product `sum conj(A) B`, contracted core by core and never densified.

    The two networks may be of different formats; only the modes must agree. Half precision is summed in float32.

    Raises:
        ValueError: the dense shapes differ.

    Example:
        >>> from decompositions import LowRank, inner
        >>> a = LowRank.random(row_modes=(3,), col_modes=(4,), rank=2, std=1.0)
        >>> round(inner(a, a).item(), 4)
        12.0
    """
    if a.shape != b.shape:
        raise ValueError(f"inner: networks must have the same modes, expected {a.shape}, got {b.shape}")
    rename = dict(zip(b.outside, a.outside, strict=True))
    quotes = max((len(label) - len(label.lstrip("'")) for leg in a.legs for label in leg), default=0) + 1
    legs_b: tuple[Labels, ...] = tuple(  # more leading quotes than any label of a: bonds of b stay its own
        tuple(rename.get(label, "'" * quotes + label) for label in leg) for leg in b.legs
    )
    sizes = {
        label: size
        for leg, core in zip((*a.legs, *legs_b), (*a.cores, *b.cores), strict=True)
        for label, size in zip(leg, core.shape, strict=True)
    }
    dtype = accumulate_dtype(torch.promote_types(a.dtype, b.dtype))
    operands = [core.conj().to(dtype) for core in a.cores] + [core.to(dtype) for core in b.cores]
    return run(plan_path((*a.legs, *legs_b), sizes, (), dtype.itemsize).steps, operands)


@full_precision
def norm(net: Network) -> Tensor:
    """Frobenius norm.

    For a tree that needs no gradient it is the norm of the center after a QR sweep, accurate to the precision of the
    dtype. Otherwise `sqrt(inner(net, net))`, which sees a cancelling sum (`add(a, scale(b, -1))`) only down to the
    square root of the precision.

    Example:
        >>> from decompositions import Tucker, norm
        >>> net = Tucker.random(row_modes=(4, 5, 5), rank=2, std=0.1)
        >>> round(norm(net).item(), 5)
        1.0
    """
    tracked = torch.is_grad_enabled() and any(core.requires_grad for core in net.cores)
    if net.is_tree and not tracked:
        center = orthogonalize(net.to(accumulate_dtype(net.dtype)), 0).cores[0]
        double = torch.promote_types(center.dtype, torch.float64)  # squares of 1e-30 leave the range of float32
        return torch.linalg.vector_norm(center, dtype=double).to(center.real.dtype)
    square = inner(net, net).real
    positive = square > 0  # at zero the gradient is the subgradient 0, not NaN
    return torch.where(positive, square, 1.0).sqrt() * positive
