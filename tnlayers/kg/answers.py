"""Which tails are known for (head, relation): compressed rows, for 1-N targets and for the filter of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Answers:
    """Known answers of every query (head, relation, ?), as compressed sparse rows: `tails[offsets[q] : offsets[q+1]]`.

    Built by `Answers.of`; a look-up of B queries costs O(B log Q + answers), without a loop over queries.

    Args:
        queries: (Q, 2) distinct pairs (head, relation), sorted by relation, then head.
        offsets: (Q + 1,) where the answers of each query begin.
        tails: distinct answers of each query, ascending.
        num_entities: number of entities.
        num_relations: number of relations.

    Example:
        >>> answers = Answers.of(torch.tensor([[0, 0, 2], [0, 0, 1], [1, 0, 0], [0, 0, 2]]), 3, 1)
        >>> answers.queries.tolist(), answers.offsets.tolist(), answers.tails.tolist()
        ([[0, 0], [1, 0]], [0, 2, 3], [1, 2, 0])
        >>> row, tail = answers.lookup(torch.tensor([1, 2, 0]), torch.tensor([0, 0, 0]))
        >>> list(zip(row.tolist(), tail.tolist()))
        [(0, 0), (2, 1), (2, 2)]
    """

    queries: Int[Tensor, "Q 2"]
    offsets: Int[Tensor, Q1]
    tails: Int[Tensor, A]
    num_entities: int
    num_relations: int

    def __repr__(self) -> str:
        sizes = f"entities={self.num_entities}, relations={self.num_relations}"
        return f"Answers({len(self.queries)} queries, {len(self.tails)} answers, {sizes})"

    @classmethod
    def of(cls, triples: Int[Tensor, "n 3"], num_entities: int, num_relations: int) -> Answers:
        """Group triples by (head, relation). Cost O(n log n).

        Args:
            triples: head, relation, tail; repeated ones count once.
            num_entities: heads and tails are below it.
            num_relations: relations are below it.

        Raises:
            ValueError: ids out of range, or not three columns.

        Example:
            >>> len(Answers.of(torch.zeros(0, 3, dtype=torch.long), 3, 1))
            0
        """
        _check(triples, num_entities, num_relations)
        heads, relations, tails = triples.unbind(1)
        # two stable sorts: a key of all three numbers would overflow on large graphs
        order = tails.argsort(stable=True)
        key = relations * num_entities + heads
        order = order[key[order].argsort(stable=True)]
        key, tails = key[order], tails[order]
        fresh = torch.ones(len(key), dtype=torch.bool, device=key.device)
        fresh[1:] = (key[1:] != key[:-1]) | (tails[1:] != tails[:-1])
        key, tails = key[fresh], tails[fresh]
        distinct, counts = key.unique_consecutive(return_counts=True)
        queries = torch.stack([distinct % num_entities, distinct // num_entities], 1)
        return cls(queries, _offsets(counts), tails, num_entities, num_relations)

    def __len__(self) -> int:
        return len(self.queries)

    @cached_property
    def _keys(self) -> Tensor:
        return self.queries[:, 1] * self.num_entities + self.queries[:, 0]

    @cached_property
    def _flat(self) -> Tensor:
        """Row of the query and tail as one number: ascending, as the tails of a row are."""
        rows = torch.arange(len(self), device=self.tails.device).repeat_interleave(self.offsets.diff())
        return rows * self.num_entities + self.tails

    def to(self, device: torch.device | str) -> Answers:
        """The same on another device."""
        queries, offsets, tails = (part.to(device) for part in (self.queries, self.offsets, self.tails))
        return Answers(queries, offsets, tails, self.num_entities, self.num_relations)

    def counts(self, heads: Int[Tensor, B], relations: Int[Tensor, B]) -> Int[Tensor, B]:
        """How many answers each query has; 0 for one that no triple asks."""
        return self._found(heads, relations)[1]

    def lookup(self, heads: Int[Tensor, B], relations: Int[Tensor, B]) -> tuple[Int[Tensor, n], Int[Tensor, n]]:
        """All known answers of B queries, as pairs (row of the query, tail), by row and then by tail.

        Args:
            heads: (B,) heads.
            relations: (B,) relations.

        Returns:
            Rows and tails: with them `scores[row, tail] = -inf` filters, and `target[row, tail] = 1` teaches.

        Example:
            >>> answers = Answers.of(torch.tensor([[0, 0, 1], [0, 0, 2]]), 3, 1)
            >>> answers.lookup(torch.tensor([0]), torch.tensor([0]))
            (tensor([0, 0]), tensor([1, 2]))
        """
        begins, counts = self._found(heads, relations)
        rows = torch.arange(len(heads), device=heads.device).repeat_interleave(counts)
        ends = counts.cumsum(0)
        places = torch.arange(len(rows), device=heads.device) + (begins - ends + counts)[rows]
        return rows, self.tails[places]

    def contains(
        self, heads: Int[Tensor, "*B"], relations: Int[Tensor, "*B"], tails: Int[Tensor, "*B"]
    ) -> Bool[Tensor, "*B"]:
        """Which triples are known. Cost O(log A) each, vectorized.

        Args:
            heads: heads.
            relations: relations.
            tails: tails, of the same shape.

        Example:
            >>> answers = Answers.of(torch.tensor([[0, 0, 1], [0, 0, 2]]), 3, 1)
            >>> answers.contains(torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([2, 0]))
            tensor([ True, False])
        """
        if not len(self):
            return torch.zeros_like(tails, dtype=torch.bool)
        key = relations * self.num_entities + heads
        query = torch.searchsorted(self._keys, key).clamp(max=len(self) - 1)
        flat = self._flat
        place = torch.searchsorted(flat, query * self.num_entities + tails).clamp(max=len(flat) - 1)
        return (self._keys[query] == key) & (flat[place] == query * self.num_entities + tails)

    def _found(self, heads: Tensor, relations: Tensor) -> tuple[Tensor, Tensor]:
        if not len(self):
            return torch.zeros_like(heads), torch.zeros_like(heads)
        key = relations * self.num_entities + heads
        place = torch.searchsorted(self._keys, key).clamp(max=len(self) - 1)
        counts = torch.where(self._keys[place] == key, self.offsets[place + 1] - self.offsets[place], 0)
        return self.offsets[place], counts


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _check(triples: Tensor, num_entities: int, num_relations: int) -> None:
    if triples.ndim != 2 or triples.shape[1] != 3 or triples.dtype != torch.int64:
        raise ValueError(
            f"Answers.of: triples are integers (n, 3), got {triples.dtype} of shape {tuple(triples.shape)}"
        )
    if not len(triples):
        return
    low, high = triples.amin(0).tolist(), triples.amax(0).tolist()
    if min(low) < 0 or max(high[0], high[2]) >= num_entities or high[1] >= num_relations:
        raise ValueError(
            f"Answers.of: expected entities below {num_entities} and relations below {num_relations}, got entities "
            f"{min(low[0], low[2])} to {max(high[0], high[2])} and relations {low[1]} to {high[1]}"
        )
