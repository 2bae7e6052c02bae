"""What a layer contracts while an optimizer moves it along its tangent space: the point, and Parameters for the change.

Between two changes of ranks (a window) the weight of a layer is affine in its *probes*: `W = W_open + xi(deltas)`, one
delta a core in the gauge centered there (`decompositions.geometry`), or the delta of one core alone. The probes are
ordinary Parameters of the layer, so that `backward` gives the center-gauge gradients as their `.grad`, and clipping,
accumulation, loss scaling and reduction see nothing special; they are not in `state_dict`. The cores' own `.grad` stays
None: the cores are the point at which the window was opened.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn

from decompositions import Network, to_dense
from decompositions.formats.gauge import cut_by
from decompositions.geometry import Chain, Gauges, Tangent, center_gradients, longest_path
from tnlayers.frozen import Freezable, release
from tnlayers.rank_change import announce, resize_

followers: WeakKeyDictionary[nn.Module, WeakMethod[Any]] = WeakKeyDictionary()
"""Who is told when a layer has opened a window, as its probes may be new Parameters (the reduction of gradients)."""


class Probes(nn.ParameterList):
    """Parameters that no state dict holds: what they mean ends with the window."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class Window:
    """A layer's weight as an affine function of its probes.

    Args:
        at: gauges of the point; `at.net` are the layer's cores.
        core: None where all cores move along the tangent space; otherwise the only one that moves, unrestricted.
        ranks: of every bond, without the directions in reserve.
    """

    def __init__(self, at: Gauges[Any], core: int | None = None, ranks: dict[str, int] | None = None) -> None:
        self.at, self.core, self.point = at, core, at.net
        self.ranks = dict(zip(at.net.bonds, at.net.ranks, strict=True)) if ranks is None else ranks
        self.fresh = True  # until an optimizer of ours moves the probes
        self._chain: Chain[Any] | None = None
        self._stamps: list[tuple[Tensor, int]] = []

    def shape(self, core: int) -> tuple[int, ...]:
        """Shape of the probe of a core."""
        return tuple(self.at.center[core].shape)

    def watch(self, probes: Sequence[Tensor]) -> None:
        """The probes are zero now."""
        self._stamps = [(probe, probe._version) for probe in probes]

    def still(self, probes: Sequence[Tensor]) -> bool:
        """Whether the probes are zero: the layer's own (not others put in their place), and nobody wrote to them."""
        if torch.compiler.is_compiling():  # one program for probes at zero and elsewhere; nor can it read versions
            return False
        if not self.fresh or len(self._stamps) != len(probes):
            return False
        return all(p is q and p._version == v for p, (q, v) in zip(probes, self._stamps, strict=True))

    def at_point(self, probes: Sequence[Tensor]) -> bool:
        """Whether the gradient may come by the routes that hold at the point itself."""
        plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
        return self.core is None and torch.is_grad_enabled() and plain and self.still(probes)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follow the layer to another dtype or device."""
        at = self.at
        net = at.net._unchecked([fn(core) for core in at.net.cores], at.net.legs, at.net.rows, at.net.cols)
        self.at = replace(
            at,
            net=net,
            up=tuple(fn(core) for core in at.up),
            down=tuple(None if core is None else fn(core) for core in at.down),
            center=tuple(fn(core) for core in at.center),
            links={bond: fn(link) for bond, link in at.links.items()},
        )
        self.point, self._chain = net, None

    def lay_out(self) -> None:
        """Contiguous tensors of their own: a compiled program is made for one layout in memory, and for no views."""
        self.move(partial(torch.clone, memory_format=torch.contiguous_format))

    def cores(self, probes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Cores of a network with the current weight, differentiable with respect to the probes."""
        at = self.at
        if self.core is not None:
            cores = list(at.centered(self.core).cores)
            cores[self.core] = at.center[self.core] + probes[0]
            return tuple(cores)
        if self.still(probes) and not torch.is_grad_enabled():
            return at.net.cores
        return tuple(Tangent(at, tuple(probes)).blocks(point=True).to_cores())

    def compacted(self, net: Network) -> Network:
        """The weight `net` without the directions in reserve."""
        return cut_by(net, lambda bond, squares, norm: self.ranks[bond])[0]

    def dense(self, probes: Sequence[Tensor]) -> Tensor | None:
        """The dense weight at the point itself, whose gradient G becomes that of every center; None once it has moved.

        Two sweeps of contractions of G in place of autograd through doubled cores.
        """
        if not self.at_point(probes):
            return None
        made: Tensor = _Dense.apply(self.at, *probes)
        return made

    def multiply(self, x: Tensor, probes: Sequence[Tensor]) -> Tensor | None:
        """`x W^T` at the point itself by the two-gauge chain, x (batch, columns); None once it has moved."""
        square = all(link.shape[0] == link.shape[1] for link in self.at.links.values())
        if not square or not self.at_point(probes):
            return None
        if self._chain is None:
            self._chain = Chain(self.at, chain_path(self.at))
        made: Tensor = _Multiply.apply(self._chain, x, *probes)
        return made


def chain_path(at: Gauges[Any]) -> tuple[int, ...]:
    """The longest path of a tree through its root, from the end nearer to the columns."""
    net = at.net
    path = longest_path(net)
    if at.root not in path:
        path = (at.root,)
    cols = set(net.cols)
    return path if cols & set(net.legs[path[0]]) else path[::-1]


