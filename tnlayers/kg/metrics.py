"""Ranks of true answers, and what is averaged from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tnlayers.kg.triples import Triples

HITS = (1, 3, 10)


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where the true answer of every query stands among its candidates.

    With s* the score of the truth and s those of the other candidates, optimistic = 1 + #(s > s*), pessimistic =
    1 + #(s >= s*), realistic their mean.

    Args:
        triples: (n, 3) what was asked: once for its head, once for its tail where both directions are ranked.
        of_head: (n,) whether the head was asked for.
        optimistic: (n,) the truth first among ties.
        pessimistic: (n,) the truth last among ties.
        options: (n,) candidates ranked, the truth included.

    Example:
        >>> ranks = Ranks(*(torch.tensor(x) for x in ([[0, 0, 1]], [False], [1], [2], [5])))
        >>> ranks.realistic
        tensor([1.5000], dtype=torch.float64)
    """

    triples: Int[Tensor, "n 3"]
    of_head: Bool[Tensor, n]
    optimistic: Int[Tensor, n]
    pessimistic: Int[Tensor, n]
    options: Int[Tensor, n]

    @property
    def realistic(self) -> Float[Tensor, n]:
        """Mean of optimistic and pessimistic rank: expected among ties in random order."""
        return (self.optimistic + self.pessimistic).double() / 2

    def __len__(self) -> int:
        return len(self.options)

    def __repr__(self) -> str:
        return f"Ranks({len(self)} queries, {int(self.of_head.sum())} for heads)"

    def where(self, chosen: Bool[Tensor, n]) -> Ranks:
        """Those of some queries."""
        parts = (self.triples, self.of_head, self.optimistic, self.pessimistic, self.options)
        return Ranks(*(part[chosen] for part in parts))


