"""Scores of all triples as one network: the tensor X[relation, head, tail], never formed."""

from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompositions import Network
from decompositions.formats.network import Labels
from decompositions.formats.plan import plan_path, run
from tnlayers.dense import NetworkFactory, Recipe
from tnlayers.frozen import Cut, best_cut
from tnlayers.kg.by_relation import ROW, Sliced, contract_rows, digits_of
from tnlayers.kg.model import Entities, InnerProduct, KGModel
from tnlayers.kg.relation_maps import RelationLayer


class ScoreTensor(RelationLayer, InnerProduct):
    """A model whose score is an entry of a network: `score(h, r, t) = X[r, h, t]`.

    X may be Tucker, a tensor train, CP, a tree, block terms: any network whose first mode are the relations and whose
    tail modes have cores of their own. An entity mode may be split into digits, so that an entity table is a network
    itself. The network is cut where the matrix (relation, head) x tail has the smallest bond K: `query` contracts the
    slices of one side to (B, K), in the order that is cheapest for the batch, its distinct relations and the ranks, and
    `against` is one product with the other side, the tail factor (N, K). A tree is a point of its manifold for
    RiemannianSGD, RiemannianAdam and RankAdaptive. Parameters: those of the network.

    With `shared`, heads and tails have one table: each core with head modes is the very Parameter of the corresponding
    core with tail modes. Such a network is no point of a tree's manifold (its two factors cannot move apart): the
    optimizers of trees hand its cores to their inner optimizer, and where there is no other network refuse the model.

    Args:
        num_entities: N.
        num_relations: R, inverse ones included.
        inverse: whether the second half of the relations are inverses.
        network: a Network of modes (relation, head..., tail...), each side's product at least N; or a callable
            (shape, dtype, device) -> Network such as `tnlayers.random_network(Tucker, rank=(8, 16, 16))`.
        recipe: a callable dense tensor (R, N, N) -> Network.
        shared: one table for heads and tails.
        dtype: of the cores.
        device: of the cores.

    Raises:
        ValueError: modes that do not fit; a core with tail modes and others; sides that cannot be shared.

    References:
        I. Balazevic, C. Allen, T. Hospedales, TuckER: tensor factorization for knowledge graph completion, EMNLP 2019,
        eq. 2, arXiv 1901.09590.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> model = ScoreTensor(9, 4, inverse=True, network=tnlayers.random_network(Tucker, rank=(2, 3, 3)))
        >>> h, r = torch.tensor([0, 8, 0]), torch.tensor([1, 0, 1])
        >>> bool(torch.allclose(model.score_all(h, r), model.weight[r, h], atol=1e-6)), model.parameter_count()
        (True, 80)
    """

    _padded = True

    def __init__(
        self,
        num_entities: int,
        num_relations: int,
        *,
        inverse: bool,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
        shared: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        KGModel.__init__(self, num_entities, num_relations, inverse=inverse)
        self.shared = shared
        self._start((num_relations, num_entities, num_entities), network, recipe, dtype, device, 0.1)
        for head, tail in self._tied_cores():
            self.cores[head] = self.cores[tail]

    def _fit(self, net: Network) -> Network:
        """Modes that fit, and a cut that separates the tails."""
        net = super()._fit(net)
        if best_cut(net) is None:
            raise ValueError(
                f"ScoreTensor: tail modes must have cores of their own, expected a network cut between tails and the "
                f"rest, got {net.equation}; a factor for the tail mode separates it (RelationMaps takes whole cores)"
            )
        return net

    def _tied_cores(self) -> list[tuple[int, int]]:
        """Pairs of cores (of heads, of tails) that are one Parameter."""
        if not self.shared:
            return []
        legs, rows, cols = self._structure.legs, self._structure.rows, self._structure.cols
        heads, tails = ([k for k, leg in enumerate(legs) if set(side) & set(leg)] for side in (rows[1:], cols))
        sides = [
            [tuple(side.index(label) if label in side else None for label in legs[k]) for k in members]
            for side, members in ((rows[1:], heads), (cols, tails))
        ]
        shapes = [[tuple(self.cores[k].shape) for k in members] for members in (heads, tails)]
        plain = all(rows[0] not in legs[k] for k in heads)
        if sides[0] != sides[1] or shapes[0] != shapes[1] or not plain:
            raise ValueError(
                f"ScoreTensor: a shared table needs equal cores for heads and tails, got shapes {shapes[0]} and "
                f"{shapes[1]} of {self.network.equation}; expected equal ranks and modes, or shared=False"
            )
        return list(zip(heads, tails, strict=True))

    def set_network(self, network: Network) -> None:
        """Replace the weight, at any ranks; see `NetworkLayer.set_network`.

        Raises:
            ValueError: also where the table is shared and the network's factors of heads and tails differ.
        """
        for head, tail in self._tied_cores():
            if not torch.equal(network.cores[head], network.cores[tail]):
                raise ValueError(
                    f"ScoreTensor.set_network: heads and tails share a table, expected cores {head} and {tail} to be "
                    "equal, got different ones; make another model with shared=False"
                )
        super().set_network(network)

    def parameter_count(self) -> int:
        """Parameters of the network as its format counts them; a shared table counts once."""
        return self.numel() - sum(self.cores[head].numel() for head, _ in self._tied_cores())

    def settings(self) -> dict[str, Any]:
        """Sizes, whether relations have inverses, whether the table is shared."""
        names = ("num_entities", "num_relations", "inverse", "shared")
        return {name: getattr(self, name) for name in names}

    def _replan(self) -> None:
        if not self._pinned or not hasattr(self, "_cuts"):
            net = self.network
            cut = best_cut(net)
            assert cut is not None
            self._cuts: tuple[Cut, Cut | None] = (
                cut,
                best_cut(net.replace(rows=(net.rows[0], *net.cols), cols=net.rows[1:])),
            )
        super()._replan()

    def _cut(self, back: bool) -> Cut:
        """Where the network is cut, its inner side that of the tails, or (`back`) of the heads."""
        cut = self._cuts[back]
        assert cut is not None
        return cut

    def _sliced(self, back: bool) -> Sliced:
        s = self._structure
        return Sliced(tuple(s.legs[k] for k in self._cut(back).outer), s.rows[0], self._ends(back)[0])

    def _asked(self, back: bool) -> tuple[list[Labels], Labels]:
        return self._sliced(back).sliced(), self._cut(back).bonds

    def _modes_of(self, labels: Labels) -> tuple[int, ...]:
        return tuple(self.network.sizes[label] for label in labels)

    def query(self, heads: Int[Tensor, "B"], relations: Int[Tensor, "B"]) -> Float[Tensor, "B K"]:
        """Contract the slices of heads and relations, and all cores on their side of the cut, to (B, K)."""
        return self._query(heads, relations, False)

    def _z(self, relations: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """The slices of tails and relations, and all cores on their side of the cut between them and the heads."""
        z = self._query(tails, relations, True)
        return z, z.new_zeros(len(z))

    def _asks_heads(self) -> bool:
        return self.inverse or (not self.training and self._cuts[1] is not None)

    def _query(self, entities: Tensor, relations: Tensor, back: bool) -> Tensor:
        labels = self._ends(back)[0]
        modes = self._modes_of(labels)
        self._check_ids(entities, modes)
        route, groups = self._route_for(relations, back)
        cores = self._contracted.cores
        mine = [cores[k] for k in self._cut(back).outer]
        digits = digits_of(entities, labels, modes)
        return contract_rows(route, self._sliced(back), mine, relations, groups, digits).flatten(1)

    def tail_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """Rows of the tail factor: contracted from slices where the tail mode is split."""
        return self._rows(entities, False)

    def head_rows(self, entities: Entities = None) -> Float[Tensor, "n K"]:
        """Rows of the head factor, likewise."""
        return self._rows(entities, True)

    def _rows(self, entities: Entities, back: bool) -> Tensor:
        net, labels, cut = self._contracted, self._ends(back)[1], self._cut(back)
        modes = self._modes_of(labels)
        cores = [net.cores[k] for k in cut.inner]
        legs = tuple(net.legs[k] for k in cut.inner)
        if entities is None or (isinstance(entities, slice) and len(labels) == 1):
            plan = plan_path(legs, net.sizes, (*labels, *cut.bonds), net.dtype.itemsize)
            table = run(plan.steps, cores).reshape(prod(modes), -1)
            return table[: self.num_entities][slice(None) if entities is None else entities]
        if isinstance(entities, slice):
            entities = torch.arange(self.num_entities, device=cores[0].device)[entities]
        self._check_ids(entities, modes)
        sliced = Sliced(legs, "", labels)
        digits = digits_of(entities, labels, modes)
        plan = plan_path(sliced.sliced(), {**net.sizes, ROW: len(entities)}, (ROW, *cut.bonds), net.dtype.itemsize)
        operands = [sliced.operand(k, core, entities, digits) for k, core in enumerate(cores)]
        return run(plan.steps, operands).flatten(1)

    def score_relations(self, heads: Int[Tensor, "B"], tails: Int[Tensor, "B"]) -> Float[Tensor, "B R"]:
        """Scores of every relation of the data, in one contraction of the slices of heads and tails."""
        self._check_ids(heads, self._row_modes[1:])
        self._check_ids(tails, self._col_modes)
        net, s = self._contracted, self._structure
        digits = {
            **digits_of(heads, s.rows[1:], self._row_modes[1:]),
            **digits_of(tails, s.cols, self._col_modes),
        }
        sliced = Sliced(s.legs, "", (*s.rows[1:], *s.cols))
        plan = plan_path(sliced.sliced(), {**net.sizes, ROW: len(heads)}, (ROW, s.rows[0]), net.dtype.itemsize)
        operands = [sliced.operand(k, core, heads, digits) for k, core in enumerate(net.cores)]
        return run(plan.steps, operands)[:, : self.num_relations // 2 if self.inverse else None]

    def _check_ids(self, ids: Tensor, modes: tuple[int, ...]) -> None:
        """An id beyond the entities must not read the padding of a split mode (else index kernels see to it)."""
        if len(modes) == 1 or torch.compiler.is_compiling() or ids.is_meta or not ids.numel():
            return
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= self.num_entities:
            raise IndexError(
                f"ScoreTensor: entities must be in 0..{self.num_entities - 1}, got {int(low)}..{int(high)}"
            )

    def extra_repr(self) -> str:
        """Sizes, format and equation."""
        shared = ", shared" if self.shared else ""
        return f"{self.num_entities} entities, {self.num_relations} relations{shared}, {self._repr_network()}"
