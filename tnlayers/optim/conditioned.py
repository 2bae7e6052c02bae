"""`CondLR`: training at fixed rank with a bound on the condition number of every layer's core matrix.

`W = U S V^T` with orthonormal U, V and S kept diagonal: its singular values. One backward gives the center-gauge
gradients `G V`, `U^T G V`, `G^T U` as gradients of probes (`tnlayers.window`); by their parts in the tangent space

    U <- orth(U - lr (I - U U^T) G V S^-1),    V <- orth(V - lr (I - V V^T) G^T U S^-T),    S <- clamp(S - lr U^T G V),

where orth is the sign-fixed QR (of the columns that belong to the new singular values) and clamp puts the singular
values into `[mean - delta, mean + delta]`, `delta = mean (c - 1) / (c + 1)`. That S is well conditioned is what makes
its inverse, here that of a diagonal, harmless: these equations of a curve of fixed rank are not stiff.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from decompositions.geometry import Tangent, center_gradients
from decompositions.geometry.blocks import flatten
from decompositions.geometry.tangent import gauge_fix
from decompositions.linalg import positive_qr, safe_svd
from decompositions.lockstep import Job
from tnlayers.layer import NetworkLayer
from tnlayers.optim.engine import Inner, NetworkOptimizer
from tnlayers.optim.matrices import (
    Middle,
    clamp_condition,
    factors,
    require_middle,
    singular_form,
    singular_gauges,
)
from tnlayers.optim.models import trees
from tnlayers.optim.options import number, refuse
from tnlayers.window import Window

Singular = tuple[Tensor, Tensor, Tensor]
"""U (m, r), singular values (r,), V (n, r)."""


@dataclass
class _Matrix:
    """A network in training: the layers that share it, and its momentum, a tangent vector (one delta a core)."""

    names: list[str]
    layers: list[NetworkLayer]
    at: Middle
    moment: list[Tensor] = field(default_factory=list)
    opened: Window | None = None

    @property
    def name(self) -> str:
        """Of the first layer, for messages."""
        return self.names[0] or "the layer"

    @property
    def layer(self) -> NetworkLayer:
        """The layer that owns the probes."""
        return self.layers[0]

    @property
    def window(self) -> Window:
        """The window that is open."""
        window = self.layer._window
        assert window is not None
        return window

    @property
    def found(self) -> list[Tensor | None]:
        """Gradients of the probes."""
        return [probe.grad for probe in self.layer.probes]

    def singular(self) -> Singular:
        """The present bases and singular values."""
        u, s, v = factors(self.window.point, self.at)
        return u, s.diagonal(), v

    def install(self, point: Singular) -> None:
        """Open a window there in all layers that share the network; the momentum comes along."""
        old = self.layer._window
        gauges = singular_gauges(self.layer.network.detach() if old is None else old.point, self.at, *point)
        if old is not None and self.moment:
            carried = center_gradients(gauges, Tangent(old.at, tuple(self.moment)))  # its projection onto the new space
            self.moment = list(gauge_fix(gauges, carried, twice=False).deltas)
        self.opened = Window(gauges)
        self.layer.open_window(self.opened)
        for twin in self.layers[1:]:
            twin.open_window(self.window, self.layer.probes)

    def digested(self) -> list[Any]:
        """What the next step depends on."""
        return [*self.singular(), *self.moment]

    def state(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        return {
            "names": self.names,
            "point": [part.detach().clone() for part in self.singular()],
            "moment": [delta.clone() for delta in self.moment],
        }

    def load(self, state: dict[str, Any], *, gauged: bool = True) -> None:
        """Inverse of `state`; the layers' weights are set to it too."""
        like = self.layer.cores[0]
        u, sigma, v = (part.to(like) for part in state["point"])
        self.moment = []
        self.install((u, sigma, v))
        self.moment = [delta.to(like).clone() for delta in state["moment"]]

    def follow(self) -> None:
        """Bring the momentum to where the layer was moved to."""
        like = self.layer.probes[0]
        self.moment = [delta.to(like) for delta in self.moment]


