"""What a rank change means to the parameters' owners: shapes in place, and optimizers told."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class RankChangeWarning(UserWarning):
    """An optimizer kept state of the old ranks; the message says what was done and what to use instead."""


_RESIZED = "_tnlayers_resized"
_hook: Any = None


def resize_(parameter: nn.Parameter, core: Tensor) -> None:
    """Give a Parameter new contents of any shape while it stays the same object (optimizers and ties keep it).

    `p.data = ...` would raise at the next backward while an old graph is alive; `set_` under no_grad does not.
    """
    global _hook
    if parameter.shape != core.shape:
        setattr(parameter, _RESIZED, True)
        if _hook is None:
            _hook = register_optimizer_step_pre_hook(_drop_stale_state)
    parameter.grad = None
    with torch.no_grad():
        parameter.set_(core.detach().contiguous().clone())  # type: ignore[call-overload]


def _drop_stale_state(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a step: moments of another shape than their parameter are dropped, and that is said once an optimizer."""
    stale = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not getattr(p, _RESIZED, False):
                continue
            state = optimizer.state.get(p, {})
            if any(isinstance(v, Tensor) and v.ndim > 0 and v.shape != p.shape for v in state.values()):
                del optimizer.state[p]
                stale += 1
    if stale and not getattr(optimizer, _RESIZED, False):
        setattr(optimizer, _RESIZED, True)
        warnings.warn(
            f"{type(optimizer).__name__}: ranks changed, so the moments of {stale} cores were dropped and start anew; "
            "call set_network less often, or use an optimizer that transports its state. Averaged copies of the model "
            "(EMA, SWA) need a new start as well",
            RankChangeWarning,
            stacklevel=4,
        )
