"""MEIM: block-term Tucker with a core a block, and maps that are pushed towards orthogonal ones."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.network import Labels
from decompositions.formats.plan import plan_path, run
from tnlayers.kg.bilinear import Bilinear, check_sizes
from tnlayers.kg.by_relation import PLACE, RELATION, ROW, Sliced, contract_rows, group_by, routes

LEGS = (("k", "a", "i", "j"), ("r", "k", "a"))
TRANSPOSED = (("k", "a", "j", "i"), ("r", "k", "a"))


class BlockMaps(nn.Module):
    """Block-diagonal maps, one a relation: `M[r] = diag over k of sum_a R[r, k, a] W[k, a]`, K blocks (d, d).

    The blocks' number k is a label of core, relations, x and y at once (a hyper-edge), so that zeros are never stored.

    Args:
        num_relations: R.
        blocks: K.
        width: d, rows and columns of a block.
        relation_dim: numbers a relation in a block.
        dtype: of the parameters.
        device: of the parameters.

    Example:
        >>> maps = BlockMaps(4, blocks=2, width=3, relation_dim=5)
        >>> maps(torch.ones(6, 6), torch.zeros(6, dtype=torch.int64)).shape
        torch.Size([6, 6])
    """

    def __init__(
        self,
        num_relations: int,
        blocks: int,
        width: int,
        relation_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.blocks, self.width = blocks, width
        self.core = nn.Parameter(torch.zeros(blocks, relation_dim, width, width, dtype=dtype, device=device))
        self.relations = nn.Parameter(torch.zeros(num_relations, blocks, relation_dim, dtype=dtype, device=device))

    def _sizes(self) -> dict[str, int]:
        k, a, i, j = self.core.shape
        return {"k": k, "a": a, "i": i, "j": j, "r": len(self.relations)}

    def forward(self, x: Float[Tensor, "B n"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B n"]:
        """Multiply each row by the map of its relation, by the cheapest route."""
        return self._multiplied(x, relations, LEGS)

    def transposed(self, y: Float[Tensor, "B n"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B n"]:
        """`M[r_b] y[b]`: each row by the transposed map of its relation."""
        return self._multiplied(y, relations, TRANSPOSED)

    def _multiplied(self, x: Tensor, relations: Tensor, legs: tuple[Labels, ...]) -> Tensor:
        sliced = Sliced(legs, "r")
        groups = group_by(relations) if len(x) else None
        distinct, longest = (len(groups.distinct), groups.longest) if groups is not None else (1, 1)
        sizes = {**self._sizes(), ROW: max(1, len(x)), RELATION: distinct, PLACE: longest}
        found = routes([*sliced.sliced(), (ROW, "k", "i")], ("k", "j"), sizes, self.core.itemsize)
        route = found[0] if groups is not None else next(route for route in found if route.strategy == "rows")
        blocks = x.unflatten(1, (self.blocks, self.width))
        y = contract_rows(route, sliced, (self.core, self.relations), relations, groups, {}, (blocks,))
        return y.flatten(1)

    def matrices(self, relations: Int[Tensor, "D"]) -> Float[Tensor, "D K d d"]:
        """The blocks of some relations."""
        legs = (LEGS[0], (RELATION, "k", "a"))
        sizes = {**self._sizes(), RELATION: len(relations)}
        plan = plan_path(legs, sizes, (RELATION, "k", "i", "j"), self.core.itemsize)
        return run(plan.steps, [self.core, self.relations.index_select(0, relations)])

    def between(self, x: Float[Tensor, "B n"], y: Float[Tensor, "B n"]) -> Float[Tensor, "B R"]:
        """`x[b] M[r] y[b]` for every relation r, in one contraction."""
        legs = (*LEGS, (ROW, "k", "i"), (ROW, "k", "j"))
        plan = plan_path(legs, {**self._sizes(), ROW: len(x)}, (ROW, "r"), self.core.itemsize)
        sides = [z.unflatten(1, (self.blocks, self.width)) for z in (x, y)]
        return run(plan.steps, [self.core, self.relations, *sides])


class MEIM(Bilinear):
    """Block-term Tucker: `score(h, r, t) = sum over blocks k of W[k] x_1 R[r, k] x_2 E[h, k] x_3 E[t, k]`.

    A core for each of K blocks (the boosting of the paper; one core for all is its predecessor MEI), batch norm and
    dropout of the head and the query, and `orthogonality(relations)`, the soft penalty of the relations' maps, to be
    added to the loss with the weight lambda_ortho (0.1 on WN18RR, 0 on FB15k-237, 1e-3 on YAGO3-10).
    Parameters: K (N d + R a + a d^2), and 4 K d for the norms.

    Deviations from the authors' code: batch norm always has statistics of its own for every block (there an option, on
    for WN18RR alone); the penalty of the norms of relation rows (5e-5 on WN18RR) is `row_norms`; the core starts from a
    normal law of deviation 1/2, cut at 1; dropout of core, relations and maps, unused there, is left out.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        blocks: K.
        block_dim: d, numbers an entity in a block.
        relation_dim: a, numbers a relation in a block; as block_dim by default.
        batch_norm: whether head and query are normalized.
        dropouts: rates for the head and the query; by default those of WN18RR.
        entity_bias: a bias for each tail.
        entity_table: "dense"; or a network of the table (N, K d), a callable (shape, dtype, device) -> Network.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: sizes below 1, rates outside [0, 1).

    References:
        H. N. Tran, A. Takasu, MEIM: multi-partition embedding interaction beyond block term format for efficient and
        expressive link prediction, IJCAI 2022, eqs. 5-10, arXiv 2209.15597.

    Example:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=7, num_relations=4, inverse=True)
        >>> model = MEIM(graph, blocks=2, block_dim=3, relation_dim=5)
        >>> model.parameter_count() == 2 * (7 * 3 + 4 * 5 + 5 * 9) + 4 * 6
        True
    """

    def __init__(
        self,
        triples: Any,
        blocks: int = 3,
        block_dim: int = 100,
        relation_dim: int | None = None,
        *,
        batch_norm: bool = True,
        dropouts: Sequence[int | float] = (0.71, 0.67),
        entity_bias: bool = False,
        entity_table: str | Network | Callable[..., Any] = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        relation_dim = block_dim if relation_dim is None else relation_dim
        check_sizes("MEIM", blocks=blocks, block_dim=block_dim, relation_dim=relation_dim)
        if len(dropouts) != 2:
            raise ValueError(f"MEIM: dropouts are 2 rates (of the head and the query), got {dropouts!r}")
        super().__init__(
            triples,
            maps=BlockMaps(triples.num_relations, blocks, block_dim, relation_dim, dtype, device),
            entity_dim=blocks * block_dim,
            batch_norm=batch_norm,
            dropouts=(dropouts[0], 0.0, dropouts[1]),
            entity_bias=entity_bias,
            entity_table=entity_table,
            dtype=dtype,
            device=device,
        )
        self.reset_parameters(generator)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        nn.init.trunc_normal_(self.maps.core, std=0.5, a=-1.0, b=1.0, generator=generator)
        rows = self.maps.relations
        std = (2 / (len(rows) + rows[0].numel())) ** 0.5
        nn.init.normal_(rows, std=std, generator=generator)

    def orthogonality(self, relations: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """`sum_k ||M[r, k]^T M[r, k] - I||^2`, mean over a batch of relations; each distinct map is made once."""
        distinct, counts = self._distinct("orthogonality", relations)
        maps = self.maps.matrices(distinct)
        one = torch.eye(self.maps.width, dtype=maps.dtype, device=maps.device)
        each = (maps.mT @ maps - one).square().sum((1, 2, 3))
        return (each * counts).sum() / len(relations)

    def row_norms(self, relations: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """`sum_k (||R[r, k]|| - 1)^2`, mean over a batch of relations."""
        distinct, counts = self._distinct("row_norms", relations)
        norms = torch.linalg.vector_norm(self.maps.relations.index_select(0, distinct), dim=2)
        return ((norms - 1).square().sum(1) * counts).sum() / len(relations)

    def _distinct(self, what: str, relations: Tensor) -> tuple[Tensor, Tensor]:
        if not len(relations):
            raise ValueError(f"MEIM.{what}: expected relations, got none")
        return relations.unique(return_counts=True)