@dataclass(frozen=True, eq=False)
class Metrics:
    """Means over the ranks of a filtered evaluation; realistic ones, with optimistic and pessimistic views.

    mrr = mean(1 / rank), mr = mean(rank), hits[k] = share of ranks <= k, amri = 1 - (mr - 1) / (E - 1) where E is the
    mean rank of a random order, mean((options + 1) / 2): 1 is perfect, 0 is chance. They are summed in the order of
    PyKEEN's evaluator and equal its figures for equal ranks in float64.

    Args:
        ranks: what is averaged.
        kind: "realistic", "optimistic" or "pessimistic".
        hits_at: the k of `hits`.
        relation_labels: name of every relation; () leaves `by_relation` and `by_cardinality` empty.
        cardinality: class of every relation.

    Raises:
        ValueError: no ranks.

    References:
        M. Berrendorf, E. Faerman, L. Vermue, V. Tresp, "On the ambiguity of rank-based evaluation of entity alignment
        or link prediction methods", 2020, arXiv:2002.06914 (amri, realistic ranks).

    Example:
        >>> ranks = Ranks(*(torch.tensor(x) for x in ([[0, 0, 1], [0, 0, 2]], [False] * 2, [1, 4], [1, 4], [5, 5])))
        >>> metrics = Metrics(ranks)
        >>> metrics.mrr, metrics.hits[1], metrics.mr, metrics.amri
        (0.625, 0.5, 2.5, 0.25)
    """

    ranks: Ranks = field(repr=False)
    kind: str = "realistic"
    hits_at: tuple[int, ...] = HITS
    relation_labels: Sequence[str] = field(default=(), repr=False)
    cardinality: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.kind not in ("realistic", "optimistic", "pessimistic"):
            raise ValueError(f"Metrics: kind must be realistic, optimistic or pessimistic, got {self.kind!r}")
        if not len(self.ranks):
            raise ValueError("Metrics: there are no ranks to average")

    @classmethod
    def of(cls, ranks: Ranks, triples: Triples, hits_at: Sequence[int] = HITS) -> Metrics:
        """With the names and classes of the relations of a graph."""
        return cls(
            ranks,
            hits_at=tuple(hits_at),
            relation_labels=tuple(triples.relation_labels),
            cardinality=tuple(triples.cardinality),
        )

    @cached_property
    def _values(self) -> np.ndarray:
        values: np.ndarray = getattr(self.ranks, self.kind).double().cpu().numpy()
        return values

    @property
    def count(self) -> int:
        """Queries averaged."""
        return len(self.ranks)

    @cached_property
    def mrr(self) -> float:
        """Mean reciprocal rank."""
        # 1 / (1 / mean): the reciprocal of the harmonic mean, as PyKEEN rounds it
        return float(1.0 / (1.0 / np.mean(1.0 / self._values)))

    @cached_property
    def mr(self) -> float:
        """Mean rank."""
        return float(np.mean(self._values))

    @cached_property
    def hits(self) -> dict[int, float]:
        """K -> share of queries whose rank is at most k."""
        return {k: float(np.mean(self._values <= k)) for k in self.hits_at}

    @cached_property
    def amri(self) -> float:
        """Adjusted mean rank index: 1 for a perfect order, 0 for a random one."""
        expected = float(np.mean(0.5 * (self.ranks.options.cpu().numpy() + 1)))
        if expected == 1.0:
            return 0.0  # one candidate each: no order to judge
        scale = 1.0 / (1.0 - expected)
        return scale * self.mr + -scale * expected

    @property
    def realistic(self) -> Metrics:
        """Ties count as the mean of best and worst."""
        return self._view("realistic")

    @property
    def optimistic(self) -> Metrics:
        """The truth first among ties."""
        return self._view("optimistic")

    @property
    def pessimistic(self) -> Metrics:
        """The truth last among ties."""
        return self._view("pessimistic")

    @cached_property
    def by_direction(self) -> dict[str, Metrics]:
        """Queries that ask for heads, and those that ask for tails."""
        asked = {"head": self.ranks.of_head, "tail": ~self.ranks.of_head}
        return {name: self._part(chosen) for name, chosen in asked.items() if bool(chosen.any())}

    @cached_property
    def by_relation(self) -> dict[str, Metrics]:
        """Relations that were asked for, by name."""
        relation = self.ranks.triples[:, 1]
        return {
            self.relation_labels[k]: self._part(relation == k)
            for k in relation.unique().tolist()
            if self.relation_labels
        }

    @cached_property
    def by_cardinality(self) -> dict[str, Metrics]:
        """Classes of relations: "1-1", "1-N", "N-1", "N-N"; their `by_direction` tells heads from tails."""
        if not self.cardinality:
            return {}
        kinds = np.asarray(self.cardinality)[self.ranks.triples[:, 1].cpu().numpy()]
        asked = sorted(set(kinds.tolist()))
        return {kind: self._part(torch.from_numpy(kinds == kind)) for kind in asked}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a file: this view, the other two, directions and classes."""
        found = self._numbers()
        found |= {kind: self._view(kind)._numbers() for kind in ("optimistic", "pessimistic")}
        found["by_direction"] = {name: part._numbers() for name, part in self.by_direction.items()}
        found["by_cardinality"] = {name: part._numbers() for name, part in self.by_cardinality.items()}
        found["by_relation"] = {name: part._numbers() for name, part in self.by_relation.items()}
        return found

    def __str__(self) -> str:
        rows = {self.kind: self}
        others = [kind for kind in ("optimistic", "pessimistic", "realistic") if kind != self.kind]
        rows |= {kind: self._view(kind) for kind in others}
        rows |= {f"{name}s": part for name, part in self.by_direction.items()} | self.by_cardinality
        head = ["", "MRR", "MR", "AMRI", *(f"H@{k}" for k in self.hits_at), "queries"]
        table = [head]
        for name, part in rows.items():
            hits = [f"{part.hits[k]:.4f}" for k in self.hits_at]
            table.append([name, f"{part.mrr:.4f}", f"{part.mr:.1f}", f"{part.amri:.4f}", *hits, f"{part.count:,}"])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        )

    def _numbers(self) -> dict[str, Any]:
        hits = {str(k): value for k, value in self.hits.items()}
        return {"mrr": self.mrr, "mr": self.mr, "amri": self.amri, "hits": hits, "queries": self.count}

    def _view(self, kind: str) -> Metrics:
        return Metrics(self.ranks, kind, self.hits_at, self.relation_labels, self.cardinality)

    def _part(self, chosen: Tensor) -> Metrics:
        return Metrics(self.ranks.where(chosen.cpu()), self.kind, self.hits_at, self.relation_labels, self.cardinality)
