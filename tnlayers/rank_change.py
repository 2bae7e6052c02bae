"""What a rank change means to the parameters' owners: contents in place, optimizers and copies told."""

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary


class RankChangeWarning(UserWarning):
    """Somebody kept state of the old ranks; the message says what was done and what to do."""


_generation = WeakTensorKeyDictionary()  # core Parameter -> how often it was replaced
_FACTORED = ("row_var", "col_var")  # Adafactor's moments have shapes of their own
_served: WeakKeyDictionary[Optimizer, WeakTensorKeyDictionary] = WeakKeyDictionary()
_copies: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
_warned: WeakSet[Any] = WeakSet()
_hook: Any = None


def resize_(parameter: nn.Parameter, core: Tensor) -> None:
    """Give a Parameter new contents of any shape while it stays the same object (optimizers and ties keep it).

    `p.data = ...` would raise at the next backward while an old graph is alive; `set_` under no_grad does not.
    """
    parameter.grad = None
    with torch.no_grad():
        parameter.set_(core.detach().contiguous().clone())  # type: ignore[call-overload]


def watch(cores: Iterable[nn.Parameter]) -> None:
    """From now on look at these Parameters before every optimizer step."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_drop_old_state)
    for core in cores:
        _generation.setdefault(core, 0)


def announce(layer: nn.Module, cores: list[nn.Parameter], *, resized: bool) -> None:
    """Note that cores were replaced: optimizers drop their moments at the next step, live copies are pointed out."""
    for core in cores:
        _generation[core] = _generation.get(core, 0) + 1
    if resized and _copies.get(layer) and layer not in _warned:
        _warned.add(layer)
        warnings.warn(
            f"{type(layer).__name__}: ranks changed while a deep copy of the layer is alive; if that is an averaged "
            "model (AveragedModel, EMA, SWA), make it anew: averages of cores of different ranks mean nothing",
            RankChangeWarning,
            stacklevel=3,
        )


def remember_copy(layer: nn.Module, copy: nn.Module) -> None:
    """Note a deep copy, so that a later rank change can point it out."""
    _copies.setdefault(layer, WeakSet()).add(copy)


def _fits(state: dict[str, Any], core: Tensor) -> bool:
    """Whether moments can belong to a core of this shape."""
    moments = (v for k, v in state.items() if isinstance(v, Tensor) and v.ndim > 1 and k not in _FACTORED)
    return all(moment.shape == core.shape for moment in moments)


def _drop_old_state(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a step: state of other cores than the present ones is dropped, and that is said once an optimizer."""
    served = _served.get(optimizer)
    if served is None:
        served = _served[optimizer] = WeakTensorKeyDictionary()
    replaced = dropped = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            generation = _generation.get(p)
            if generation is None:
                continue
            # an optimizer that was never seen has no state, or was given it on purpose (resumed): shapes decide
            current = served.get(p, generation) == generation and _fits(optimizer.state.get(p, {}), p)
            served[p] = generation
            if current:
                continue
            replaced += 1
            dropped += optimizer.state.pop(p, None) is not None
    if replaced and hasattr(optimizer, "_numel_cache"):  # LBFGS flattens all parameters into one vector
        dropped += len(optimizer.state)
        optimizer.state.clear()
        optimizer._numel_cache = None
    if dropped and optimizer not in _warned:
        _warned.add(optimizer)
        warnings.warn(
            f"{type(optimizer).__name__}: cores were replaced, so the moments of {dropped} of them were dropped "
            "and start anew; call set_network less often, or use an optimizer that transports its state",
            RankChangeWarning,
            stacklevel=4,
        )
