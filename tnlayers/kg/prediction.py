"""Answers to one question, by name: which tails, heads or relations a model finds most plausible."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from tnlayers.kg.foreign import as_model
from tnlayers.kg.model import KGModel
from tnlayers.kg.triples import SPLITS, Triples
from tnlayers.page import Cell, Column, text_table

COLUMNS = (
    Column("rank", "place among all candidates that are listed", numeric=True),
    Column("name", "entity or relation", flexible=True),
    Column("score", "logit: only differences within a question mean something", numeric=True),
    Column("known", "split that holds the triple"),
)


@dataclass(frozen=True)
class Answer:
    """One candidate.

    Args:
        rank: from 1, by score; equal scores in the order of the vocabulary.
        name: of the entity or relation.
        score: logit.
        known: "train", "valid" or "test" where the graph holds the triple, else "".

    Example:
        >>> Answer(1, "ann", 0.5, "").known
        ''
    """

    rank: int
    name: str
    score: float
    known: str


@dataclass(frozen=True)
class Prediction:
    """Ranked answers to a question.

    Args:
        question: as text, "(ann, knows, ?)".
        answers: best first.
        known: how many known answers the question has in all.
        filtered: whether they were left out.

    Example:
        >>> print(Prediction("(a, r, ?)", (Answer(1, "b", 2.0, "train"),), 1, False))
        (a, r, ?): 1 known
        rank  name  score  known
        ────────────────────────
           1  b         2  train
    """

    question: str
    answers: tuple[Answer, ...]
    known: int
    filtered: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [[Cell(str(a.rank)), Cell(a.name), Cell(f"{a.score:.4g}"), Cell(a.known)] for a in self.answers]
        return f"{self.question}: {self.known} known{' and left out' * self.filtered}\n{text_table(COLUMNS, rows)}"


def predict(
    model: nn.Module,
    triples: Triples,
    *,
    head: str | int | None = None,
    relation: str | int | None = None,
    tail: str | int | None = None,
    count: int = 10,
    filtered: bool = False,
) -> Prediction:
    """Rank what completes a triple of which two parts are given.

    Args:
        model: a `KGModel` trained on the graph, or a PyKEEN model on the same numbers; scored in evaluation mode, left
            in the mode it is in.
        triples: the graph.
        head: name (a number stands for its text), or None to ask for heads.
        relation: name, or None to ask for relations.
        tail: name, or None to ask for tails.
        count: answers listed.
        filtered: leave known answers out; False marks them.

    Returns:
        Prediction: answers with names, scores, and the split that knows them.

    Raises:
        ValueError: not two parts of three, a name that is not in the graph (with those most like it), a relation that
            no training triple has, scores that are not finite, a graph that is not the model's.
        TypeError: no model of a known kind.

    Warns:
        UserWarning: an entity that no training triple has: its answers are those of its random start.

    Example:
        >>> from tnlayers.kg import KGModel, load_triples
        >>> graph = load_triples({"train": [("ann", "knows", "bob"), ("bob", "knows", "cid")]})
        >>> class Last(KGModel):  # prefers entities with a higher number
        ...     def query(self, heads, relations):
        ...         return torch.ones(len(heads), 1)
        ...     def against(self, query, entities=None):
        ...         return query * torch.arange(3.0)
        >>> [(a.name, a.known) for a in predict(Last(3, 2, inverse=True), graph, head="ann", relation="knows").answers]
        [('cid', ''), ('bob', 'train'), ('ann', '')]
    """
    named = {"head": head, "relation": relation, "tail": tail}
    given = {part: None if name is None else str(name) for part, name in named.items()}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise ValueError(f"predict: two of head, relation and tail must be given, got {3 - len(missing)}")
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"predict: count must be an int >= 1, got {count!r}")
    model = as_model(model)
    own = model.num_relations // 2 if model.inverse else model.num_relations
    if model.num_entities != triples.num_entities or own != len(triples.relation_to_id):
        raise ValueError(
            f"predict: the model has {model.num_entities} entities and {own} relations, the graph "
            f"{triples.num_entities} and {len(triples.relation_to_id)}; ask with the triples it was made from"
        )
    ids = _ids(given, triples)
    scores = _scores(model, ids, missing[0])
    labels = triples.relation_labels if missing[0] == "relation" else triples.entity_labels
    column = ("head", "relation", "tail").index(missing[0])
    knows: dict[int, str] = {}
    for split in reversed(SPLITS):
        part = triples.split(split)
        for k, name in enumerate(given):
            if k != column:
                part = part[part[:, k] == ids[name]]
        knows |= dict.fromkeys(part[:, column].tolist(), split)
    order = scores.argsort(descending=True, stable=True).tolist()
    listed = [place for place in order if not (filtered and place in knows)][:count]
    answers = tuple(
        Answer(rank, labels[place], scores[place].item(), knows.get(place, ""))
        for rank, place in enumerate(listed, start=1)
    )
    parts = ", ".join("?" if value is None else value for value in given.values())
    return Prediction(f"({parts})", answers, len(knows), filtered)


def _ids(given: dict[str, str | None], triples: Triples) -> dict[str, int]:
    """Numbers of the names; what training has never seen is refused or warned of."""
    found: dict[str, int] = {}
    for part, name in given.items():
        if name is not None:
            numbered = triples.relation_ids if part == "relation" else triples.entity_ids
            found[part] = int(numbered([name])[0])
    trained = triples.train
    if "relation" in found and not bool((trained[:, 1] == found["relation"]).any()):
        raise ValueError(
            f"predict: no training triple has the relation {given['relation']!r}; the model has never seen it"
        )
    for part in ("head", "tail"):
        if part in found and not bool((trained[:, (0, 2)] == found[part]).any()):
            warnings.warn(
                f"predict: no training triple has the entity {given[part]!r}; its answers are those of a random start",
                stacklevel=3,
            )
    return found


def _scores(model: KGModel, ids: dict[str, int], asked: str) -> Tensor:
    """Scores of every candidate, in float64 on the CPU."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = {part: torch.tensor([number], device=device) for part, number in ids.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            if asked == "head":
                found = model.score_heads(given["relation"], given["tail"])
            elif asked == "relation":
                found = model.score_relations(given["head"], given["tail"])
            else:
                found = model.score_all(given["head"], given["relation"])
    finally:
        for module, mode in modes.items():
            module.training = mode
    scores = found[0].double().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("predict: scores must be finite, got NaN or infinite ones; look for a diverged training")
    return scores
