"""Sums of trees that share cores, kept as blocks: every bond has halves, a core is a list of its blocks.

The doubled tree of a tangent vector has two halves a bond and k + 2 blocks at a core with k children, of the 2^(k + 1)
that a dense core of doubled ranks would hold. A plain network is the case of one half.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions.formats.network import Labels, Network
from decompositions.linalg import accumulate_dtype
from decompositions.lockstep import Job

PLAIN, DELTA = 0, 1
"""Halves of a bond of a doubled tree: no change in the subtree below; exactly one."""


class Block(NamedTuple):
    """A core that stands in certain halves of its bonds; `halves` has one entry an axis, 0 at outside ones."""

    halves: tuple[int, ...]
    core: Tensor


class BlockTree(NamedTuple):
    """`W = sum over all choices of halves of the contraction of the blocks that stand in them`."""

    legs: tuple[Labels, ...]
    rows: Labels
    cols: Labels
    blocks: tuple[tuple[Block, ...], ...]

    @classmethod
    def of(cls, net: Network) -> "BlockTree":
        """A network as the case of one half."""
        blocks = tuple((Block((0,) * core.ndim, core),) for core in net.cores)
        return cls(net.legs, net.rows, net.cols, blocks)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every outside label."""
        outside = {*self.rows, *self.cols}
        return {
            label: size
            for leg, blocks in zip(self.legs, self.blocks, strict=True)
            for label, size in zip(leg, blocks[0].core.shape, strict=True)
            if label in outside
        }

    def to(self, dtype: torch.dtype) -> "BlockTree":
        """`torch.Tensor.to` for every block."""
        return self._replace(blocks=tuple(tuple(b._replace(core=b.core.to(dtype)) for b in own) for own in self.blocks))

    def to_cores(self) -> list[Tensor]:
        """Cores of a network with the same value, the halves of every bond side by side.

        Cost: a core with k bonds becomes 2^k times as large; meant for few bonds.
        """
        extent: dict[str, dict[int, int]] = {}
        for leg, blocks in zip(self.legs, self.blocks, strict=True):
            for block in blocks:
                for label, half, size in zip(leg, block.halves, block.core.shape, strict=True):
                    extent.setdefault(label, {})[half] = size
        starts = {label: _starts(halves) for label, halves in extent.items()}
        cores = []
        for leg, blocks in zip(self.legs, self.blocks, strict=True):
            shape = [sum(extent[label].values()) for label in leg]
            if len(blocks) == 1 and tuple(shape) == tuple(blocks[0].core.shape):
                cores.append(blocks[0].core)
                continue
            core = blocks[0].core.new_zeros(shape)
            for block in blocks:
                place = core
                for axis, (label, half) in enumerate(zip(leg, block.halves, strict=True)):
                    place = place.narrow(axis, starts[label][half], block.core.shape[axis])
                place += block.core
            cores.append(core)
        return cores


def _starts(extent: Mapping[int, int]) -> dict[int, int]:
    halves = sorted(extent)
    ends = accumulate(extent[half] for half in halves)
    return {half: end - extent[half] for half, end in zip(halves, ends, strict=True)}


