"""The schemes of `tnlayers.integrators` on all networks of a model at once, with gradients from a closure.

A scheme asks for the right-hand side of one network at a time; a model gives the gradients of all its networks in one
backward. So every network runs its scheme in a thread of its own, each of which waits when it asks; when all that still
run have asked, one call of the closure answers them all. Threads never run beside each other's evaluation, and nothing
depends on their order.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decompositions import Network
from tnlayers.integrators.fields import CoreField
from tnlayers.integrators.schemes import SCHEMES
from tnlayers.integrators.steps import SUBSTEPS, Stepper, Truncate


class Request(NamedTuple):
    """Where a scheme wants the gradient: a network, and the core it wants it of."""

    network: Network
    core: int


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
    evaluate: Callable[[Mapping[int, Request]], Mapping[int, Tensor]],
) -> list[Network]:
    """One step of size `lr` of the gradient flow for every network, Euler in the substeps.

    Args:
        nets: one a layer.
        roots: of each.
        truncations: of each.
        method: a row of `SCHEMES`.
        lr: step size.
        evaluate: gives, for requests by position, the gradients of the cores asked for.
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
