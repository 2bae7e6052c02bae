"""LowRank: `W = U S V^T`."""

from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.algebra import numel, transpose
from decompositions.formats.network import Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class LowRank(Network):
    """A matrix of low rank, `W = U S V^T`, equation `ia,ab,jb->ij`; a tree of three cores.

    Parameters are counted merged, r(m + n): S belongs to the gauge (U S V^T = (U A)(A^-1 S B^-T)(V B)^T) and plans
    merge it into the smaller side.

    Args:
        U: (m, r).
        S: (r, s), usually square.
        V: (n, s); no conjugation is implied for complex V.

    Raises:
        ValueError: shapes do not chain.

    Example:
        >>> import torch
        >>> net = LowRank(torch.ones(4, 2), torch.eye(2), torch.ones(3, 2))
        >>> net.shape, net.ranks
        ((4, 3), (2, 2))
    """

    def __init__(self, U: Inexact[Tensor, "m r"], S: Inexact[Tensor, "r s"], V: Inexact[Tensor, "n s"]) -> None:
        self._init((U, S, V), (("i0", "a"), ("a", "b"), ("i1", "b")), ("i0",), ("i1",))

    @property
    def U(self) -> Tensor:
        """Row factor (m, r)."""
        return self.cores[0]

    @property
    def S(self) -> Tensor:
        """Middle matrix (r, s)."""
        return self.cores[1]

    @property
    def V(self) -> Tensor:
        """Column factor (n, s)."""
        return self.cores[2]

    @classmethod
    def default_modes(cls, shape: tuple[int, ...], order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """One mode a side: out, and everything else (`order` has no say)."""
        return (shape[0],), (prod(shape[1:]),)

    @classmethod
    def skeleton(cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...], rank: int | tuple[int, ...]) -> "LowRank":
        """Shapes alone, on the meta device; several modes on a side are taken as their product."""
        m, n = prod(row_modes), prod(col_modes)
        (r,) = check_ranks("LowRank", rank, [min(m, n)])
        return cls(*(torch.empty(shape, device="meta") for shape in ((m, r), (r, r), (n, r))))

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | tuple[int, ...],
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "LowRank":
        """Draw a matrix of rank `rank` whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


@numel.register
def _(net: LowRank) -> int:
    """Merged count: S is absorbed by the side that makes it free."""
    (m, r), s, n = net.U.shape, net.S.shape[1], net.V.shape[0]
    return min(r, s) * (m + n)


@transpose.register
def _(net: LowRank) -> LowRank:
    """Keep the roles: U is the row factor of the transpose too."""
    return LowRank(net.V, net.S.mT, net.U)