class CondLR(NetworkOptimizer):
    """Train a model whose layers are low-rank matrices, each with a condition number of at most `condition`.

    Every layer whose weight is one matrix between two bases, `W = U S V^T` (Linear, convolutions as out x (in k k),
    embeddings; the labels decide, not the class), is stepped here at its rank; all other parameters go to an inner
    optimizer, whose groups are among `param_groups`. One backward a step; an ordinary loop.

    With `G = dL/dW` and a momentum that is a tangent vector, `xi <- momentum P(xi) + P(W) G` (P the projection onto the
    tangent space at the present W), the singular values of S after a step are those of
    `(1 - lr weight_decay) S - lr U^T xi V`, clamped into `[mean - delta, mean + delta]` with
    `delta = mean (c - 1) / (c + 1)`, c = `condition`; the bases move as the module says. c = 1 makes S a multiple of an
    orthogonal matrix, the nearest one in the Frobenius norm (the authors' code scales it by the root mean square of the
    singular values there, and uses (sigma_min / sigma_max)^2 in place of the inverse of S S^T for c > 1).

    Guarantees: cond(S) <= c from the constructor on and after every step, rounding included; bases orthonormal to 1e-5
    in float32 after any number of steps (they are factored anew in each); where no clamp acts, a step is
    `W - lr P(W) G + O(lr^2)`; iterates depend on W alone, not on the cores that it started from. The clamp is the
    authors': it acts wherever a value is outside of the interval, also where cond(S) <= c already, so that W may move
    where the gradient is zero. By the product of the layers' conditions the paper bounds the sensitivity of a model.
    Cost of a step: two QRs (m x r and n x r) and an SVD (r x r) a layer, O((m + n) r^2 + r^3).

    Args:
        model: its layers are found. Layers with frozen cores or that are no trees are left to the inner optimizer.
            The singular values are clamped at once: the weights change here.
        lr: step size of the gradient flow; also that of the inner optimizer.
        condition: c >= 1; the paper's 1 + tau, with tau = .1 and .5.
        momentum: in [0, 1), as `torch.optim.SGD`'s.
        weight_decay: decoupled decay of W; the inner optimizer has its own way.
        inner: makes the optimizer of the other parameters; `torch.optim.SGD` with the same lr, momentum and decay by
            default.

    Raises:
        ValueError: options that make no sense; a tree layer that is not one matrix between two bases; no layer at all;
            a weight that is zero or not finite; float16 or bfloat16 cores (autocast is welcome).
        TypeError: not a module.

    References:
        D. Savostianova, E. Zangrando, G. Ceruti, F. Tudisco, Robust low-rank training via approximate orthonormal
        constraints, NeurIPS 2023, arXiv 2306.01485. Momentum in the tangent space is ours.

    Example:
        >>> import torch, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=3))
        >>> optimizer = tnlayers.CondLR(layer, lr=0.1, condition=1.5)
        >>> x, y = torch.randn(32, 8), torch.randn(32, 6)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(layer(x), y).backward()
        ...     _ = optimizer.step()
        >>> optimizer.conditions()[""] <= 1.5
        True
    """

    def __init__(
        self,
        model: nn.Module,
        lr: int | float,
        *,
        condition: int | float = 1.5,
        momentum: int | float = 0.0,
        weight_decay: int | float = 0.0,
        inner: Inner | None = None,
    ) -> None:
        self._check_model(model)
        _check_options(lr, condition, momentum, weight_decay)
        self.condition = float(condition)
        self._tracks = [
            _Matrix(names, layers, require_middle("CondLR", names[0], layers[0].network))
            for names, layers in trees(model).values()
        ]
        if not self._tracks:
            raise ValueError(
                "CondLR: the model must have a layer whose weight is one matrix between two bases with trainable "
                "cores, found none; tensorize the model to LowRank first, or use torch.optim.SGD"
            )
        self._open(self._tracks)
        self._agree()
        usual = partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._adopt(model, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, inner, usual)

    # --- points ---

    def _clamped(self, job: Job[Singular]) -> Job[Singular]:
        u, sigma, v = yield from job
        return u, clamp_condition(sigma, self.condition), v

    def _open(self, tracks: Sequence[_Matrix]) -> None:
        """Bring weights that others have set to the singular form, and their singular values into the interval."""
        for track in tracks:
            net = track.layer.network.detach()
            if net.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"CondLR: orthonormal bases need float32 or float64, got {net.dtype} in {track.name}; keep the "
                    "model in float32 and compute in half precision under torch.autocast"
                )
            if not all(bool(core.isfinite().all()) for core in net.cores):
                raise ValueError(f"CondLR: weights must be finite, got NaN or infinity in {track.name}")
        found = self._run([self._clamped(singular_form(*factors(t.layer.network.detach(), t.at))) for t in tracks])
        for track, point in zip(tracks, found, strict=True):
            if not bool(point[1].min() > 0):
                raise ValueError(
                    f"CondLR: a weight of zero has no condition number, got one in {track.name}; "
                    "reset_parameters() draws another"
                )
        for track, point in zip(tracks, found, strict=True):
            track.moment = []
            track.install(point)

    def _reopen(self) -> list[_Matrix]:
        """Take weights that somebody has replaced; which these were.

        Raises:
            ValueError: another optimizer has opened windows in our layers.
        """
        for track in self._tracks:
            if track.layer._window not in (None, track.opened):
                raise ValueError(
                    f"CondLR: {track.name} is moved by another optimizer that was made after this one, expected one "
                    "optimizer a layer; make this one anew to go on with it"
                )
        closed = [track for track in self._tracks if track.layer._window is None]
        if closed:
            self._open(closed)
            self._group_probes()
        return closed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; weights that were replaced since are taken here, or in `step`."""
        self._reopen()
        super().zero_grad(set_to_none)

    # --- the step ---

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move by the gradients that `backward` left.

        A layer without gradient (not used in the forward) stays where it is; weight decay does not move it either.

        Raises:
            ValueError: gradients that are not finite, or a step to a weight that is zero or not finite; nothing was
                moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        group = self.param_groups[0]
        reopened = self._reopen()
        moving = [
            track
            for track in self._tracks
            if not any(track is other for other in reopened) and any(g is not None for g in track.found)
        ]
        before = [track.moment for track in moving]
        with torch.autocast(self._tracks[0].layer.cores[0].device.type, enabled=False):
            try:
                points = self._points(moving, group["lr"], group["momentum"], group["weight_decay"])
            except BaseException:
                for track, moment in zip(moving, before, strict=True):
                    track.moment = moment
                raise
            for track, point in zip(moving, points, strict=True):
                if not group["momentum"]:
                    track.moment = []
                track.install(point)
        if self.inner is not None:
            self.inner.step()
        self.steps += 1
        self._agree()
        return loss

    def _points(self, moving: Sequence[_Matrix], lr: float, momentum: float, decay: float) -> list[Singular]:
        """Where the networks go; nothing but their momenta has changed yet."""
        moves = [self._move(track, lr, momentum, decay) for track in moving]
        self._check(moving, [part for move in moves for part in move], parts=3)
        points = self._run([self._clamped(_retracted(*move)) for move in moves])
        self._check(moving, [part for u, sigma, v in points for part in (u, sigma, 1 / sigma, v)], parts=4)
        return points

    def _move(self, track: _Matrix, lr: float, momentum: float, decay: float) -> tuple[Tensor, Tensor, Tensor]:
        """U, S and V after the step, before the bases are orthonormalized and S is clamped."""
        track.follow()
        window, at = track.window, track.at
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(track.layer.probes, track.found, strict=True)]
        moment = list(gauge_fix(window.at, filled, twice=False).deltas)
        if track.moment:
            moment = [new.add(old, alpha=momentum) for new, old in zip(moment, track.moment, strict=True)]
        track.moment = moment
        u, sigma, v = track.singular()
        legs = window.point.legs
        first, second = legs[at.center]
        du = flatten(moment[at.left], legs[at.left].index(first))
        dv = flatten(moment[at.right], legs[at.right].index(second))
        core = torch.diag((1 - lr * decay) * sigma).sub(moment[at.center], alpha=lr)
        return u.sub(du / sigma, alpha=lr), core, v.sub(dv / sigma, alpha=lr)

    def _check_gradients(self) -> None:
        """Refuse gradients that are not finite, those of the inner optimizer too, before anything moves."""
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        values = [g.coalesce().values() if g.is_sparse else g for g in found]
        if values and not bool(_finite(values).all()):
            bad = [t.name for t in self._tracks if not all(bool(g.isfinite().all()) for g in t.found if g is not None)]
            raise ValueError(
                f"CondLR: gradients must be finite, got NaN or infinity in {bad[0] if bad else 'other parameters'} at "
                f"step {self.steps + 1}; nothing was moved: lower lr, clip, or scale the loss"
            )

    def _check(self, moving: Sequence[_Matrix], values: Sequence[Tensor], parts: int) -> None:
        """Refuse a step to weights that are zero or not finite."""
        if not values:
            return
        finite = _finite(values)
        if not bool(finite.all()):
            worst = moving[int((~finite).nonzero()[0]) // parts]
            raise ValueError(
                f"CondLR: step {self.steps + 1} would make the weight of {worst.name} zero or infinite; nothing was "
                "moved: lower lr or weight_decay"
            )

    # --- what users ask ---

    def conditions(self) -> dict[str, float]:
        """Condition number of every layer's S, in the order of the model; one number a name, ties included."""
        self._reopen()
        made = {}
        for track in self._tracks:
            sigma = track.singular()[1].double()
            made.update(dict.fromkeys(track.names, float(sigma.max() / sigma.min())))
        return made


