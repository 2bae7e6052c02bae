"""What the optimizers of networks have in common: the probes are theirs, all other parameters an inner optimizer's."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from decompositions.lockstep import Job, together

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
    that share it, `layer.probes`), opens their windows, and calls `_adopt`.
    """

    inner: Optimizer | None
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

    def _inner_state(self) -> dict[str, Any] | None:
        return None if self.inner is None else self.inner.state_dict()

    def _load_groups(self, group: dict[str, Any], inner: dict[str, Any] | None) -> None:
        """Settings of the first group, and the state of the inner optimizer."""
        self.param_groups[0].update(group)
        if self.inner is not None and inner is not None:
            self.inner.load_state_dict(inner)
            self.param_groups[1:] = self.inner.param_groups

    def _check_names(self, saved: Sequence[Sequence[str]]) -> None:
        names = [track.names for track in self._tracks]
        if names != list(saved):
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the state must be of this model, expected {names}, got "
                f"{list(saved)}"
            )
