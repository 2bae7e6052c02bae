"""What `train` is told: losses by name, and what it refuses before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from tnlayers.kg.losses import Loss, NegativeSampling, OneToN, Softmax
from tnlayers.kg.model import KGModel
from tnlayers.kg.ranking import evaluate
from tnlayers.kg.triples import Triples

LOSSES: dict[str, Callable[[float, str], Loss]] = {
    "1-N": OneToN,
    "softmax": lambda smoothing, formula: Softmax(smoothing, "query"),
    "1-vs-all": lambda smoothing, formula: Softmax(smoothing, "answer"),
    "negative sampling": lambda smoothing, formula: NegativeSampling(),
}
EVERY = 10
"""Epochs between validations where only a patience is given."""
LEFT_OUT = ("every", "patience", "clip", "max_seconds")
"""What may be None."""


def loss_of(loss: str | Loss, label_smoothing: float, smoothing: str) -> Loss:
    """A loss by name, or the given one.

    Args:
        loss: a name of `LOSSES`, or a `Loss`.
        label_smoothing: of a loss by name.
        smoothing: formula of "1-N".

    Raises:
        ValueError: an unknown name, a formula that a softmax does not have.

    Example:
        >>> loss_of("1-N", 0.1, "uniform")
        OneToN(smoothing=0.1, formula='uniform')
    """
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"train: loss must be one of {', '.join(LOSSES)}, or a Loss, got {loss!r}")
    if loss not in ("1-N", "negative sampling") and smoothing != "uniform":
        raise ValueError(f"train: a softmax is smoothed uniformly, expected smoothing='uniform', got {smoothing!r}")
    return LOSSES[loss](label_smoothing, smoothing)


def check_training(
    model: Any,
    triples: Triples,
    counts: Mapping[str, Any],
    rates: Mapping[str, Any],
    seconds: Mapping[str, Any],
    validation: Mapping[str, Any] | None,
) -> tuple[int | None, dict[str, Any]]:
    """Refuse what makes no sense, before any work; how often to validate, and how.

    Args:
        model: to be trained.
        triples: the graph.
        counts: epochs, batch_size, every, patience, memory.
        rates: numbers above 0.
        seconds: numbers.
        validation: options of `evaluate`.

    Returns:
        Epochs between validations (None: there are none), and the options of each.

    Raises:
        ValueError: see `train`.
        TypeError: see `train`.
    """
    if not isinstance(model, KGModel):
        raise TypeError(f"train: expected a KGModel, got {type(model).__name__}; write query and against for it")
    if validation is not None and not isinstance(validation, Mapping):
        raise TypeError(f"train: validation must be a mapping of options of evaluate, got {validation!r}")
    kinds: tuple[tuple[Mapping[str, Any], type, str], ...] = (
        (counts, Integral, "an int"),
        ({**rates, **seconds}, Real, "a number"),
    )
    for given, kind, word in kinds:
        for name, value in given.items():
            left_out = value is None and name in LEFT_OUT
            if not left_out and (isinstance(value, bool) or not isinstance(value, kind)):
                raise TypeError(f"train: {name} must be {word}, got {value!r}")
    for name, count in counts.items():
        if name != "epochs" and count is not None and count < 1:
            raise ValueError(f"train: {name} must be at least 1, got {count}")
    if counts["epochs"] < 0:
        raise ValueError(f"train: epochs must be at least 0, got {counts['epochs']}")
    for name, number in rates.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ValueError(f"train: {name} must be a number above 0, got {number}")
    if (model.num_entities, model.num_relations, model.inverse) != (
        triples.num_entities,
        triples.num_relations,
        triples.inverse,
    ):
        raise ValueError(
            f"train: the model has {model.num_entities} entities and {model.num_relations} relations (inverse="
            f"{model.inverse}), the graph {triples.num_entities} and {triples.num_relations} (inverse="
            f"{triples.inverse}); make the model from these triples"
        )
    if not len(triples.train):
        raise ValueError("train: the training split is empty; there is nothing to learn from")
    seen = torch.bincount(triples.train[:, 1], minlength=len(triples.relation_to_id))
    if not bool(seen.all()):
        names = [triples.relation_labels[k] for k in (seen == 0).nonzero()[:5, 0].tolist()]
        raise ValueError(
            f"train: every relation needs a training triple, {int((seen == 0).sum())} have none ({', '.join(names)}); "
            "load_triples(..., unseen='drop') leaves their triples out"
        )
    known = list(inspect.signature(evaluate).parameters)[2:]
    for key in validation or {}:
        if key not in known:
            raise ValueError(f"train: validation has no option {key!r}, expected one of {', '.join(known)}")
    asked = {"split": "valid", **(validation or {})}
    every: int | None = counts["every"]
    if every is None and counts["patience"] is not None:
        every = EVERY
    if every is not None and isinstance(asked["split"], str) and not len(triples.split(asked["split"])):
        raise ValueError(
            f"train: validation needs triples, the split {asked['split']!r} is empty; leave every and patience out"
        )
    return every, asked
