"""TuckER and its relatives: an entity table, a map for every relation, batch norm and dropout between them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decompositions import Network, Tree, Tucker
from tnlayers.dense import Recipe
from tnlayers.kg.by_relation import group_by
from tnlayers.kg.dropping import check_rate, drop
from tnlayers.kg.model import Entities, KGModel
from tnlayers.kg.relation_maps import RelationMaps
from tnlayers.kg.tables import Table, make_table, reset_table, rows_of

Masks = Literal["relation", "row"]


class Bilinear(KGModel):
    """`score(h, r, t) = <BN1(drop(BN0(H[h])) drop(M_r)), T[t]> + b_t` with a map M_r for every relation.

    What TuckER, TTER and RESCAL share. The maps of a batch are made once for each distinct relation (and not at all
    where nothing is dropped in them and another order of contraction is cheaper).

    Args:
        num_entities: N.
        num_relations: R, inverse ones included.
        inverse: whether the second half of the relations are inverses.
        maps: network of modes (relation, d, d).
        entity_dim: d.
        shared: whether heads and tails have one table.
        batch_norm: whether BN0 (of the head) and BN1 (of the query) are there.
        dropouts: rates for the head, the maps, and the query.
        masks: "relation": the rows of a batch that share a relation share the mask of its map; "row": a mask each, as
            published, at the cost of (batch, d, d) numbers.
        entity_bias: whether there is a b_t.
        entity_table: see `TuckER`.
    """

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        *,
        inverse: bool,
        maps: Network,
        entity_dim: int,
        shared: bool,
        batch_norm: bool,
        dropouts: Sequence[int | float],
        masks: Masks,
        entity_bias: bool,
        entity_table: "str | Recipe | Network",
    ) -> None:
        super().__init__(num_entities, num_relations, inverse=inverse)
        name = type(self).__name__
        if len(dropouts) != 3:
            raise ValueError(f"{name}: dropouts are 3 rates (of the head, the maps, the query), got {dropouts!r}")
        if masks not in ("relation", "row"):
            raise ValueError(f"{name}: masks must be 'relation' or 'row', got {masks!r}")
        self.dropouts = tuple(check_rate(name, "dropouts", p) for p in dropouts)
        self.masks, self.entity_dim, self.shared = masks, entity_dim, shared
        kind: dict[str, Any] = {"dtype": maps.dtype, "device": maps.device}
        self.maps = RelationMaps(num_relations, entity_dim, entity_dim, network=maps)
        self.entities: Table = make_table(num_entities, entity_dim, entity_table, **kind)
        self.heads: Table | None = None if shared else make_table(num_entities, entity_dim, entity_table, **kind)
        self.norm0 = nn.BatchNorm1d(entity_dim, **kind) if batch_norm else None
        self.norm1 = nn.BatchNorm1d(entity_dim, **kind) if batch_norm else None
        self.bias = nn.Parameter(torch.zeros(num_entities, **kind)) if entity_bias else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw everything anew: tables by Xavier's normal law, maps as the model says, norms and bias as torch's."""
        for table in (self.entities, self.heads):
            if table is not None:
                reset_table(table, generator)
        with torch.no_grad():
            self._reset_maps(generator)
        for norm in (self.norm0, self.norm1):
            if norm is not None:
                norm.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        self.maps.reset_parameters(generator)

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B d"]:
        """`drop(BN1(x M_r))`; in evaluation a function of each row alone."""
        x = rows_of(self.entities if self.heads is None else self.heads, heads)
        x = drop(_normalized(x, self.norm0), self.dropouts[0], self.training)
        y = _normalized(self._mapped(x, relations), self.norm1)
        return drop(y, self.dropouts[2], self.training)

    def _mapped(self, x: Tensor, relations: Tensor) -> Tensor:
        """`x[b] drop(M)[r_b]`."""
        rate = self.dropouts[1]
        if not self.training or rate == 0 or not len(x):
            return self.maps(x, relations)
        if self.masks == "row":
            distinct, inverse = relations.unique(return_inverse=True)
            maps = drop(self.maps.matrices(distinct)[inverse], rate)
            return torch.bmm(x[:, None], maps)[:, 0]
        groups = group_by(relations)
        return groups.multiply(x, drop(self.maps.matrices(groups.distinct), rate))

    def against(self, query: Float[Tensor, "B d"], entities: Entities = None) -> Float[Tensor, "B n"]:
        """One product with the entity table."""
        table = rows_of(self.entities, entities)
        if self.bias is None:
            return query @ table.mT
        bias = self.bias if entities is None else self.bias[entities]
        return torch.addmm(bias, query, table.mT)

    def paired(self, query: Float[Tensor, "B d"], tails: Int[Tensor, "B k"]) -> Float[Tensor, "B k"]:
        """Row b against its own entities. Cost: B k d."""
        rows = rows_of(self.entities, tails.reshape(-1)).unflatten(0, tails.shape)
        scores = torch.bmm(rows, query[:, :, None])[:, :, 0]
        return scores if self.bias is None else scores + self.bias[tails]

    def score_relations(self, heads: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B R"]:
        """Scores of every relation of the data: in evaluation one contraction, as BN1 is affine then."""
        if self.training:
            return super().score_relations(heads, tails)
        x = _normalized(rows_of(self.entities if self.heads is None else self.heads, heads), self.norm0)
        y = rows_of(self.entities, tails)
        offset = None if self.bias is None else self.bias[tails]
        norm: Any = self.norm1
        if norm is not None:
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            moved = y @ (norm.bias - norm.running_mean * scale)
            offset = moved if offset is None else offset + moved
            y = y * scale
        scores = self.maps.between(x, y)[:, : self.num_relations // 2 if self.inverse else None]
        return scores if offset is None else scores + offset[:, None]

    def extra_repr(self) -> str:
        """Sizes and dropout."""
        return f"{self.num_entities} entities, {self.num_relations} relations, dropouts={self.dropouts}"


def _normalized(x: Tensor, norm: nn.BatchNorm1d | None) -> Tensor:
    """Batch norm, statistics in float32 or better; a batch of one row has none, and takes the running ones."""
    if norm is None:
        return x
    precise: Any = norm.running_mean
    precise = torch.promote_types(x.dtype, precise.dtype)
    if norm.training and len(x) == 1:
        y = nn.functional.batch_norm(
            x.to(precise), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
    else:
        y = norm(x.to(precise))
    return y


class TuckER(Bilinear):
    """TuckER: `score(h, r, t) = W x_1 R[r] x_2 E[h] x_3 E[t]`, with batch norm and dropout as published.

    In the order of the paper's code: x = drop(BN0(E[h])); M = drop(sum_k R[r, k] W[k]); y = drop(BN1(x M)); y E^T.
    The start is the published one: W from U(-1, 1), tables by Xavier's normal law. R and W are one Tucker network
    (`model.maps`, a tree: RankAdaptive finds the relation rank). Parameters: N d_e + R d_r + d_r d_e^2, 4 d_e for the
    norms, N for the bias, N d_e more for separate tables.

    One deviation, in dropout alone: by default rows of a batch with one relation share the mask of its map; every row by
    itself has the published law. `masks="row"` is the published joint law.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        entity_dim: d_e.
        relation_dim: d_r.
        shared: whether heads and tails have one table, as published.
        batch_norm: whether BN0 and BN1 are there.
        dropouts: rates for the head, the maps, and the query.
        masks: "relation" or "row", see above.
        entity_bias: a bias for each tail, which the published WN18RR run had.
        entity_table: "dense"; or a network of the table, a callable (shape, dtype, device) -> Network such as
            `tnlayers.random_network(TTMatrix, rank=8)`.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: sizes below 1, rates outside [0, 1).

    References:
        I. Balazevic, C. Allen, T. Hospedales, TuckER: tensor factorization for knowledge graph completion, EMNLP 2019,
        eq. 2, arXiv 1901.09590.

    Example:
        >>> from types import SimpleNamespace
        >>> umls = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> TuckER(umls, entity_dim=100, relation_dim=30).parameter_count()
        316660
    """

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 200,
        relation_dim: int = 30,
        *,
        shared: bool = True,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.2, 0.2, 0.3),
        masks: Masks = "relation",
        entity_bias: bool = False,
        entity_table: "str | Callable[..., Network] | Network" = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        name = type(self).__name__
        _check_sizes(name, entity_dim=entity_dim, relation_dim=relation_dim)
        core = torch.empty(relation_dim, entity_dim, entity_dim, dtype=dtype, device=device)
        relations = core.new_empty(triples.num_relations, relation_dim)
        for tensor in (core, relations):
            nn.init.zeros_(tensor)
        super().__init__(
            triples.num_entities,
            triples.num_relations,
            inverse=triples.inverse,
            maps=Tucker(core, [relations], modes=(0,), num_rows=2),
            entity_dim=entity_dim,
            shared=shared,
            batch_norm=batch_norm,
            dropouts=dropouts,
            masks=masks,
            entity_bias=entity_bias,
            entity_table=entity_table,
        )
        self.reset_parameters(generator)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        core, relations = self.maps.cores
        nn.init.uniform_(core, -1, 1, generator=generator)
        nn.init.xavier_normal_(relations, generator=generator)


class TTER(Bilinear):
    """TuckER whose core is a tensor train, head - relation - tail: for graphs that need a large relation_dim.

    `W[k, i, j] = sum_ab A[i, a] B[a, k, b] C[j, b]`: (a + b) d_e + a d_r b numbers in place of d_r d_e^2, and a map
    costs as many multiplications as it has entries in B. With R, the maps are a tree of four cores. The start has the
    variance of TuckER's core, 1/3 an entry, in every entry of W; tables by Xavier's normal law.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        entity_dim: d_e.
        relation_dim: d_r.
        rank: (a, b), or one number for both.
        shared: whether heads and tails have one table.
        batch_norm: whether BN0 and BN1 are there.
        dropouts: rates for the head, the maps, and the query.
        masks: as of `TuckER`.
        entity_bias: a bias for each tail.
        entity_table: as of `TuckER`.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: sizes below 1, rates outside [0, 1).

    Example:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> model = TTER(graph, entity_dim=100, relation_dim=60, rank=20)
        >>> model.parameter_count(), model.maps.network.is_tree
        (47420, True)
    """

    def __init__(
        self,
        triples: Any,
        entity_dim: int = 200,
        relation_dim: int = 200,
        rank: int | tuple[int, int] = 50,
        *,
        shared: bool = True,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.2, 0.2, 0.3),
        masks: Masks = "relation",
        entity_bias: bool = False,
        entity_table: "str | Callable[..., Network] | Network" = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        a, b = (rank, rank) if isinstance(rank, int) else rank
        _check_sizes("TTER", entity_dim=entity_dim, relation_dim=relation_dim, rank=min(a, b))
        middle = torch.zeros(relation_dim, a, b, dtype=dtype, device=device)
        cores = [
            middle,
            *(
                middle.new_zeros(n, r)
                for n, r in zip((triples.num_relations, entity_dim, entity_dim), middle.shape, strict=True)
            ),
        ]
        super().__init__(
            triples.num_entities,
            triples.num_relations,
            inverse=triples.inverse,
            maps=Tree(cores, tree=((0,), (1,), (2,)), num_rows=2),
            entity_dim=entity_dim,
            shared=shared,
            batch_norm=batch_norm,
            dropouts=dropouts,
            masks=masks,
            entity_bias=entity_bias,
            entity_table=entity_table,
        )
        self.reset_parameters(generator)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        middle, relations, first, second = self.maps.cores
        _, a, b = middle.shape
        nn.init.uniform_(middle, -1, 1, generator=generator)
        nn.init.xavier_normal_(relations, generator=generator)
        for factor, rank in ((first, a), (second, b)):
            nn.init.normal_(factor, std=rank**-0.5, generator=generator)


def _check_sizes(name: str, **sizes: int) -> None:
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {what} must be an int >= 1, got {size!r}")
