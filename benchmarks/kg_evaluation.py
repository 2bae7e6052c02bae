"""Full filtered evaluation of WN18RR test (6,268 queries), TuckER 200/30: ours against PyKEEN at its best batch size.

python benchmarks/kg_evaluation.py --data ../shared/data/wn18rr        a few minutes on 2 threads
python benchmarks/kg_evaluation.py --data ... --share .1               a tenth of the test triples

Both sides have the same weights; their ranks are compared. PyKEEN's best batch size is that of the shortest of its
times on 64 triples. The evaluations stand in turn in one process, and the figure is the ratio of the
smallest times.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from timing import markdown, publish, seconds
from torch import Tensor

from tnlayers.kg import KGModel, Triples, evaluate, load_triples

PYKEEN_BATCHES = (4, 16, 64)


class Twin(KGModel):
    """TuckER with the weights of a PyKEEN model, without batch norm and dropout."""

    def __init__(self, triples: Triples, model: Any) -> None:
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        entities, relations = model.entity_representations[0]().detach(), model.relation_representations[0]().detach()
        order = torch.cat([torch.arange(0, len(relations), 2), torch.arange(1, len(relations), 2)])
        core = model.interaction.core_tensor.detach()  # (d_e, d_r, d_e)
        self.entities = torch.nn.Parameter(entities.clone())
        self.relations = torch.nn.Parameter(relations[order].clone())
        self.core = torch.nn.Parameter(core.clone())

    def query(self, heads: Tensor, relations: Tensor) -> Tensor:
        distinct, where = relations.unique(return_inverse=True)
        matrices = torch.einsum("rj,ijk->rik", self.relations[distinct], self.core)
        found = self.entities.new_empty(len(heads), matrices.shape[2])
        for place, matrix in enumerate(matrices):
            rows = where == place
            found[rows] = self.entities[heads[rows]] @ matrix
        return found

    def against(self, query: Tensor, entities: Any = None) -> Tensor:
        return query @ (self.entities if entities is None else self.entities[entities]).mT


def theirs(triples: Triples, dim: int, relation_dim: int) -> tuple[Any, Any]:
    """PyKEEN's TuckER on the same triples, and a function of (triples, batch size) that evaluates it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from pykeen.evaluation import RankBasedEvaluator
    from pykeen.models import TuckER
    from pykeen.triples import TriplesFactory

    factory = TriplesFactory(
        triples.train, dict(triples.entity_to_id), dict(triples.relation_to_id), create_inverse_triples=True
    )
    torch.manual_seed(0)
    model = TuckER(
        triples_factory=factory, embedding_dim=dim, relation_dim=relation_dim, apply_batch_normalization=False
    )

    def run(part: Tensor, batch: int) -> Any:
        return RankBasedEvaluator().evaluate(
            model,
            part,
            batch_size=batch,
            additional_filter_triples=[triples.train, triples.valid, triples.test],
            use_tqdm=False,
        )

    return model, run


def rows(data: str | Path, share: float = 1.0, rounds: int = 3, dim: int = 200, relation_dim: int = 30) -> list[dict]:
    """One row an evaluation: seconds, ratio to PyKEEN, MRR."""
    triples = load_triples(data)
    model, run = theirs(triples, dim, relation_dim)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(triples.test), generator=generator)
    asked = triples.test[chosen[: max(1, round(share * len(chosen)))]]
    probe = asked[:64]  # the largest batch, whole
    tried = {batch: seconds(lambda b=batch: run(probe, b)) for batch in PYKEEN_BATCHES}
    best = min(tried, key=tried.__getitem__)
    twin = Twin(triples, model)
    calls = {
        "PyKEEN": lambda: run(asked, best),
        "exact": lambda: evaluate(twin, triples, asked),
        "exact=False": lambda: evaluate(twin, triples, asked, exact=False),
        "PyKEEN's model, exact=False": lambda: evaluate(model, triples, asked, exact=False),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(lambda name=name, call=call: results.__setitem__(name, call())))
    found = []
    for name, values in times.items():
        result = results[name]
        found.append(
            {
                "evaluation": name,
                "batch": best if name == "PyKEEN" else None,
                "queries": 2 * len(asked),
                "seconds": min(values),
                "ratio": min(values) / min(times["PyKEEN"]),
                "mrr": result.get_metric("mrr") if name == "PyKEEN" else result.mrr,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/wn18rr")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = rows(options.data, options.share, options.rounds)
    head = ("evaluation", "batch", "queries", "seconds", "/ PyKEEN", "MRR")
    lines = [
        (row["evaluation"], row["batch"] or "", row["queries"])
        + (f"{row['seconds']:.2f}", f"{row['ratio']:.3f}", f"{row['mrr']:.6f}")
        for row in found
    ]
    table = markdown(head, lines)
    publish("kg_evaluation", "Filtered evaluation of WN18RR, TuckER 200/30", table, found, [])


if __name__ == "__main__":
    main()
