"""MIG-TF against TuckER with equal total parameters and equal tuning, on UMLS and Kinships, seeds 0 to 4.

All arms: the same learning rates tried with seed 0 and chosen on validation, the same epochs in all, the weights of the
epoch that was best on validation. MIG-TF spends two thirds of its epochs on its first stage, a TuckER; the last third
trains the hyperbolic part on it, frozen as published, or frozen for one half and jointly for the other.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from kg_runs import TRAINING, Row, fit, spread, tucker
from timing import markdown

from tnlayers.kg import MIGTF, Triples, load_triples, train

SETS = ("umls", "kinships")
RATES = (3e-3, 1e-2, 3e-2)
DIM, HYPERBOLIC, SEEDS = 50, 20, 5
VALIDATIONS = 30
"""In the epochs of a run."""


def plain(triples: Triples, seed: int, lr: float, epochs: int, dim: int) -> Row:
    options = {"lr": lr, "epochs": epochs, "every": max(1, epochs // VALIDATIONS)}
    return fit(tucker(triples, seed, entity_dim=dim), triples, seed, **options)


def mixed(triples: Triples, seed: int, lr: float, epochs: int, joint: bool) -> Row:
    start, third = time.perf_counter(), epochs // 3
    options: Row = {"lr": lr, "every": max(1, epochs // VALIDATIONS)}
    first = tucker(triples, seed, entity_dim=DIM)
    train(first, triples, seed=seed, **{**TRAINING, **options, "epochs": 2 * third})
    model = MIGTF(first, HYPERBOLIC, generator=torch.Generator().manual_seed(seed))
    if joint:
        train(model, triples, seed=seed + 100, **{**TRAINING, **options, "epochs": third // 2})
        model.freeze(False)
    row = fit(model, triples, seed + 200, **options, epochs=third - third // 2 if joint else third)
    return row | {"seed": seed, "seconds": time.perf_counter() - start, "epochs": epochs}


def arms(triples: Triples, epochs: int) -> dict[str, Callable[[int, float], Row]]:
    """Name -> a run of a seed and a learning rate."""
    target = tucker(triples, 0, entity_dim=DIM).parameter_count()
    target += HYPERBOLIC * (triples.num_entities + triples.num_relations)
    wide = min(range(DIM, 4 * DIM), key=lambda d: abs(tucker(triples, 0, entity_dim=d).parameter_count() - target))
    return {
        f"TuckER {DIM}": lambda seed, lr: plain(triples, seed, lr, epochs, DIM),
        f"TuckER {wide} (equal parameters)": lambda seed, lr: plain(triples, seed, lr, epochs, wide),
        f"MIG-TF {DIM} + {HYPERBOLIC}, frozen": lambda seed, lr: mixed(triples, seed, lr, epochs, False),
        f"MIG-TF {DIM} + {HYPERBOLIC}, frozen then joint": lambda seed, lr: mixed(triples, seed, lr, epochs, True),
    }


def rows(epochs: int, done: list[Row], keep: Callable[[list[Row]], None]) -> list[Row]:
    """All runs; those done are not made again, and `keep` gets all after each arm."""
    found = list(done)
    for name in SETS:
        triples = load_triples(name)
        for arm, run in arms(triples, epochs).items():
            if any((row["set"], row["arm"]) == (name, arm) for row in found):
                continue
            trials = {lr: run(0, lr) for lr in RATES}
            best = max(RATES, key=lambda lr: trials[lr]["valid"])
            own = [trials[best] if seed == 0 else run(seed, best) for seed in range(SEEDS)]
            found += [{"set": name, "arm": arm, "lr": best, **row} for row in own]
            print(found[-1], file=sys.stderr, flush=True)
            keep(found)
    return found


def verdict(first: list[float], second: list[float]) -> str:
    """Whether the first is better, by paired seeds: the mean difference against twice its standard error."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return "reproduced" if mean > 2 * error else "refuted" if mean < -2 * error else "undecided"


def table(found: list[Row]) -> str:
    lines: list[list[Any]] = []
    for name in dict.fromkeys(row["set"] for row in found):
        of: dict[str, list[Row]] = {}
        for row in found:
            if row["set"] == name:
                of.setdefault(row["arm"], []).append(row)
        equal = next((own for arm, own in of.items() if "equal" in arm), None)
        for arm, own in of.items():
            mrr = [row["mrr"] for row in own]
            said = verdict(mrr, [row["mrr"] for row in equal]) if "MIG-TF" in arm and equal is not None else ""
            lines.append(
                [name, arm, f"{own[0]['parameters']:,}", spread(mrr), spread([row["hits@1"] for row in own]),
                 own[0]["lr"], f"{statistics.median(row['seconds'] for row in own):.0f} s", said]
            )  # fmt: skip
    head = ["set", "arm", "parameters", "test MRR", "Hits@1", "lr", "seconds", "better than TuckER of equal size"]
    return (
        f"## MIG-TF against TuckER at equal total parameters, {found[0]['epochs']} epochs in all\n\nSeeds 0 to 4; "
        f"learning rates {', '.join(map(str, RATES))} tried for every arm on validation with seed 0; the epoch best on "
        "validation. MIG-TF's first stage has two thirds of the epochs.\n\n" + markdown(head, lines)
    )
