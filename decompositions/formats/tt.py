"""TT: a tensor train."""

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
class TT(Network):
    """`W(i_1, ..., i_d) = G_1(i_1) ... G_d(i_d)`, equation `ia,ajb,bk->ijk`; a chain-shaped tree.

    Parameters: sum_k r_{k-1} n_k r_k with r_0 = r_d = 1 (the boundary ranks have no axis). Gauge: an invertible matrix
    on every bond.

    Args:
        cores: (n, r), (r, n, r), ..., (r, n); a single core (n,) for order 1.
        num_rows: how many leading axes of the dense tensor are rows; all by default.
        axes: the dense axis that each core carries, in chain order; (0, 1, ..., d - 1) by default. A convolution
            kernel (out, in, kh, kw) as the chain in, kh, kw, out has axes (1, 2, 3, 0).

    Raises:
        ValueError: cores do not chain, or axes is not a permutation.

    References:
        I. Oseledets, Tensor-train decomposition, SIAM J. Sci. Comput. 2011.

    Example:
        >>> import torch
        >>> TT([torch.zeros(4, 2), torch.zeros(2, 5, 3), torch.zeros(3, 6)]).shape
        (4, 5, 6)
    """

    def __init__(
        self,
        cores: Sequence[Inexact[Tensor, "..."]],
        num_rows: int | None = None,
        axes: Sequence[int] | None = None,
    ) -> None:
        cores = tuple(cores)
        d = len(cores)
        axes = check_axes("TT", axes, d)
        num_rows = check_num_rows("TT", num_rows, d)
        outside = tuple(f"i{k}" for k in range(d))
        self._init(cores, chain_legs([(outside[k],) for k in axes]), outside[:num_rows], outside[num_rows:])

    @property
    def axes(self) -> tuple[int, ...]:
        """The dense axis of each core, in chain order."""
        position = {label: k for k, label in enumerate(self.outside)}
        return tuple(next(position[label] for label in leg if label in position) for leg in self.legs)

    @classmethod
    def skeleton(
        cls,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | tuple[int, ...],
        axes: Sequence[int] | None = None,
    ) -> "TT":
        """Shapes alone, on the meta device. `rank`: a cap for all bonds, or an entry for each in chain order."""
        sizes = (*row_modes, *col_modes)
        chain = check_axes("TT", axes, len(sizes))
        ranks = check_ranks("TT", rank, chain_ranks([sizes[k] for k in chain]))
        shapes = chain_shapes([(sizes[k],) for k in chain], ranks)
        return cls([torch.empty(shape, device="meta") for shape in shapes], len(row_modes), chain)

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
    ) -> "TT":
        """Draw a tensor train whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank, axes)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


def chain_legs(outside: Sequence[Labels]) -> list[Labels]:
    """Labels of a chain of cores that carry the given outside labels: `b0` joins cores 0 and 1, and so on."""
    last = len(outside) - 1
    return [
        ((f"b{k - 1}",) if k else ()) + tuple(labels) + ((f"b{k}",) if k < last else ())
        for k, labels in enumerate(outside)
    ]


def chain_shapes(modes: Sequence[tuple[int, ...]], ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """Core shapes of a chain: left rank, modes, right rank, without the boundary ones."""
    last = len(modes) - 1
    return [
        ((ranks[k - 1],) if k else ()) + tuple(sizes) + ((ranks[k],) if k < last else ())
        for k, sizes in enumerate(modes)
    ]


def chain_ranks(sizes: Sequence[int]) -> list[int]:
    """Largest useful rank of every bond of a chain."""
    return [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes))]
