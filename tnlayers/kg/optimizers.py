"""Optimizers by name, class or callable, for dense models and for models with network cores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from tnlayers.kg.r_tucker import RTuckER, r_tucker_optimizer
from tnlayers.optim import RankAdaptive, RiemannianAdam, RiemannianSGD
from tnlayers.optim.engine import NetworkOptimizer
from tnlayers.optim.options import number

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
R_TUCKER: dict[str, Callable[..., NetworkOptimizer]] = {
    "R-TuckER SGD": partial(r_tucker_optimizer, method="sgd"),
    "R-TuckER Adam": partial(r_tucker_optimizer, method="adam"),
}
NAMES = {**TORCH, **NETWORKS, **R_TUCKER}
GIVEN = (
    "params",
    "model",
    "lr",
    "weight_decay",
    "inner",
    "generator",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
"""Options that `train` gives itself, or that no JSON holds."""
SETTLE = 0.6
"""Part of the steps after which the ranks that an optimizer by name adapts stay."""

Asked = str | Mapping[str, Any] | Optimizer | Callable[..., Optimizer] | None


def make_optimizer(
    model: nn.Module, asked: Asked, *, lr: int | float, weight_decay: int | float, steps: int
) -> Optimizer:
    """The optimizer of a training run.

    By name, or as `{"name": ..., ...}` with options of its own, which JSON holds: "AdamW", "Adam", "Adagrad", "SGD"
    for any model; "RiemannianSGD", "RiemannianAdam", "RankAdaptive" for models with network cores, whose other
    parameters go to a fused AdamW; "R-TuckER SGD", "R-TuckER Adam" for an `RTuckER`, see `r_tucker_optimizer`.

    Where ranks adapt ("RankAdaptive", and both of "R-TuckER" for a model made with `adaptive=True`) `tol` is the
    relative error of a rounding, and `settle` says when ranks are cut a last time and stay: a step (int), a part of all
    steps (below 1; .6 by default), or None for never.

    Args:
        model: all its parameters that require gradients are trained.
        asked: a name, or a mapping of a name and options, see above; a class or `functools.partial` of one, which gets
            lr where it does not hold one; a callable of the model; an optimizer. None: "AdamW".
        lr: learning rate.
        weight_decay: of the optimizers by name.
        steps: of the whole run.

    Raises:
        ValueError: an unknown name or option, a value that torch's optimizer does not take, a model without trainable
            parameters, an optimizer of trees for a shared `RTuckER`.
        TypeError: something else.

    Example:
        >>> make_optimizer(nn.Linear(2, 2), "Adam", lr=0.1, weight_decay=0.0, steps=10).defaults["lr"]
        0.1
        >>> from types import SimpleNamespace
        >>> graph = SimpleNamespace(num_entities=135, num_relations=92, inverse=True)
        >>> model = RTuckER(graph, (5, 8), adaptive=True)
        >>> asked = {"name": "R-TuckER Adam", "tol": 0.2, "settle": 0.5}
        >>> make_optimizer(model, asked, lr=0.03, weight_decay=0.0, steps=10).settle_at
        5
    """
    own = [p for p in model.parameters() if p.requires_grad]
    if not own:
        raise ValueError("train: the model must have parameters that require gradients, got none; unfreeze some")
    if asked is None:
        asked = "AdamW"
    if isinstance(asked, str | Mapping):
        return _by_name(model, own, asked, lr, weight_decay, steps)
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


def _by_name(
    model: nn.Module,
    own: list[nn.Parameter],
    asked: str | Mapping[str, Any],
    lr: float,
    weight_decay: float,
    steps: int,
) -> Optimizer:
    options: dict[str, Any] = {"name": asked} if isinstance(asked, str) else dict(asked)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"train: optimizer must be one of {', '.join(NAMES)}, got {name!r}")
    fixed = getattr(NAMES[name], "keywords", {})
    allowed = [key for key in inspect.signature(NAMES[name]).parameters if key not in (*GIVEN, *fixed)]
    for key in options:
        if key not in allowed:
            raise ValueError(
                f"train: {name} has no option {key!r} here, expected one of {', '.join(allowed)}; lr and weight_decay "
                "are given to train"
            )
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    options = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in own)
    fused: dict[str, Any] = {"fused": True} if plain else {}
    if name in TORCH:
        try:
            return TORCH[name](own, lr=lr, weight_decay=weight_decay, **fused, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"train: torch's {name} takes no lr={lr}, {options} ({error}); see its options") from None
    tensor = isinstance(model, RTuckER)
    if name in NETWORKS and tensor and model.shared:
        raise ValueError(
            f"train: heads and tails of this RTuckER share a table, expected one of {', '.join(R_TUCKER)}, got "
            f"{name!r}; or make the model with shared=False"
        )
    if name == "RankAdaptive" or (name in R_TUCKER and tensor and model.adaptive):
        settle = options.setdefault("settle", SETTLE)
        if isinstance(settle, float):
            if not (number(settle, 0) and 0 < settle < 1):
                raise ValueError(
                    f"train: settle must be a part of the steps between 0 and 1, a step (int), or None, got {settle}"
                )
            options["settle"] = max(1, round(settle * steps))
    if name in R_TUCKER:
        return R_TUCKER[name](model, lr, weight_decay=weight_decay, **options)
    inner = partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, **fused)
    return NETWORKS[name](model, lr=lr, weight_decay=weight_decay, inner=inner, **options)


def plain_options(asked: Asked) -> dict[str, Any]:
    """The options in a mapping or `functools.partial` that JSON holds: a run with others is another run.

    Example:
        >>> plain_options({"name": "SGD", "momentum": 0.9}), plain_options(partial(torch.optim.SGD, momentum=0.8))
        ({'momentum': 0.9}, {'momentum': 0.8})
    """
    given = asked if isinstance(asked, Mapping) else getattr(asked, "keywords", {})
    kinds = bool | int | float | str | list | tuple | None
    return {key: value for key, value in given.items() if key != "name" and isinstance(value, kinds)}
