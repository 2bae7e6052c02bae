"""A matrix for every relation, together one network: the middle of every bilinear model."""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeVar

import torch
from jaxtyping import Inexact, Int
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.network import Labels
from decompositions.formats.plan import plan_path, run
from tnlayers.dense import NetworkFactory, Recipe, copy_settings, exactly, run_recipe, unchanged_rng
from tnlayers.kg.by_relation import PLACE, RELATION, ROW, Groups, Route, Sliced, contract_rows, group_by, routes
from tnlayers.layer import NetworkLayer, Shapes

T = TypeVar("T", bound="RelationLayer")


class DenseRelations(nn.Module):
    """The dense tensor that a `RelationMaps` or a `ScoreTensor` stands for: a matrix (n, m) for each relation.

    Args:
        shape: (relations, n, m).
        options: constructor arguments of the layer besides its network.
        dtype: of the weight.
        device: of the weight.

    Example:
        >>> DenseRelations((3, 4, 5)).weight.shape
        torch.Size([3, 4, 5])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        options: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.options = dict(options or {})
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: Inexact[Tensor, "B n"], relations: Int[Tensor, "B"]) -> Inexact[Tensor, "B m"]:
        """`y[b] = x[b] W[relation of b]`."""
        return torch.bmm(x[:, None], self.weight[relations])[:, 0]

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{tuple(self.weight.shape)}"


class RelationLayer(NetworkLayer):
    """What RelationMaps and ScoreTensor share: a tensor of modes (relation, first side, second side), each side split
    into as many modes as the network has, planned for batches that share relations.
    """

    def _fit(self, net: Network) -> Network:
        """The network with rows (relation, first side) and columns (second side)."""
        name = type(self).__name__
        if not isinstance(net, Network):
            raise TypeError(f"{name}: network must be a decompositions.Network, got {type(net).__name__}")
        count, first, second = self.weight_shape
        modes, labels = net.shape, net.outside
        split = next((k for k in range(2, len(modes)) if prod(modes[1:k]) >= first), 0)
        covers = split > 0 and modes[0] == count and prod(modes[split:]) >= second
        if not covers or (not self._padded and prod(modes[1:]) != first * second):
            rule = ">=" if self._padded else "="
            raise ValueError(
                f"{name}: the modes of the network must be the relations, then those of the two sides, expected "
                f"{count}, then products {rule} {first} and {rule} {second}, got {modes}"
            )
        return net.replace(rows=labels[:split], cols=labels[split:])

    _padded = False

    @property
    def weight(self) -> Tensor:
        """The dense tensor, differentiable with respect to the cores; for small graphs and tests."""
        count, first, second = self.weight_shape
        dense = self._dense().reshape(count, prod(self._row_modes[1:]), prod(self._col_modes))
        return dense[:, :first, :second]

    @classmethod
    def from_dense(cls: type[T], dense: nn.Module, recipe: Recipe) -> T:
        """Layer that stands in for a dense tensor.

        Raises:
            TypeError: another module than DenseRelations.
        """
        if not isinstance(dense, DenseRelations):
            raise TypeError(f"{cls.__name__}.from_dense: expected a DenseRelations, got {type(dense).__name__}")
        net = run_recipe(f"{cls.__name__}.from_dense", recipe, dense.weight.detach())
        with unchanged_rng(dense.weight.device):
            layer: T = cls._from_settings(net, **dense.options)
        copy_settings(dense, layer, dense.weight, None)
        return layer

    @classmethod
    def _from_settings(cls, network: Network, **settings: Any) -> Any:
        """A layer of what `settings` gives, with this network."""
        make: Any = cls
        return make(**settings, network=network)

    def to_dense_module(self) -> DenseRelations:
        """The dense tensor as a module."""
        first: Any = self.cores[0]
        shape: Any = self.weight_shape
        with unchanged_rng(first.device):
            dense = DenseRelations(shape, self.settings(), first.dtype, first.device)
        with torch.no_grad(), exactly(first.device):
            dense.weight.copy_(self.weight)
        copy_settings(self, dense, first, None)
        return dense

    def _asked(self, back: bool) -> tuple[list[Labels], Labels]:
        """Labels of all operands of a query, sliced, and of its result after the row; `back`: from the second side."""
        raise TypeError("RelationLayer._asked: expected a layer, got the base")

    def _ends(self, back: bool) -> tuple[Labels, Labels]:
        """Labels of the side that a query has, and of the one that it asks for."""
        first, second = self._structure.rows[1:], self._structure.cols
        return (second, first) if back else (first, second)

    def _routes(self, rows: int, distinct: int, longest: int, back: bool = False) -> tuple[Route, ...]:
        net = self.network
        sizes = {**net.sizes, ROW: rows, RELATION: distinct, PLACE: longest}
        return routes(*self._asked(back), sizes, net.dtype.itemsize)

    def alternatives(self, batch: int | None = None, *, back: bool = False) -> tuple[Route, ...]:
        """Routes considered for a batch in which relations are spread evenly, best predicted first.

        With `back` those of the transposed matrices.
        """
        rows = batch or self._hint or 1024
        distinct = min(rows, self.weight_shape[0])
        return self._routes(rows, distinct, -(-rows // distinct), back)

    def _route_for(self, relations: Tensor, back: bool = False) -> tuple[Route, Groups | None]:
        """The cheapest route for a batch, planned for powers of two; the stored one while tracing."""
        if torch.compiler.is_compiling() or relations.numel() == 0 or relations.is_meta:
            return next(route for route in self.alternatives(back=back) if route.strategy == "rows"), None
        groups = group_by(relations)
        if self._forced is not None and not back:
            return self._forced, groups
        size = (len(relations), _up(len(groups.distinct)), _up(groups.longest), back)
        route = self._plans.get(size)
        if route is None:
            route = self._plans[size] = self._routes(*size)[0]
        return route, groups

    def example_input(self, batch: int) -> Tensor:
        """Refused: a query is not one tensor."""
        raise TypeError(
            f"{type(self).__name__}: a query is made of two tensors and cannot be measured by itself; "
            "explain(layer, measured=False)"
        )

    def flops(self, batch: int = 1) -> int:
        """Multiply-adds times two of `batch` queries whose relations are spread evenly."""
        return self.alternatives(batch)[0].flops

    @staticmethod
    def dense_flops(weight_shape: tuple[int, ...], seen: Shapes | None) -> int:
        """Dense multiply-adds times two of one query."""
        return 2 * weight_shape[1] * weight_shape[2]

    def _sample_plan(self, seen: Shapes | None) -> tuple[Any, int]:
        return self.alternatives(1)[0], 1

    def extra_repr(self) -> str:
        """Sizes, format and equation."""
        return f"{', '.join(map(str, self.weight_shape))}, {self._repr_network()}"


def _up(count: int) -> int:
    """The power of two that plans are made for."""
    return 1 << (count - 1).bit_length()


class RelationMaps(RelationLayer):
    """Bilinear maps, one a relation, as one network: `y[b] = x[b] M[r_b]`, M of modes (relation, in, out).

    With a Tucker network of the relation mode alone, `M[r] = sum_k R[r, k] W[k]`, this is the middle of TuckER; with
    one core RESCAL's; any other network with the relations as its first mode serves. The relations of a batch are
    contracted with the core once each where that is cheaper, and no (batch, in, out) intermediate is made then.

    Args:
        num_relations: size of the first mode.
        in_features: of x; the network may split it into several modes.
        out_features: of y, likewise.
        network: a Network of modes (relations, in..., out...), or a callable (shape, dtype, device) -> Network.
        recipe: a callable dense tensor (relations, in, out) -> Network.
        dtype: of the cores.
        device: of the cores.

    Raises:
        ValueError: modes that do not fit.

    Example:
        >>> import torch
        >>> from decompositions import Tucker
        >>> net = Tucker.random(row_modes=(6, 4), col_modes=(5,), rank=3, modes=(0,))
        >>> maps, x, relations = RelationMaps(6, 4, 5, network=net), torch.randn(7, 4), torch.arange(7) % 3
        >>> y = torch.einsum("bi,bij->bj", x, maps.weight[relations])
        >>> bool(torch.allclose(maps(x, relations), y, atol=1e-5))
        True
    """

    def __init__(
        self,
        num_relations: int,
        in_features: int,
        out_features: int,
        *,
        network: Network | NetworkFactory | None = None,
        recipe: Recipe | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_relations, self.in_features, self.out_features = num_relations, in_features, out_features
        self._start((num_relations, in_features, out_features), network, recipe, dtype, device, 0.1)

    def settings(self) -> dict[str, Any]:
        """Sizes."""
        return {name: getattr(self, name) for name in ("num_relations", "in_features", "out_features")}

    def _sliced(self) -> Sliced:
        return Sliced(self._structure.legs, self._structure.rows[0])

    def _asked(self, back: bool) -> tuple[list[Labels], Labels]:
        given, asked = self._ends(back)
        return [*self._sliced().sliced(), (ROW, *given)], asked

    def forward(self, x: Inexact[Tensor, "B n"], relations: Int[Tensor, "B"]) -> Inexact[Tensor, "B m"]:
        """Multiply each row by the map of its relation, by the cheapest route."""
        return self._multiplied(x.reshape(len(x), *self._row_modes[1:]), relations, False)

    def transposed(self, y: Inexact[Tensor, "B m"], relations: Int[Tensor, "B"]) -> Inexact[Tensor, "B n"]:
        """`M[r_b] y[b]`: each row by the transposed map of its relation, by the cheapest route."""
        return self._multiplied(y.reshape(len(y), *self._col_modes), relations, True)

    def _multiplied(self, x: Tensor, relations: Tensor, back: bool) -> Tensor:
        route, groups = self._route_for(relations, back)
        y = contract_rows(route, self._sliced(), self._contracted.cores, relations, groups, {}, (x,))
        return y.reshape(len(x), self.in_features if back else self.out_features)

    def matrices(self, relations: Int[Tensor, "D"]) -> Inexact[Tensor, "D n m"]:
        """The maps of some relations, dense: one product of the relations' slices with the rest of the network."""
        net, sliced = self._contracted, self._sliced()
        legs = sliced.sliced()
        sizes = {**net.sizes, RELATION: len(relations)}
        plan = plan_path(legs, sizes, (RELATION, *net.rows[1:], *net.cols), net.dtype.itemsize)
        operands = [sliced.operand(k, core, relations, {}) for k, core in enumerate(net.cores)]
        return run(plan.steps, operands).reshape(len(relations), self.in_features, self.out_features)

    def between(self, x: Inexact[Tensor, "B n"], y: Inexact[Tensor, "B m"]) -> Inexact[Tensor, "B R"]:
        """`x[b] M[r] y[b]` for every relation r, in one contraction; no map is made."""
        net = self._contracted
        legs = (*net.legs, (ROW, *net.rows[1:]), (ROW, *net.cols))
        plan = plan_path(legs, {**net.sizes, ROW: len(x)}, (ROW, net.rows[0]), net.dtype.itemsize)
        sides: Sequence[Tensor] = (
            x.reshape(len(x), *self._row_modes[1:]),
            y.reshape(len(y), *self._col_modes),
        )
        return run(plan.steps, [*net.cores, *sides])
