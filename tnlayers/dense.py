"""What layers share on the way from torch's dense layers and back to them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from decompositions import Network

Recipe = Callable[[Tensor], Any]
"""Dense weight -> Network (or the pair (Network, error) of `with_error=True`)."""

NetworkFactory = Callable[[tuple[int, ...], torch.dtype, torch.device], Network]
"""(shape of the weight, dtype, device) -> Network: makes a fresh weight without allocating the dense one."""


def exactly(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: what is decomposed, merged or stored keeps the precision of its numbers."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def unchanged_rng(device: torch.device) -> AbstractContextManager[None]:
    """Keep the global generators as they are while throw-away initial values are drawn."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def copy_settings(source: nn.Module, target: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Carry over the bias, the training flag, and which parts are frozen."""
    if bias is not None:
        with torch.no_grad():
            target.bias.copy_(bias)  # type: ignore[operator]
    for name, parameter in target.named_parameters():
        frozen_by = bias if name == "bias" else weight
        assert frozen_by is not None
        parameter.requires_grad_(frozen_by.requires_grad)
    target.train(source.training)


def run_recipe(name: str, recipe: Recipe, weight: Tensor) -> Network:
    """Call a recipe on a copy, without autograd; take the network of a (network, error) pair or of a result."""
    if not callable(recipe):
        raise TypeError(
            f"{name}: a recipe must be a callable dense weight -> Network, got {recipe!r}; for example "
            "functools.partial(decompositions.svd, tol=0.1)"
        )
    with torch.no_grad(), exactly(weight.device):
        made = recipe(weight.detach().clone())
    net = made[0] if isinstance(made, tuple) else getattr(made, "network", made)  # as a CrossResult has it
    if not isinstance(net, Network):
        raise TypeError(f"{name}: a recipe must return a decompositions.Network, got {type(net).__name__}")
    if net.dtype != weight.dtype:
        raise TypeError(
            f"{name}: a recipe must keep the dtype, expected {weight.dtype}, got {net.dtype}; use net.to(...)"
        )
    if net.device.type == "meta":  # structure alone, for a file's numbers to come
        return net
    if net.device != weight.device:
        raise TypeError(f"{name}: a recipe must keep the device, expected {weight.device}, got {net.device}")
    if not all(bool(torch.isfinite(core).all()) for core in net.cores):
        raise ValueError(f"{name}: a recipe must return finite cores, got NaN or infinity in {net!r}")
    return net
