"""Tucker: a core tensor and a factor matrix for some or all of its modes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Inexact
from torch import Tensor

from decompositions.formats.modes import check_num_rows
from decompositions.formats.network import Labels, Network
from decompositions.formats.random import fill_random
from decompositions.linalg import check_ranks


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Tucker(Network):
    """`W = core x_1 U_1 ... x_d U_d`, equation `abc,ia,jb,kc->ijk`; a star-shaped tree.

    A mode without a factor stays on the core (Tucker-2 of a convolution kernel has factors for out and in alone).
    Parameters: prod(r) + sum(n_k r_k). Gauge: an invertible matrix on every bond.

    Args:
        core: (r_1, ..., r_d); on a mode without a factor r_k is the mode size.
        factors: one (n_k, r_k) matrix for each entry of `modes`.
        modes: which axes of the core have a factor; all by default.
        num_rows: how many leading axes are rows; all by default (then the network has no columns).

    Raises:
        ValueError: the factors do not fit the core.

    References:
        L. De Lathauwer, B. De Moor, J. Vandewalle, A multilinear singular value decomposition, SIAM J. Matrix Anal.
        Appl. 2000.

    Example:
        >>> import torch
        >>> net = Tucker(torch.zeros(2, 3, 5), [torch.zeros(4, 2), torch.zeros(6, 3)], modes=(0, 1))
        >>> net.shape, net.ranks
        ((4, 6, 5), (2, 3))
    """

    def __init__(
        self,
        core: Inexact[Tensor, "..."],
        factors: Sequence[Inexact[Tensor, "_n _r"]],
        modes: Sequence[int] | None = None,
        num_rows: int | None = None,
    ) -> None:
        factors = tuple(factors)
        modes = tuple(range(core.ndim)) if modes is None else tuple(modes)
        if len(modes) != len(factors) or len(set(modes)) != len(modes) or any(not 0 <= k < core.ndim for k in modes):
            raise ValueError(
                f"Tucker: modes must name a distinct axis of the core per factor, expected {len(factors)} of "
                f"0..{core.ndim - 1}, got {modes}"
            )
        num_rows = check_num_rows("Tucker", num_rows, core.ndim)
        outside = tuple(f"i{k}" for k in range(core.ndim))
        legs: list[Labels] = [tuple(f"r{k}" if k in modes else f"i{k}" for k in range(core.ndim))]
        legs += [(f"i{k}", f"r{k}") for k in modes]
        self._init((core, *factors), legs, outside[:num_rows], outside[num_rows:])

    @property
    def core(self) -> Tensor:
        """The core tensor."""
        return self.cores[0]

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """Factor matrices, in the order of their modes."""
        return self.cores[1:]

    @classmethod
    def skeleton(
        cls,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...],
        rank: int | tuple[int, ...],
        modes: Sequence[int] | None = None,
    ) -> "Tucker":
        """Shapes alone, on the meta device. `rank`: a cap for all factors, or an entry for each of `modes`."""
        sizes = (*row_modes, *col_modes)
        modes = tuple(range(len(sizes))) if modes is None else tuple(modes)
        if len(set(modes)) != len(modes) or any(not 0 <= k < len(sizes) for k in modes):
            raise ValueError(f"Tucker: modes must be distinct axes in 0..{len(sizes) - 1}, got {modes}")
        ranks = dict(zip(modes, check_ranks("Tucker", rank, [sizes[k] for k in modes], "mode"), strict=True))
        core = torch.empty([ranks.get(k, size) for k, size in enumerate(sizes)], device="meta")
        factors = [torch.empty(sizes[k], ranks[k], device="meta") for k in modes]
        return cls(core, factors, modes, len(row_modes))

    @classmethod
    def random(
        cls,
        *,
        row_modes: tuple[int, ...],
        col_modes: tuple[int, ...] = (),
        rank: int | tuple[int, ...],
        modes: Sequence[int] | None = None,
        std: float = 1.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "Tucker":
        """Draw a Tucker tensor whose entries have root mean square `std` exactly; see `fill_random`."""
        skeleton = cls.skeleton(row_modes, col_modes, rank, modes)
        return fill_random(skeleton, std=std, generator=generator, dtype=dtype, device=device)
