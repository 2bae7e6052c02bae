"""Orthonormal bases for some modes of a tensor, in which boxes of it are projected: what passes build up."""

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from jaxtyping import Inexact
from torch import Tensor

from cross_approx.streaming.passes import Box, pieces, squared_norm
from decompositions.formats.network import Network
from decompositions.formats.tt import TT, chain_ranks
from decompositions.formats.tucker import Tucker
from decompositions.truncation import Truncation
from decompositions.tt import split_chain


class Frame(Protocol):
    """Bases for some modes; the projected tensor has the axes `axes()`."""

    def covered(self) -> tuple[int, ...]:
        """Modes that have a basis."""

    def axes(self) -> list[tuple[int | None, int]]:
        """Of every axis of the projected tensor: its mode (None where it is a rank), and its size."""

    def project(self, x: Tensor, box: Box) -> Tensor:
        """What a box adds to the projected tensor."""

    def choices(self) -> list[tuple[int, int]]:
        """Modes that may be cut next, the best first, each with its largest rank."""

    def rows(self, mode: int) -> tuple[int, int]:
        """First and last axis of the projected tensor that are the rows of the cut at this mode."""

    def add(self, mode: int, u: Tensor) -> None:
        """Cover a mode by the basis found."""

    def cuts_left(self) -> int:
        """How many cuts there are still."""

    def inside(self, name: str, held: Tensor, tol: float | None) -> Network:
        """Decompose the projected tensor in memory."""

    def whole(self, inner: Network) -> Network:
        """The network of the tensor from that of the projected one."""


