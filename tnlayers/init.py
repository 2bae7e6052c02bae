"""Fresh networks for layers: modes chosen from the shape, variance read off it."""

from collections.abc import Callable, Sequence
from math import prod, sqrt
from typing import Any

import torch

from decompositions import Network


def default_std(weight_shape: tuple[int, ...]) -> float:
    """Standard deviation of torch's default initialisation of Linear and Conv weights, `1 / sqrt(3 fan_in)`.

    Torch draws from U(-b, b) with b = 1 / sqrt(fan_in); fan_in is the product of all axes but the first.

    Example:
        >>> round(default_std((16, 300)), 4)
        0.0333
    """
    return 1 / sqrt(3 * prod(weight_shape[1:]))


def random_network(
    format: type[Network],
    rank: int | Sequence[int],
    *,
    std: float | None = None,
    gain: float = 1.0,
    order: int = 3,
    row_modes: Sequence[int] | None = None,
    col_modes: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Callable[[tuple[int, ...], torch.dtype, torch.device], Network]:
    """Factory of fresh networks for `Linear(..., network=...)` and the other layers.

    The dense weight it stands for has the root mean square of torch's default initialisation, exactly and in every
    draw, whatever the format and the ranks. Nothing of the dense size is allocated.

    Args:
        format: LowRank, Tucker, TT, TTMatrix, or another format with `random`.
        rank: a cap for every bond, or one entry a bond.
        std: root mean square of the entries of the weight; None is `gain / sqrt(3 fan_in)`.
        gain: factor on the default.
        order: number of modes a side where they are chosen (a matrix in Tucker, TT or TTMatrix).
        row_modes: modes of the out side; None chooses them (balanced; primes are padded).
        col_modes: modes of the in side.
        generator: source of randomness; None is torch's global one.
        options: further arguments of `format.random`, such as `modes=(0, 1)` for Tucker-2.

    Example:
        >>> import tnlayers
        >>> from decompositions import TTMatrix
        >>> tnlayers.Linear(784, 256, network=random_network(TTMatrix, rank=8)).network.ranks
        (8, 8)
    """

    def make(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Network:
        rows, cols = format.default_modes(shape, order)
        return format.random(  # type: ignore[attr-defined]
            row_modes=rows if row_modes is None else tuple(row_modes),
            col_modes=cols if col_modes is None else tuple(col_modes),
            rank=rank if isinstance(rank, int) else tuple(rank),
            std=gain * default_std(shape) if std is None else std,
            generator=generator,
            dtype=dtype,
            device=device,
            **options,
        )

    return make
