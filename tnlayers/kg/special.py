"""Models whose network is fixed but for its tables: DistMult, CP, SimplE, ComplEx; and RESCAL, one map a relation.

The first four are one multi-partition network: with an entity's row split into parts, `score = sum over terms (a, b, c,
s) of s <R_a[r], E_b[h], E_c[t]>`; which terms there are makes the model.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decompositions import Network
from tnlayers.dense import unchanged_rng
from tnlayers.kg.bilinear import Bilinear, check_sizes
from tnlayers.kg.foreign import take
from tnlayers.kg.model import Entities, InnerProduct
from tnlayers.kg.tables import make_table, reset_table, rows_of

Terms = tuple[tuple[int, int, int, float], ...]
P = TypeVar("P", bound="Partitioned")
HEAD, TAIL = 1, 2
"""Places of the entities' parts in a term."""


class Partitioned(InnerProduct):
    """`score(h, r, t) = sum over (a, b, c, s) in terms of s sum_k R[r, a, k] E[h, b, k] E[t, c, k]`.

    Rows of tables are their parts one after another. `network` is the score tensor: the terms are its constant core S,
    and k is a hyper-edge of S's three neighbours; it is exact, and the oracle of the formulas here. A query is
    elementwise, `against` one product with the tails' parts. Parameters: (N parts_e + R parts_r) d.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        dim: d, numbers a part.
        entity_table: "dense"; or a network of the table (N, parts d), a callable (shape, dtype, device) -> Network.
        std: of the start, a normal law.
        generator: of the start.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: a size below 1.

    References:
        H. N. Tran, A. Takasu, Analyzing knowledge graph embedding methods from a multi-embedding interaction
        perspective, DSI4 at EDBT 2019, arXiv 1903.11406.
    """

    terms: ClassVar[Terms]
    parts: ClassVar[tuple[int, int]]
    """Of a relation's row, and of an entity's."""
    of_pykeen: ClassVar[str] = ""
    """Name of PyKEEN's interaction with these scores; none for SimplE, whose ends meet their own kind there."""

    def __init__(
        self,
        triples: Any,
        dim: int = 200,
        *,
        entity_table: str | Network | Callable[..., Any] = "dense",
        std: int | float = 0.1,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        check_sizes(type(self).__name__, dim=dim)
        self.dim, self.std = dim, std
        relation, entity = self.parts
        self.relations = nn.Embedding(self.num_relations, relation * dim, dtype=dtype, device=device)
        self.entities = make_table(self.num_entities, entity * dim, entity_table, dtype=dtype, device=device)
        self.reset_parameters(generator)

    @classmethod
    def from_pykeen(cls: type[P], model: nn.Module) -> P:
        """A trained model of PyKEEN's with the interaction of this class, `pykeen.models.ComplEx` say: the same scores.

        Regularizers and constraints, which act in training alone, are left behind. Relations are renumbered (r^-1 is
        r + R / 2 here).

        Args:
            model: a PyKEEN model; it is copied.

        Raises:
            TypeError: another interaction; SimplE, which PyKEEN defines otherwise (as a DistMult of two parts).
            ValueError: tables that are normalized or dropped in every forward pass.

        Example:
            >>> DistMult.from_pykeen(torch.nn.Linear(2, 2))
            Traceback (most recent call last):
            TypeError: DistMult.from_pykeen: expected a PyKEEN model with a DistMultInteraction, got Linear
        """
        who = f"{cls.__name__}.from_pykeen"
        if not cls.of_pykeen:
            raise TypeError(f"{who}: PyKEEN has no model with these scores; evaluate(model, triples) takes its own")
        taken = take(who, model, cls.of_pykeen)
        values = taken.relations, taken.entities
        with unchanged_rng(values[0].device):
            made = cls(taken.graph, values[0].shape[1] // cls.parts[0], dtype=values[0].dtype, device=values[0].device)
        with torch.no_grad():
            for table, value in zip((made.relations, made.entities), values, strict=True):
                table.weight.copy_(value)
        return made.train(model.training)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw both tables anew, normal of standard deviation `std`."""
        for table in (self.relations, self.entities):
            reset_table(table, generator, self.std)

    @property
    def network(self) -> Network:
        """The score tensor (relation, head, tail) as a network, differentiable with respect to the tables."""
        relation, entity = self.parts
        weight = self.relations.weight
        core = weight.new_zeros(relation, entity, entity)
        for a, b, c, s in self.terms:
            core[a, b, c] = s
        e = self.entities.weight.unflatten(1, (entity, self.dim))
        return Network(
            (core, weight.unflatten(1, (relation, self.dim)), e, e),
            legs=(("a", "b", "c"), ("r", "a", "k"), ("h", "b", "k"), ("t", "c", "k")),
            rows=("r", "h"),
            cols=("t",),
        )

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.dim, dim=-1)

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B K"]:
        """For each tail part that occurs in the terms, `sum s R_a[r] E_b[h]`."""
        return self._asked(heads, relations, HEAD, TAIL)

    def _z(self, relations: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """For each head part that occurs in the terms, `sum s R_a[r] E_c[t]`."""
        z = self._asked(tails, relations, TAIL, HEAD)
        return z, z.new_zeros(len(z))

    def _asked(self, entities: Tensor, relations: Tensor, given: int, asked: int) -> Tensor:
        """Parts of known entities times those of relations, summed by the other entity's part that meets them."""
        e, r = self._parts(rows_of(self.entities, entities)), self._parts(self.relations(relations))
        found: dict[int, Tensor] = {}
        for term in sorted(self.terms, key=lambda term: term[asked]):
            own, s = int(term[asked]), term[3]
            product = r[term[0]] * e[int(term[given])]
            product = product if s == 1 else product * s
            found[own] = found[own] + product if own in found else product
        return torch.cat(list(found.values()), dim=-1)

    def tail_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """The parts of entities that a tail takes part with."""
        return self._met(entities, TAIL)

    def head_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """The parts of entities that a head takes part with."""
        return self._met(entities, HEAD)

    def _met(self, entities: Entities, asked: int) -> Tensor:
        rows = rows_of(self.entities, entities)
        used = sorted({int(term[asked]) for term in self.terms})
        return rows if len(used) == self.parts[1] else torch.cat([self._parts(rows)[k] for k in used], dim=-1)

    def score_relations(self, heads: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B R"]:
        """Scores of every relation of the data: one product of `sum s E_b[h] E_c[t]` with the relations."""
        h, t = (self._parts(rows_of(self.entities, ids)) for ids in (heads, tails))
        found: dict[int, Tensor] = {}
        for a, b, c, s in sorted(self.terms):
            product = h[b] * t[c] * s
            found[a] = found[a] + product if a in found else product
        count = self.num_relations // 2 if self.inverse else self.num_relations
        return torch.cat(list(found.values()), dim=-1) @ self.relations.weight[:count].mT

    def _moduli(
        self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Parts of head, relation and tail that occur in the terms."""
        rows = (rows_of(self.entities, heads), self.relations(relations), rows_of(self.entities, tails))
        relation, head, tail = (
            sorted(own) for own in map(set, zip(*((a, b, c) for a, b, c, _ in self.terms), strict=True))
        )
        return tuple(tuple(self._parts(x)[k] for k in own) for x, own in zip(rows, (head, relation, tail), strict=True))

    def n3(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """Weighted nuclear 3-norm: `sum |.|^3` over head, relation and tail, mean over the triples.

        The paper's factor 1/3 is left to the weight it is multiplied with, as in its code.

        References:
            T. Lacroix, N. Usunier, G. Obozinski, Canonical tensor decomposition for knowledge base completion, ICML
            2018, eq. 4, arXiv 1806.07297.
        """
        return self._power(heads, relations, tails, 3)

    def l2(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """Squared Frobenius norm of the rows of head, relation and tail, mean over the triples."""
        return self._power(heads, relations, tails, 2)

    def _power(self, heads: Tensor, relations: Tensor, tails: Tensor, power: int) -> Tensor:
        if not len(heads):
            raise ValueError(f"{type(self).__name__}.{'n3' if power == 3 else 'l2'}: expected triples, got none")
        sums = [part.abs().pow(power).sum() for side in self._moduli(heads, relations, tails) for part in side]
        return torch.stack(sums).sum() / len(heads)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.num_entities} entities, {self.num_relations} relations, dim={self.dim}"


class DistMult(Partitioned):
    """`score(h, r, t) = sum_k R[r, k] E[h, k] E[t, k]`: a CP of equal head and tail factors; symmetric in h and t.

    Args: see `Partitioned`.

    References:
        B. Yang, W. Yih, X. He, J. Gao, L. Deng, Embedding entities and relations for learning and inference in
        knowledge bases, ICLR 2015, arXiv 1412.6575.

    Example:
        >>> from types import SimpleNamespace
        >>> DistMult(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3).network.shape
        (4, 7, 7)
    """

    of_pykeen = "DistMultInteraction"
    terms = ((0, 0, 0, 1.0),)
    parts = (1, 1)


class CP(Partitioned):
    """`score(h, r, t) = sum_k R[r, k] H[h, k] T[t, k]`: the canonical decomposition, entities [H | T] in one table.

    With inverse relations it is the model of Lacroix et al.; `n3` is their regularizer.

    Args: see `Partitioned`.

    References:
        T. Lacroix, N. Usunier, G. Obozinski, Canonical tensor decomposition for knowledge base completion, ICML 2018,
        arXiv 1806.07297.

    Example:
        >>> from types import SimpleNamespace
        >>> CP(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3).parameter_count()
        54
    """

    of_pykeen = "CPInteraction"
    terms = ((0, 0, 1, 1.0),)
    parts = (1, 2)


class SimplE(Partitioned):
    """`score(h, r, t) = (<R_0[r], H[h], T[t]> + <R_1[r], H[t], T[h]>) / 2`, R_1 being of the inverse relation.

    Args: see `Partitioned`.

    References:
        S. M. Kazemi, D. Poole, SimplE embedding for link prediction in knowledge graphs, NeurIPS 2018, section 4,
        arXiv 1802.04868.

    Example:
        >>> from types import SimpleNamespace
        >>> SimplE(SimpleNamespace(num_entities=7, num_relations=4, inverse=False), dim=3).parameter_count()
        66
    """

    terms = ((0, 0, 1, 0.5), (1, 1, 0, 0.5))
    parts = (2, 2)


class ComplEx(Partitioned):
    """`score(h, r, t) = Re sum_k R[r, k] E[h, k] conj(E[t, k])` with complex tables, kept as [real | imaginary].

    A real network of four terms: `q = R E[h]` as complex numbers, then `Re q Re E[t] + Im q Im E[t]`, one real product
    of twice the width. `n3` takes the modulus of complex numbers, as its paper.

    Args: see `Partitioned`; `dim` counts complex numbers.

    References:
        T. Trouillon, J. Welbl, S. Riedel, E. Gaussier, G. Bouchard, Complex embeddings for simple link prediction, ICML
        2016, eq. 9, arXiv 1606.06357.

    Example:
        >>> from types import SimpleNamespace
        >>> ComplEx(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3).parameter_count()
        66
    """

    of_pykeen = "ComplExInteraction"
    terms = ((0, 0, 0, 1.0), (1, 1, 0, -1.0), (1, 0, 1, 1.0), (0, 1, 1, 1.0))
    parts = (2, 2)

    def _moduli(
        self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]
    ) -> tuple[tuple[Tensor, ...], ...]:
        sides = super()._moduli(heads, relations, tails)
        return tuple((torch.view_as_complex(torch.stack(parts, dim=-1)).abs(),) for parts in sides)


class RESCAL(Bilinear):
    """`score(h, r, t) = E[h]^T M_r E[t]` with a dense map a relation: one core (R, d, d).

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        dim: d.
        entity_table: as of `TuckER`.
        generator: of the start, Xavier's normal law.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: a size below 1.

    References:
        M. Nickel, V. Tresp, H.-P. Kriegel, A three-way model for collective learning on multi-relational data, ICML
        2011.

    Example:
        >>> from types import SimpleNamespace
        >>> RESCAL(SimpleNamespace(num_entities=7, num_relations=4, inverse=True), dim=3).parameter_count()
        57
    """

    def __init__(
        self,
        triples: Any,
        dim: int = 100,
        *,
        entity_table: str | Network | Callable[..., Any] = "dense",
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_sizes("RESCAL", dim=dim)
        core = torch.zeros(triples.num_relations, dim, dim, dtype=dtype, device=device)
        super().__init__(
            triples,
            maps=Network((core,), legs=(("r", "i", "j"),), rows=("r", "i"), cols=("j",)),
            entity_dim=dim,
            batch_norm=False,
            dropouts=(0.0, 0.0, 0.0),
            entity_table=entity_table,
            dtype=dtype,
            device=device,
        )
        self.reset_parameters(generator)

    @classmethod
    def from_pykeen(cls, model: nn.Module) -> "RESCAL":
        """A trained `pykeen.models.RESCAL` as a model of ours; see `Partitioned.from_pykeen`.

        Example:
            >>> RESCAL.from_pykeen(torch.nn.Linear(2, 2))
            Traceback (most recent call last):
            TypeError: RESCAL.from_pykeen: expected a PyKEEN model with a RESCALInteraction, got Linear
        """
        taken = take(f"{cls.__name__}.from_pykeen", model, "RESCALInteraction")
        entities = taken.entities
        with unchanged_rng(entities.device):
            made = cls(taken.graph, entities.shape[1], dtype=entities.dtype, device=entities.device)
        with torch.no_grad():
            made.entities.weight.copy_(entities)
            made.maps.cores[0].copy_(taken.relations.view_as(made.maps.cores[0]))
        return made.train(model.training)

    def _reset_maps(self, generator: torch.Generator | None) -> None:
        self.maps.cores[0].normal_(std=self.entity_dim**-0.5, generator=generator)

    def l2(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, ""]:
        """Squared Frobenius norms of the rows of head and tail and of the map, mean over the triples."""
        if not len(heads):
            raise ValueError("RESCAL.l2: expected triples, got none")
        distinct, counts = relations.unique(return_counts=True)
        maps = (self.maps.matrices(distinct).square().sum((1, 2)) * counts).sum()
        ends = sum(rows_of(self.entities, ids).square().sum() for ids in (heads, tails))
        return (maps + ends) / len(heads)