class Star:
    """Bases of single modes: the factors of a Tucker tensor.

    Args:
        sizes: mode sizes.
        caps: largest rank of every mode.
        free: whether tolerances, not the caps, decide: then the largest mode is cut first, since passes cost more than
            products; else the one that shrinks most, and of those the smallest.

    Example:
        >>> import torch
        >>> frame = Star((4, 3), [4, 3])
        >>> frame.add(0, torch.eye(4, 2))
        >>> frame.project(torch.ones(2, 3), (slice(1, 3), slice(0, 3))).tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, sizes: tuple[int, ...], caps: Sequence[int], free: bool = False) -> None:
        self.sizes, self.caps, self.free = sizes, caps, free
        self.factors: dict[int, Tensor] = {}

    def covered(self) -> tuple[int, ...]:
        """Modes that have a factor."""
        return tuple(sorted(self.factors))

    def axes(self) -> list[tuple[int | None, int]]:
        """One axis a mode."""
        return [(None, self.factors[k].shape[1]) if k in self.factors else (k, n) for k, n in enumerate(self.sizes)]

    def project(self, x: Inexact[Tensor, "..."], box: Box) -> Inexact[Tensor, "..."]:
        """`x x_k U_k[box]^H` over the modes covered."""
        for k, u in self.factors.items():
            x = contract(x, u[box[k]], k)
        return x

    def choices(self) -> list[tuple[int, int]]:
        """Modes without a factor."""
        left = [k for k in range(len(self.sizes)) if k not in self.factors]
        if self.free:
            return sorted(((k, self.caps[k]) for k in left), key=lambda pair: -self.sizes[pair[0]])
        return sorted(
            ((k, self.caps[k]) for k in left), key=lambda pair: (pair[1] / self.sizes[pair[0]], self.sizes[pair[0]])
        )

    def rows(self, mode: int) -> tuple[int, int]:
        """The mode itself."""
        return mode, mode

    def add(self, mode: int, u: Inexact[Tensor, "n r"]) -> None:
        """Cover a mode by its factor."""
        self.factors[mode] = u

    def cuts_left(self) -> int:
        """Modes without a factor."""
        return len(self.sizes) - len(self.factors)

    def inside(self, name: str, held: Inexact[Tensor, "..."], tol: float | None) -> Tucker:
        """ST-HOSVD over the modes without a factor."""
        left = [k for k in range(len(self.sizes)) if k not in self.factors]
        task = Truncation(name, held, max(1, len(left)), tol)
        core, factors = task.work, []
        for k in left:
            slices = core.reshape(prod(core.shape[:k]), core.shape[k], prod(core.shape[k + 1 :]))
            found = task.cut(slices, self.caps[k])
            core = found.rest.reshape(*core.shape[:k], -1, *core.shape[k + 1 :])
            factors.append(found.u.to(core.dtype))
        return Tucker(core * task.scale, factors, left)

    def whole(self, inner: Network) -> Tucker:
        """The core with every factor."""
        found = iter(inner.cores[1:])
        core = inner.cores[0]
        factors = [self.factors[k] if k in self.factors else next(found) for k in range(len(self.sizes))]
        return Tucker(core, [u.to(core.dtype) for u in factors])


class Chain:
    """Left-orthogonal cores of the first modes and right-orthogonal ones of the last: both ends of a tensor train.

    Args:
        sizes: mode sizes.
        caps: largest rank of every bond.

    Example:
        >>> import torch
        >>> frame = Chain((4, 3, 2), [4, 2])
        >>> frame.add(0, torch.eye(4, 2))
        >>> frame.add(2, torch.eye(2, 1))
        >>> frame.project(torch.ones(2, 3, 2), (slice(1, 3), slice(0, 3), slice(0, 2))).shape
        torch.Size([2, 3, 1])
    """

    def __init__(self, sizes: tuple[int, ...], caps: Sequence[int]) -> None:
        self.sizes, self.caps = sizes, caps
        self.left: list[Tensor] = []  # (r, n, s), orthonormal columns s
        self.right: list[Tensor] = []  # the last mode first, (s, n, r), orthonormal rows s

    def covered(self) -> tuple[int, ...]:
        """The modes at both ends."""
        d = len(self.sizes)
        return (*range(len(self.left)), *range(d - len(self.right), d))

    def axes(self) -> list[tuple[int | None, int]]:
        """A rank where an end is covered, the modes between, a rank."""
        between = range(len(self.left), len(self.sizes) - len(self.right))
        first: list[tuple[int | None, int]] = [(None, self.left[-1].shape[2])] if self.left else []
        last: list[tuple[int | None, int]] = [(None, self.right[-1].shape[0])] if self.right else []
        return [*first, *((k, self.sizes[k]) for k in between), *last]

    def project(self, x: Inexact[Tensor, "..."], box: Box) -> Inexact[Tensor, "..."]:
        """Both ends contracted with their cores."""
        for k, core in enumerate(self.left):
            x = x if k == 0 else x.flatten(0, 1)
            x = contract(x, core[:, box[k]].flatten(0, 1), 0)
        for k, core in enumerate(self.right):
            x = x if k == 0 else x.flatten(-2)
            x = contract(x, core[:, box[-1 - k]].flatten(1).mT, x.ndim - 1)
        return x

    def choices(self) -> list[tuple[int, int]]:
        """The first and the last mode between the ends, the one with fewer rows first."""
        a, b = len(self.left), len(self.sizes) - 1 - len(self.right)
        if a == b:
            return []
        sizes = [size for _, size in self.axes()]
        ends = [(prod(sizes[: self.rows(a)[1] + 1]), a, self.caps[a])]
        ends.append((prod(sizes[self.rows(b)[0] :]), b, self.caps[b - 1]))
        return [(mode, cap) for _, mode, cap in sorted(ends)]

    def rows(self, mode: int) -> tuple[int, int]:
        """The mode with the rank beside it."""
        if mode == len(self.left):
            return 0, 1 if self.left else 0
        last = len(self.axes()) - 1
        return (last - 1 if self.right else last), last

    def add(self, mode: int, u: Inexact[Tensor, "m r"]) -> None:
        """Cover the first mode between the ends, or the last one."""
        n = self.sizes[mode]
        if mode == len(self.left):
            self.left.append(u.reshape(-1, n, u.shape[1]))
        else:
            self.right.append(u.reshape(n, -1, u.shape[1]).permute(2, 0, 1))

    def cuts_left(self) -> int:
        """Bonds that are not cut."""
        return len(self.sizes) - 1 - len(self.left) - len(self.right)

    def inside(self, name: str, held: Inexact[Tensor, "..."], tol: float | None) -> TT:
        """TT-SVD; the ranks at the ends are modes of it."""
        a, b = len(self.left), len(self.sizes) - 1 - len(self.right)
        ends = ([held.shape[0]] if self.left else []), ([held.shape[-1]] if self.right else [])
        caps = [min(pair) for pair in zip([*ends[0], *self.caps[a:b], *ends[1]], chain_ranks(held.shape), strict=True)]
        task, cores = split_chain(name, held, held, caps, tol, "auto", None)
        return TT([*cores[:-1], cores[-1] * task.scale])

    def whole(self, inner: Network) -> TT:
        """The cores of both ends around it."""
        cores, dtype = list(inner.cores), inner.dtype
        if self.left:
            cores[:2] = [torch.tensordot(cores[0], cores[1], dims=1)]
        if self.right:
            cores[-2:] = [torch.tensordot(cores[-2], cores[-1], dims=1)]
        cores = [*(core.to(dtype) for core in self.left), *cores, *(core.to(dtype) for core in reversed(self.right))]
        if self.left:
            cores[0] = cores[0].squeeze(0)
        if self.right:
            cores[-1] = cores[-1].squeeze(-1)
        return TT(cores)


def project_box(
    frame: Frame, values: Inexact[Tensor, "..."], box: Box, dtype: torch.dtype
) -> tuple[Inexact[Tensor, "..."], float]:
    """What a box adds to the projected tensor, and its squared norm, in `dtype` by pieces.

    The projected values have the axes of the frame, those with a mode as long as the box there.

    Example:
        >>> import torch
        >>> frame = Star((4, 3), [4, 3])
        >>> frame.add(0, torch.eye(4, 2, dtype=torch.float64))
        >>> part, square = project_box(frame, torch.ones(2, 3), (slice(1, 3), slice(0, 3)), torch.float64)
        >>> part.sum(1).tolist(), round(square, 9)
        ([0.0, 3.0], 6.0)
    """
    shape = [size if k is None else values.shape[k] for k, size in frame.axes()]
    held, square = torch.zeros(shape, dtype=dtype, device=values.device), 0.0
    for piece, x in pieces(box, values, frame.covered()):
        wide = x.to(dtype)
        square += squared_norm(wide)
        place = tuple(
            slice(None) if k is None else slice(piece[k].start - box[k].start, piece[k].stop - box[k].start)
            for k, _ in frame.axes()
        )
        held[place] += frame.project(wide, piece)
    return held, square


def contract(x: Inexact[Tensor, "..."], u: Inexact[Tensor, "n r"], axis: int) -> Inexact[Tensor, "..."]:
    """Mode product `x x_axis u^H`.

    Example:
        >>> import torch
        >>> contract(torch.ones(2, 3), torch.ones(2, 1), 0).tolist()
        [[2.0, 2.0, 2.0]]
    """
    if axis == x.ndim - 1:
        return x @ u.conj()
    slices = x.reshape(prod(x.shape[:axis]), x.shape[axis], prod(x.shape[axis + 1 :]))
    return (u.mH @ slices).reshape(*x.shape[:axis], u.shape[1], *x.shape[axis + 1 :])
