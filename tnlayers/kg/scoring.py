"""Scores that do not depend on how they are computed: in float64, rounded to what the model can tell apart."""

from __future__ import annotations

import copy
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnlayers.kg.model import Entities, KGModel

WIDE = (torch.float64, torch.complex128)
SPLIT = float((1 << 21) + 1)
"""Veltkamp's constant that leaves 53 - 21 = 32 bits of a float64."""


class _Heads(NamedTuple):
    """(?, r, t) of a model that has no query for it."""

    relations: Tensor
    tails: Tensor


class Scorer:
    """A model while it is evaluated: dropout and batch norm at rest, and, if exact, a float64 copy.

    A context: on leaving it every module is in the mode it was in. A model in float64 is not copied.

    Args:
        model: of ours.
        exact: score in float64 and round; otherwise scores are those of the model's own arithmetic.

    Raises:
        ValueError: the model cannot be copied or computed in float64.

    Example:
        >>> model = KGModel(3, 1, inverse=False)
        >>> with Scorer(model, exact=False) as scorer:
        ...     (model.training, scorer.dtype)
        (False, torch.float32)
        >>> model.training
        True
    """

    def __init__(self, model: KGModel, exact: bool) -> None:
        numbers = [*model.parameters(), *model.buffers()]
        floating = [part for part in numbers if part.is_floating_point() or part.is_complex()]
        self.device = numbers[0].device if numbers else torch.device("cpu")
        self.fine = any(part.dtype in WIDE for part in floating)
        self.dtype = torch.float64 if self.fine else torch.float32
        self.itemsize = 8 if self.fine else 4
        self.exact, self.model = exact, model
        if exact and any(part.dtype not in WIDE for part in floating):
            try:
                self.model = copy.deepcopy(model)._apply(_widened)
            except RuntimeError as error:
                raise ValueError(f"evaluate: the model cannot be copied ({error}); pass exact=False") from error
        self._modes: list[tuple[nn.Module, bool]] = []
        self._autocast: Any = None

    def __enter__(self) -> Scorer:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        if self.exact:  # a surrounding autocast would score in half precision
            self._autocast = torch.autocast(self.device.type, enabled=False)
            self._autocast.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(kind, error, trace)
        for module, training in self._modes:
            module.training = training

    def ask(self, name: str, first: Tensor, relations: Tensor) -> Any:
        """The query of (first, relation, ?), or of (?, relation, first) if heads are asked for."""
        if name != "head":
            return self.model.query(first, relations)
        return self.model.query_heads(relations, first) if self.model._asks_heads() else _Heads(relations, first)

    def fill(self, out: Tensor, query: Any, entities: Entities) -> None:
        """Scores against some entities, the same for all rows, into `out`."""
        if isinstance(query, _Heads):
            found = self.model.score_heads(query.relations, query.tails, entities)
        else:
            found = self.model.against(query, entities)
        out.copy_(self._rounded(found))

    def pairs(self, query: Any, entities: Tensor) -> Tensor:
        """Scores of every row against entities of its own."""
        if isinstance(query, _Heads):
            relations, tails = (part[:, None].expand_as(entities).reshape(-1) for part in query)
            found = self.model(entities.reshape(-1), relations, tails).reshape(entities.shape)
        else:
            found = self.model.paired(query, entities)
        return self._rounded(found).to(self.dtype)

    def _rounded(self, scores: Tensor) -> Tensor:
        if not (self.exact and self.fine and scores.dtype == torch.float64):
            return scores  # copying into float32 rounds to its 24 bits
        high = scores * SPLIT
        return high - (high - scores)


def _widened(part: Tensor) -> Tensor:
    if part.is_complex():
        return part.to(torch.complex128)
    return part.double() if part.is_floating_point() else part
