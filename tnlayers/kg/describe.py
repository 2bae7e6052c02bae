"""What a set of triples holds: counts, entities never trained, repeated triples, relations by cardinality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

CARDINALITIES = ("1-1", "1-N", "N-1", "N-N")
THRESHOLD = 1.5


def cardinalities(triples: Int[Tensor, "n 3"], num_relations: int, threshold: float = THRESHOLD) -> list[str]:
    """Class of every relation: "1-1", "1-N", "N-1" or "N-N".

    A relation has many tails where a head that it starts from has, on average, more than `threshold` distinct tails,
    and many heads likewise. A relation without triples is "1-1".

    Args:
        triples: head, relation, tail; repeated ones count once.
        num_relations: relations, numbered from 0.
        threshold: 1.5 in the literature.

    References:
        A. Bordes, N. Usunier, A. Garcia-Durán, J. Weston, O. Yakhnenko, "Translating embeddings for modeling
        multi-relational data", NeurIPS 2013, section 4.2.

    Example:
        >>> cardinalities(torch.tensor([[0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 1, 0]]), 2)
        ['1-N', '1-1']
    """

    def distinct(*columns: int) -> Tensor:
        """Different values of some columns, counted by relation."""
        first = first_of_each(triples[:, columns])
        return torch.bincount(triples[first, 1], minlength=num_relations)

    count, pairs = distinct(0, 1, 2), lambda column: distinct(1, column)

    many_tails, many_heads = count > threshold * pairs(0), count > threshold * pairs(2)
    sides = zip(many_heads.tolist(), many_tails.tolist(), strict=True)
    return [f"{'N' if heads else '1'}-{'N' if tails else '1'}" for heads, tails in sides]


def first_of_each(rows: Int[Tensor, "n k"]) -> Int[Tensor, m]:
    """Where each distinct row occurs first, ascending. Sorts one key a column; no key overflows.

    Example:
        >>> first_of_each(torch.tensor([[2, 0], [1, 5], [2, 0]]))
        tensor([0, 1])
    """
    code = rows.new_zeros(len(rows))
    for column in rows.unbind(1):
        low = column.amin() if len(column) else 0
        span = int(column.amax() - low) + 1 if len(column) else 1
        code = (code * span + column - low).unique(return_inverse=True)[1]  # below n again, so the next fits
    first = torch.full((int(code.amax()) + 1 if len(code) else 0,), len(rows), device=rows.device)
    places = torch.arange(len(rows), device=rows.device)
    return first.scatter_reduce_(0, code, places, "amin").sort().values


def repeated(triples: Int[Tensor, "n 3"], among: Int[Tensor, "m 3"]) -> int:
    """How many distinct triples occur among others too.

    Example:
        >>> repeated(torch.tensor([[0, 0, 1], [0, 0, 2]]), torch.tensor([[0, 0, 2]]))
        1
    """
    first = first_of_each(torch.cat([among, triples]))
    return len(first_of_each(triples)) - int((first >= len(among)).sum())


@dataclass(frozen=True)
class Description:
    """Statistics of `Triples`; printed as a table.

    Args:
        name: of the data.
        entities: in the vocabulary.
        relations: in the vocabulary, inverse ones not counted.
        inverse: whether inverse relations are added.
        triples: split -> triples.
        duplicates: split -> repeated lines that were left out.
        seen: split -> its triples that occur in the training split too.
        unseen_entities: split -> its distinct entities that no training triple has.
        unseen_triples: split -> its triples with an entity or a relation that no training triple has.
        dropped: split -> triples left out by `unseen="drop"`.
        literals: statements left out because their object is a literal.
        cardinality: class -> relations.

    Example:
        >>> Description("toy", 3, 1, True, {"train": 2}).triples["train"]
        2
    """

    name: str
    entities: int
    relations: int
    inverse: bool
    triples: dict[str, int]
    duplicates: dict[str, int] | None = None
    seen: dict[str, int] | None = None
    unseen_entities: dict[str, int] | None = None
    unseen_triples: dict[str, int] | None = None
    dropped: dict[str, int] | None = None
    literals: int = 0
    cardinality: dict[str, int] | None = None

    def __str__(self) -> str:
        added = f" (+ {self.relations:,} inverse)" if self.inverse else ""
        lines = [f"{self.name or 'triples'}: {self.entities:,} entities, {self.relations:,} relations{added}"]
        rows = [["", *self.triples], ["triples", *map("{:,}".format, self.triples.values())]]
        for title, values in (
            ("repeated lines left out", self.duplicates),
            ("also in train", self.seen),
            ("entities not in train", self.unseen_entities),
            ("triples with something not in train", self.unseen_triples),
            ("triples left out for it", self.dropped),
        ):
            if values is not None and any(values.values()):
                rows.append([title, *(f"{values.get(split, 0):,}" for split in self.triples)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            first, *others = (cell.ljust if k == 0 else cell.rjust for k, cell in enumerate(row))
            lines.append("  ".join([first(widths[0]), *(pad(w) for pad, w in zip(others, widths[1:], strict=True))]))
        if self.literals:
            lines.append(f"statements with a literal left out: {self.literals:,}")
        if self.cardinality is not None:
            lines.append("relations " + ", ".join(f"{name}: {n:,}" for name, n in self.cardinality.items()))
        return "\n".join(line.rstrip() for line in lines)
