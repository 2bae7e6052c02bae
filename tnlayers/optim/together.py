"""The schemes of `tnlayers.integrators` on all networks of a model at once, with gradients from a closure.

A scheme asks for the right-hand side of one network at a time; a model gives the gradients of all its networks in one
backward. So every network runs its scheme in a thread of its own, each of which waits when it asks; when all that still
run have asked, one call of the closure answers them all. Threads never run beside each other's evaluation, and nothing
depends on their order.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions import Network
from decompositions.geometry import gauges
from tnlayers.integrators.fields import CoreField
from tnlayers.integrators.schemes import SCHEMES
from tnlayers.integrators.steps import SUBSTEPS, Stepper, Truncate
from tnlayers.optim.track import Track
from tnlayers.window import CoreWindow, Window


class Request(NamedTuple):
    """Where a scheme wants the gradient: a network, and the core it wants it of."""

    network: Network
    core: int


class Gradients:
    """Answers requests by windows and one backward for all of them.

    What schemes ask first is the gradient of core after core at the point where the step starts, in the gauge centered
    there: one backward with all cores in motion gives them all.

    Args:
        tracks: the networks.
        backward: makes the gradients of the model as it is.
    """

    def __init__(self, tracks: Sequence[Track], backward: Callable[[], None]) -> None:
        self._tracks, self._backward = tracks, backward
        self._starts = [gauges(track.window.point, track.root) for track in tracks]
        self._known: list[list[Tensor]] | None = None

    def known(self, k: int, request: Request) -> Tensor | None:
        """A gradient that is at hand."""
        if self._known is None or not self._at_start(k, request):
            return None
        return self._known[k][request.core]

    def __call__(self, requests: Mapping[int, Request]) -> dict[int, Tensor]:
        """The gradients asked for."""
        if self._known is None and any(self._at_start(k, request) for k, request in requests.items()):
            for track, at in zip(self._tracks, self._starts, strict=True):
                track.install(Window(at, None, track.ranks.found))
            self._backward()
            self._known = [_gradients(track.layer.probes) for track in self._tracks]
        at_hand = {k: self.known(k, request) for k, request in requests.items()}
        found = {k: value for k, value in at_hand.items() if value is not None}
        others = [k for k in requests if k not in found]
        if others:
            for k in others:
                self._tracks[k].install(CoreWindow(*requests[k], self._tracks[k].ranks.found))
            self._backward()
            for k in others:
                core = requests[k].core
                found[k] = _gradients([self._tracks[k].layer.probes[core]])[0]
        return found

    def _at_start(self, k: int, request: Request) -> bool:
        cores = self._starts[k].centered(request.core).cores
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(cores, request.network.cores, strict=True))


def _gradients(probes: Iterable[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in probes]


class _Stopped(Exception):
    """Another network's scheme has failed."""


class _Asking:
    """A field whose values come from outside."""

    def __init__(self, ask: Callable[[Request], Tensor]) -> None:
        self._ask = ask

    def __call__(self, t: float, y: Tensor) -> Tensor:
        raise TypeError("the gradient of a model is only known at networks")

    def restrict(self, net: Network, core: int) -> CoreField:
        """See `tnlayers.integrators.Field`."""

        def derivative(t: float, value: Tensor) -> Tensor:
            cores = [value if k == core else own for k, own in enumerate(net.cores)]
            return -self._ask(Request(net._unchecked(cores, net.legs, net.rows, net.cols), core))

        return derivative


def step_together(
    nets: Sequence[Network],
    roots: Sequence[int],
    truncations: Sequence[Truncate],
    method: str,
    lr: float,
    evaluate: Gradients,
) -> list[Network]:
    """One step of size `lr` of the gradient flow for every network, Euler in the substeps.

    Args:
        nets: one a layer.
        roots: of each.
        truncations: of each.
        method: a row of `SCHEMES`.
        lr: step size.
        evaluate: answers requests; what it knows already is not waited for.
    """
    inbox: SimpleQueue[tuple[int, str, Any]] = SimpleQueue()
    answers: list[SimpleQueue[Any]] = [SimpleQueue() for _ in nets]

    def work(k: int) -> None:
        def ask(request: Request) -> Tensor:
            inbox.put((k, "ask", request))
            answer = answers[k].get()
            if answer is None:
                raise _Stopped
            found: Tensor = answer
            return found

        try:
            with torch.no_grad():
                stepper = Stepper(_Asking(ask), SUBSTEPS["euler"], truncations[k], roots[k])
                inbox.put((k, "done", SCHEMES[method](stepper, nets[k], 0.0, lr)))
        except BaseException as error:  # handed to the caller's thread
            inbox.put((k, "failed", error))

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(len(nets))]
    for thread in threads:
        thread.start()
    pending: dict[int, Request] = {}
    results: dict[int, Network] = {}
    failure: BaseException | None = None
    alive = len(nets)
    while alive:
        k, kind, value = inbox.get()
        if kind == "ask":
            known = evaluate.known(k, value) if failure is None else None
            if known is not None:
                answers[k].put(known)
                continue
            pending[k] = value
        else:
            alive -= 1
            if kind == "done":
                results[k] = value
            elif not isinstance(value, _Stopped):
                failure = value
        if pending and len(pending) == alive:
            found: Mapping[int, Tensor] = {}
            if failure is None:
                try:
                    found = evaluate(dict(pending))
                except BaseException as error:
                    failure = error
            waiting, pending = list(pending), {}
            for position in waiting:
                answers[position].put(None if failure is not None else found[position])
    for thread in threads:
        thread.join()
    if failure is not None:
        raise failure
    return [results[k] for k in range(len(nets))]
