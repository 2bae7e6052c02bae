"""Mixed geometry (MIG-TF): a Tucker score plus the Lorentz interaction of head, relation and tail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from decompositions.linalg import positive_qr
from tnlayers.kg.model import Entities, KGModel
from tnlayers.lorentz_interaction import Curvature, interaction_inverse_query, interaction_query, interaction_scores


class LPITF(KGModel):
    """The hyperbolic part of MIG-TF as a model of its own: the Lorentz interaction N (or S) of one point each.

    `N(u, t, v) = D(u,t) + D(0,v) - D(u,v) - D(t,v) - D(0,u) - D(0,t)` of the points u of the head, t of the relation
    and v of the tail (`tnlayers.lorentz_interaction`); S is N / (u_0 t_0 + u_0 v_0 + t_0 v_0), which is bounded. One
    table of entities serves u and v; it holds space coordinates, so that points stay on the hyperboloid. Scores of all
    entities are one matrix product. Parameters: (num_entities + num_relations) d.

    Args:
        triples: whose num_entities, num_relations and inverse are read (`Triples`, or another model).
        dim: d, space coordinates of a point.
        curvature: c > 0, points satisfy -x_0^2 + |x|^2 = -1/c. The papers' c is 1/curvature.
        normalized: S in place of N.
        batch_norm: normalize u and t over the batch, each with statistics of its own (the published code shares one
            normalization, whose running statistics then fit neither).
        dropout: of the coordinates of u and t.
        entity_dropout: of the coordinates of v, one mask for all rows.
        orthogonal_relations: relations are the orthonormal factor of their table; needs num_relations <= dim.
        std: of the entities at the start.
        relation_std: of the relations at the start.
        learn_curvature: train c, as exp of a parameter.
        generator: source of randomness of the start.
        device: of all parameters.
        dtype: of all parameters.

    Raises:
        ValueError: dim below 1, more relations than dim for orthonormal ones.

    References:
        MIG-TF: arXiv 2504.02589 (in its code: LPITF, without denominator, c = 1).

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = LPITF(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3)
        >>> model.score_all(torch.tensor([0, 1]), torch.tensor([3, 2])).shape, model.parameter_count()
        (torch.Size([2, 7]), 33)
    """

    def __init__(
        self,
        triples: Any,
        dim: int = 50,
        curvature: int | float = 1.0,
        *,
        normalized: bool = False,
        batch_norm: bool = False,
        dropout: int | float = 0.0,
        entity_dropout: int | float = 0.0,
        orthogonal_relations: bool = False,
        std: int | float = 0.2,
        relation_std: int | float = 0.2,
        learn_curvature: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        name = type(self).__name__
        if dim < 1:
            raise ValueError(f"{name}: dim must be at least 1, got {dim}")
        if not (0 <= entity_dropout < 1 and std >= 0 and relation_std >= 0):
            raise ValueError(
                f"{name}: expected 0 <= entity_dropout < 1 and std, relation_std >= 0, got "
                f"entity_dropout={entity_dropout}, std={std}, relation_std={relation_std}"
            )
        if orthogonal_relations and self.num_relations > dim:
            raise ValueError(
                f"{name}: only dim = {dim} relations can be orthonormal, got num_relations = {self.num_relations}; "
                "raise dim or pass orthogonal_relations=False"
            )
        self.normalized, self.orthogonal_relations, self.entity_dropout = (
            normalized,
            orthogonal_relations,
            entity_dropout,
        )
        self.std, self.relation_std = std, relation_std
        self.entities, self.relations = (
            nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype))
            for rows in (self.num_entities, self.num_relations)
        )
        self.curvature = Curvature(curvature, learn_curvature, device=device, dtype=dtype)
        self.head_norm, self.relation_norm = (
            nn.BatchNorm1d(dim, device=device, dtype=dtype) if batch_norm else nn.Identity() for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all points anew, as at the start."""
        nn.init.normal_(self.entities, std=self.std, generator=generator)
        nn.init.normal_(self.relations, std=self.relation_std, generator=generator)
        self.curvature.reset_parameters()
        for norm in (self.head_norm, self.relation_norm):
            if isinstance(norm, nn.BatchNorm1d):
                norm.reset_parameters()

    def relation_points(self) -> Float[Tensor, "R d"]:
        """Space coordinates of the relations, orthonormal where that was asked for."""
        return positive_qr(self.relations.mT)[0].mT if self.orthogonal_relations else self.relations

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d4"]:
        """See `KGModel`: (B, d + 4), as `interaction_query` makes it."""
        u = self.dropout(self.head_norm(self.entities[heads]))
        t = self.dropout(self.relation_norm(self.relation_points()[relations]))
        return interaction_query(u, t, self.curvature())

    def query_heads(self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B d4"]:
        """See `KGModel`; without inverse relations in closed form, for which the heads may have no batch norm."""
        if self.inverse or isinstance(self.head_norm, nn.BatchNorm1d):
            return super().query_heads(relations, tails)
        t = self.dropout(self.relation_points()[relations])
        return interaction_inverse_query(t, self.dropout(self.entities[tails]), self.curvature())

    def _asks_heads(self) -> bool:
        return self.inverse or not isinstance(self.head_norm, nn.BatchNorm1d)

    def against(self, query: Float[Tensor, "B d4"], entities: Entities = None) -> Float[Tensor, "B n"]:
        """See `KGModel`: one product (B, d + 1) x (d + 1, n)."""
        return self._against(query, self.entities if entities is None else self.entities[entities])

    def paired(self, query: Float[Tensor, "B d4"], tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """See `KGModel`."""
        return self._against(query, self.entities[tails])

    def _against(self, query: Tensor, v: Tensor) -> Tensor:
        v = F.dropout(v, self.entity_dropout, self.training)
        return interaction_scores(query, v, self.curvature(), normalized=self.normalized)


class MIGTF(KGModel):
    """Mixed-geometry tensor factorization: the score of a trained model plus the Lorentz interaction S.

    The model given (a TuckER, or any KGModel) is held, not copied. While `frozen` its parameters have no gradient and
    it stays in eval mode, with the batch-norm statistics that it was trained to, which makes its scores constants:
    `StoredScores` can stand in for it. All entities start at the origin, where S adds the same number to all tails of
    a query: ranks start as the given model's (scores nearer to each other than rounding of the sum become tied).
    `freeze(False)` goes on to train both jointly.

    Args:
        tucker: a trained model.
        hyperbolic_dim: space coordinates of a point.
        curvature: c > 0, points satisfy -x_0^2 + |x|^2 = -1/c. The papers' c is 1/curvature: their 1.3 is 1/1.3.
        frozen: train the hyperbolic part only.
        orthogonal_relations: see `LPITF`.
        batch_norm: of u and t, see `LPITF`.
        dropout: of u and t.
        entity_dropout: of v.
        learn_curvature: train c.
        relation_std: of the relations at the start.
        generator: source of randomness of the start.

    Raises:
        TypeError: not a model of this package.

    References:
        MIG-TF: arXiv 2504.02589.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=7, num_relations=4, inverse=True)
        >>> model = MIGTF(LPITF(graph, dim=3), hyperbolic_dim=2).eval()
        >>> h, r = torch.tensor([0, 1]), torch.tensor([3, 2])
        >>> torch.equal(model.score_all(h, r).argsort(), model.tucker.score_all(h, r).argsort())
        True
    """

    frozen: bool

    def __init__(
        self,
        tucker: KGModel,
        hyperbolic_dim: int = 50,
        curvature: int | float = 1 / 1.3,
        *,
        frozen: bool = True,
        orthogonal_relations: bool = False,
        batch_norm: bool = True,
        dropout: int | float = 0.0,
        entity_dropout: int | float = 0.0,
        learn_curvature: bool = False,
        relation_std: int | float = 0.2,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(tucker, KGModel):
            raise TypeError(f"MIGTF: expected a trained model of tnlayers.kg, got {type(tucker).__name__}")
        super().__init__(tucker.num_entities, tucker.num_relations, inverse=tucker.inverse)
        self.tucker = tucker
        first = next(_floating(tucker), None)
        self.hyperbolic = LPITF(
            tucker,
            hyperbolic_dim,
            curvature,
            normalized=True,
            batch_norm=batch_norm,
            dropout=dropout,
            entity_dropout=entity_dropout,
            orthogonal_relations=orthogonal_relations,
            std=0.0,
            relation_std=relation_std,
            learn_curvature=learn_curvature,
            generator=generator,
            device=None if first is None else first.device,
            dtype=None if first is None else first.dtype,
        )
        self._held: list[str] = []
        self.freeze(frozen)

    def freeze(self, frozen: bool = True) -> "MIGTF":
        """Hold the given model fixed, or (False) train what was trainable of it again; returns the model."""
        if not frozen:
            for name, parameter in self.tucker.named_parameters():
                if name in self._held:
                    parameter.requires_grad_(True)
            self._held = []
        else:
            trained = [name for name, parameter in self.tucker.named_parameters() if parameter.requires_grad]
            self._held = sorted({*self._held, *trained})
            self.tucker.requires_grad_(False)
        self.frozen = frozen
        return self.train(self.training)

    def train(self, mode: bool = True) -> "MIGTF":
        """As torch's, but a frozen model stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.tucker.eval()
        return self

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> tuple[Tensor, ...]:
        """See `KGModel`: what the given model asks, and last what the hyperbolic part asks."""
        return _joined(self.tucker.query(heads, relations), self.hyperbolic.query(heads, relations))

    def query_heads(self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> tuple[Tensor, ...]:
        """See `KGModel`."""
        return _joined(self.tucker.query_heads(relations, tails), self.hyperbolic.query_heads(relations, tails))

    def _asks_heads(self) -> bool:
        return self.tucker._asks_heads() and self.hyperbolic._asks_heads()

    def score_heads(
        self, relations: Int[Tensor, "B"], tails: Int[Tensor, "B"], entities: Entities = None
    ) -> Float[Tensor, "B n"]:
        """See `KGModel`: a sum, so that each part has its own closed form."""
        first, last = (part.score_heads(relations, tails, entities) for part in (self.tucker, self.hyperbolic))
        return first + last

    def against(self, query: tuple[Tensor, ...], entities: Entities = None) -> Float[Tensor, "B n"]:
        """See `KGModel`: the given model's cost, and one product (B, d + 1) x (d + 1, n)."""
        first, last = _split(query)
        return self.tucker.against(first, entities) + self.hyperbolic.against(last, entities)

    def paired(self, query: tuple[Tensor, ...], tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """See `KGModel`."""
        first, last = _split(query)
        return self.tucker.paired(first, tails) + self.hyperbolic.paired(last, tails)


class StoredScores(KGModel):
    """A model's scores of all entities for a list of queries, computed once: a frozen model as a table.

    `MIGTF(StoredScores(tucker, queries), ...)` trains the second stage without the first one's products. For other
    queries put the model back: `migtf.tucker = tucker`, then `migtf.freeze()`, or `migtf.freeze(False)` to train both.
    Memory: queries x num_entities numbers, in a file if asked.

    Args:
        model: whose scores are stored, in eval mode, with any training state given back.
        queries: (Q, 2) distinct (head, relation), such as `Answers.queries`.
        dtype: of the stored numbers; torch.bfloat16 or float16 halve the memory and round the scores.
        file: path of a file to keep them in, read as needed; it is overwritten. None keeps them in memory.
        batch_size: queries at a time.

    Raises:
        ValueError: queries that are not pairs, or not distinct; on `query`, one that is not stored.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = LPITF(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3)
        >>> table = StoredScores(model, torch.tensor([[0, 3], [5, 1]]))
        >>> h, r = torch.tensor([5, 0]), torch.tensor([1, 3])
        >>> torch.allclose(table.score_all(h, r), model.score_all(h, r))
        True
    """

    keys: Tensor
    scores: Tensor

    def __init__(
        self,
        model: KGModel,
        queries: Int[Tensor, "Q two"],
        *,
        dtype: torch.dtype | None = None,
        file: str | Path | None = None,
        batch_size: int = 1024,
    ) -> None:
        super().__init__(model.num_entities, model.num_relations, inverse=model.inverse)
        if queries.ndim != 2 or queries.shape[1] != 2 or len(queries) == 0:
            raise ValueError(f"StoredScores: queries must be (Q, 2) pairs (head, relation), got {tuple(queries.shape)}")
        keys, order = (queries[:, 0] * self.num_relations + queries[:, 1]).sort()
        if bool((keys[1:] == keys[:-1]).any()):
            raise ValueError(
                f"StoredScores: queries must be distinct, got {len(keys)} with {len(keys.unique())} different; "
                "pass queries.unique(dim=0)"
            )
        queries = queries[order]
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        scores: Tensor | None = None
        try:
            with torch.no_grad():
                for start in range(0, len(keys), batch_size):
                    heads, relations = queries[start : start + batch_size].unbind(1)
                    found = model.score_all(heads, relations)
                    if scores is None:
                        scores = self._room(len(keys), found.dtype if dtype is None else dtype, file, found.device)
                    scores[start : start + batch_size] = found
        finally:
            for module, mode in modes:
                module.training = mode
        self.register_buffer("keys", keys, persistent=False)
        if file is None:
            self.register_buffer("scores", scores, persistent=False)
        else:
            assert scores is not None
            self.scores = scores  # no buffer: it stays in the file when the model moves

    def _room(self, rows: int, dtype: torch.dtype, file: str | Path | None, device: torch.device) -> Tensor:
        shape = rows, self.num_entities
        if file is None:
            return torch.empty(shape, dtype=dtype, device=device)
        return torch.from_file(str(file), shared=True, size=rows * self.num_entities, dtype=dtype).reshape(shape)

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B N"]:
        """See `KGModel`: the stored rows."""
        wanted = heads * self.num_relations + relations
        rows = torch.searchsorted(self.keys, wanted).clamp_max(len(self.keys) - 1)
        known = self.keys[rows] == wanted
        if not bool(known.all()):
            missing = int((~known).nonzero()[0])
            raise ValueError(
                f"StoredScores: expected queries among the {len(self.keys)} stored, got head {int(heads[missing])} "
                f"with relation {int(relations[missing])}; store it too, or put the model itself in place of the table"
            )
        return self.scores[rows.to(self.scores.device)].to(heads.device)

    def against(self, query: Float[Tensor, "B N"], entities: Entities = None) -> Float[Tensor, "B n"]:
        """See `KGModel`: columns of the rows."""
        return query if entities is None else query[:, entities]

    def paired(self, query: Float[Tensor, "B N"], tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """See `KGModel`."""
        return query.gather(1, tails)


def _floating(model: nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.is_floating_point())


def _joined(first: Any, last: Tensor) -> tuple[Tensor, ...]:
    """One flat tuple, as every query is a tensor or a tuple of tensors."""
    return (first, last) if isinstance(first, Tensor) else (*first, last)


def _split(query: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
    first, last = query[:-1], query[-1]
    return (first[0] if len(first) == 1 else first), last
