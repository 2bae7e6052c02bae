"""TTMatrix: a tensor train whose cores carry a row mode and a column mode each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.algebra import transpose
from decompositions.formats.modes import check_paired, paired_default_modes, paired_modes
from decompositions.formats.network import Network
from decompositions.formats.random import fill_random
from decompositions.formats.tt import chain_legs, chain_ranks, chain_shapes
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class TTMatrix(Network):
    """`W(i_1..i_d, j_1..j_d) = G_1(i_1, j_1) ... G_d(i_d, j_d)`, equation `ila,ajmb,bkn->ijklmn`; a chain-shaped tree.

    The matrix has prod(m_k) rows and prod(n_k) columns. Parameters: sum_k r_{k-1} m_k n_k r_k. Gauge: an invertible
    matrix on every bond.

    Args:
        cores: (m, n, r), (r, m, n, r), ..., (r, m, n); a single core (m, n) for one pair of modes.

    Raises:
        ValueError: cores do not chain.

    References:
        I. Oseledets, Approximation of 2^d x 2^d matrices using tensor decomposition, SIAM J. Matrix Anal. Appl. 2010;
        A. Novikov et al., Tensorizing neural networks, 2015, arXiv 1509.06569.

    Example:
        >>> import torch
        >>> TTMatrix([torch.zeros(4, 2, 3), torch.zeros(3, 5, 6)]).shape
        (4, 5, 2, 6)
    """

    def __init__(self, cores: Sequence[Inexact[Tensor, "..."]]) -> None:
        cores = tuple(cores)
        rows = tuple(f"i{k}" for k in range(len(cores)))
        cols = tuple(f"j{k}" for k in range(len(cores)))
        self._init(cores, chain_legs(list(zip(rows, cols, strict=True))), rows, cols)

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
    ) -> "TTMatrix":
        """Shapes alone, on the meta device. `rank`: a cap for all bonds, or an entry for each."""
        check_paired("TTMatrix", row_modes, col_modes)
        pairs = list(zip(row_modes, col_modes, strict=True))
        ranks = check_ranks("TTMatrix", rank, chain_ranks([m * n for m, n in pairs]))
        return cls([torch.empty(shape, device="meta") for shape in chain_shapes(pairs, ranks)])

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
    ) -> "TTMatrix":
        """Draw a TT-matrix whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


@transpose.register
def _(net: TTMatrix) -> TTMatrix:
    """Keep the axis order row, column in every core."""
    last = len(net.cores) - 1
    return TTMatrix(
        [core.transpose(*((0, 1) if k == 0 else (1, 2))) for k, core in enumerate(net.cores)]
        if last
        else [net.cores[0].mT]
    )
