"""Entries that no core was made from, and the error there."""

from collections.abc import Callable
from math import inf, prod, sqrt

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from cross_approx.reading.reader import Entries, norm

ENUMERATE = 1 << 16
"""Tensors of at most so many entries are listed rather than sampled."""

CLIMB = 8
"""Rounds in which the half near large values is drawn, so that it climbs toward values not read yet."""


def train_entries(cores: list[Inexact[Tensor, "..."]], index: Int[Tensor, "B d"]) -> Inexact[Tensor, "B"]:
    """Entries of a train of cores (r, n, s) at the rows of `index`, in double precision. Cost: O(B d r^2)."""
    values = []
    most = max(1, *(core.shape[0] * core.shape[2] for core in cores))
    for part in index.split(min(4096, max(256, (1 << 22) // most))):
        row = torch.ones(len(part), 1, dtype=torch.promote_types(cores[0].dtype, torch.float64))
        for k, core in enumerate(cores):
            core = core.to(row.dtype)
            if len(part) < 8 * core.shape[1]:
                row = torch.bmm(row[:, None], core[:, part[:, k]].movedim(1, 0))[:, 0]
                continue
            out = row.new_zeros(len(part), core.shape[2])
            for i in range(core.shape[1]):  # many entries an index: one product for all of them
                here = (part[:, k] == i).nonzero()[:, 0]
                out[here] = row[here] @ core[:, i]
            row = out
        values.append(row[:, 0])
    return torch.cat(values)


class HeldOut:
    """A sample of entries, one half uniform, one half near the largest values read, and the error on it.

    The error of a half is `sqrt(mean |a - â|^2 / m)`, m being the mean square of a over that half, but at least what
    all entries read so far say about the mean square of the whole tensor.
    """

    def __init__(self, reader: Entries, count: int, generator: torch.Generator | None) -> None:
        self.reader, self.count, self.generator = reader, count, generator
        d = len(reader.sizes)
        self.numel = prod(reader.sizes)
        self._sizes = torch.tensor(reader.sizes)
        self.index = torch.zeros(0, d, dtype=torch.long)
        self.values = torch.zeros(0, dtype=torch.float64)
        self.near = torch.zeros(0, dtype=torch.bool)
        self.exhausted = False

    def refresh(self) -> None:
        """Drop what was used meanwhile, and draw until both halves are full again."""
        if self.exhausted:
            return
        keep = ~self.reader.used(self.index)
        self.index, self.values, self.near = self.index[keep], self.values[keep], self.near[keep]
        half = (self.count + 1) // 2
        self._append(self._unread(half - int((~self.near).sum()), self._uniform), False)
        for rounds_left in range(CLIMB, 0, -1):  # every round starts from the largest values of those before
            missing = self.count - half - int(self.near.sum())
            self._append(self._unread(-(-missing // rounds_left), self._around), True)
        missing = half - int((~self.near).sum())
        if missing > 0:  # nearly every entry was used: the sample is filled up with used ones, or all are compared
            self.exhausted = True
            if self.numel <= ENUMERATE:
                self.index, self.values, self.near = self.index[:0], self.values[:0], self.near[:0]
            self._append(self._all() if self.numel <= ENUMERATE else self._uniform(missing), False)

    def anew(self, count: int) -> "HeldOut":
        """Another sample of the same kind, not drawn yet."""
        return type(self)(self.reader, count, self.generator)

    def join(self, other: "HeldOut") -> None:
        """Take over the sample of another one."""
        self.index, self.values = torch.cat([self.index, other.index]), torch.cat([self.values, other.values])
        self.near = torch.cat([self.near, other.near])

    def root_mean_square(self) -> float:
        """Estimate of the root of the mean of |a|^2 over the whole tensor."""
        uniform = self.values[~self.near]
        sampled = norm(uniform) / sqrt(len(uniform)) if len(uniform) else 0.0
        return max(sampled, self.reader.norm / sqrt(min(self.numel, 10**300)))

    def errors(self, cores: list[Tensor]) -> Tensor:
        """Absolute errors on the sample."""
        return (train_entries(cores, self.index) - self.values).abs()

    def relative(self, errors: Tensor) -> float:
        """The larger of the relative errors of the two halves."""
        if not len(errors):
            return inf
        worst, floor = 0.0, self.root_mean_square()
        for half in (self.near, ~self.near):
            count = int(half.sum())
            if count:
                error = norm(errors[half]) / sqrt(count)
                size = max(norm(self.values[half]) / sqrt(count), floor)
                worst = max(worst, error / size if size > 0 else (inf if error > 0 else 0.0))
        return worst

    def _append(self, index: Tensor, near: bool) -> None:
        if len(index):
            values = self.reader.read(index, use=False)
            self.index, self.values = torch.cat([self.index, index]), torch.cat([self.values.to(values.dtype), values])
            self.near = torch.cat([self.near, torch.full((len(index),), near)])

    def _unread(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        taken = self.index[:0]
        if self.numel <= ENUMERATE and count > 0 and draw == self._uniform:
            everything = self._all()
            everything = everything[~self.reader.used(everything)]
            order = torch.randperm(len(everything), generator=self.generator)
            return everything[order[:count]]
        for _ in range(4):
            if len(taken) >= count or (draw == self._around and not len(self.reader.largest)):
                break
            drawn = draw(2 * count)
            taken = torch.cat([taken, drawn[~self.reader.used(drawn)]]).unique(dim=0)
            taken = taken[torch.randperm(len(taken), generator=self.generator)]
        return taken[: max(0, count)]

    def _all(self) -> Tensor:
        return torch.cartesian_prod(*(torch.arange(n) for n in self.reader.sizes)).reshape(self.numel, -1)

    def _uniform(self, count: int) -> Tensor:
        columns = [torch.randint(n, (count,), generator=self.generator) for n in self.reader.sizes]
        return torch.stack(columns, 1)

    def _around(self, count: int) -> Tensor:
        """One or two coordinates of a large entry changed, half of the time by one."""
        largest = self.reader.largest
        index = largest[torch.randint(len(largest), (count,), generator=self.generator)].clone()
        rows = torch.arange(count)
        for changes in (rows, rows[: count // 2]):
            mode = torch.randint(index.shape[1], (len(changes),), generator=self.generator)
            size = self._sizes[mode]
            anywhere = (torch.rand(len(changes), generator=self.generator, dtype=torch.float64) * size).long()
            step = torch.randint(2, (len(changes),), generator=self.generator) * 2 - 1
            beside = (index[changes, mode] + step).clamp(min=0).minimum(size - 1)
            near = torch.rand(len(changes), generator=self.generator) < 0.5
            index[changes, mode] = torch.where(near, beside, anywhere)
        return index