def along(core: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply a core along one axis: the new index is the first of `matrix`.

    Example:
        >>> along(torch.ones(2, 3), 1, torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    if axis == core.ndim - 1:
        return core @ matrix.mT
    if axis == 0:
        columns = core.reshape(core.shape[0], -1)
        if columns.dtype == torch.float64 and columns.shape[1] <= 128 and min(matrix.shape) >= 512:
            # MKL multiplies a large matrix by a few columns up to twice as fast from the other side (not in float32)
            return (columns.mT @ matrix.mT).mT.reshape(-1, *core.shape[1:])
        return (matrix @ columns).reshape(-1, *core.shape[1:])
    return torch.tensordot(core, matrix, dims=([axis], [1])).movedim(-1, axis)


def flatten(core: Tensor, axis: int) -> Tensor:
    """A core as the matrix (other axes) x axis."""
    return core.movedim(axis, -1).reshape(-1, core.shape[axis])


def unflatten(matrix: Tensor, like: Sequence[int], axis: int) -> Tensor:
    """Inverse of `flatten` for a core of shape `like`, whose size at `axis` is what the matrix has."""
    others = [*like[:axis], *like[axis + 1 :]]
    return matrix.reshape(*others, matrix.shape[1]).movedim(-1, axis)


def leave_one_out(core: Tensor, along_axes: Sequence[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """For every (axis, matrix): the core multiplied along all the other axes. O(k log k) products for k axes.

    Example:
        >>> [out.shape for _, out in leave_one_out(torch.ones(2, 3), [(0, torch.ones(5, 2)), (1, torch.ones(7, 3))])]
        [torch.Size([2, 7]), torch.Size([5, 3])]
    """
    if len(along_axes) <= 1:
        yield from ((axis, core) for axis, _ in along_axes)
        return
    half = len(along_axes) // 2
    for keep, absorb in ((along_axes[:half], along_axes[half:]), (along_axes[half:], along_axes[:half])):
        partial = core
        for axis, matrix in absorb:
            partial = along(partial, axis, matrix)
        yield from leave_one_out(partial, keep)


def contract_common(x: Tensor, labels: Labels, core: Tensor, leg: Labels) -> tuple[Tensor, Labels]:
    """Contract over the labels that both have."""
    common = [label for label in leg if label in labels]
    axes = [labels.index(label) for label in common], [leg.index(label) for label in common]
    rest = tuple(label for label in labels if label not in common)
    return torch.tensordot(x, core, dims=axes), rest + tuple(label for label in leg if label not in common)


def all_but_one(
    x: Tensor, labels: Labels, children: Sequence[int], compress: Callable[..., Any], *, full: bool = True
) -> Any:
    """Pairs (child, x with the subtrees of all other children compressed), and where `full` (None, all compressed).

    By halves, so that no subtree is compressed more than log k times.
    """
    if len(children) <= 1:
        for child in children:
            yield child, (x, labels)
            x, labels = compress(x, labels, child) if full else (x, labels)
        if full:
            yield None, (x, labels)
        return
    half = len(children) // 2
    for keep, absorb, last in ((children[:half], children[half:], full), (children[half:], children[:half], False)):
        rest = (x, labels)
        for child in absorb:
            rest = compress(*rest, child)
        yield from all_but_one(*rest, keep, compress, full=last)


def padded(core: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy with zeros behind along every axis."""
    made = core.new_zeros(tuple(shape))
    place = made
    for axis, size in enumerate(core.shape):
        place = place.narrow(axis, 0, size)
    place.copy_(core)
    return made


def normal_basis(basis: Tensor, rest: Tensor) -> Job[Tensor]:
    """Orthonormal columns, normal to those of `basis` (n, r), that span `rest`, which is normal to them already.

    As many as `rest` has columns, or n - r. Where `rest` has no full rank, QR completes its columns by any, which must
    be normal to `basis` too: then both are factored together.
    """
    n, r = basis.shape
    count = min(rest.shape[1], n - r)
    if count == 0:
        return basis.new_zeros(n, 0)
    if accumulate_dtype(basis.dtype) != basis.dtype:  # there is no QR in half precision
        wide = accumulate_dtype(basis.dtype)
        return (yield from normal_basis(basis.to(wide), rest.to(wide))).to(basis.dtype)
    if count == rest.shape[1]:
        q, _ = yield torch.linalg.qr, rest
        overlap = basis.mH @ q
        if float(torch.linalg.vector_norm(overlap)) < torch.finfo(q.dtype).eps ** 0.5:
            return q - basis @ overlap
    both, _ = yield torch.linalg.qr, torch.cat([basis, rest], 1)
    return both[:, r : r + count]
