"""What the benchmarks of knowledge graphs share: a run, and how its figures are written."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from tnlayers.kg import KGModel, Triples, TuckER, evaluate, train

Row = dict[str, Any]

EPOCHS = 100
TUCKER: Row = {"entity_dim": 100, "relation_dim": 30, "dropouts": (0.2, 0.2, 0.2)}
TRAINING: Row = {"epochs": EPOCHS, "batch_size": 128, "lr": 3e-3, "optimizer": "Adam"}


def tucker(triples: Triples, seed: int, **options: Any) -> TuckER:
    return TuckER(triples, **{**TUCKER, **options}, generator=torch.Generator().manual_seed(seed))


def figures(model: KGModel, triples: Triples) -> Row:
    """Of the validation and the test split."""
    valid, test = (evaluate(model, triples, split=split) for split in ("valid", "test"))
    return {
        "parameters": model.parameter_count(),
        "valid": valid.mrr,
        "mrr": test.mrr,
        **{f"hits@{k}": test.hits[k] for k in (1, 3, 10)},
    }


def fit(model: KGModel, triples: Triples, seed: int, **options: Any) -> Row:
    """Train and evaluate; seconds are of training alone."""
    start = time.perf_counter()
    history = train(model, triples, seed=seed, **{**TRAINING, **options})
    seconds = time.perf_counter() - start
    return {"seed": seed, "seconds": seconds, "epochs": len(history.losses), **figures(model, triples)}


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"
