"""`RiemannianSGD` and `RiemannianAdam`: networks of fixed ranks, moved on the manifold of trees with these ranks.

Every step starts at a point in its gauges. The layers' probes receive the gradients of all centers in one backward
(`tnlayers.window`); the step is a tangent vector, the new point its Galerkin retraction: one QR a bond, no singular
values, no inverse of a core. The moments are tangent vectors in the bases of the point and follow them. All of it
depends on the tensor W alone: other cores for the same W give the same steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from decompositions import Network
from decompositions.formats.gauge import cutting
from decompositions.geometry import Tangent
from decompositions.geometry.blocks import flatten
from decompositions.geometry.gauges import gauging
from decompositions.geometry.retraction import follow, galerkin_retracting
from decompositions.geometry.tangent import gauge_fix
from decompositions.lockstep import Job
from tnlayers.optim.engine import Inner, NetworkOptimizer
from tnlayers.optim.models import trees
from tnlayers.optim.options import integer, number, refuse
from tnlayers.optim.ranks import Ranks
from tnlayers.optim.track import Track
from tnlayers.window import Window


class _Riemannian(NetworkOptimizer):
    """What all have in common: the networks of a model, their windows, the retraction, the inner optimizer.

    The geometry is that of trees; another one overrides `_found`, `_starting`, `_opening`, `_fixed`, `_squares` and
    `_retracting`.
    """

    _wanted = "a tree network with trainable cores, found none; tensorize the model first, or use torch.optim.AdamW"
    _tracks: list[Track]

    def __init__(
        self, model: nn.Module, defaults: dict[str, Any], inner: Inner | None, usual: Inner, stabilize_every: int
    ) -> None:
        name = type(self).__name__
        self._check_model(model)
        refuse(
            name,
            [
                ("lr", defaults["lr"], number(defaults["lr"], 0), "a number >= 0"),
                ("weight_decay", defaults["weight_decay"], number(defaults["weight_decay"], 0), "a number >= 0"),
                ("stabilize_every", stabilize_every, integer(stabilize_every, 1), "an int >= 1"),
            ],
        )
        self.stabilize_every = stabilize_every
        self._tracks = self._found(model)
        if not self._tracks:
            raise ValueError(f"{name}: the model must have a layer whose weight is {self._wanted}")
        self._run([self._starting(track) for track in self._tracks])
        self._agree()
        self._adopt(model, defaults, inner, usual)

    def _found(self, model: nn.Module) -> list[Track]:
        """The networks of the model."""
        return [Track.start(names, layers, Ranks(None, None, 0, 1, None)) for names, layers in trees(model).values()]

    def _starting(self, track: Track) -> Job[None]:
        """Open the first window on the weight as it is; moments are zero."""
        net = track.layer.network.detach()
        net, _ = yield from cutting(net, lambda bond, squares, norm: len(squares), center=track.root)
        track.ranks.start(net)
        track.moment = []
        track.second = [torch.zeros((), device=net.device) for _ in net.cores]
        track.counts = [0] * len(net.cores)
        yield from self._opening(track, net)

    def _opening(self, track: Track, net: Network) -> Job[None]:
        net = track.layer._with_cores([core.contiguous() for core in net.cores])
        at = yield from gauging(net, track.root, gauged=True)
        track.install(Window(at, None, track.ranks.found))

    def _reopen(self) -> list[Track]:
        """Open windows on weights that somebody has replaced; which these were."""
        closed = [track for track in self._tracks if track.layer._window is None]
        if closed:
            self._run([self._starting(track) for track in closed])
            self._group_probes()
        return closed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move by the gradients that `backward` left; a layer without gradient stays where it is.

        Raises:
            ValueError: gradients that are not finite; nothing was moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for track in self._tracks:
            track.check_gradients(self.steps + 1, type(self).__name__)
        self.steps += 1
        reopened = self._reopen()
        moving = [track for track in self._tracks if not any(track is other for other in reopened)]
        self._run([self._moving(track) for track in moving])
        if self.inner is not None:
            self.inner.step()
        self._agree()
        return loss

    def _moving(self, track: Track) -> Job[None]:
        """One network: tangent step, retraction, the next window; moments come along."""
        probes = track.moving
        found = [probe.grad for probe in probes]
        if all(gradient is None for gradient in found):
            return
        track.follow(probes[0])
        group, at = self.param_groups[0], track.window.at
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, found, strict=True)]
        if not track.moment:
            track.moment = [torch.zeros_like(g) for g in gradients]
        deltas = self._direction(track, gradients)
        decay = 1 - group["lr"] * group["weight_decay"]
        if decay != 1:  # W shrinks, and the tangent vector stays what it is
            deltas[at.root] = deltas[at.root] - (1 - decay) * at.center[at.root]
        yield from self._retracting(track, deltas)

    def _fixed(self, at: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the deltas without what the gauge forbids: the Riemannian gradient."""
        return list(gauge_fix(at, gradients, twice=False).deltas)

    def _squares(self, at: Any, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Squared norms of the parts of the Riemannian gradient, before `_fixed`."""
        squares = [torch.linalg.vector_norm(g).square() for g in gradients]
        for edge in at.edges:  # without the part along U_e, of which the core above has the same coordinates
            axis, down = at.axis(edge.parent, edge.bond), at.down[edge.child]
            assert down is not None
            along = flatten(gradients[edge.parent], axis).mT @ flatten(down, axis).conj()
            squares[edge.child] = (squares[edge.child] - torch.linalg.vector_norm(along).square()).clamp_min(0)
        return squares

    def _retracting(self, track: Track, deltas: Sequence[Tensor]) -> Job[None]:
        """The next point and its window; moments come along."""
        at = track.window.at
        near = self.steps % self.stabilize_every != 0
        moved = yield from galerkin_retracting(Tangent(at, tuple(deltas)), near=near)
        yield from self._opening(track, moved.net)
        track.moment = follow(track.window.at, at, moved.overlaps, track.moment)

    def _direction(self, track: Track, gradients: list[Tensor]) -> list[Tensor]:
        """Update the moments by the gradients of the centers; the tangent step, gauge-fixed."""
        raise TypeError("_Riemannian._direction: expected RiemannianSGD or RiemannianAdam, got the base")

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Ranks of every layer, in the order of `layer.network.bonds`."""
        self._reopen()
        return {name: track.window.point.ranks for track in self._tracks for name in track.names}


class RiemannianSGD(_Riemannian):
    """Gradient descent with momentum on the manifold of trees of fixed ranks.

    `m <- momentum T(m) + grad f(W)`, `W <- R_W(-lr m)`: the Riemannian gradient `P(W) G` of the embedded manifold, the
    Galerkin retraction R (`galerkin_retract`), and the transport T that lets a tangent vector follow its bases. With
    `momentum = 0` it is `W - lr P(W) G` up to O(lr^2). Weight decay is decoupled, `W <- (1 - lr weight_decay) W`.

    Guarantees: the iterates depend on W alone, not on its cores; bases are orthonormal to 1e-5 in float32; ranks stay.
    Cost: a QR a bond and about a dozen products of a core with r x r matrices a step.

    Args:
        model: its layers are found; those whose cores are frozen, or that are no trees, are left to the inner one.
        lr: step size, as of gradient descent on the dense W; also that of the inner optimizer.
        momentum: in [0, 1).
        weight_decay: of W.
        normalize: divide every network's Riemannian gradient by its norm: a step then changes W by lr (in Frobenius
            norm, without momentum) whatever the scale of the loss; lr should decrease.
        inner: makes the optimizer of the other parameters; SGD with the same lr, momentum and decay by default.
        stabilize_every: steps after which bases come from a Householder QR; see `RiemannianAdam`.

    Raises:
        ValueError: options that make no sense; a model without any tree layer.
        TypeError: not a module.

    References:
        P.-A. Absil, R. Mahony, R. Sepulchre, Optimization algorithms on matrix manifolds, 2008; B. Vandereycken,
        Low-rank matrix completion by Riemannian optimization, SIAM J. Optim. 2013.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> optimizer = tnlayers.RiemannianSGD(layer, lr=0.1, momentum=0.9)
        >>> layer(torch.randn(32, 8)).square().mean().backward()
        >>> _ = optimizer.step()
        >>> layer.network.ranks
        (2, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        normalize: bool = False,
        inner: Inner | None = None,
        stabilize_every: int = 50,
    ) -> None:
        refuse("RiemannianSGD", [("momentum", momentum, number(momentum, 0, 1), "a number in [0, 1)")])
        usual = partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "normalize": normalize}
        super().__init__(model, defaults, inner, usual, stabilize_every)

    def _direction(self, track: Track, gradients: list[Tensor]) -> list[Tensor]:
        group, at = self.param_groups[0], track.window.at
        if group["normalize"]:
            gradients = self._fixed(at, gradients)
            size = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            gradients = [g / size.clamp_min(torch.finfo(size.dtype).tiny) for g in gradients]
        track.moment = [m * group["momentum"] + g for m, g in zip(track.moment, gradients, strict=True)]
        track.moment = self._fixed(at, track.moment)
        return [-group["lr"] * delta for delta in track.moment]


class RiemannianAdam(_Riemannian):
    """Adam on the manifold of trees of fixed ranks, with one second moment a core.

    With p the Riemannian gradient in the coordinates of the point (one delta a core), m its first moment, which follows
    the bases, and v_k the second moment of the root mean square of core k's delta,

        delta_k = -lr sqrt(numel(W) / numel(delta_k)) m_k / (sqrt(v_k) + floor),    W <- R_W(delta),

    bias-corrected: lr is the root mean square change that one core gives to an entry of the dense W, comparable with
    Adam's on a dense layer, whatever the ranks. A second moment of every entry would depend on the choice of bases.

    Guarantees: the iterates depend on W alone, not on its cores; bases are orthonormal to 1e-5 in float32; ranks stay.
    Cost: a QR a bond and about a dozen products of a core with r x r matrices a step.

    Args:
        model: its layers are found; those whose cores are frozen, or that are no trees, are left to the inner one.
        lr: see above; also that of the inner optimizer.
        betas: decay of the moments.
        weight_decay: decoupled decay of W itself, `W <- (1 - lr weight_decay) W` a step.
        inner: makes the optimizer of the other parameters; AdamW with the same lr, betas and decay by default.
        stabilize_every: in between, steps that are small beside the singular values take bases by products and a
            Cholesky factorization of a matrix near 1, which is as accurate and faster; every so many steps, and
            elsewhere, by a Householder QR.

    Raises:
        ValueError: options that make no sense; a model without any tree layer.
        TypeError: not a module.

    References:
        G. Becigneul, O.-E. Ganea, Riemannian adaptive optimization methods, ICLR 2019 (one second moment a factor).

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> optimizer = tnlayers.RiemannianAdam(layer, lr=0.01)
        >>> layer(torch.randn(32, 8)).square().mean().backward()
        >>> _ = optimizer.step()
        >>> layer.network.ranks
        (2, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        inner: Inner | None = None,
        stabilize_every: int = 50,
    ) -> None:
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        decays = pair and all(number(beta, 0, 1) for beta in betas)
        refuse("RiemannianAdam", [("betas", betas, decays, "two numbers in [0, 1)")])
        usual = partial(torch.optim.AdamW, lr=lr, betas=betas, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(model, defaults, inner, usual, stabilize_every)

    def _direction(self, track: Track, gradients: list[Tensor]) -> list[Tensor]:
        group, at = self.param_groups[0], track.window.at
        b1, b2 = group["betas"]
        track.moment = [m.lerp(g, 1 - b1) for m, g in zip(track.moment, gradients, strict=True)]
        squares = self._squares(at, gradients)
        # what is left along U_e would turn into a step of the core below at the next point, out of all proportion
        track.moment = self._fixed(at, track.moment)
        roots, steps = [], []
        for k, delta in enumerate(track.moment):
            track.counts[k] += 1
            mean = squares[k] / max(1, delta.numel())
            track.second[k] = torch.lerp(track.second[k].to(mean), mean, 1 - b2)
            roots.append((track.second[k] / (1 - b2 ** track.counts[k])).sqrt())
        largest = torch.stack(
            [root * sqrt(delta.numel()) for root, delta in zip(roots, track.moment, strict=True)]
        ).max()
        for k, (root, delta) in enumerate(zip(roots, track.moment, strict=True)):
            # a core whose gradient is rounding noise (a square basis) must not be blown up to a full step
            floor = largest / sqrt(max(1, delta.numel())) * max(1e-8, 100 * torch.finfo(delta.dtype).eps)
            scale = group["lr"] * sqrt(track.numel / max(1, delta.numel())) / (1 - b1 ** track.counts[k])
            steps.append(delta / (root + floor).clamp_min(torch.finfo(delta.dtype).tiny) * -scale)
        return steps
