"""TensorRing: a tensor train whose last core is bonded to the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import check_axes, check_num_rows
from decompositions.formats.network import Labels, Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class TensorRing(Network):
    """`W(i_1, ..., i_d) = trace(G_1(i_1) ... G_d(i_d))`, equation `cia,ajb,bkc->ijk`; a cycle, no tree.

    So it has no gauge, no rounding and no rank-adaptive training, and the best ring of given ranks may not exist.
    Parameters: sum_k r_{k-1} n_k r_k, with r_0 = r_d the bond that closes the ring. Gauge: an invertible matrix on
    every bond.

    Args:
        cores: (r_d, n_1, r_1), (r_1, n_2, r_2), ..., (r_{d-1}, n_d, r_d); a single core (n,) for order 1.
        num_rows: how many leading axes of the dense tensor are rows; all by default.
        axes: the dense axis that each core carries, in ring order; (0, 1, ..., d - 1) by default.

    Raises:
        ValueError: cores do not close a ring, or axes is not a permutation.

    References:
        Q. Zhao, G. Zhou, S. Xie, L. Zhang, A. Cichocki, Tensor ring decomposition, 2016, arXiv 1606.05535.

    Example:
        >>> import torch
        >>> net = TensorRing([torch.zeros(2, 4, 3), torch.zeros(3, 5, 2), torch.zeros(2, 6, 2)])
        >>> net.shape, net.ranks, net.is_tree
        ((4, 5, 6), (2, 3, 2), False)
    """

    def __init__(
        self,
        cores: Sequence[Inexact[Tensor, "..."]],
        num_rows: int | None = None,
        axes: Sequence[int] | None = None,
    ) -> None:
        cores = tuple(cores)
        d = len(cores)
        axes = check_axes("TensorRing", axes, d)
        num_rows = check_num_rows("TensorRing", num_rows, d)
        outside = tuple(f"i{k}" for k in range(d))
        bonds = [f"b{k}" for k in range(d)]  # bond k joins cores k - 1 and k: the first to be shown closes the ring
        legs: list[Labels] = [(bonds[k], outside[axis], bonds[(k + 1) % d]) for k, axis in enumerate(axes)]
        self._init(cores, legs if d > 1 else [outside], outside[:num_rows], outside[num_rows:])

    @property
    def axes(self) -> tuple[int, ...]:
        """The dense axis of each core, in ring order."""
        position = {label: k for k, label in enumerate(self.outside)}
        return tuple(next(position[label] for label in leg if label in position) for leg in self.legs)

    @classmethod
    def skeleton(
        cls,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | tuple[int, ...],
        axes: Sequence[int] | None = None,
    ) -> "TensorRing":
        """Shapes alone, on the meta device. `rank`: a cap for all bonds, or an entry each, the closing one first."""
        sizes = (*row_modes, *col_modes)
        d = len(sizes)
        ring = check_axes("TensorRing", axes, d)
        ranks = check_ranks("TensorRing", rank, ring_ranks([sizes[k] for k in ring]))
        shapes = [(ranks[k], sizes[axis], ranks[(k + 1) % d]) for k, axis in enumerate(ring)] if d > 1 else [sizes]
        return cls([torch.empty(shape, device="meta") for shape in shapes], len(row_modes), ring)

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...] = (),
        rank: int | tuple[int, ...],
        axes: Sequence[int] | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "TensorRing":
        """Draw a tensor ring whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank, axes)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


def ring_ranks(sizes: Sequence[int]) -> list[int]:
    """Largest useful rank of every bond: a ring needs none above all modes but the largest together.

    Example:
        >>> ring_ranks((4, 5, 6))
        [20, 20, 20]
    """
    return [prod(sizes) // max(sizes)] * len(sizes) if len(sizes) > 1 else []
