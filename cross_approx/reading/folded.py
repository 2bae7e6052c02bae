"""Reading a tensor folded to other modes: one memory of entries for all foldings, nothing beyond its bounds."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.reading.held_out import HeldOut
from cross_approx.reading.reader import Reader
from cross_approx.sources.views import Fill


class FoldedReader:
    """A `Reader` seen through a change of modes: what searches ask of a reader, in the folded indices.

    Entries are asked for, remembered and counted by the reader below, which several foldings may share: an entry that
    two folded indices, or two foldings, stand for is read once. Padded indices are never asked for: `fill` gives them
    the last value of their axis ("edge") or zero.

    Args:
        reader: of the tensor itself.
        sizes: of the folded modes.
        unfold: folded indices (B, m) -> indices (B, d), which may lie beyond the tensor.
        fold: its inverse.
        fill: the value of padded entries.
    """

    def __init__(
        self,
        reader: Reader,
        sizes: Sequence[int],
        unfold: Callable[[Tensor], Tensor],
        fold: Callable[[Tensor], Tensor],
        fill: Fill,
    ) -> None:
        self.reader, self.sizes, self.unfold, self.fold, self.fill = reader, tuple(sizes), unfold, fold, fill
        self._last = torch.tensor(reader.sizes) - 1

    @property
    def source(self) -> Any:
        """The source below."""
        return self.reader.source

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.reader.dtype

    @property
    def evaluations(self) -> int:
        """Entries asked for, by all foldings."""
        return self.reader.evaluations

    @property
    def bytes_read(self) -> int:
        """Bytes read, by all foldings."""
        return self.reader.bytes_read

    @property
    def norm(self) -> float:
        """Of the entries read, each counted once."""
        return self.reader.norm

    @property
    def largest(self) -> Tensor:
        """Indices of the largest entries read, in the modes of the tensor itself."""
        return self.reader.largest

    @property
    def max_evals(self) -> int | None:
        """The limit of evaluations, of all foldings together."""
        return self.reader.max_evals

    @property
    def left(self) -> int:
        """Evaluations that `max_evals` leaves."""
        return self.reader.left

    def whole_limit(self) -> AbstractContextManager[None]:
        """See `Reader.whole_limit`."""
        return self.reader.whole_limit()

    def read(self, index: Int[Tensor, "B m"], *, use: bool = True) -> Inexact[Tensor, "B"]:
        """Values at folded indices; see `Reader.read`."""
        index = self.unfold(index)
        if self.fill == "edge":
            return self.reader.read(index.minimum(self._last), use=use)
        real = (index <= self._last).all(1)
        values = torch.zeros(len(index), dtype=torch.promote_types(self.dtype, torch.float64))
        if bool(real.any()):
            found = self.reader.read(index[real], use=use)
            values = values.to(found.dtype)
            values[real] = found
        return values

    def used(self, index: Int[Tensor, "B m"]) -> Tensor:
        """Which rows were read, and not only to be held out; see `Reader.used`."""
        return self.reader.used(self.unfold(index).minimum(self._last))


class RealEntries(HeldOut):
    """A held-out sample of a folded tensor: drawn in the tensor itself, so that no padded entry is in it."""

    def __init__(self, reader: FoldedReader, count: int, generator: torch.Generator | None) -> None:
        super().__init__(reader, count, generator)
        self.folded = reader
        self._real = HeldOut(reader.reader, count, generator)
        self.numel = self._real.numel

    def take(self, other: "RealEntries") -> None:
        """The sample of another folding of the same tensor."""
        self.index, self.values = self.folded.fold(other.folded.unfold(other.index)), other.values
        self.near, self.exhausted = other.near, other.exhausted

    def _all(self) -> Tensor:
        return self.folded.fold(self._real._all())

    def _uniform(self, count: int) -> Tensor:
        return self.folded.fold(self._real._uniform(count))

    def _around(self, count: int) -> Tensor:
        return self.folded.fold(self._real._around(count))
