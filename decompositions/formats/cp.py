"""CP: a sum of rank-one tensors (canonical polyadic decomposition)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import check_num_rows
from decompositions.formats.network import Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class CP(Network):
    """`W(i_1, ..., i_d) = sum_r A_1(i_1, r) ... A_d(i_d, r)`, equation `ir,jr,kr->ijk`; the bond r is a hyper-edge.

    A tree for orders 1 and 2 alone: beyond, it has no gauge, no rounding and no rank-adaptive training. Parameters:
    r (n_1 + ... + n_d). Gauge: an order of the r terms, and d - 1 scales for each.
    As a weight it is fast where r is below half a width: plans take the Khatri-Rao products of its row and of its
    column factors and go on as for a matrix of rank r. At a tenth of the parameters of a dense weight in many modes r
    is above its widths, and a product with it costs more than with the dense weight; `explain` and the report count it.

    Args:
        factors: one (n_k, r) matrix a mode; for order 1 a single vector (n,).
        num_rows: how many leading axes are rows; all by default (then the network has no columns).

    Raises:
        ValueError: factors of different ranks.

    References:
        T. Kolda, B. Bader, Tensor decompositions and applications, SIAM Review 2009, section 3.

    Example:
        >>> import torch
        >>> net = CP([torch.ones(4, 3), torch.ones(5, 3), torch.ones(6, 3)])
        >>> net.shape, net.ranks, net.is_tree
        ((4, 5, 6), (3,), False)
    """

    def __init__(self, factors: Sequence[Inexact[Tensor, "..."]], num_rows: int | None = None) -> None:
        factors = tuple(factors)
        d = len(factors)
        num_rows = check_num_rows("CP", num_rows, d)
        outside = tuple(f"i{k}" for k in range(d))
        legs = [(label, "r") if d > 1 else (label,) for label in outside]
        self._init(factors, legs, outside[:num_rows], outside[num_rows:])

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Factor matrices, one a mode."""
        return self.cores

    @classmethod
    def skeleton(cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...], rank: int | tuple[int, ...]) -> "CP":
        """Shapes alone, on the meta device. A rank beyond all modes but the largest together is of no use."""
        sizes = (*row_modes, *col_modes)
        if len(sizes) == 1:
            check_ranks("CP", rank, [1] if isinstance(rank, int) else [])
            return cls([torch.empty(sizes, device="meta")], len(row_modes))
        (r,) = check_ranks("CP", rank, [prod(sizes) // max(sizes)])
        return cls([torch.empty(n, r, device="meta") for n in sizes], len(row_modes))

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...] = (),
        rank: int | tuple[int, ...],
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "CP":
        """Draw a sum of rank-one tensors whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)
