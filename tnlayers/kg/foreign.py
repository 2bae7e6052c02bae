"""Models of other libraries as models of ours: enough of `KGModel` to be evaluated."""

from __future__ import annotations

from typing import Any

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
