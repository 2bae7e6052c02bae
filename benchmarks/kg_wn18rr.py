"""WN18RR at entity dimension 64: TuckER, R-TuckER, and MIG-TF whose second stage reads stored scores of the TuckER.

At most 40 minutes of training a model on 2 cores; runs go on from their checkpoints in runs/kg-wn18rr. All 3,134 test
triples are ranked, those of entities that training has never seen among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kg_runs import Row, figures
from timing import markdown

from tnlayers.kg import MIGTF, Answers, KGModel, RTuckER, StoredScores, Triples, TuckER, load_triples, train

DIM, RELATION_DIM, HYPERBOLIC = 64, 30, 20
SECONDS = 2400
"""Training of a model stops there."""


def linear(step: int, steps: int) -> float:
    """To nothing at the end."""
    return 1 - step / steps


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def trained(model: KGModel, triples: Triples, folder: Path, name: str, **options: Any) -> Row:
    """Train to the end, or go on; products in bfloat16."""

    def report(done: int, whole: int, text: str) -> None:
        if done % 200 == 0:
            print(f"{name}: {done} of {whole} steps, {text}", file=sys.stderr, flush=True)

    options = {"schedule": linear, "amp": True, "seed": 0, "max_seconds": SECONDS, "progress": report, **options}
    history = train(model, triples, checkpoint=folder / f"{name}.pt", **options)
    return {"epochs": len(history.losses), "of": options["epochs"], "seconds": history.seconds, "lr": options["lr"]}


def tucker(triples: Triples, folder: Path) -> tuple[TuckER, Row]:
    model = TuckER(triples, DIM, RELATION_DIM, generator=seeded())
    return model, trained(model, triples, folder, "tucker", **TRAINING["TuckER"])


def r_tucker(triples: Triples, folder: Path) -> tuple[RTuckER, Row]:
    model = RTuckER(triples, (10, DIM), generator=seeded())
    return model, trained(model, triples, folder, "r-tucker", **TRAINING["R-TuckER"])


def mixed(triples: Triples, folder: Path) -> tuple[MIGTF, Row]:
    """Stage 2 on the trained TuckER; its scores of the training queries are stored once, in float16."""
    first, _ = tucker(triples, folder)
    queries = Answers.of(triples.directed("train"), triples.num_entities, triples.num_relations).queries
    file = folder / "scores.f16"
    model = MIGTF(
        StoredScores(first, queries, dtype=torch.float16, file=file), HYPERBOLIC, dropout=0.2, generator=seeded()
    )
    row = trained(model, triples, folder, "mig-tf", **TRAINING["MIG-TF"])
    model.tucker = first
    file.unlink()
    return model.freeze(), row


CROSS_ENTROPY: Row = {"loss": "1-vs-all", "every": 4}
"""Binary cross-entropy, which the papers train for 500 epochs, is still at its start after six."""
TRAINING: dict[str, Row] = {
    "TuckER": {"epochs": 36, "batch_size": 256, "lr": 3e-3, "optimizer": "Adam", **CROSS_ENTROPY},
    "R-TuckER": {"epochs": 26, "batch_size": 512, "lr": 0.006, "optimizer": "R-TuckER Adam", **CROSS_ENTROPY},
    "MIG-TF": {"epochs": 20, "batch_size": 256, "lr": 3e-3, "optimizer": "Adam", "loss": "1-vs-all"},
}
MODELS: dict[str, Callable[[Triples, Path], tuple[Any, Row]]] = {
    "TuckER": tucker,
    "R-TuckER": r_tucker,
    "MIG-TF": mixed,
}


def rows(data: Path, folder: Path, done: list[Row], keep: Callable[[list[Row]], None]) -> list[Row]:
    """One row a model; those done are not made again, and `keep` gets all after each."""
    folder.mkdir(parents=True, exist_ok=True)
    triples, found = load_triples(data), list(done)
    for name, make in MODELS.items():
        if any(row["model"] == name for row in found):
            continue
        model, row = make(triples, folder)
        found.append({"model": name, "test": len(triples.test), **row, **figures(model, triples)})
        print(found[-1], file=sys.stderr, flush=True)
        keep(found)
    return found


SIZES = {
    "TuckER": f"{DIM}/{RELATION_DIM}",
    "R-TuckER": f"ranks 10, {DIM}, shared",
    "MIG-TF": f"TuckER {DIM}/{RELATION_DIM} frozen, hyperbolic {HYPERBOLIC}",
}


def table(found: list[Row]) -> str:
    lines = [
        [row["model"], SIZES[row["model"]], f"{row['parameters']:,}", f"{row['valid']:.3f}", f"{row['mrr']:.3f}",
         *(f"{row[f'hits@{k}']:.3f}" for k in (1, 3, 10)), f"{row['epochs']} of {row['of']}",
         f"{row['seconds'] / 60:.0f} min"]
        for row in found
    ]  # fmt: skip
    head = [
        "model",
        "sizes",
        "parameters",
        "valid MRR",
        "test MRR",
        "Hits@1",
        "Hits@3",
        "Hits@10",
        "epochs",
        "training",
    ]
    return (
        f"## WN18RR, entity dimension {DIM}\n\nOne seed, at most 40 minutes of training on 2 cores, products in "
        f"bfloat16, learning rates decreasing linearly; all {found[0]['test']:,} test triples, both directions. MIG-TF "
        "is stage 2 alone, on stored scores of the TuckER above it.\n\n" + markdown(head, lines)
    )
