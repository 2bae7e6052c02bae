"""What bilinear models share: an entity table, a map for every relation, batch norm and dropout between them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decompositions import Network
from tnlayers.kg.by_relation import group_by
from tnlayers.kg.dropping import check_rate, drop, multiply_dropped
from tnlayers.kg.model import Entities, InnerProduct
from tnlayers.kg.relation_maps import RelationMaps
from tnlayers.kg.tables import Table, few_rows_of, make_table, reset_table, rows_of

Masks = Literal["relation", "row"]


class Bilinear(InnerProduct):
    """`score(h, r, t) = <BN1(drop(BN0(H[h])) drop(M_r)), T[t]> + b_t` with a map M_r for every relation.

    What TuckER, TTER, RESCAL and MEIM share. The maps of a batch are made once for each distinct relation (and not at
    all where nothing is dropped in them and another order of contraction is cheaper).

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        maps: network of modes (relation, d, d), or what has the methods of `RelationMaps`.
        entity_dim: d.
        shared: whether heads and tails have one table.
        batch_norm: whether BN0 (of the head) and BN1 (of the query) are there.
        dropouts: rates for the head, the maps, and the query.
        masks: "relation": the rows of a batch that share a relation share the mask of its map; "row": a mask each, at
            the cost of (batch, d, d) numbers.
        entity_bias: whether there is a b_t.
        entity_table: "dense", a Network, or a callable (shape, dtype, device) -> Network.
        dtype: of the parameters beside the maps.
        device: of the parameters beside the maps.
    """

    def __init__(
        self,
        triples: Any,
        *,
        maps: Network | nn.Module,
        entity_dim: int,
        shared: bool = True,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.2, 0.2, 0.3),
        masks: Masks = "relation",
        entity_bias: bool = False,
        entity_table: str | Network | Callable[..., Any] = "dense",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        name = type(self).__name__
        if len(dropouts) != 3:
            raise ValueError(f"{name}: dropouts are 3 rates (of the head, the maps, the query), got {dropouts!r}")
        if masks not in ("relation", "row"):
            raise ValueError(f"{name}: masks must be 'relation' or 'row', got {masks!r}")
        self.dropouts = tuple(check_rate(name, "dropouts", p) for p in dropouts)
        self.masks, self.entity_dim, self.shared = masks, entity_dim, shared
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        if isinstance(maps, Network):
            maps = RelationMaps(self.num_relations, entity_dim, entity_dim, network=maps)
        self.maps: Any = maps
        self.entities: Table = make_table(self.num_entities, entity_dim, entity_table, **kind)
        self.heads: Table | None = None if shared else make_table(self.num_entities, entity_dim, entity_table, **kind)
        self.norm0 = nn.BatchNorm1d(entity_dim, **kind) if batch_norm else None
        self.norm1 = nn.BatchNorm1d(entity_dim, **kind) if batch_norm else None
        self.bias = nn.Parameter(torch.zeros(self.num_entities, **kind)) if entity_bias else None

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
        x = few_rows_of(self.entities, heads) if self.heads is None else rows_of(self.heads, heads)
        x = drop(normalized(x, self.norm0), self.dropouts[0], self.training)
        y = normalized(self._mapped(x, relations), self.norm1)
        return drop(y, self.dropouts[2], self.training)

    def _mapped(self, x: Tensor, relations: Tensor) -> Tensor:
        """`x[b] drop(M)[r_b]`."""
        rate = self.dropouts[1]
        if not self.training or rate == 0 or not len(x):
            return self.maps(x, relations)
        if self.masks == "row":
            distinct, inverse = relations.unique(return_inverse=True)
            return multiply_dropped(x, self.maps.matrices(distinct), inverse, rate)
        groups = group_by(relations)
        return groups.multiply(x, drop(self.maps.matrices(groups.distinct), rate))

    def tail_rows(self, entities: Entities = None) -> Float[Tensor, "n d"]:
        """Rows of the tails' table."""
        return rows_of(self.entities, entities)

    def head_rows(self, entities: Entities = None) -> Float[Tensor, "n d"]:
        """Rows of the heads' table, the same one where it is shared."""
        return rows_of(self.entities if self.heads is None else self.heads, entities)

    def _bias(self, entities: slice | Tensor | None) -> Tensor | None:
        return self.bias if self.bias is None or entities is None else self.bias[entities]

    def _z(self, relations: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """`BN1^T`, then the maps transposed, then `BN0^T`; what the norms' offsets meet is c."""
        y, last = adjoint(rows_of(self.entities, tails), self.norm1)
        z, first = adjoint(self.maps.transposed(y, relations), self.norm0)
        return z, first + last

    def score_relations(self, heads: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B R"]:
        """Scores of every relation of the data: in evaluation one contraction, as BN1 is affine then."""
        if self.training:
            return super().score_relations(heads, tails)
        x = normalized(self.head_rows(heads), self.norm0)
        y, offset = adjoint(rows_of(self.entities, tails), self.norm1)
        bias = self._bias(tails)
        offset = offset if bias is None else offset + bias
        scores: Tensor = self.maps.between(x, y)[:, : self.num_relations // 2 if self.inverse else None]
        return scores + offset[:, None]

    def extra_repr(self) -> str:
        """Sizes and dropout."""
        return f"{self.num_entities} entities, {self.num_relations} relations, dropouts={self.dropouts}"


def normalized(x: Tensor, norm: nn.BatchNorm1d | None) -> Tensor:
    """Batch norm in the precision of its statistics; a batch of one row has none, and takes the running ones.

    Example:
        >>> norm, x = nn.BatchNorm1d(2), torch.tensor([[1.0, 2.0], [3.0, 2.0]])
        >>> normalized(x, norm)[:, 0].round(decimals=3).tolist(), torch.equal(normalized(x, None), x)
        ([-1.0, 1.0], True)
    """
    if norm is None:
        return x
    mean: Any = norm.running_mean
    x = x.to(torch.promote_types(x.dtype, mean.dtype))
    if norm.training and len(x) == 1:
        return nn.functional.batch_norm(x, mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    made: Tensor = norm(x)
    return made


def adjoint(y: Tensor, norm: nn.BatchNorm1d | None) -> tuple[Tensor, Tensor]:
    """`(v, c)` with `<BN(x), y> = <x, v> + c` for every x, of a batch norm at rest: an affine map of each row.

    Example:
        >>> norm, x, y = nn.BatchNorm1d(3).eval(), torch.randn(5, 3), torch.randn(5, 3)
        >>> v, c = adjoint(y, norm)
        >>> torch.allclose((norm(x) * y).sum(1), (x * v).sum(1) + c, atol=1e-5)
        True
    """
    if norm is None:
        return y, y.new_zeros(len(y))
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    scale = norm.weight / (variance + norm.eps).sqrt()
    return y * scale, y @ (norm.bias - mean * scale)


def check_sizes(name: str, **sizes: int) -> None:
    """Refuse what is no size.

    Raises:
        ValueError: not an int, or below 1.

    Example:
        >>> check_sizes("TuckER", entity_dim=200)
    """
    for what, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: {what} must be an int >= 1, got {size!r}")