def _retracted(u: Tensor, core: Tensor, v: Tensor) -> Job[Singular]:
    """The core turned to a diagonal, the bases along with it and then to orthonormal ones.

    In this order the result depends on `U S V^T` and the tangent step alone: another choice of bases turns the columns
    that the QR sees by signs at most.
    """
    p, sigma, qh = yield safe_svd, core
    left, _ = yield positive_qr, u @ p
    right, _ = yield positive_qr, v @ qh.mT
    return left, sigma, right


def _finite(values: Sequence[Tensor]) -> Tensor:
    """Whether all entries of each are finite, by the largest magnitude: nothing overflows, NaN comes through."""
    found = [v.abs().max().double() if v.numel() else v.new_zeros((), dtype=torch.float64) for v in values]
    return torch.stack([one.to(found[0].device) for one in found]).isfinite()


def _check_options(lr: Any, condition: Any, momentum: Any, weight_decay: Any) -> None:
    """Refuse options that make no sense, by name."""
    refuse(
        "CondLR",
        [
            ("lr", lr, number(lr, 0), "a number >= 0"),
            ("condition", condition, number(condition, 1), "a finite number >= 1 (the bound of cond(S))"),
            ("momentum", momentum, number(momentum, 0, 1), "a number in [0, 1)"),
            ("weight_decay", weight_decay, number(weight_decay, 0), "a number >= 0"),
        ],
    )
