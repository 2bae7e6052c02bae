"""Calling a model: whatever it takes, whatever it returns, and nothing of it changed afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in its own mode again.

    `no_grad`, not `inference_mode`: a mask or a table that a model makes at its first call and keeps would be an
    inference tensor, and training would fail afterwards.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        if any(training for _, training in modes):
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer; the CPU for a model without any.

    Raises:
        ValueError: the model is on the meta device.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    tensor = next((t for group in (model.parameters(), model.buffers()) for t in group), None)
    if tensor is not None and tensor.is_meta:
        raise ValueError("evaluate: the model is on the meta device and holds no numbers; load them first")
    return torch.device("cpu") if tensor is None else tensor.device


def to_device(inputs: Any, device: torch.device) -> Any:
    """Tensors of a tensor, tuple, list or mapping on that device.

    Example:
        >>> to_device({"x": torch.ones(2)}, torch.device("cpu"))
        {'x': tensor([1., 1.])}
    """
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(**inputs)` for a mapping, `model(*inputs)` for a tuple or list, `model(inputs)` otherwise.

    Example:
        >>> call(nn.Identity(), {"input": 3})
        3
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def logits_of(output: Any) -> Tensor:
    """Logits of what a model returned: `.logits`, an entry "logits", the first of a tuple, or the tensor itself.

    Raises:
        TypeError: none of these.

    Example:
        >>> logits_of((torch.ones(1, 2), "cache")).shape
        torch.Size([1, 2])
    """
    return _picked(output, "logits", "use a model with a language or classification head")


def hidden_of(output: Any) -> Tensor:
    """Hidden states of what a model returned: `.last_hidden_state`, such an entry, the first of a tuple, or the tensor.

    Raises:
        TypeError: none of these.

    Example:
        >>> hidden_of({"last_hidden_state": torch.ones(1, 2, 3)}).shape
        torch.Size([1, 2, 3])
    """
    return _picked(output, "last_hidden_state", "use the model below its head (model.base_model)")


def _picked(output: Any, name: str, advice: str) -> Tensor:
    found = output
    if not isinstance(output, Tensor):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        found = output[0] if named is None and isinstance(output, tuple) and output else named
    if not isinstance(found, Tensor):
        raise TypeError(f"evaluate: expected a model that returns {name}, got {type(output).__name__}; {advice}")
    return found
