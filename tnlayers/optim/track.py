"""A network in training: the layers that share it, and the state of its step."""

from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from decompositions import Network
from decompositions.geometry import gauges
from tnlayers.integrators.integrate import default_root
from tnlayers.layer import NetworkLayer
from tnlayers.optim.ranks import Ranks
from tnlayers.window import CoreWindow, Window

PATIENCE = 20
"""Roundings in a row that cut what the steps had made, after which ranks are said to be stuck."""


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

    @classmethod
    def start(cls, names: list[str], layers: list[NetworkLayer], ranks: Ranks) -> "Track":
        """A network that has not moved yet."""
        net = layers[0].network
        return cls(names, layers, default_root(net), ranks, prod(net.shape), [], [], [])

    @property
    def layer(self) -> NetworkLayer:
        """The layer that owns the probes."""
        return self.layers[0]

    @property
    def name(self) -> str:
        """Of the first layer, for messages."""
        return self.names[0] or "the layer"

    @property
    def window(self) -> Window:
        """The window that is open."""
        window = self.layer._window
        assert window is not None
        return window

    @property
    def moving(self) -> list[Tensor]:
        """The probes, one for each delta of a tangent vector."""
        return list(self.layer.probes)

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

    def check_gradients(self, step: int, optimizer: str = "RankAdaptive") -> None:
        """Refuse gradients that are not finite, before anything moves.

        Raises:
            ValueError: NaN or infinity.
        """
        if self.layer._window is None:
            return
        found = [p.grad for p in self.layer._active_probes() if p.grad is not None]
        if found and not bool(torch.stack([torch.linalg.vector_norm(g) for g in found]).isfinite().all()):
            raise ValueError(
                f"{optimizer}: gradients must be finite, got NaN or infinity in {self.name} at step {step}; nothing "
                "was moved: lower lr, clip, or scale the loss"
            )

    def limits(self, before: dict[str, int]) -> dict[str, str]:
        """What keeps ranks from growing after a rounding: steps that are always cut, or a cap."""
        own, found = self.ranks, {}
        if own.reserve == 0:
            grown = any(own.found[bond] > before.get(bond, 0) for bond in own.found)
            lost = [
                sqrt(max(0.0, float(squares[own.kept[bond]]))) if len(squares) > own.kept[bond] else 0.0
                for bond, squares in own.spectra.items()
            ]
            limit = max(own.theta or 0.0, (own.tol or 0.0) * own.norm) / sqrt(max(1, len(own.found)))
            idle = max(lost, default=0.0) <= 1e-12 * own.norm
            self.cut_again = 0 if grown or idle else self.cut_again + 1
            if self.cut_again >= PATIENCE:
                found[f"stuck {self.name}"] = (
                    f"RankAdaptive: ranks of {self.name} cannot grow: in {PATIENCE} roundings all that steps added "
                    f"(now {max(lost):.2g}) was under the tolerance ({limit:.2g}) and cut; where the loss is not low "
                    "enough yet use reserve=1, a smaller tol, a larger lr or longer windows (every=)"
                )
        if own.most is not None and any(rank >= own.most for rank in own.found.values()):
            found["cap"] = f"RankAdaptive: max_rank={own.most} binds in {self.name}; the tolerance asks for more"
        return found

    def digested(self) -> list[Any]:
        """What the next step depends on: tensors, and plain data."""
        own, probes = self.ranks, list(self.layer.probes)
        moved = [] if self.window.still(self.layer._active_probes()) else probes
        plain = [list(own.found.items()), list(own.kept.items()), self.counts, self.turn, self.cut_again]
        return [*plain, *self.window.point.cores, *moved, *self.moment, *self.second]

    def state(self) -> dict[str, Any]:
        """All of it as plain data and tensors."""
        return {
            "names": self.names,
            "cores": [core.detach().clone() for core in self.window.point.cores],
            "core": self.window.core,
            "fresh": self.window.still(self.layer._active_probes()),
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
        self.layer.open_window(self._window_at(net, state["core"], gauged=gauged))
        for twin in self.layers[1:]:
            twin.open_window(self.window, self.layer.probes)
        if not state["fresh"]:
            with torch.no_grad():
                for probe, value in zip(self.layer.probes, own(state["probes"]), strict=True):
                    probe.copy_(value)
            for member in self.layers:
                member.window_moved()
        self.moment, self.second = own(state["moment"]), [v.to(like.device) for v in state["second"]]
        self.counts, self.turn, self.cut_again = list(state["counts"]), state["turn"], state["cut_again"]

    def _window_at(self, net: Network, core: int | None, *, gauged: bool) -> Window:
        """The window on cores that were saved, isometries toward the root already where windows are those of gauges."""
        if gauged:
            return Window(gauges(net, self.root, gauged=True), core, self.ranks.found)
        assert core is not None
        return CoreWindow(net, core, self.ranks.found)
