"""KroneckerSum: a sum of Kronecker products of matrices."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.algebra import transpose
from decompositions.formats.modes import check_paired, paired_default_modes, paired_modes
from decompositions.formats.network import Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class KroneckerSum(Network):
    """`W = sum_r A_1(r) ⊗ ... ⊗ A_d(r)`, equation `rik,rjl->ijkl`; a tree for two factors, r a hyper-edge beyond.

    Two factors are a matrix of rank r between the pairs (i_1, j_1) and (i_2, j_2), with all that trees have; three or
    more have no gauge, no rounding and no rank-adaptive training. The rank of W itself is the product of the ranks of
    the factors: a single term may have full rank. Parameters: r sum_k m_k n_k. Gauge: for two factors an invertible
    matrix on the bond, beyond an order of the terms and d - 1 scales for each.

    Args:
        factors: one (r, m_k, n_k) a pair of modes; a single (m, n) for one pair.

    Raises:
        ValueError: factors of different ranks.

    References:
        C. Van Loan, N. Pitsianis, Approximation with Kronecker products, 1993.

    Example:
        >>> import torch
        >>> from decompositions import to_matrix
        >>> a, b = torch.randn(1, 2, 3), torch.randn(1, 4, 5)
        >>> net = KroneckerSum([a, b])
        >>> net.is_tree, bool(torch.allclose(to_matrix(net), torch.kron(a[0], b[0])))
        (True, True)
    """

    def __init__(self, factors: Sequence[Inexact[Tensor, "..."]]) -> None:
        factors = tuple(factors)
        rows = tuple(f"i{k}" for k in range(len(factors)))
        cols = tuple(f"j{k}" for k in range(len(factors)))
        pairs = list(zip(rows, cols, strict=True))
        self._init(factors, [("r", *pair) for pair in pairs] if len(pairs) > 1 else pairs, rows, cols)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors, one a pair of modes."""
        return self.cores

    @classmethod
    def default_modes(cls, shape: tuple[int, ...], order: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`order` balanced modes a side; kernel axes follow as column modes beside row modes 1."""
        return paired_default_modes(shape, order)

    @classmethod
    def operator_modes(
        cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Modes pair up: the shorter side is filled with ones."""
        return paired_modes(row_modes, col_modes)

    @classmethod
    def skeleton(
        cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...], rank: int | tuple[int, ...]
    ) -> "KroneckerSum":
        """Shapes alone, on the meta device."""
        check_paired("KroneckerSum", row_modes, col_modes)
        pairs = list(zip(row_modes, col_modes, strict=True))
        sizes = [m * n for m, n in pairs]
        if len(pairs) == 1:
            check_ranks("KroneckerSum", rank, [1] if isinstance(rank, int) else [])
            return cls([torch.empty(pairs[0], device="meta")])
        (r,) = check_ranks("KroneckerSum", rank, [prod(sizes) // max(sizes)])
        return cls([torch.empty(r, *pair, device="meta") for pair in pairs])

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
    ) -> "KroneckerSum":
        """Draw a Kronecker sum whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


@transpose.register
def _(net: KroneckerSum) -> KroneckerSum:
    """Keep the axis order row, column in every factor."""
    return KroneckerSum([factor.mT for factor in net.factors])
