"""R-TuckER: the score tensor itself is trained, as a point of the manifold of its multilinear ranks."""

from collections.abc import Sequence
from math import prod, sqrt
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from decompositions import Network, Tucker
from decompositions.geometry.shared_tucker import possible_shared_ranks
from tnlayers.dense import unchanged_rng
from tnlayers.kg.score_tensor import ScoreTensor
from tnlayers.kg.tucker import TuckER
from tnlayers.optim.engine import NetworkOptimizer
from tnlayers.optim.models import compact
from tnlayers.optim.rank_adaptive import RankAdaptive
from tnlayers.optim.riemannian import RiemannianAdam, RiemannianSGD
from tnlayers.optim.shared import SharedRiemannianAdam, SharedRiemannianSGD

T = TypeVar("T", bound="RTuckER")
METHODS = ("adam", "sgd")


class RTuckER(ScoreTensor):
    """R-TuckER: `score(h, r, t) = W x_1 R[r] x_2 E[h] x_3 E'[t]`, X = W x R x E x E' a point of a manifold.

    The same function as TuckER's without batch norm and dropout; what differs is the training: steps along the tangent
    space of tensors of multilinear rank (r_r, r_e, r_e'), with `r_tucker_optimizer(model, lr)`. With `shared` heads and
    tails have one table, E' = E, and the manifold is that of shared-factor Tucker tensors. With `adaptive` a tolerance
    finds the ranks, from those given on. Any other optimizer trains the cores as plain Parameters.

    The start is random, of root mean square score `std`; factors are orthonormal.
    Parameters: R r_r + N r_e + N r_e' + r_r r_e r_e', N r_e once if shared.

    Args:
        triples: what has num_entities, num_relations and inverse; see `load_triples`.
        ranks: (relation, entity), or (relation, head, tail) where the table is not shared. Larger ones than a tensor of
            these sizes can have are lowered.
        shared: one table for heads and tails.
        adaptive: whether `r_tucker_optimizer` adapts the ranks.
        std: root mean square of the scores at the start.
        network: a Tucker network to start from, in place of a random one of the ranks.
        generator: of the start.
        dtype: of the cores.
        device: of the cores.

    Raises:
        ValueError: ranks that are no two or three sizes >= 1, different ones of heads and tails that share a table.

    References:
        I. Peshekhonov, A. Arzhantsev, M. Rakhuba, Training a Tucker model with shared factors: a Riemannian
        optimization approach, AISTATS 2024.

    Example:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> RTuckER(graph, (10, 20)).parameter_count(), RTuckER(graph, (10, 20), shared=False).parameter_count()
        (7620, 10320)
    """

    def __init__(
        self,
        triples: Any,
        ranks: Sequence[int] = (10, 200),
        *,
        shared: bool = True,
        adaptive: bool = False,
        std: int | float = 0.1,
        network: Network | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = (triples.num_relations, triples.num_entities, triples.num_entities)
        wanted = _ranks(ranks, shared, sizes)
        core = torch.zeros(wanted, dtype=dtype, device=device)
        tables = [core.new_zeros(n, r) for n, r in zip(sizes, wanted, strict=True)]
        net = Tucker(core, tables, num_rows=2) if network is None else network
        self.adaptive = adaptive  # first: measured plans are looked up by the settings
        super().__init__(
            triples.num_entities, triples.num_relations, inverse=triples.inverse, network=net, shared=shared
        )
        self._std = float(std)
        if network is None:
            self.reset_parameters(generator)

    def settings(self) -> dict[str, Any]:
        """Those of `ScoreTensor`, and whether ranks adapt."""
        return {**super().settings(), "adaptive": self.adaptive}

    @classmethod
    def _from_settings(cls, network: Network, **settings: Any) -> "RTuckER":
        own = {name: settings.pop(name) for name in ("shared", "adaptive")}
        return cls(SimpleNamespace(**settings), network=network, **own)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw X anew at the present ranks: orthonormal factors, a normal core, scores of root mean square `std`."""
        self.close_window()
        net = self.network
        # QR has no half precision
        wide = torch.promote_types(net.cores[0].dtype, torch.float32)
        core, *factors = (torch.randn(c.shape, generator=generator, dtype=wide, device=c.device) for c in net.cores)
        bases = [torch.linalg.qr(factor).Q for factor in factors]
        if self.shared:
            bases[1] = bases[2]
        core = core * (self._std * sqrt(prod(self.weight_shape)) / torch.linalg.vector_norm(core))
        drawn = [core.to(net.cores[0].dtype) for core in (core, *bases)]
        self.set_network(net._unchecked(drawn, net.legs, net.rows, net.cols))

    @classmethod
    def from_tucker(cls, tucker: TuckER, *, adaptive: bool = False) -> "RTuckER":
        """The same scores as a TuckER without batch norm and bias, whose dropouts are left behind.

        Raises:
            TypeError: another model.
            ValueError: batch norms or a bias, or an entity table that is a network.

        Example:
            >>> from types import SimpleNamespace
            >>> graph = SimpleNamespace(num_entities=9, num_relations=4, inverse=True)
            >>> tucker = TuckER(graph, 3, 2, batch_norm=False, dropouts=(0.1, 0, 0))
            >>> RTuckER.from_tucker(tucker).network.ranks
            (2, 3, 3)
        """
        if not isinstance(tucker, TuckER):
            raise TypeError(f"RTuckER.from_tucker: expected a TuckER, got {type(tucker).__name__}")
        if tucker.norm0 is not None or tucker.bias is not None:
            raise ValueError(
                "RTuckER.from_tucker: batch norms and a bias are no part of the tensor X = W x R x E x E', expected "
                f"batch_norm=False and entity_bias=False, got {tucker}"
            )
        core, relations = (core.detach().clone() for core in tucker.maps.network.cores)
        tails = tucker.entities.weight.detach().clone()
        heads = tails if tucker.heads is None else tucker.heads.weight.detach().clone()
        made = cls(tucker, core.shape, shared=tucker.shared, adaptive=adaptive, dtype=core.dtype, device=core.device)
        made._take(core, relations, heads, tails)
        return made

    def _take(self, core: Tensor, relations: Tensor, heads: Tensor, tails: Tensor) -> None:
        net = self.network
        self.set_network(net._unchecked([core, relations, heads, tails], net.legs, net.rows, net.cols))

    def to_tucker(self) -> TuckER:
        """The same scores as a TuckER without batch norm, bias and dropout, at the ranks found.

        TuckER's tables have one width; where heads and tails have different ranks, the narrower is padded by zeros.
        """
        core, relations, heads, tails = (core.detach() for core in compact(self).cores)
        r, width = core.shape[0], max(core.shape[1:])
        kind: dict[str, Any] = {"dtype": core.dtype, "device": core.device}
        plain: dict[str, Any] = {"batch_norm": False, "dropouts": (0.0, 0.0, 0.0)}
        with unchanged_rng(core.device):
            made = TuckER(self, width, r, shared=self.shared, **plain, **kind)
        values = [(made.maps.cores[0], core), (made.maps.cores[1], relations), (made.entities.weight, tails)]
        if made.heads is not None:
            values.append((made.heads.weight, heads))
        with torch.no_grad():
            for mine, value in values:
                mine.zero_()[tuple(slice(0, n) for n in value.shape)] = value
        return made


def _ranks(ranks: Sequence[int], shared: bool, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """(relation, head, tail), lowered to what a tensor of these sizes can have."""
    given = tuple(ranks) if isinstance(ranks, Sequence) else (ranks,)
    if len(given) not in (2, 3) or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in given):
        raise ValueError(
            f"RTuckER: ranks are ints >= 1 for relations and entities, or relations, heads and tails, got {ranks!r}"
        )
    r, head, tail = given if len(given) == 3 else (*given, given[1])
    if not shared:
        return tuple(possible_shared_ranks((r, head, tail), sizes, ((0,), (1,), (2,))))  # type: ignore[return-value]
    if head != tail:
        raise ValueError(
            f"RTuckER: heads and tails share a table, expected equal ranks, got {head} and {tail}; or shared=False"
        )
    r, head = possible_shared_ranks((r, head), sizes[:2], ((0,), (1, 2)))
    return r, head, head


def r_tucker_optimizer(
    model: RTuckER,
    lr: int | float = 0.03,
    *,
    method: str = "adam",
    momentum: int | float | None = None,
    weight_decay: int | float = 0.0,
    tol: int | float | None = None,
    reserve: int = 1,
    settle: int | None = None,
    max_rank: int | None = None,
) -> NetworkOptimizer:
    """The optimizer of an `RTuckER` on its manifold: shared factors or not, at fixed ranks or by a tolerance.

    What `train(model, triples, optimizer=partial(r_tucker_optimizer, lr=0.03))` takes. "sgd" is the paper's method:
    normalized Riemannian gradients and momentum; one step changes X by lr in root mean square over its R N N entries.
    "adam" scales the steps of the core and of each factor by second moments of their own; lr is what each changes. For
    both lr should decrease, to a tenth or less at the end. (The paper gives the step in Frobenius norm, lr sqrt(R N N):
    2,000 for WN18RR is .0104 here.)

    Args:
        model: the model.
        lr: see above.
        method: "adam" or "sgd".
        momentum: decay of the first moment; .9 of "adam", .8 of "sgd".
        weight_decay: of X, decoupled.
        tol: relative error of the rounding of each step, for an adaptive model; .1 by default.
        reserve: directions kept beyond the tolerance while ranks adapt.
        settle: step at which ranks are cut a last time and stay.
        max_rank: cap of every rank.

    Raises:
        ValueError: another method; a tolerance for a model that is not adaptive; "sgd" for one that is, without shared
            factors.
        TypeError: another model.

    Example:
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> type(r_tucker_optimizer(RTuckER(graph, (5, 8)))).__name__
        'SharedRiemannianAdam'
    """
    if not isinstance(model, RTuckER):
        raise TypeError(f"r_tucker_optimizer: expected an RTuckER, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"r_tucker_optimizer: method must be one of {METHODS}, got {method!r}")
    if not model.adaptive and (tol is not None or settle is not None):
        raise ValueError(
            f"r_tucker_optimizer: the ranks of this model stay, expected no tol and no settle, got {tol} and {settle}; "
            "RTuckER(..., adaptive=True) adapts them"
        )
    sgd = method == "sgd"
    first = momentum if momentum is not None else 0.8 if sgd else 0.9
    adapting: dict[str, Any] = {"tol": 0.1 if tol is None else tol, "settle": settle}
    adapting |= {"reserve": reserve, "max_rank": max_rank}
    if model.adaptive and not model.shared:
        if sgd:
            raise ValueError(
                "r_tucker_optimizer: ranks of separate tables adapt by method='adam' (RankAdaptive), got 'sgd'; or "
                "shared=True"
            )
        return RankAdaptive(model, float(lr), betas=(first, 0.999), weight_decay=weight_decay, **adapting)
    options = adapting if model.adaptive else {}
    if sgd:
        kind: Any = SharedRiemannianSGD if model.shared else RiemannianSGD
        options |= {"momentum": first, "normalize": True}
        lr = lr * sqrt(prod(model.weight_shape))
    else:
        kind = SharedRiemannianAdam if model.shared else RiemannianAdam
        options |= {"betas": (first, 0.999)}
    made: NetworkOptimizer = kind(model, float(lr), weight_decay=weight_decay, **options)
    return made
