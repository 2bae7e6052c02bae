"""Axes of any size as mixed-radix digits: the quantization of a tensor (QTT)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from decompositions.formats.modes import as_integer

Order = Literal["C", "F", "interleaved"]
ORDERS: tuple[Order, ...] = ("C", "F", "interleaved")

LARGEST_DIGIT = 13
"""Prime factors up to this one become digits of an axis of that size."""

PADDED_DIGIT = 7
"""Other axes are padded to a product of prime factors up to this one."""


@dataclass(frozen=True)
class Quantization:
    """The axes of a tensor written as digits: `i_a = sum_j digit_j * (product of the later digits of axis a)`.

    An axis whose digits reach beyond its size is padded: indices from `shape[a]` to `padded[a] - 1` stand for nothing.

    Args:
        shape: sizes of the axes.
        modes: (axis, size) of every digit, in the order of the train; of each axis the most significant one first.

    Raises:
        ValueError: digits of an axis that is none, sizes below 1, digits that do not reach the size of their axis.

    References:
        I. Oseledets, Approximation of 2^d x 2^d matrices using tensor decomposition, SIAM J. Matrix Anal. Appl. 2010;
        B. Khoromskij, O(d log N)-quantics approximation of N-d tensors, Constr. Approx. 2011.

    Example:
        >>> import torch
        >>> q = Quantization((6, 4), ((0, 3), (1, 2), (0, 2), (1, 2)))
        >>> q.digits(torch.tensor([[5, 2]])), q.index(torch.tensor([[2, 1, 1, 0]]))
        (tensor([[2, 1, 1, 0]]), tensor([[5, 2]]))
    """

    shape: tuple[int, ...]
    modes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        object.__setattr__(self, "modes", tuple((int(axis), int(size)) for axis, size in self.modes))
        d = len(self.shape)
        for axis, size in self.modes:
            if not 0 <= axis < d or size < 1:
                raise ValueError(f"Quantization: expected digits (axis in 0..{d - 1}, size >= 1), got {(axis, size)}")
        for axis, (n, padded) in enumerate(zip(self.shape, self.padded, strict=True)):
            if not 1 <= n <= padded:
                raise ValueError(
                    f"Quantization: digits must reach the size of their axis, expected 1 <= shape[{axis}] <= {padded}, "
                    f"got {n}"
                )

    @classmethod
    def of(cls, shape: Sequence[int], order: Order = "C") -> "Quantization":
        """Digits of every axis: its prime factors, or if one is above 13 those of the next number with none above 7.

        Orders: "C": all digits of axis 0, then of axis 1, ...; "F": of the last axis first; "interleaved": coarse
        digits of all axes before fine ones, the next one always of the axis that was divided into fewest parts.
        An axis of size 1 has no digits (a tensor of one entry has one of size 1).

        Raises:
            ValueError: sizes below 1, another order.

        Example:
            >>> Quantization.of((6, 17), "interleaved")
            Quantization(shape=(6, 17), modes=((0, 3), (1, 3), (0, 2), (1, 3), (1, 2)))
        """
        sizes = [as_integer(n) for n in shape]
        if not sizes or any(n is None or n < 1 for n in sizes):
            raise ValueError(f"Quantization.of: expected mode sizes >= 1 and an order >= 1, got shape {tuple(shape)}")
        if order not in ORDERS:
            raise ValueError(f"Quantization.of: order must be one of {', '.join(ORDERS)}, got {order!r}")
        left = [list(digit_sizes(n)) for n in sizes if n is not None]
        modes: list[tuple[int, int]] = []
        if order == "interleaved":
            parts = [1] * len(left)
            while any(left):
                axis = min((a for a, rest in enumerate(left) if rest), key=lambda a: (parts[a], a))
                modes.append((axis, left[axis].pop(0)))
                parts[axis] *= modes[-1][1]
        else:
            axes = range(len(left)) if order == "C" else reversed(range(len(left)))
            modes = [(axis, size) for axis in axes for size in left[axis]]
        return cls(tuple(shape), tuple(modes or [(0, 1)]))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the digits: the shape of the train."""
        return tuple(size for _, size in self.modes)

    @property
    def padded(self) -> tuple[int, ...]:
        """Sizes of the axes that the digits reach."""
        return tuple(prod(size for a, size in self.modes if a == axis) for axis in range(len(self.shape)))

    def digits(self, index: Int[Tensor, "B d"]) -> Int[Tensor, "B m"]:
        """Digits of B multi-indices, also of padded ones.

        Raises:
            ValueError: another shape than (B, d), indices out of `padded`.
        """
        _check("Quantization.digits", index, self.padded)
        columns = [index[:, axis] // step % size for (axis, size), step in zip(self.modes, self._steps(), strict=True)]
        return torch.stack(columns, 1)

    def index(self, digits: Int[Tensor, "B m"]) -> Int[Tensor, "B d"]:
        """Multi-indices of B rows of digits; in the padded part they are `>= shape`.

        Raises:
            ValueError: another shape than (B, m), digits out of range.
        """
        _check("Quantization.index", digits, self.sizes)
        index = digits.new_zeros(len(digits), len(self.shape))
        for k, ((axis, _), step) in enumerate(zip(self.modes, self._steps(), strict=True)):
            index[:, axis] += digits[:, k] * step
        return index

    def split(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A tensor of `shape` as one of the digits, the last value of an axis repeated where it is padded.

        `tt_svd(q.split(x), tol=1e-6)` is the QTT of a tensor in memory.

        Raises:
            ValueError: a tensor of another shape.

        Example:
            >>> import torch
            >>> q = Quantization.of((17, 4))
            >>> x = torch.arange(68.0).reshape(17, 4)
            >>> q.split(x).shape, torch.equal(q.merge(q.split(x)), x)
            (torch.Size([3, 3, 2, 2, 2]), True)
        """
        if tuple(x.shape) != self.shape:
            raise ValueError(f"Quantization.split: expected a tensor of shape {self.shape}, got {tuple(x.shape)}")
        for axis, (n, padded) in enumerate(zip(self.shape, self.padded, strict=True)):
            if padded > n:
                x = x.index_select(axis, torch.arange(padded, device=x.device).clamp_max_(n - 1))
        chain = self._chain()
        return x.reshape([self.modes[k][1] for k in chain]).permute([chain.index(k) for k in range(len(chain))])

    def merge(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """A tensor of the digits as one of `shape`, the padding cut off; undoes `split`.

        Raises:
            ValueError: a tensor of another shape.
        """
        if tuple(x.shape) != self.sizes:
            raise ValueError(f"Quantization.merge: expected a tensor of shape {self.sizes}, got {tuple(x.shape)}")
        return x.permute(self._chain()).reshape(self.padded)[tuple(slice(n) for n in self.shape)]

    def _chain(self) -> list[int]:
        """The digits, axis by axis."""
        return sorted(range(len(self.modes)), key=lambda k: self.modes[k][0])

    def _steps(self) -> list[int]:
        steps: list[int] = []
        reached = [1] * len(self.shape)
        for axis, size in reversed(self.modes):
            steps.insert(0, reached[axis])
            reached[axis] *= size
        return steps


@lru_cache(maxsize=1024)
def digit_sizes(n: int) -> tuple[int, ...]:
    """Prime factors of n, if none is above 13, else of the smallest larger number with none above 7; largest first.

    Example:
        >>> digit_sizes(360), digit_sizes(77), digit_sizes(37), digit_sizes(1)
        ((5, 3, 3, 2, 2, 2), (11, 7), (5, 2, 2, 2), ())
    """
    factors = _smooth(n, LARGEST_DIGIT)
    while factors is None:
        n += 1
        factors = _smooth(n, PADDED_DIGIT)
    return factors


def _smooth(n: int, largest: int) -> tuple[int, ...] | None:
    """Prime factors, largest first, or None where one is larger than that."""
    factors = []
    for p in range(largest, 1, -1):
        while n % p == 0 and all(p % q for q in range(2, p)):
            n //= p
            factors.append(p)
    return tuple(factors) if n == 1 else None


def _check(name: str, index: Tensor, sizes: Sequence[int]) -> None:
    if index.ndim != 2 or index.shape[1] != len(sizes) or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"{name}: expected integers of shape (B, {len(sizes)}), got {tuple(index.shape)} {index.dtype}"
        )
    bad = (index < 0) | (index >= torch.tensor(sizes, device=index.device))
    if bool(bad.any()):
        row = int(bad.any(1).int().argmax())
        raise ValueError(f"{name}: expected indices in range of {tuple(sizes)}, got {tuple(index[row].tolist())}")
