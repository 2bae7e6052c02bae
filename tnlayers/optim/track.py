"""A network in training: the layers that share it, and the state of its step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decompositions.geometry import gauges
from tnlayers.layer import NetworkLayer
from tnlayers.optim.ranks import Ranks
from tnlayers.window import CoreWindow, Window


@dataclass
class Track:
    """A network in training.

    Args:
        names: of the layers in the model.
        layers: that share its cores.
        root: core that the tree hangs from, always the same.
        ranks: and how they are chosen.
        numel: entries of the dense W.
        moment: first moment, a delta a moving core.
        second: second moment, a number a core.
        counts: steps that every core took part in.
        turn: whose turn it is, where one core moves at a time.
        cut_again: roundings in a row that cut all that steps had added.
    """

    names: list[str]
    layers: list[NetworkLayer]
    root: int
    ranks: Ranks
    numel: int
    moment: list[Tensor]
    second: list[Tensor]
    counts: list[int]
    turn: int = 0
    cut_again: int = 0

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

    def install(self, window: Window) -> None:
        """Open a window in all layers that share the network."""
        self.layer.open_window(window)
        for twin in self.layers[1:]:
            twin.open_window(window, self.layer.probes)

    def follow(self, like: Tensor) -> None:
        """Bring the moments to the dtype and device that the layer was moved to."""
        if self.moment and (self.moment[0].dtype, self.moment[0].device) != (like.dtype, like.device):
            self.moment = [m.to(like) for m in self.moment]
            self.second = [v.to(device=like.device) for v in self.second]

    def state(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        return {
            "names": self.names,
            "cores": [core.detach().clone() for core in self.window.point.cores],
            "core": self.window.core,
            "fresh": self.window.fresh,
            "probes": [probe.detach().clone() for probe in self.layer.probes],
            "moment": [m.clone() for m in self.moment],
            "second": [v.clone() for v in self.second],
            "counts": list(self.counts),
            "turn": self.turn,
            "cut_again": self.cut_again,
            "found": dict(self.ranks.found),
            "kept": dict(self.ranks.kept),
        }

    def load(self, state: dict[str, Any], *, gauged: bool) -> None:
        """Inverse of `state`; the layers' weights are set to it. `gauged`: windows are those of gauges."""
        like = self.layer.cores[0]

        def own(values: list[Tensor]) -> list[Tensor]:
            return [value.to(device=like.device, dtype=like.dtype).clone() for value in values]

        net = self.layer._with_cores(own(state["cores"]))
        self.ranks.found, self.ranks.kept = dict(state["found"]), dict(state["kept"])
        if gauged:  # the cores saved are isometries toward the root already
            self.layer.open_window(Window(gauges(net, self.root, gauged=True), state["core"], self.ranks.found))
        else:
            self.layer.open_window(CoreWindow(net, state["core"], self.ranks.found))
        with torch.no_grad():
            for probe, value in zip(self.layer.probes, own(state["probes"]), strict=True):
                probe.copy_(value)
        for twin in self.layers[1:]:
            twin.open_window(self.window, self.layer.probes)
        if not state["fresh"]:
            for member in self.layers:
                member.window_moved()
        self.moment, self.second = own(state["moment"]), [v.to(like.device) for v in state["second"]]
        self.counts, self.turn, self.cut_again = list(state["counts"]), state["turn"], state["cut_again"]
