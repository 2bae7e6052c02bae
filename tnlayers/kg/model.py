"""What every model of a knowledge graph is to training and evaluation: a query, and entities it is compared with."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tnlayers.dense import unchanged_rng

Entities = slice | Int[Tensor, "n"] | None
"""Which entities: a range, their ids, or all."""
HEADS = 4096
"""Heads asked at once where (?, r, t) needs a query for each of them."""


class KGModel(nn.Module):
    """Scores of triples (head, relation, tail), higher for what is more plausible: logits, never probabilities.

    A score is made in two steps, so that one query serves all entities, in chunks of any size: `query(heads,
    relations)` is what the model knows before it has seen a tail (batch norm and dropout act here only), and
    `against(query, entities)` compares it with entities, one by one: the score of an entity does not depend on which
    others are asked for.

    A kind of model writes `query` and `against`. With `inverse` the relation r + num_relations / 2 is the inverse of r,
    and heads are tails of it. Without, (?, r, t) compares t with the queries of every head; a model that has a closed
    form for that writes `query_heads`. A subclass that writes another `query`, and nothing else, is asked for heads and
    relations by that.

    Attributes:
        num_entities: rows of the entity table.
        num_relations: relations, inverse ones included.
        inverse: whether the second half of the relations are the inverses of the first.

    Example:
        >>> import torch
        >>> class Dot(KGModel):
        ...     def __init__(self):
        ...         super().__init__(5, 4, inverse=True)
        ...         self.entities, self.relations = (torch.nn.Parameter(torch.randn(n, 3)) for n in (5, 4))
        ...
        ...     def query(self, heads, relations):
        ...         return self.entities[heads] * self.relations[relations]
        ...
        ...     def against(self, query, entities=None):
        ...         return query @ (self.entities if entities is None else self.entities[entities]).mT
        >>> model, h, r, t = Dot(), torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2, 2])
        >>> model.score_all(h, r).shape, torch.equal(model(h, r, t), model.score_all(h, r)[:, 2])
        (torch.Size([2, 5]), True)
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "query" in vars(cls):  # closed forms of classes above are those of another query
            if not vars(cls).keys() & {"query_heads", "_asks_heads", "_z"}:
                cls._asks_heads = _by_inverse_relations  # type: ignore[method-assign]
            if "score_relations" not in vars(cls):
                cls.score_relations = KGModel.score_relations  # type: ignore[method-assign]
        if "__init__" in vars(cls) and "generator" in inspect.signature(cls.__init__).parameters:
            cls.__init__ = _drawing_from_its_generator(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, num_entities: int, num_relations: int, *, inverse: bool) -> None:
        super().__init__()
        name = type(self).__name__
        if num_entities < 1 or num_relations < 1:
            raise ValueError(
                f"{name}: a graph needs entities and relations, got {num_entities} and {num_relations}; "
                "load_triples counts them"
            )
        if inverse and num_relations % 2:
            raise ValueError(
                f"{name}: with inverse relations their number must be even, got {num_relations}; pass inverse=False"
            )
        self.num_entities, self.num_relations, self.inverse = num_entities, num_relations, inverse

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Any:
        """What (h, r, ?) asks: a tensor (B, ...), or a tuple of such."""
        raise TypeError(f"{type(self).__name__}: a model must write query(heads, relations)")

    def query_heads(self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Any:
        """What (?, r, t) asks; with inverse relations the query (t, r^-1, ?)."""
        if not self.inverse:
            raise TypeError(
                f"{type(self).__name__}: without inverse relations this model has no query for heads, expected "
                "inverse=True; score_heads and evaluate do without"
            )
        return self.query(tails, self.inverted(relations))

    def against(self, query: Any, entities: Entities = None) -> Float[Tensor, "B n"]:
        """Scores of a query's rows against entities, the same for all rows."""
        raise TypeError(f"{type(self).__name__}: a model must write against(query, entities)")

    def inverted(self, relations: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """The inverse relations."""
        half = self.num_relations // 2
        return torch.where(relations < half, relations + half, relations - half)

    def score_all(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B N"]:
        """Scores of every entity as the tail."""
        return self.against(self.query(heads, relations))

    def score_heads(
        self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"], entities: Entities = None
    ) -> Float[Tensor, "B n"]:
        """Scores of every entity, or of those given, as the head.

        Cost as `score_all`; without inverse relations, and no closed form, a query for every entity and distinct
        relation.
        """
        if self._asks_heads():
            return self.against(self.query_heads(relations, tails), entities)
        every = torch.arange(self.num_entities, device=tails.device)
        heads = every if entities is None else every[entities]
        columns = []
        for part in heads.split(HEADS):
            scores, order = [], []
            for relation in relations.unique():
                order.append((relations == relation).nonzero()[:, 0])
                query = self.query(part, relation.expand(len(part)))
                scores.append(self.against(query, tails[order[-1]]).mT)
            columns.append(torch.cat(scores)[torch.cat(order).argsort()])
        return torch.cat(columns, 1)

    def _asks_heads(self) -> bool:
        """Whether there is a query for heads."""
        return self.inverse or type(self).query_heads is not KGModel.query_heads

    def score_relations(self, heads: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B R"]:
        """Scores of every relation of the data (no inverse ones). Cost here: a query each; a model may know better."""
        count = self.num_relations // 2 if self.inverse else self.num_relations
        every = torch.arange(count, device=heads.device)
        scores = self(heads.repeat_interleave(count), every.repeat(len(heads)), tails.repeat_interleave(count))
        return scores.reshape(len(heads), count)

    def forward(
        self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]
    ) -> Float[Tensor, "B"]:
        """Scores of triples. Cost here: each distinct tail is compared with its own queries only."""
        query = self.query(heads, relations)
        return self.paired(query, tails[:, None])[:, 0]

    def paired(self, query: Any, tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """Scores of row b of the query against its own k entities (negative samples). A model writes a faster one."""
        unique, where = tails.unique(return_inverse=True)
        return self.against(query, unique).gather(1, where)

    def parameter_count(self) -> int:
        """Numbers of all parameters, those held fixed (a frozen MIGTF) among them, buffers not."""
        return sum(parameter.numel() for parameter in self.parameters())


def _by_inverse_relations(self: KGModel) -> bool:
    return self.inverse


def _drawing_from_its_generator(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that, given a generator, leaves torch's own as they were.

    Tables and layers of torch draw a start of their own when they are made, which the model then draws anew.
    """

    @wraps(init)
    def made(self: Any, *args: Any, **options: Any) -> None:
        given = [value for value in (*args, *options.values()) if isinstance(value, torch.Generator)]
        given = [value for value in given if value is not torch.default_generator]  # which is torch's own
        with unchanged_rng(given[0].device) if given else nullcontext():
            init(self, *args, **options)

    return made


class InnerProduct(KGModel):
    """A model linear in the tail's row, and affine in the head's where batch norm and dropout rest: in evaluation.

    `score(h, r, t) = <q(h, r), tails[t]> + bias[t] = <z(r, t), heads[h]> + c(r, t)`. Head and tail change sides:
    without inverse relations (?, r, t) is asked by the pair (z, c) at the cost of (h, r, ?). In training batch norm is
    no affine map of a row, and (?, r, t) a query for every head.

    A kind of model writes `query`, `tail_rows`, `head_rows` and `_z`; one that changes `query` changes `_z` with it, or
    has no closed form.

    Example:
        >>> from types import SimpleNamespace
        >>> from tnlayers.kg import CP
        >>> model = CP(SimpleNamespace(num_entities=7, num_relations=4, inverse=False), dim=3).eval()
        >>> r, t = torch.tensor([0, 3]), torch.tensor([5, 5])
        >>> z, c = model.query_heads(r, t)
        >>> torch.allclose(model.score_heads(r, t), z @ model.head_rows().mT + c[:, None])
        True
    """

    def tail_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """What a query meets of entities that are tails."""
        raise TypeError(f"{type(self).__name__}: a model must write tail_rows(entities)")

    def head_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """What z meets of entities that are heads."""
        raise TypeError(f"{type(self).__name__}: a model must write head_rows(entities)")

    def _z(self, relations: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """z, and c without the bias."""
        raise TypeError(f"{type(self).__name__}: a model must write _z(relations, tails)")

    def _bias(self, entities: slice | Tensor | None) -> Tensor | None:
        """Of tails, ids of any shape; None is 0."""
        return None

    def _asks_heads(self) -> bool:
        return self.inverse or not self.training

    def query_heads(self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Any:
        """See `KGModel`; without inverse relations the pair (z, c), in evaluation."""
        if self.inverse or not self._asks_heads():
            return super().query_heads(relations, tails)
        (z, c), bias = self._z(relations, tails), self._bias(tails)
        return z, c if bias is None else c + bias

    def against(self, query: Any, entities: Entities = None) -> Float[Tensor, "B n"]:
        """One product with rows of the entities."""
        if not isinstance(query, Tensor):
            z, c = query
            return torch.addmm(c[:, None], z, self.head_rows(entities).mT)
        rows, bias = self.tail_rows(entities).mT, self._bias(entities)
        return query @ rows if bias is None else torch.addmm(bias, query, rows)

    def paired(self, query: Any, tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """Row b against its own entities. Cost: B k K."""
        if isinstance(query, Tensor):
            rows, offset = self.tail_rows, self._bias(tails)
        else:
            rows, (query, c) = self.head_rows, query
            offset = c[:, None]
        met = rows(tails.reshape(-1)).unflatten(0, tails.shape)
        scores = torch.bmm(met, query[:, :, None])[:, :, 0]
        return scores if offset is None else scores + offset
