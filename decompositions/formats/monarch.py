"""Monarch: block-diagonal matrices with shuffles between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import check_paired, paired_default_modes, paired_modes
from decompositions.formats.network import Labels, Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Monarch(Network):
    """A product of d block-diagonal matrices with shuffles between, `W = L P R` for two; equation `blar,abrj->lbaj`.

    With row modes (m_1, ..., m_d) and column modes (n_1, ..., n_d), factor t turns mode n_t of x into m_t, by a matrix
    of its own for every value of the other modes as they are then: n_1, ..., n_{t-1} before, m_{t+1}, ..., m_d after.
    For two factors: block a of R takes x[a, :] to (b, r), the shuffle brings the parts of one b together, block b of L
    takes them from (a, r) to y[:, b]. So block (a, b) of W, an m_1 x n_2 matrix, has rank r: `rank=1` is the Monarch
    matrix, larger ranks are the block low-rank class of group-and-shuffle matrices. Its outside labels are hyper-edges:
    no tree, so no gauge, no rounding and no rank-adaptive training.
    Parameters: for two factors r n_1 m_2 (m_1 + n_2). Gauge: an invertible r x r matrix for every pair (a, b).

    Args:
        factors: first that which is applied last (L). For two: L (m_2, m_1, n_1, r) and R (n_1, m_2, r, n_2); in
            general factor t has the axes n_1..n_{t-1}, m_{t+1}..m_d (its blocks), m_t, r_{t-1} (rows), n_t, r_t
            (columns), without r_0 and r_d; see `factor_legs`. A single (m, n) for one.

    Raises:
        ValueError: factors that do not fit one another.

    References:
        T. Dao et al., Monarch: expressive structured matrices, ICML 2022, arXiv 2204.00595; M. Gorbunov, N. Yudin,
        V. Soboleva, A. Alanov, A. Naumov, M. Rakhuba, Group and shuffle, NeurIPS 2024, arXiv 2406.10019.

    Example:
        >>> import torch
        >>> net = Monarch([torch.ones(5, 4, 3, 1), torch.ones(3, 5, 1, 2)])
        >>> net.shape, net.ranks, net.is_tree
        ((4, 5, 3, 2), (1,), False)
    """

    def __init__(self, factors: Sequence[Inexact[Tensor, "..."]]) -> None:
        factors = tuple(factors)
        rows = tuple(f"i{k}" for k in range(len(factors)))
        cols = tuple(f"j{k}" for k in range(len(factors)))
        self._init(factors, factor_legs(len(factors)), rows, cols)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors, that which is applied last first."""
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
    def skeleton(cls, row_modes: tuple[int, ...], col_modes: tuple[int, ...], rank: int | tuple[int, ...]) -> "Monarch":
        """Shapes alone, on the meta device. `rank`: a cap for the ranks of the blocks, or an entry a shuffle."""
        check_paired("Monarch", row_modes, col_modes)
        ranks = check_ranks("Monarch", rank, block_ranks(row_modes, col_modes), "shuffle")
        sizes = {f"i{k}": size for k, size in enumerate(row_modes)}
        sizes |= {f"j{k}": size for k, size in enumerate(col_modes)}
        sizes |= {f"r{k}": size for k, size in enumerate(ranks)}
        shapes = [[sizes[label] for label in leg] for leg in factor_legs(len(row_modes))]
        return cls([torch.empty(shape, device="meta") for shape in shapes])

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | tuple[int, ...] = 1,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Monarch":
        """Draw a Monarch matrix whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)


def factor_legs(count: int) -> list[Labels]:
    """Labels of every factor: its blocks, its rows, its columns.

    Example:
        >>> factor_legs(2)
        [('i1', 'i0', 'j0', 'r0'), ('j0', 'i1', 'r0', 'j1')]
    """
    return [
        (
            *(f"j{s}" for s in range(t)),
            *(f"i{s}" for s in range(t + 1, count)),
            f"i{t}",
            *(f"r{s}" for s in (t - 1,) if s >= 0),
            f"j{t}",
            *(f"r{s}" for s in (t,) if s < count - 1),
        )
        for t in range(count)
    ]


def block_ranks(row_modes: Sequence[int], col_modes: Sequence[int]) -> list[int]:
    """Largest useful rank of the blocks at every shuffle."""
    return [min(prod(row_modes[:t]), prod(col_modes[t:])) for t in range(1, len(row_modes))]
