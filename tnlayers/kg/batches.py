"""The batches of an epoch: slices of one permutation of the queries, with their answers, without a loop over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tnlayers.kg.answers import Answers
from tnlayers.kg.chunks import Batch


def derived(seed: int, *what: object) -> int:
    """A seed for one purpose, from that of the run.

    Example:
        >>> derived(0, "order", 1) == derived(0, "order", 1) != derived(0, "order", 2)
        True
    """
    text = "/".join(map(str, (seed, *what)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Sampling:
    """What batches of triples need beside them: see `NegativeSampling`."""

    count: int
    filtered: bool


class Batches:
    """Batches of all queries (h, r) of a graph with their answers; or of its triples with negatives.

    An epoch is a permutation cut into as few slices as `batch_size` allows, whose sizes differ by one at most: none is
    so small that batch norm fails on it. Inside a slice queries are sorted by relation, then head. Each worker takes
    its consecutive part of every slice. Cost of an epoch: a sort of each slice, and one gather.

    Args:
        answers: of training, on the device where batches are wanted.
        batch_size: most queries (or triples) a step, of all workers together.
        sampling: negatives; None: queries with all their answers.
        worker: number of this worker.
        workers: how many there are.

    Raises:
        ValueError: batches too small for the workers.

    Example:
        >>> answers = Answers.of(torch.tensor([[0, 0, 1], [0, 0, 2], [1, 0, 2], [2, 0, 0]]), 3, 1)
        >>> batches = Batches(answers, 2)
        >>> batches.rows, len(batches), [len(batch.heads) for batch in batches.epoch(seed=0)]
        (3, 2, [2, 1])
    """

    def __init__(
        self,
        answers: Answers,
        batch_size: int,
        *,
        sampling: Sampling | None = None,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        self.answers, self.sampling, self.worker, self.workers = answers, sampling, worker, workers
        self.rows = len(answers) if sampling is None else len(answers.tails)
        slices = max(1, -(-self.rows // batch_size))
        each, more = divmod(self.rows, slices)
        if workers > 1 and each < 2 * workers:
            raise ValueError(
                f"train: each of {workers} workers needs two rows of a batch, expected batches of {2 * workers}, got "
                f"{each}; raise batch_size, or use fewer workers"
            )
        bounds = [k * each + min(k, more) for k in range(slices + 1)]
        self.bounds = bounds
        self.generator = torch.Generator()
        counts = answers.offsets.diff()
        if sampling is not None:  # the query of each triple
            self._query = torch.arange(len(answers), device=counts.device).repeat_interleave(counts)
        self._counts = counts

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def epoch(self, seed: int, skip: int = 0, state: Tensor | None = None) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            seed: of the permutation and the negatives.
            skip: batches at the beginning that are left out.
            state: of the generator of negatives after them.
        """
        self.generator.manual_seed(seed)
        order = torch.randperm(self.rows, generator=self.generator)
        if state is not None:
            self.generator.set_state(state)
        wide = len(order) % len(self) * self.bounds[1] if self.rows else 0  # rows in slices that have one more
        pieces = [
            part.reshape(-1, width).sort(1).values.reshape(-1)
            for part, width in ((order[:wide], self.bounds[1]), (order[wide:], self.rows // len(self)))
            if len(part)
        ]
        order = torch.cat(pieces).to(self.answers.tails.device)
        return self._queries(order, skip) if self.sampling is None else self._triples(order, skip)

    def _shares(self) -> list[tuple[int, int]]:
        """Where this worker's part of every slice begins and ends."""
        found = []
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            each, more = divmod(end - begin, self.workers)
            first = begin + self.worker * each + min(self.worker, more)
            found.append((first, first + each + (self.worker < more)))
        return found

    def _queries(self, order: Tensor, skip: int) -> Iterator[Batch]:
        answers, device = self.answers, order.device
        counts = self._counts[order]
        ends = counts.cumsum(0)
        rows = torch.arange(len(order), device=device).repeat_interleave(counts)
        tails = answers.tails[torch.arange(len(rows), device=device) + (answers.offsets[order] - ends + counts)[rows]]
        heads, relations = answers.queries[order].unbind(1)
        heads, relations = heads.contiguous(), relations.contiguous()
        shares = self._shares()
        begins = torch.tensor([begin for begin, _ in shares], device=device)
        lengths = torch.tensor([b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)], device=device)
        rows -= begins.repeat_interleave(lengths)[rows]
        upto = torch.cat([ends.new_zeros(1), ends])
        cuts = upto[torch.tensor([*shares, *zip(self.bounds, self.bounds[1:], strict=False)], device=device)].tolist()
        for k in range(skip, len(shares)):
            (begin, end), (first, last), (low, high) = shares[k], cuts[k], cuts[len(shares) + k]
            yield Batch(
                heads[begin:end],
                relations[begin:end],
                rows[first:last],
                tails[first:last],
                self.bounds[k + 1] - self.bounds[k],
                high - low,
            )

    def _triples(self, order: Tensor, skip: int) -> Iterator[Batch]:
        assert self.sampling is not None
        heads, relations = self.answers.queries[self._query[order]].unbind(1)
        tails = self.answers.tails[order]
        places = torch.arange(max(b - a for a, b in self._shares()), device=order.device)
        for k, (begin, end) in enumerate(self._shares()):
            if k < skip:
                continue
            low, high = self.bounds[k], self.bounds[k + 1]
            # all workers draw for all of the batch, so that its negatives do not depend on how many they are
            drawn = torch.randint(
                self.answers.num_entities, (high - low, self.sampling.count), generator=self.generator
            )
            negatives = drawn[begin - low : end - low].to(order.device)
            h, r = heads[begin:end], relations[begin:end]
            kept = None
            if self.sampling.filtered:
                kept = ~self.answers.contains(
                    h[:, None].expand_as(negatives), r[:, None].expand_as(negatives), negatives
                )
            yield Batch(h, r, places[: end - begin], tails[begin:end], high - low, high - low, negatives, kept)
