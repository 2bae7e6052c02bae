"""Where a training run stands, in one file that is written whole or not at all; from it the run goes on bit for bit."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from tnlayers.files import atomic_target

KIND = "tnlayers kg training"


@dataclass
class RunState:
    """Where a run stands between two steps: with model and optimizer, all that the rest depends on.

    Args:
        seed: from which orders, negatives and dropout of every epoch are derived.
        rates: learning rate of every parameter group before decay and schedule.
        epoch: epochs done.
        step: steps done in the present epoch.
        loss: sum of the losses of these steps, by queries.
        seconds: spent on these steps.
        negatives: state of their generator after these steps.
        epochs: the epochs done, in plain data.
        best: number of the best epoch; 0 before a validation.
        weights: those of the best epoch.
        settle: step at which adapted ranks stay; that of the first call, whatever number of epochs later ones ask for.
    """

    seed: int
    rates: list[float]
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    negatives: Tensor | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    weights: dict[str, Any] | None = None
    settle: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training run.

    Args:
        file: its folder is made.
        identity: what the run depends on: the file of another one is refused.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> checkpoint = Checkpoint(Path(tempfile.mkdtemp()) / "run.pt", {"batch_size": 128})
        >>> checkpoint.read(model, optimizer) is None
        True
        >>> checkpoint.write(model, optimizer, RunState(0, [0.001], epoch=3))
        >>> checkpoint.read(model, optimizer).epoch
        3
    """

    file: str | os.PathLike[str]
    identity: Mapping[str, Any]

    def write(self, model: nn.Module, optimizer: Optimizer, state: RunState) -> None:
        """Keep this moment; the old file stays until the new one is whole.

        Raises:
            OSError: the file cannot be written (a full disk).
        """
        path = Path(self.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        # not asdict: it would copy the weights
        found = {field.name: getattr(state, field.name) for field in fields(RunState)}
        content = {
            "kind": KIND,
            "identity": json.dumps(dict(self.identity), sort_keys=True),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "progress": found,
            "random": generators(model),
        }
        with atomic_target(path) as temporary:
            try:
                torch.save(content, temporary)
            except RuntimeError as error:  # what torch makes of a full disk
                text = str(error).partition("\n")[0]
                raise OSError(f"train: the checkpoint {path} cannot be written, is the disk full? ({text})") from None

    def read(self, model: nn.Module, optimizer: Optimizer) -> RunState | None:
        """Set model, optimizer and torch's generators to what was kept; None where there is no file.

        Raises:
            ValueError: a file that is damaged, or of another run; the model is as it was then.
        """
        path = Path(self.file)
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            kind, identity = content["kind"], json.loads(content["identity"])
        except Exception as error:  # torch and pickle raise almost any type on a damaged file
            raise ValueError(
                f"train: the checkpoint cannot be read, expected a file of train, got {path} "
                f"({type(error).__name__}); remove it to begin anew"
            ) from None
        wanted = json.loads(json.dumps(dict(self.identity)))
        identity = {"triples": wanted.get("triples")} | identity  # which older files do not tell
        other = [key for key in {**identity, **wanted} if identity.get(key) != wanted.get(key)]
        if kind != KIND or other:
            told = ", ".join(f"{key} = {wanted.get(key)!r} (the file: {identity.get(key)!r})" for key in other)
            raise ValueError(
                f"train: the checkpoint {path} is of another run: {told or kind}; remove it to begin anew, or give "
                "another name"
            )
        before = copy.deepcopy(model.state_dict())
        try:
            model.load_state_dict(content["model"])
            optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:  # torch has copied what fits by then
            model.load_state_dict(before)
            raise ValueError(
                f"train: the checkpoint {path} is of a model of other sizes, or with other parts frozen ({error}); "
                "remove it to begin anew, or give another name"
            ) from None
        set_generators(content["random"])
        return RunState(**content["progress"])


def generators(model: nn.Module) -> dict[str, Tensor]:
    """States of torch's own generators, which dropout draws from: of the CPU, and of the model's device."""
    found = {"cpu": torch.get_rng_state()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        found[f"cuda:{device.index or 0}"] = torch.cuda.get_rng_state(device)
    return found


def set_generators(states: Mapping[str, Tensor]) -> None:
    """Set them.

    Example:
        >>> states = generators(nn.Linear(1, 1))
        >>> first = torch.rand(1)
        >>> set_generators(states)
        >>> torch.equal(torch.rand(1), first)
        True
    """
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state.cpu())
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state.cpu(), name)
