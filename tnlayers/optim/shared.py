"""`SharedRiemannianSGD` and `SharedRiemannianAdam`: Tucker tensors in which several modes have one factor.

A layer whose network is a star (a core with a factor for every mode), and in which some of the factors are one and the
same Parameter, is moved on the manifold of such tensors (`decompositions.geometry.shared_tucker`): at fixed ranks, or
at ranks that a tolerance finds.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decompositions import Network
from decompositions.geometry.shared_tucker import (
    Chooser,
    SharedGauges,
    SharedTangent,
    retract_by,
    shared_cut,
    shared_gauge_fix,
    shared_gauges,
    shared_transport,
)
from decompositions.lockstep import Job
from tnlayers.layer import NetworkLayer
from tnlayers.optim.engine import Inner
from tnlayers.optim.options import integer, number, refuse
from tnlayers.optim.ranks import Ranks
from tnlayers.optim.riemannian import RiemannianAdam, RiemannianSGD, _Riemannian
from tnlayers.optim.track import Track
from tnlayers.window import Window


class Star(NamedTuple):
    """Where the core and the factors of a shared Tucker tensor are among the cores of a network.

    Args:
        hub: the core.
        members: cores that hold the factor of every group, all the same.
        groups: modes, axes of the hub, of every group.
        bonds: bonds of every group.
    """

    hub: int
    members: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]
    bonds: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, layer: NetworkLayer) -> "Star":
        """Read it off a layer.

        Raises:
            ValueError: the network is no star, or one of its factors is at several places in another way.
        """
        net, same = layer.network, [id(core) for core in layer.cores]
        hub = max(range(len(net.legs)), key=lambda k: len(set(net.legs[k]) & set(net.bonds)))
        joined: dict[int, tuple[list[Any], list[Any], list[Any]]] = {}
        for axis, bond in enumerate(net.legs[hub]):
            found = [k for k, leg in enumerate(net.legs) if k != hub and leg[1:] == (bond,) and leg[0] in net.outside]
            if len(found) != 1:
                raise ValueError(
                    f"SharedRiemannian: shared factors need a core with a matrix for every mode, (mode, rank), got "
                    f"{net.equation}; use a Tucker network"
                )
            for value, own in zip((found[0], axis, bond), joined.setdefault(same[found[0]], ([], [], [])), strict=True):
                own.append(value)
        members, groups, bonds = zip(*joined.values(), strict=True)
        return cls(hub, *(tuple(map(tuple, own)) for own in (members, groups, bonds)))

    @property
    def first(self) -> list[int]:
        """The hub, and the first member of every group: what moves."""
        return [self.hub, *(members[0] for members in self.members)]

    def spread(self, core: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Cores in the order of the network."""
        found = {self.hub: core} | {k: u for own, u in zip(self.members, factors, strict=True) for k in own}
        return [found[k] for k in range(len(found))]

    def gauges(self, net: Network) -> SharedGauges:
        """The point that a network's cores are."""
        return shared_gauges(net.cores[self.hub], [net.cores[own[0]] for own in self.members], self.groups)


def _at_most(ranks: Sequence[int]) -> Chooser:
    """Ranks as given."""
    return lambda g, squares, norm: min(ranks[g], len(squares))


