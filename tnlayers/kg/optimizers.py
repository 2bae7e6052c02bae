"""Optimizers by name, class or callable, for dense models and for models with network cores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from tnlayers.kg.r_tucker import RTuckER, r_tucker_optimizer
from tnlayers.optim import RankAdaptive, RiemannianAdam, RiemannianSGD
from tnlayers.optim.engine import NetworkOptimizer

TORCH: dict[str, Callable[..., Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "Adagrad": torch.optim.Adagrad,
    "SGD": torch.optim.SGD,
}
NETWORKS: dict[str, Callable[..., NetworkOptimizer]] = {
    "RiemannianSGD": RiemannianSGD,
    "RiemannianAdam": RiemannianAdam,
    "RankAdaptive": RankAdaptive,
}
R_TUCKER = {"R-TuckER SGD": "sgd", "R-TuckER Adam": "adam"}
"""Methods of `r_tucker_optimizer`."""
SETTLE = 0.6
"""Part of the steps after which the ranks of `RankAdaptive`, asked for by name, stay."""

Asked = str | Optimizer | Callable[..., Optimizer] | None


def make_optimizer(
    model: nn.Module, asked: Asked, *, lr: int | float, weight_decay: int | float, steps: int
) -> Optimizer:
    """The optimizer of a training run.

    Args:
        model: all its parameters that require gradients are trained.
        asked: a name ("AdamW", "Adam", "Adagrad", "SGD"; "RiemannianSGD", "RiemannianAdam", "RankAdaptive" for models
            with network cores: their other parameters go to a fused AdamW; "R-TuckER SGD", "R-TuckER Adam" for an
            `RTuckER`); a class or `functools.partial` of one,
            which gets lr where it does not hold one; a callable of the model; an optimizer. None: "AdamW".
        lr: learning rate.
        weight_decay: of the optimizers by name.
        steps: of the whole run; "RankAdaptive" settles after 60 % of them.

    Raises:
        ValueError: an unknown name, a model without trainable parameters, an optimizer of trees for a shared `RTuckER`.
        TypeError: something else.

    Example:
        >>> make_optimizer(nn.Linear(2, 2), "Adam", lr=0.1, weight_decay=0.0, steps=10).defaults["lr"]
        0.1
    """
    own = [p for p in model.parameters() if p.requires_grad]
    if not own:
        raise ValueError("train: the model must have parameters that require gradients, got none; unfreeze some")
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in own)
    fused: dict[str, Any] = {"fused": True} if plain else {}
    if asked is None:
        asked = "AdamW"
    if isinstance(asked, str):
        if asked in TORCH:
            return TORCH[asked](own, lr=lr, weight_decay=weight_decay, **fused)
        if asked in R_TUCKER:
            return r_tucker_optimizer(model, lr, method=R_TUCKER[asked], weight_decay=weight_decay)  # type: ignore[arg-type]
        if asked not in NETWORKS:
            names = ", ".join([*TORCH, *NETWORKS, *R_TUCKER])
            raise ValueError(f"train: optimizer must be one of {names}, got {asked!r}")
        if isinstance(model, RTuckER) and model.shared:
            raise ValueError(
                f"train: heads and tails of this RTuckER share a table, expected one of {', '.join(R_TUCKER)}, got "
                f"{asked!r}; or make the model with shared=False"
            )
        options: dict[str, Any] = {"settle": max(1, round(SETTLE * steps))} if asked == "RankAdaptive" else {}
        inner = partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, **fused)
        return NETWORKS[asked](model, lr=lr, weight_decay=weight_decay, inner=inner, **options)
    if isinstance(asked, Optimizer):
        return asked
    if not callable(asked):
        raise TypeError(f"train: optimizer must be a name, an optimizer or a callable, got {type(asked).__name__}")
    kind, given = getattr(asked, "func", asked), getattr(asked, "keywords", {})
    rate = {} if "lr" in given else {"lr": lr}
    if isinstance(kind, type) and issubclass(kind, NetworkOptimizer):
        made = asked(model, **rate)
    elif isinstance(kind, type) and issubclass(kind, Optimizer):
        made = asked(own, **rate)
    else:
        made = asked(model)
    if not isinstance(made, Optimizer):
        raise TypeError(f"train: the optimizer made must be a torch.optim.Optimizer, got {type(made).__name__}")
    return made