class CoreWindow(Window):
    """One core of a network moves, the others are as they are: what a scheme asks the gradient of."""

    def __init__(self, point: Network, core: int, ranks: dict[str, int]) -> None:
        self.point, self.core, self.ranks, self.fresh = point, core, ranks, True
        self._stamps = []

    def shape(self, core: int) -> tuple[int, ...]:
        """Shape of the probe of a core."""
        return tuple(self.point.cores[core].shape)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """See `Window`."""
        net = self.point
        self.point = net._unchecked([fn(core) for core in net.cores], net.legs, net.rows, net.cols)

    def cores(self, probes: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See `Window`."""
        return tuple(core + probes[0] if k == self.core else core for k, core in enumerate(self.point.cores))


class _Dense(torch.autograd.Function):
    """The dense tensor of a tree; its gradient is contracted to those of all centers."""

    @staticmethod
    def forward(ctx: Any, at: Gauges[Any], *probes: Tensor) -> Tensor:
        ctx.at = at
        return to_dense(at.net)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        found = center_gradients(ctx.at, gradient)
        return (None, *(g if needed else None for g, needed in zip(found, ctx.needs_input_grad[1:], strict=True)))


class _Multiply(torch.autograd.Function):
    """The two-gauge chain as an autograd function."""

    @staticmethod
    def forward(ctx: Any, chain: Chain[Any], x: Tensor, *probes: Tensor) -> Tensor:
        y, kept = chain.forward(x)
        ctx.chain, ctx.labels = chain, [labels for _, labels in kept]
        ctx.save_for_backward(x, *probes, *(value for value, _ in kept))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        many = 1 + len(ctx.chain.at.center)
        if torch.is_grad_enabled():  # a graph of the gradients is asked for: that of the affine cores
            x, *probes = ctx.saved_tensors[:many]
            net = Tangent(ctx.chain.at, tuple(probes)).to_network(point=True)
            y = x @ to_dense(net).reshape(gradient.shape[1], -1).mT
            wanted = [v for v in (x, *probes) if v.requires_grad]
            made = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True, allow_unused=True))
            return (None, *(next(made) if v.requires_grad else None for v in (x, *probes)))
        kept = list(zip(ctx.saved_tensors[many:], ctx.labels, strict=True))
        gx, found = ctx.chain.backward(kept, gradient)
        return (None, gx, *found)


class Movable(Freezable):
    """What every layer has to be moved by an optimizer: the window, and the Parameters of the change."""

    probes: Probes
    _pinned = False  # whether changes of ranks leave the stored plan as it is: the layer is part of a compiled model
    _window: Window | None = None

    def _replan(self) -> None:
        """Make the plans for the present sizes."""
        raise TypeError("Movable._replan: expected a layer, got the base")

    def open_window(self, window: Window, probes: Probes | None = None) -> None:
        """Contract the affine weight of a window instead of the cores, until `close_window` (or another weight).

        For optimizers. The cores become those of the window's point; `probes` (of a tied layer) are shared, else the
        layer's own are zeroed and resized, the same Parameter objects from window to window.
        """
        release(self)
        if self._pinned:
            window.lay_out()
        for parameter, core in zip(self.cores, window.point.cores, strict=True):
            if parameter.data_ptr() != core.data_ptr() or parameter.shape != core.shape:
                parameter.grad = None
                with torch.no_grad():
                    parameter.set_(core)
        if probes is not None:
            self.probes = probes
        elif "probes" not in self._modules:
            self.probes = Probes([nn.Parameter(core.new_zeros(core.shape)) for core in window.point.cores])
        if probes is None:
            moving = range(len(self.cores)) if window.core is None else (window.core,)
            for k, parameter in enumerate(self.probes):
                shape = window.shape(k) if k in moving else (0,)
                if parameter.shape == shape:
                    parameter.grad = None
                    with torch.no_grad():
                        parameter.zero_()
                else:
                    resize_(parameter, window.point.cores[k].new_zeros(shape))
        old, self._window = self._window, window
        window.watch(self._active_probes())
        if old is None or (old.point.ranks, old.core) != (window.point.ranks, window.core) or not window.fresh:
            self._replan()
        if old is not None and old.point.ranks != window.point.ranks:
            announce(self, list(self.cores), resized=True)
        follow = followers[self]() if self in followers else None
        if follow is not None:
            follow(self)

    def close_window(self) -> None:
        """Back to the cores; what the probes had changed is dropped (an optimizer calls set_network with it)."""
        if self._window is not None:
            self._window = None
            del self.probes

    @property
    def _contracted(self) -> Network:
        """The network that forward contracts."""
        raise TypeError("Movable._contracted: expected a layer, got the base")

    def window_moved(self) -> None:
        """The probes are no longer zero."""
        if self._window is not None and self._window.fresh:
            self._window.fresh = False
            if self._window.core is None:
                self._replan()
        release(self)  # what was frozen from the weight before

    def _active_probes(self) -> list[Tensor]:
        """The probes of the cores that move."""
        core = None if self._window is None else self._window.core
        return list(self.probes) if core is None else [self.probes[core]]
