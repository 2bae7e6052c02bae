"""Fresh networks for layers: modes chosen from the shape, variance read off it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from numbers import Integral
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


@dataclass(frozen=True)
class RandomNetwork:
    """The factory that `random_network` returns: `(shape, dtype, device) -> Network`."""

    format: type[Network]
    rank: int | tuple[int, ...]
    std: float | None
    gain: float
    order: int
    row_modes: tuple[int, ...] | None
    col_modes: tuple[int, ...] | None
    generator: torch.Generator | None
    options: dict[str, Any] = field(default_factory=dict)

    def or_std(self, std: float) -> "RandomNetwork":
        """Return the same factory with `gain * std` where no std was asked for: how a layer brings its own default."""
        return self if self.std is not None else replace(self, std=self.gain * std)

    def or_modes(self, row_modes: tuple[int, ...], col_modes: tuple[int, ...]) -> "RandomNetwork":
        """Return the same factory for an operator between tensors of these modes, where no modes were asked for."""
        rows, cols = self.format.operator_modes(
            row_modes if self.row_modes is None else self.row_modes,
            col_modes if self.col_modes is None else self.col_modes,
        )
        return replace(self, row_modes=rows, col_modes=cols)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Network:
        """Draw a network for a weight of this shape."""
        rows, cols = self.format.default_modes(shape, self.order)
        return self.format.random(  # type: ignore[attr-defined]
            row_modes=rows if self.row_modes is None else self.row_modes,
            col_modes=cols if self.col_modes is None else self.col_modes,
            rank=self.rank,
            std=self.gain * default_std(shape) if self.std is None else self.std,
            generator=self.generator,
            dtype=dtype,
            device=device,
            **self.options,
        )


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
) -> RandomNetwork:
    """Factory of fresh networks for `Linear(..., network=...)` and the other layers.

    The dense tensor it stands for has the root mean square of torch's initialisation of that layer, exactly and in
    every draw, whatever the format and the ranks (where modes exceed the widths: of the padded tensor). Nothing of the
    dense size is allocated.

    Args:
        format: LowRank, Tucker, TT, TTMatrix, or another format with `random`.
        rank: a cap for every bond, or one entry a bond.
        std: root mean square of the entries of the weight; None is the layer's default, `1 / sqrt(3 fan_in)` for
            Linear, Conv and the contraction layers and 1 for Embedding and EmbeddingBag, times `gain`.
        gain: factor on the default.
        order: number of modes a side where they are chosen (a matrix in Tucker, TT or TTMatrix).
        row_modes: modes of the out side; None chooses them (balanced; primes are padded).
        col_modes: modes of the in side.
        generator: source of randomness; None is torch's global one.
        options: further arguments of `format.random`, such as `modes=(0, 1)` for Tucker-2.

    Raises:
        TypeError: a format that is not a class of networks with `random`, a rank that is not made of ints.

    Example:
        >>> import tnlayers
        >>> from decompositions import TTMatrix
        >>> tnlayers.Linear(784, 256, network=random_network(TTMatrix, rank=8)).network.ranks
        (8, 8)
    """
    if not (isinstance(format, type) and issubclass(format, Network) and hasattr(format, "random")):
        raise TypeError(
            f"random_network: format must be a class of networks such as decompositions.LowRank, got {format!r}"
        )
    ranks = tuple(rank) if isinstance(rank, Sequence) else (rank,)
    if isinstance(rank, str) or any(isinstance(r, bool) or not isinstance(r, Integral) for r in ranks):
        raise TypeError(f"random_network: rank must be an int or one int a bond, got {rank!r}")
    return RandomNetwork(
        format,
        tuple(int(r) for r in ranks) if isinstance(rank, Sequence) else int(rank),
        std,
        gain,
        order,
        None if row_modes is None else tuple(row_modes),
        None if col_modes is None else tuple(col_modes),
        generator,
        options,
    )
