"""`RankAdaptive`: an optimizer that trains networks along their tangent spaces and finds their ranks.

The default algorithm. In a *window* of `every` steps the weight of each layer is affine in its probes,
`W = W_open + xi(deltas)`; a step moves the deltas, along the gauge-fixed center gradients, by a first moment that is a
tangent vector and a second moment of one number a core, so that no choice of cores for W matters. When the window
closes, `W_open + xi` is rounded by the tolerance, `reserve` directions more are kept, and the moment is transported.
The reserve has orthonormal bases at singular value zero: the gradient that the present rank cannot follow moves it.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import nn

from decompositions import Network, scale
from decompositions.formats.gauge import cutting, orthogonalizing
from decompositions.geometry import Tangent
from decompositions.geometry.gauges import gauging
from decompositions.geometry.retraction import basis_overlaps, extending, follow
from decompositions.geometry.tangent import gauge_fix
from decompositions.lockstep import Job
from tnlayers.integrators.schemes import FIXED, SCHEMES
from tnlayers.integrators.steps import Truncate
from tnlayers.optim.engine import Inner, NetworkOptimizer
from tnlayers.optim.growth import widening
from tnlayers.optim.models import centers, sizes_of, trees
from tnlayers.optim.options import RankLimitWarning, check_options
from tnlayers.optim.ranks import Ranks, check_budget, within_budget
from tnlayers.optim.together import Gradients, step_together
from tnlayers.optim.track import Track
from tnlayers.window import CoreWindow, Window

RENEW = 50
"""Roundings after which bases are orthonormalized again."""


class RankAdaptive(NetworkOptimizer):
    """Train a model whose layers are networks, at ranks that the training finds.

    Every layer of the model whose weight is a tree is stepped here; all other parameters (biases, norms, dense layers)
    go to an inner optimizer, whose groups are among `param_groups`: schedulers, clipping and loss scaling see one
    optimizer. One backward a step. An ordinary loop, with this optimizer in place of another.

    With `p` the center gradients E_v without their part along U_v, `m` and `v` their moments, a core moves by

        delta_v -= lr sqrt(numel(W) / numel(delta_v)) m_v / (sqrt(v_v) + floor),

    so that lr is the root mean square change that one core gives to an entry of the dense W: comparable with Adam's on
    a dense layer, whatever the ranks. `betas=(b, None)` leaves the scaling out: `delta_v -= lr m_v`, heavy ball.

    Guarantees: a step without truncation is `W - lr P(W) G` (tested in every layer); a rounding changes W by at most
    `tol ‖W‖`; bases stay orthonormal to 1e-5 in float32.
    Cost: every = 1 costs a QR and an SVD of every core a step; every = 10 a tenth of it, and doubled ranks in the
    forward (`window="tangent"`), or no more than the plain layers (`window="center"`: one core at a time).

    Args:
        model: its layers are found; those whose cores are frozen, or that are no trees, are left to the inner one.
        lr: see above; also that of the inner optimizer.
        method: "parallel", this algorithm; the others are those of `tnlayers.integrators`, see `step`.
        tol: relative error of a rounding, split over the bonds in quadrature.
        theta: absolute one.
        reserve: directions kept beyond those of the tolerance while ranks adapt. With 0, ranks are stuck where a step
            makes less than the tolerance cuts, and at stationary points of their rank.
        settle: step at which ranks are rounded a last time and stay; None: when `settle()` is called.
        min_rank: least rank of every bond.
        max_rank: cap, the reserve included.
        budget: parameters of all networks together, by which the smallest singular values of all layers are cut.
        every: steps in a window.
        window: "tangent" moves all cores along the tangent space; "center" one core a window, in turn.
        inner: makes the optimizer of the other parameters; AdamW with the same lr, betas and decay by default.
        betas: decay of the moments; the second may be None.
        weight_decay: decoupled decay of W itself, exact: `W <- (1 - lr weight_decay) W` a step.
        generator: of the directions in reserve; a fixed seed by default.

    Raises:
        ValueError: options that make no sense; a model without any tree layer.
        TypeError: not a module.

    References:
        J. Kusch, S. Schotthoefer et al., GeoLoRA, ICLR 2025; S. Schotthoefer et al., Low-rank lottery tickets (DLRT),
        NeurIPS 2022; on trees G. Ceruti, J. Kusch, C. Lubich, D. Sulz, arXiv 2412.00858. The reserve is ours.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=1))
        >>> optimizer = tnlayers.RankAdaptive(layer, lr=0.01, tol=0.1)
        >>> x, y = torch.randn(32, 8), torch.randn(32, 6)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(layer(x), y).backward()
        ...     _ = optimizer.step()
        >>> sorted(optimizer.ranks())
        ['']
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        method: str = "parallel",
        tol: float | None = None,
        theta: float | None = None,
        reserve: int = 1,
        settle: int | None = None,
        min_rank: int = 1,
        max_rank: int | None = None,
        budget: int | None = None,
        every: int = 1,
        window: str = "tangent",
        inner: Inner | None = None,
        betas: tuple[float, float | None] = (0.9, 0.999),
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._check_model(model)
        check_options(lr, tol, theta, reserve, settle, min_rank, max_rank, budget, every, betas, weight_decay)
        if method not in SCHEMES:
            raise ValueError(f"RankAdaptive: method must be one of {tuple(SCHEMES)}, got {method!r}")
        self._by_closure = method != "parallel"
        self._gauged = not self._by_closure
        if self._by_closure and (every != 1 or budget is not None or window != "tangent" or min_rank != 1):
            raise ValueError(
                f"RankAdaptive: method={method!r} has no windows and no budget, expected every=1, budget=None, "
                f"window='tangent' and min_rank=1, got {every}, {budget}, {window!r} and {min_rank}; the default has"
            )
        if method in FIXED and (tol is not None or theta is not None or max_rank is not None):
            raise ValueError(
                f"RankAdaptive: method={method!r} keeps the ranks, expected no tol, theta or max_rank; "
                "method='augmented' adapts them"
            )
        if window not in ("tangent", "center"):
            raise ValueError(f"RankAdaptive: window must be 'tangent' or 'center', got {window!r}")
        if tol is None and theta is None and budget is None and method not in FIXED:
            tol = 0.1
        if self._by_closure:
            reserve = 0
        self.method, self.reserve, self.every, self.window, self.budget = method, reserve, every, window, budget
        self.settle_at, self.fixed = settle, False
        self.generator: torch.Generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.history: list[dict[str, Any]] = []
        self._warned: set[str] = set()
        self._tracks = [
            Track.start(names, layers, Ranks(tol, theta, reserve, min_rank, max_rank))
            for names, layers in trees(model).values()
        ]
        if not self._tracks:
            raise ValueError(
                "RankAdaptive: the model must have a layer whose weight is a tree network with trainable cores, found "
                "none; tensorize the model first, or use torch.optim.AdamW"
            )
        if budget is not None:
            check_budget([track.layer.network for track in self._tracks], min_rank, budget)
        self._run([self._opening(track, first=True) for track in self._tracks])
        self._agree()
        usual = partial(
            torch.optim.AdamW,
            lr=lr,
            betas=(betas[0], 0.999 if betas[1] is None else betas[1]),
            weight_decay=weight_decay,
        )
        self._adopt(model, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, inner, usual)

    # --- windows ---

    def _opening(self, track: Track, net: Network | None = None, *, first: bool = False) -> Job[None]:
        """Hang the tree, make room for the reserve, open the next window; moments come along."""
        old = None if first or track.layer._window is None else track.window
        if self._by_closure:
            net = track.layer.network.detach() if net is None else net
            if first:
                track.ranks.start(net)
            track.ranks.found = dict(zip(net.bonds, net.ranks, strict=True))
            net = track.layer._with_cores([core.contiguous() for core in net.cores])
            track.install(CoreWindow(net, track.root, track.ranks.found))
            return
        gauged = net is not None
        if net is None:
            net = track.layer.network.detach()
            net, _ = yield from cutting(net, lambda bond, squares, norm: len(squares), center=track.root)
        if first:
            track.ranks.start(net)
            zeros = torch.zeros((), device=net.device)
            track.second, track.counts = [zeros.clone() for _ in net.cores], [0] * len(net.cores)
        if not self.fixed:
            net = yield from widening(net, track.ranks.wanted(net), track.root, self.generator)
            track.ranks.kept = dict(zip(net.bonds, net.ranks, strict=True))
        net = track.layer._with_cores([core.contiguous() for core in net.cores])  # they become the layer's Parameters
        # bases are products of orthonormal ones from rounding to rounding: now and then they are made anew
        at = yield from gauging(net, track.root, gauged=(gauged or first) and len(self.history) % RENEW != 0)
        core = None
        if self.window == "center":
            turns = centers(net)
            core = turns[track.turn % len(turns)]
            track.turn += 1
        if old is not None and core is None and old.core is None and track.moment:
            seen = follow(at, old.at, basis_overlaps(at, old.at), track.moment)
            track.moment = list(gauge_fix(at, seen, twice=False).deltas)
        else:
            track.moment = [torch.zeros_like(center) for center in (at.center if core is None else (at.center[core],))]
            track.counts = [0] * len(track.counts) if core is not None or first else track.counts
        track.install(Window(at, core, track.ranks.found))

    def _reopen(self) -> list[Track]:
        """Open windows on weights that somebody has replaced; which these were."""
        closed = [track for track in self._tracks if track.layer._window is None]
        self._run([self._opening(track, first=True) for track in closed])
        if closed:
            self._group_probes()
        return closed

    def _moving(self, track: Track) -> Job[Network]:
        """The weight at the end of a window, as a tree centered at the root."""
        window, layer = track.window, track.layer
        if window.core is not None:
            return (yield from orthogonalizing(layer._contracted.detach(), track.root))
        # what rounding left of the deltas along U, extend drops
        return (yield from extending(Tangent(window.at, tuple(probe.detach() for probe in layer.probes))))

    def _rounding(self, track: Track, settling: bool) -> Job[Network]:
        """The weight at the end of a window, rounded to the ranks that its own tolerance asks for."""
        made = yield from self._moving(track)
        chooser = track.ranks.chooser(made, fixed=self.fixed, reserve=0 if settling else None)
        net, _ = yield from cutting(made, chooser, center=track.root, gauged=True)
        return net

    def _renewing(self, track: Track, net: Network) -> Job[None]:
        """The next window on a weight that was cut."""
        sizes = track.ranks.consistent(net)
        if tuple(sizes.values()) != net.ranks:
            net, _ = yield from cutting(net, sizes_of(sizes), center=track.root, gauged=True)
        track.ranks.kept = dict(zip(net.bonds, net.ranks, strict=True))
        if self.fixed:
            track.ranks.found = dict(track.ranks.kept)
        yield from self._opening(track, net)

    def _close(self, *, settling: bool = False) -> None:
        """Round every network, choose ranks, open the next windows."""
        before = [dict(track.ranks.found) for track in self._tracks]
        nets = self._run([self._rounding(track, settling) for track in self._tracks])
        if not self.fixed:
            for track, found in zip(self._tracks, before, strict=True):
                for key, text in track.limits(found).items():
                    self._say(key, text)
        if self.budget is not None and not self.fixed:
            nets = self._cut_to_budget(nets, settling)
        if settling:
            self.fixed = True
        self._run([self._renewing(track, net) for track, net in zip(self._tracks, nets, strict=True)])
        self._agree()
        self.history.append({"step": self.steps, "ranks": self.ranks()})

    def _cut_to_budget(self, nets: list[Network], settling: bool) -> list[Network]:
        assert self.budget is not None
        chosen = within_budget(nets, [track.ranks for track in self._tracks], self.budget)

        def cut(track: Track, net: Network, found: dict[str, int]) -> Job[Network]:
            if found != track.ranks.found:
                track.ranks.found = found
                sizes = found if settling else track.ranks.wanted(net)
                net, _ = yield from cutting(net, sizes_of(sizes), center=track.root, gauged=True)
            return net

        return self._run([cut(*one) for one in zip(self._tracks, nets, chosen, strict=True)])

    def _say(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(text, RankLimitWarning, stacklevel=4)

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move by the gradients that `backward` left; close the window when it is full.

        A layer without gradient (not used in the forward) stays where it is; weight decay does not move it either.

        The methods of `tnlayers.integrators` other than "parallel" ask for several gradients a step ("augmented": two
        for matrices and Tucker, more for deeper trees): they need a closure that zeroes the gradients, calls backward
        and returns the loss, take plain Euler steps of the gradient flow without moments, reserve and budget, and are
        not for loss scaling. The other parameters move by the gradient of the last call.

        Raises:
            ValueError: a method that needs a closure without one.
        """
        if self._by_closure:
            return self._step_by_closure(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        for track in self._tracks:
            track.check_gradients(self.steps + 1)
        self.steps += 1
        settling = not self.fixed and self.settle_at is not None and self.steps >= self.settle_at
        closing = settling or self.steps % self.every == 0
        reopened = self._reopen()
        for track in self._tracks:
            if any(track is other for other in reopened):
                continue
            if self._move(track, group["lr"], group["betas"], group["weight_decay"]) and not closing:
                for member in track.layers:
                    member.window_moved()
        if self.inner is not None:
            self.inner.step()
        if closing:
            self._close(settling=settling)
        return loss

    def _step_by_closure(self, closure: Callable[[], Any] | None) -> Any:
        if closure is None:
            raise ValueError(
                f"RankAdaptive: method={self.method!r} needs several gradients a step, expected step(closure) with a "
                "closure that zeroes the gradients, calls backward and returns the loss, got none; "
                "method='parallel' needs one backward"
            )
        call, group, losses = closure, self.param_groups[0], []
        self._reopen()

        def evaluate() -> None:
            with torch.enable_grad():
                losses.append(call())

        asked = Gradients(self._tracks, evaluate)
        truncations = []
        for track in self._tracks:
            own, net = track.ranks, track.window.point
            capped = own.most if not self.fixed and self.method not in FIXED else tuple(net.ranks)
            adapting = not self.fixed and self.method not in FIXED
            truncations.append(Truncate(own.tol if adapting else None, own.theta if adapting else None, capped))
        roots = [track.root for track in self._tracks]
        before = [track.window.point for track in self._tracks]
        ranks = [dict(track.ranks.found) for track in self._tracks]
        try:
            nets = step_together(before, roots, truncations, self.method, group["lr"], asked)
        except BaseException:  # interrupted, or the closure's own: the step has not happened
            for track, net, found in zip(self._tracks, before, ranks, strict=True):
                track.install(CoreWindow(net, track.root, found))
            raise
        if self.inner is not None:
            self.inner.step()
        self.steps += 1
        if not self.fixed and self.settle_at is not None and self.steps >= self.settle_at:
            self.fixed = True
        if group["weight_decay"]:
            nets = [scale(net, 1 - group["lr"] * group["weight_decay"]) for net in nets]
        self._run([self._opening(track, net) for track, net in zip(self._tracks, nets, strict=True)])
        self._agree()
        self.history.append({"step": self.steps, "ranks": self.ranks()})
        return losses[0] if losses else None

    def _move(self, track: Track, lr: float, betas: tuple[float, float | None], decay: float) -> bool:
        """Move the probes of a network; whether they moved."""
        layer, window = track.layer, track.window
        probes = layer._active_probes()
        found = [probe.grad for probe in probes]
        if all(gradient is None for gradient in found):
            return False
        track.follow(probes[0])
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(probes, found, strict=True)]
        at = window.at
        centered = window.core is None
        projected = list(gauge_fix(at, filled, twice=False).deltas) if centered else filled
        cores = list(range(len(probes))) if window.core is None else [window.core]
        b1, b2 = betas
        moves = []
        for k, core in enumerate(cores):
            track.counts[core] += 1
            track.moment[k] = track.moment[k].lerp(projected[k], 1 - b1)
            move = track.moment[k] / (1 - b1 ** track.counts[core])
            if b2 is not None:
                square = projected[k].abs().square().mean()
                track.second[core] = torch.lerp(track.second[core].to(square), square, 1 - b2)
            moves.append(move)
        if b2 is None:
            steps = [lr * move for move in moves]
        else:
            roots = [(track.second[core] / (1 - b2 ** max(1, track.counts[core]))).sqrt() for core in cores]
            largest = torch.stack([root * sqrt(move.numel()) for root, move in zip(roots, moves, strict=True)]).max()
            steps = []
            for root, move in zip(roots, moves, strict=True):
                # a core whose gradient is rounding noise (a square basis) must not be blown up to a full step
                floor = largest / sqrt(move.numel()) * max(1e-8, 100 * torch.finfo(move.dtype).eps)
                scale = sqrt(track.numel / move.numel())
                steps.append(lr * scale * move / (root + floor).clamp_min(torch.finfo(move.dtype).tiny))
        for k, (probe, step) in enumerate(zip(probes, steps, strict=True)):
            if decay:
                probe.mul_(1 - lr * decay)
                if not centered or cores[k] == at.root:
                    probe.sub_(at.center[cores[k]], alpha=lr * decay)
            probe.sub_(step)
        return True

    # --- what users ask ---

    def settle(self) -> None:
        """Round by the tolerance a last time, without reserve; ranks stay from now on."""
        if not self.fixed and not self._by_closure:
            self._close(settling=True)
        self.fixed = True

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Ranks of every layer by the tolerance, without the reserve, in the order of `layer.network.bonds`."""
        self._reopen()
        return {
            name: tuple(track.ranks.found[bond] for bond in track.window.point.bonds)
            for track in self._tracks
            for name in track.names
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: resumed runs agree bit by bit."""
        return {
            **super().state_dict(),
            "fixed": self.fixed,
            "generator": self.generator.get_state(),
            "history": copy.deepcopy(self.history),
        }

    def _load_more(self, state_dict: dict[str, Any]) -> None:
        self.fixed = state_dict["fixed"]
        self.generator.set_state(state_dict["generator"].cpu())
        self.history = copy.deepcopy(state_dict["history"])
