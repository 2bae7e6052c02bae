"""The state of a training run in one file: written by worker 0, read by any number of workers."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only

from tnlayers.files import atomic_target

KIND = "tnlayers training state"


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is spread over the workers (a DTensor)."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def save_state(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **extra: Any) -> None:
    """Write model and optimizer to one file, from which any number of workers goes on; every worker calls it.

    Sharded tensors are gathered one by one; worker 0 writes, under a temporary name that is synced and renamed. The
    others return, or raise, when the file is there.

    Args:
        path: file name.
        model: what `tnlayers.distributed.prepare` returned, or a model that was not prepared.
        optimizer: its optimizer: `RankAdaptive`, or one of torch's.
        extra: plain data and tensors to keep too (the step, a scheduler's state); those of worker 0.

    Raises:
        OSError: worker 0 could not write.

    Example:
        >>> import tempfile, tnlayers
        >>> from decompositions import LowRank
        >>> layer = tnlayers.Linear(8, 6, network=tnlayers.random_network(LowRank, rank=2))
        >>> optimizer = tnlayers.RankAdaptive(layer, lr=0.01)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(f"{folder}/state.pt", layer, optimizer, step=7)
        ...     load_state(f"{folder}/state.pt", layer, optimizer)
        {'step': 7}
    """
    content = {
        "kind": KIND,
        "model": _whole(_inside(model).state_dict()),
        "optimizer": _whole(optimizer.state_dict()),
        "extra": extra,
    }
    box = [""]
    alone = not torch.distributed.is_available() or not torch.distributed.is_initialized()
    if alone or torch.distributed.get_rank() == 0:
        try:
            with atomic_target(path) as temporary:
                torch.save(content, temporary)
        except OSError as error:
            box = [str(error)]
    if not alone:
        torch.distributed.broadcast_object_list(box, group_src=0)
    if box[0]:
        raise OSError(f"save_state: worker 0 could not write {os.fspath(path)}: {box[0]}")


def load_state(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Go on where `save_state` was called, at its ranks; every worker calls it and reads the same file.

    Model and optimizer are made as they were then: the same architecture, engine and number of workers may be another
    one. With the gradients equal, what follows is the same bit for bit.

    Args:
        path: what `save_state` wrote.
        model: what `tnlayers.distributed.prepare` returned, or a model that was not prepared.
        optimizer: its optimizer.

    Returns:
        The `extra` that was kept.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file, or the state of another optimizer.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"load_state: expected a file written by save_state, got {os.fspath(path)}")
    inside = _inside(model)
    own = inside.state_dict()
    inside.load_state_dict({key: _like(value, own.get(key)) for key, value in content["model"].items()})
    handles = [
        each.register_load_state_dict_pre_hook(_shard_state)
        for each in (optimizer, getattr(optimizer, "inner", None))
        if each is not None
    ]
    try:
        optimizer.load_state_dict(content["optimizer"])
    finally:
        for handle in handles:
            handle.remove()
    extra: dict[str, Any] = content["extra"]
    return extra


def _inside(model: nn.Module) -> nn.Module:
    """The model without the wrapper around it: names in the file do not depend on the engine."""
    inner = getattr(model, "module", None) if hasattr(model, "reduction") else None
    return model if inner is None else inner


def _whole(state: Any) -> Any:
    """The same state with every sharded tensor gathered."""
    return tree_map_only(Tensor, lambda value: value.full_tensor() if is_sharded(value) else value, state)


def _like(value: Any, own: Any) -> Any:
    """A whole tensor sharded as another one; everybody has it, so that nothing is sent."""
    if not is_sharded(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _shard_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Moments of sharded parameters sharded like them."""
    owners = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [k for group in state["param_groups"] for k in group["params"]]
    moments = {
        k: {key: _like(value, p) for key, value in state["state"].get(k, {}).items()}
        for k, p in zip(numbers, owners, strict=True)
        if k in state["state"]
    }
    return {**state, "state": moments}
