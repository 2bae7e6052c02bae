"""Models of other libraries as models of ours: enough of `KGModel` to be evaluated."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tnlayers.kg.model import Entities, KGModel


class PyKEENModel(KGModel):
    """A PyKEEN model, asked through its `score_t` and `score_h`; the model itself is kept, not copied.

    Relations are numbered as here, inverse ones in the second half; PyKEEN interleaves them (2 r and 2 r + 1). Scores
    are PyKEEN's own, before any sigmoid.

    Args:
        model: a `pykeen.models.Model`, in the transductive setting.

    Raises:
        TypeError: no such model.

    Example:
        >>> from tnlayers.kg import as_model
        >>> as_model(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: as_model: expected a KGModel or a PyKEEN model (score_t and score_h), got Linear
    """

    def __init__(self, model: nn.Module) -> None:
        held: Any = model
        inverse = bool(held.use_inverse_triples)
        super().__init__(int(held.num_entities), int(held.num_relations), inverse=inverse)
        self.model = model

    def query(self, heads: Int[Tensor, B], relations: Int[Tensor, B]) -> Int[Tensor, "B 3"]:
        """Head and relation, in PyKEEN's numbers, and a 0: PyKEEN sees the tails and the query together."""
        return torch.stack([heads, self._theirs(relations), torch.zeros_like(heads)], 1)

    def query_heads(self, relations: Int[Tensor, B], tails: Int[Tensor, B]) -> Int[Tensor, "B 3"]:
        """With inverse relations the query (t, r^-1, ?), as PyKEEN asks it; otherwise marked by a 1."""
        if self.inverse:
            return self.query(tails, self.inverted(relations))
        return torch.stack([tails, relations, torch.ones_like(tails)], 1)

    def against(self, query: Int[Tensor, "B 3"], entities: Entities = None) -> Float[Tensor, "B n"]:
        """PyKEEN's scores; the rows of a query all ask for tails, or all for heads."""
        model: Any = self.model
        first, relation, of_head = query.unbind(1)
        if isinstance(entities, slice):
            whole = entities == slice(0, self.num_entities)
            entities = None if whole else torch.arange(self.num_entities, device=query.device)[entities]
        if len(of_head) and bool(of_head[0]):
            found: Tensor = model.score_h(torch.stack([relation, first], 1), heads=entities)
        else:
            found = model.score_t(torch.stack([first, relation], 1), tails=entities)
        return found

    def _theirs(self, relations: Tensor) -> Tensor:
        if not self.inverse:
            return relations
        half = self.num_relations // 2
        return torch.where(relations < half, 2 * relations, 2 * (relations - half) + 1)


class Taken(NamedTuple):
    """What a model of PyKEEN's has learned: an interaction, and tables in our order of relations, one row each.

    Several representations of an entity stand side by side; complex numbers as [real | imaginary].
    """

    graph: PyKEENModel
    interaction: Any
    entities: Tensor
    relations: Tensor


def take(who: str, model: nn.Module, kind: str) -> Taken:
    """Copies of the tables of a PyKEEN model whose interaction is of a kind, for a model of ours.

    Args:
        who: named in errors.
        model: a `pykeen.models.ERModel`.
        kind: name of the interaction's class, exactly; a subclass may score otherwise.

    Raises:
        TypeError: another module, or another interaction.
        ValueError: tables that are normalized or dropped in every forward pass, which tables here are not.

    Example:
        >>> take("TuckER.from_pykeen", torch.nn.Linear(2, 2), "TuckERInteraction")
        Traceback (most recent call last):
        TypeError: TuckER.from_pykeen: expected a PyKEEN model with a TuckERInteraction, got Linear
    """
    theirs: Any = model
    interaction = getattr(model, "interaction", None)
    if type(interaction).__name__ != kind or not hasattr(model, "entity_representations"):
        found = type(model).__name__ + ("" if interaction is None else f" with a {type(interaction).__name__}")
        raise TypeError(f"{who}: expected a PyKEEN model with a {kind}, got {found}")
    graph = PyKEENModel(model)
    entities, relations = (
        torch.cat([_numbers(who, table) for table in tables], 1)
        for tables in (theirs.entity_representations, theirs.relation_representations)
    )
    order = graph._theirs(torch.arange(graph.num_relations, device=relations.device))
    return Taken(graph, interaction, entities, relations[order])


def _numbers(who: str, table: Any) -> Tensor:
    """Rows of a representation, flat and real."""
    dropout = 0.0 if table.dropout is None else table.dropout.p
    if table.normalizer is not None or dropout:
        raise ValueError(
            f"{who}: tables here are plain, expected representations without normalizer and dropout, got "
            f"{type(table).__name__} with normalizer={table.normalizer} and dropout={dropout}; evaluate(model, "
            "triples) takes the PyKEEN model as it is"
        )
    with torch.no_grad():
        rows = table._plain_forward(None).detach().flatten(1)
    return torch.cat([rows.real, rows.imag], 1) if rows.is_complex() else rows.clone()


def as_model(model: nn.Module) -> KGModel:
    """A model of ours as it is, a PyKEEN model as a `PyKEENModel`.

    Args:
        model: a `KGModel`, or anything with PyKEEN's `score_t` and `score_h`.

    Raises:
        TypeError: it is neither.

    Example:
        >>> from tnlayers.kg import KGModel
        >>> model = KGModel(5, 2, inverse=True)
        >>> as_model(model) is model
        True
    """
    if isinstance(model, KGModel):
        return model
    if hasattr(model, "score_t") and hasattr(model, "score_h"):
        return PyKEENModel(model)
    raise TypeError(f"as_model: expected a KGModel or a PyKEEN model (score_t and score_h), got {type(model).__name__}")