class SharedWindow(Window):
    """A weight as an affine function of the deltas of a shared Tucker tensor.

    Args:
        at: gauges of the point.
        star: where its cores are.
        like: a network of the same labels.
        ranks: of every group, by its first bond, without the directions in reserve.
    """

    at: Any

    def __init__(self, at: SharedGauges, star: Star, like: Network, ranks: dict[str, int]) -> None:
        self.star, self.core, self.fresh = star, None, True
        self.ranks = {bond: ranks[bonds[0]] for bonds in star.bonds for bond in bonds}
        self._stamps: list[tuple[Tensor, int]] = []
        self.at, self.point = at, like._unchecked(star.spread(at.core, at.factors), like.legs, like.rows, like.cols)

    def shape(self, core: int) -> tuple[int, ...]:
        """Shape of the probe of a core: nothing where another core has the probe of the group."""
        first = self.star.first
        shapes: tuple[tuple[int, ...], ...] = self.at.shapes
        return shapes[first.index(core)] if core in first else (0,)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """See `Window`."""
        self.at, net = self.at.map(fn), self.point
        cores = self.star.spread(self.at.core, self.at.factors)
        self.point = net._unchecked(cores, net.legs, net.rows, net.cols)

    def cores(self, probes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See `Window`."""
        if self.still(probes) and not torch.is_grad_enabled():
            return self.point.cores
        tangent = SharedTangent(self.at, tuple(probes[k] for k in self.star.first))
        return tuple(self.star.spread(*tangent.doubled(point=True)))

    def dense(self, probes: Sequence[Tensor]) -> Tensor | None:
        """None: by the doubled cores."""
        return None

    def multiply(self, x: Tensor, probes: Sequence[Tensor]) -> Tensor | None:
        """None: by the doubled cores."""
        return None

    def compacted(self, net: Network) -> Network:
        """See `Window`."""
        at, star = self.star.gauges(net), self.star
        made = shared_cut(at.core, at.factors, at.groups, _at_most([self.ranks[bonds[0]] for bonds in star.bonds]))
        return net._unchecked(star.spread(made.core, made.factors), net.legs, net.rows, net.cols)


class SharedTrack(Track):
    """A network with shared factors in training."""

    @cached_property
    def star(self) -> Star:
        """Where its factors are."""
        return Star.of(self.layer)

    @property
    def moving(self) -> list[Tensor]:
        """See `Track`."""
        return [self.layer.probes[k] for k in self.star.first]

    def window_on(self, at: SharedGauges) -> Window:
        """A window at a point."""
        return SharedWindow(at, self.star, self.layer.network, self.ranks.found)

    def _window_at(self, net: Network, core: int | None, *, gauged: bool) -> Window:
        cores = net.cores
        factors = [cores[own[0]] for own in self.star.members]
        return self.window_on(shared_gauges(cores[self.star.hub], factors, self.star.groups, gauged=True))


class _Shared(_Riemannian):
    """The geometry of shared factors, and the ranks that it finds, in place of that of trees."""

    _wanted = (
        "a Tucker network two factors of which are one Parameter, trainable, found none; use RiemannianSGD, "
        "RiemannianAdam or RankAdaptive for networks without shared factors"
    )
    fixed = True

    def _adapting(self, tol: int | float | None, reserve: int, settle: int | None, max_rank: int | None) -> None:
        """How ranks are found; before torch's constructor runs, which opens windows."""
        rules = [
            ("tol", tol, tol is None or number(tol, 0, 1), "a number in [0, 1), or None"),
            ("reserve", reserve, integer(reserve, 0), "an int >= 0"),
            ("settle", settle, settle is None or integer(settle, 1), "an int >= 1 (a step), or None"),
            ("max_rank", max_rank, max_rank is None or integer(max_rank, 1), "an int >= 1, or None"),
        ]
        refuse(type(self).__name__, rules)
        self.fixed, self.settle_at = tol is None, settle
        self._options = (tol, None, reserve, 1, max_rank)

    def _found(self, model: nn.Module) -> list[Track]:
        layers: dict[int, tuple[list[str], list[NetworkLayer]]] = {}
        for name, module in model.named_modules():
            if not isinstance(module, NetworkLayer) or not all(core.requires_grad for core in module.cores):
                continue
            if len({id(core) for core in module.cores}) == len(module.cores):
                continue
            if module._window is not None and id(module.cores[0]) not in layers:  # of another optimizer
                with torch.no_grad():
                    net = module.network.detach()
                    star, at = Star.of(module), Star.of(module).gauges(net)
                module.set_network(net._unchecked(star.spread(at.core, at.factors), net.legs, net.rows, net.cols))
            names, twins = layers.setdefault(id(module.cores[0]), ([], []))
            names.append(name)
            twins.append(module)
        found: list[Track] = [SharedTrack.start(*own, Ranks(*self._options)) for own in layers.values()]
        for track in found:
            Star.of(track.layer)  # refused before any is touched
        return found

    def _starting(self, track: Any) -> Job[None]:
        at = track.star.gauges(track.layer.network.detach())
        track.moment, track.counts = [], [0] * len(at.shapes)
        track.second = [torch.zeros((), device=at.core.device) for _ in at.shapes]
        track.ranks.found = {bonds[0]: rank for bonds, rank in zip(track.star.bonds, at.ranks, strict=True)}
        track.ranks.kept = dict(track.ranks.found)
        self._install(track, at)
        yield from ()

    def _install(self, track: Any, at: SharedGauges) -> None:
        track.install(track.window_on(at.map(torch.Tensor.contiguous)))

    def _fixed(self, at: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
        return list(shared_gauge_fix(at, gradients).deltas)

    def _squares(self, at: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
        return [torch.linalg.vector_norm(g).square() for g in self._fixed(at, gradients)]

    def _retracting(self, track: Any, deltas: Sequence[Tensor]) -> Job[None]:
        old, own, bonds = track.window.at, track.ranks, [bonds[0] for bonds in track.star.bonds]
        settling = not self.fixed and self.settle_at is not None and self.steps >= self.settle_at
        possible = {bond: len(factor) for bond, factor in zip(bonds, old.factors, strict=True)}
        choose = own.choosing(possible, fixed=self.fixed, reserve=0 if settling else None)
        at = retract_by(SharedTangent(old, tuple(deltas)), lambda g, squares, norm: choose(bonds[g], squares, norm))
        if self.steps % self.stabilize_every == 0:  # bases are products of orthonormal ones from step to step
            at = shared_gauges(at.core, at.factors, at.groups)
        if not self.fixed:
            own.kept = dict(zip(bonds, at.ranks, strict=True))
            own.found = {bond: min(own.found[bond], rank) for bond, rank in own.kept.items()}
        moment = SharedTangent(old, tuple(track.moment))
        track.moment = list(shared_transport(at, moment, lost=False).deltas)
        self._install(track, at)
        yield from ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `RiemannianSGD`; at the step `settle` ranks are cut by the tolerance a last time, without reserve."""
        loss = super().step(closure)
        if not self.fixed and self.settle_at is not None and self.steps >= self.settle_at:
            self.fixed = True
        return loss

    def settle(self) -> None:
        """Cut to the ranks of the last step without reserve; ranks stay from now on."""
        self._reopen()
        for track in self._tracks if not self.fixed else ():
            assert isinstance(track, SharedTrack)
            own, bonds = track.ranks, [bonds[0] for bonds in track.star.bonds]
            old: Any = track.window.at
            ranks = [own.found[bond] for bond in bonds]
            at = shared_cut(old.core, old.factors, old.groups, _at_most(ranks))
            own.kept = dict(zip(bonds, at.ranks, strict=True))
            own.found = dict(own.kept)
            if track.moment:
                track.moment = list(shared_transport(at, SharedTangent(old, tuple(track.moment)), lost=False).deltas)
            self._install(track, at)
        self.fixed = True

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Ranks of every layer without the reserve, in the order of `layer.network.bonds`."""
        self._reopen()
        return {
            name: tuple(track.window.ranks[bond] for bond in track.window.point.bonds)
            for track in self._tracks
            for name in track.names
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: resumed runs agree bit by bit."""
        return {**super().state_dict(), "fixed": self.fixed}

    def _load_more(self, state_dict: dict[str, Any]) -> None:
        self.fixed = state_dict["fixed"]


class SharedRiemannianSGD(_Shared, RiemannianSGD):
    """`RiemannianSGD` on the manifold of Tucker tensors with shared factors, at fixed ranks or by a tolerance.

    `m <- momentum T(m) + grad f(X)`, `X <- R_X(-lr m)`: the gradient projected on the tangent space, the HOSVD with
    shared factors as retraction R (of second order), and the transport T that lets a tangent vector follow its bases.
    With `tol` the ranks are those that the rounding of each step asks for, and `reserve` more: directions of the step
    beyond the present bases, so that they can grow where a single step adds less than the tolerance.

    Guarantees: the iterates depend on X alone at fixed ranks; bases are orthonormal to 1e-5 in float32; a rounding by
    `tol` changes X by at most `tol ‖X‖`.
    Cost: a QR of each factor's delta, and SVDs of the unfoldings of a core of doubled ranks, a step.

    Args:
        model: its layers with shared factors are found; other parameters are left to the inner optimizer.
        lr: step size, as of gradient descent on the dense X; also that of the inner optimizer.
        momentum: in [0, 1).
        weight_decay: of X, decoupled.
        normalize: divide the Riemannian gradient by its norm, as R-TuckER does; see `RiemannianSGD`.
        tol: relative error of a step's rounding, in quadrature over the factors; None keeps the ranks.
        reserve: directions kept beyond those of the tolerance while ranks adapt.
        settle: step at which ranks are cut a last time and stay; None: when `settle()` is called.
        max_rank: cap, the reserve included.
        inner: makes the optimizer of the other parameters; SGD by default.
        stabilize_every: steps after which bases are orthonormalized again.

    Raises:
        ValueError: options that make no sense; a model without shared factors, or whose network is no Tucker.
        TypeError: not a module.

    References:
        I. Peshekhonov, A. Arzhantsev, M. Rakhuba, Training a Tucker model with shared factors: a Riemannian
        optimization approach, AISTATS 2024.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> from tnlayers.kg.score_tensor import ScoreTensor
        >>> factory = tnlayers.random_network(Tucker, rank=(2, 3, 3))
        >>> model = ScoreTensor(9, 4, inverse=True, network=factory, shared=True)
        >>> optimizer = SharedRiemannianSGD(model, lr=0.1, momentum=0.8, normalize=True)
        >>> model.score_all(torch.tensor([0, 1]), torch.tensor([2, 3])).square().mean().backward()
        >>> _ = optimizer.step()
        >>> model.network.ranks, bool(torch.equal(model.cores[2], model.cores[3]))
        ((2, 3, 3), True)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        normalize: bool = False,
        tol: int | float | None = None,
        reserve: int = 1,
        settle: int | None = None,
        max_rank: int | None = None,
        inner: Inner | None = None,
        stabilize_every: int = 50,
    ) -> None:
        self._adapting(tol, reserve, settle, max_rank)
        super().__init__(
            model,
            lr,
            momentum=momentum,
            weight_decay=weight_decay,
            normalize=normalize,
            inner=inner,
            stabilize_every=stabilize_every,
        )


class SharedRiemannianAdam(_Shared, RiemannianAdam):
    """`RiemannianAdam` on the manifold of Tucker tensors with shared factors, at fixed ranks or by a tolerance.

    One second moment for the core and one for each factor: `lr` is the root mean square change that each of them gives
    to an entry of the dense X. Guarantees and cost as of `SharedRiemannianSGD`.

    Args:
        model: its layers with shared factors are found; other parameters are left to the inner optimizer.
        lr: see above; also that of the inner optimizer.
        betas: decay of the moments.
        weight_decay: decoupled decay of X itself.
        tol: relative error of a step's rounding, in quadrature over the factors; None keeps the ranks.
        reserve: directions kept beyond those of the tolerance while ranks adapt.
        settle: step at which ranks are cut a last time and stay; None: when `settle()` is called.
        max_rank: cap, the reserve included.
        inner: makes the optimizer of the other parameters; AdamW by default.
        stabilize_every: steps after which bases are orthonormalized again.

    Raises:
        ValueError: options that make no sense; a model without shared factors, or whose network is no Tucker.
        TypeError: not a module.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import Tucker
        >>> from tnlayers.kg.score_tensor import ScoreTensor
        >>> factory = tnlayers.random_network(Tucker, rank=(2, 3, 3))
        >>> model = ScoreTensor(9, 4, inverse=True, network=factory, shared=True)
        >>> optimizer = SharedRiemannianAdam(model, lr=0.01, tol=0.1)
        >>> model.score_all(torch.tensor([0, 1]), torch.tensor([2, 3])).square().mean().backward()
        >>> _ = optimizer.step()
        >>> sorted(optimizer.ranks())
        ['']
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        tol: int | float | None = None,
        reserve: int = 1,
        settle: int | None = None,
        max_rank: int | None = None,
        inner: Inner | None = None,
        stabilize_every: int = 50,
    ) -> None:
        self._adapting(tol, reserve, settle, max_rank)
        super().__init__(
            model,
            lr,
            betas=betas,
            weight_decay=weight_decay,
            inner=inner,
            stabilize_every=stabilize_every,
        )
