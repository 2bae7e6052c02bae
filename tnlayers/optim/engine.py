"""What the optimizers of networks have in common: the probes are theirs, all other parameters an inner optimizer's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from decompositions.lockstep import Job, together
from tnlayers.optim.agreement import agree

T = TypeVar("T")
Inner = Callable[[Iterable[Tensor]], Optimizer]
"""Makes the optimizer of the parameters that are no cores."""


class KeptElsewhere(defaultdict[Any, Any]):
    """`state` of an optimizer whose moments are not here, as they do not have the shapes of parameters.

    `torch.distributed.checkpoint` asks whether there is any, and would otherwise make a step of its own to get some.
    """

    owner: str = ""

    def __bool__(self) -> bool:
        raise ValueError(
            f"{self.owner}: torch.distributed.checkpoint holds states by the shape of their parameters, expected a "
            "torch optimizer, got one that keeps its moments itself; tnlayers.distributed.save_state writes it, for "
            "any number of workers"
        )


class NetworkOptimizer(Optimizer):
    """Base of `RankAdaptive`, `RiemannianSGD`, `RiemannianAdam` and `CondLR`.

    The first of `param_groups` holds the probes of the layers; the others are the very dicts of the inner optimizer, so
    that schedulers, clipping and loss scaling see one optimizer. A subclass finds its tracks (a network, the layers
    that share it; `digested`, `state` and `load`), opens their windows, and calls `_adopt`.
    """

    inner: Optimizer | None
    generator: torch.Generator | None = None
    """Of random directions, where there are any."""
    steps = 0
    _gauged = True  # whether windows are those of gauges, see `Track.load`
    _tracks: Sequence[Any]

    @classmethod
    def _check_model(cls, model: object) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{cls.__name__}: expected the model (its layers are found), got {type(model).__name__}; "
                f"{cls.__name__}(model, lr=...), not model.parameters()"
            )

    def _adopt(self, model: nn.Module, defaults: dict[str, Any], inner: Inner | None, usual: Inner) -> None:
        """Torch's constructor, on the probes; the inner optimizer on whatever is neither core nor probe."""
        mine = [p for track in self._tracks for p in track.layer.probes]
        own = {id(p) for track in self._tracks for layer in track.layers for p in layer.cores} | {id(p) for p in mine}
        others = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
        self.inner = (inner or usual)(others) if others else None
        super().__init__(mine, defaults)
        self.state = KeptElsewhere(dict)
        self.state.owner = type(self).__name__
        if self.inner is not None:
            self.param_groups.extend(self.inner.param_groups)

    def _run(self, jobs: Sequence[Job[T]]) -> list[T]:
        """Jobs of all networks: those of equal shapes share their QRs and SVDs."""
        with torch.autocast(self._tracks[0].layer.cores[0].device.type, enabled=False), torch.no_grad():
            return together(jobs)

    def _group_probes(self) -> None:
        """The first group holds the probes; a layer whose weight was replaced has new ones."""
        self.param_groups[0]["params"] = [p for track in self._tracks for p in track.layer.probes]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Further parameters go to the inner optimizer.

        Raises:
            ValueError: there is none, as the model had no other parameters.
        """
        if not hasattr(self, "inner") or not self.param_groups:  # while torch's constructor runs
            super().add_param_group(param_group)
            return
        if self.inner is None:
            raise ValueError(
                f"{type(self).__name__}.add_param_group: there is no inner optimizer, as all parameters of the model "
                "are cores; make the optimizer anew from a module that holds the new ones too"
            )
        self.inner.add_param_group(param_group)
        self.param_groups[1:] = self.inner.param_groups

    def _reopen(self) -> Sequence[Any]:
        """Open windows on weights that somebody has replaced; which these were."""
        raise TypeError("NetworkOptimizer._reopen: expected an optimizer, got the base")

    def _agree(self) -> None:
        """Workers that train together take the state of worker 0 where any of theirs differs."""
        agree(self._tracks, self.generator, gauged=self._gauged)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: resumed runs agree bit by bit."""
        self._reopen()
        return {
            "tracks": [track.state() for track in self._tracks],
            "group": {key: value for key, value in self.param_groups[0].items() if key != "params"},
            "inner": None if self.inner is None else self.inner.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a state was saved; the layers' weights are set to it too.

        Raises:
            ValueError: the state of another model.
        """
        names, saved = [track.names for track in self._tracks], [state["names"] for state in state_dict["tracks"]]
        if names != saved:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state must be of this model, expected {names}, got {saved}"
            )
        self._load_more(state_dict)
        self.steps = state_dict["steps"]
        self.param_groups[0].update(state_dict["group"])
        if self.inner is not None:
            self.inner.load_state_dict(state_dict["inner"])
            self.param_groups[1:] = self.inner.param_groups
        for track, state in zip(self._tracks, state_dict["tracks"], strict=True):
            track.load(state, gauged=self._gauged)
        self._group_probes()
        self._agree()

    def _load_more(self, state_dict: dict[str, Any]) -> None:
        """What a subclass has beside."""
