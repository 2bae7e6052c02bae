"""A knowledge graph learned by TuckER, then bent: MIG-TF adds a hyperbolic part to the trained model.

UMLS (135 medical concepts, 46 relations) is read from ../shared/data/umls, or from PyKEEN where that is installed;
otherwise a small graph is made by rules (a grandparent is a parent's parent), of which some conclusions are held back.
Both models are evaluated by filtered ranking in both directions, and one of them answers a question by name. The figure
(MRR over parameters) is written to train_knowledge_graph.png.
"""

from pathlib import Path

import torch

from tnlayers import kg
from tnlayers.kg.figures import Point, mrr_figure


def by_rules(generations: int = 6) -> dict[str, list[tuple[str, str, str]]]:
    """A binary family tree: parents, children and siblings are told, grandparents held back for every fifth person."""
    people = range(1, 2**generations)
    told, held = [], []
    for k in people:
        for child in (2 * k, 2 * k + 1):
            if child in people:
                told += [(f"p{k}", "parent of", f"p{child}"), (f"p{child}", "child of", f"p{k}")]
        if k > 1:
            told.append((f"p{k}", "sibling of", f"p{k ^ 1}"))
        for grandchild in range(4 * k, 4 * k + 4):
            if grandchild in people:
                (held if grandchild % 5 == 0 else told).append((f"p{k}", "grandparent of", f"p{grandchild}"))
    return {"train": told, "valid": held[::2], "test": held[1::2]}


def graph(quick: bool) -> kg.Triples:
    """UMLS where there is one, otherwise the family; the family too in the quick form."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data" / "umls"
    if quick:
        return kg.load_triples(by_rules(5), name="family")
    if shared.is_dir():
        return kg.load_triples(shared)
    try:
        return kg.load_triples("umls")
    except ImportError:
        return kg.load_triples(by_rules(), name="family")


def main(quick: bool = False, folder: str = ".") -> dict[str, float]:
    """Train, print, draw the figure, return the test MRR of both models."""
    torch.manual_seed(0)
    triples = graph(quick)
    print(triples.describe())
    epochs, batch_size = (30, 32) if quick else (100, 128)

    tucker = kg.TuckER(triples, entity_dim=20 if quick else 100, relation_dim=8 if quick else 30)
    history = kg.train(
        tucker, triples, epochs=epochs, batch_size=batch_size, lr=1e-2 if quick else 3e-3, every=10, seed=0
    )
    print(f"\nTuckER: {history}")
    first = kg.evaluate(tucker, triples)
    print(first)

    mixed = kg.MIGTF(tucker, hyperbolic_dim=10)  # at the start its ranks are those of TuckER, which stays frozen
    history = kg.train(mixed, triples, epochs=epochs // 2, batch_size=batch_size, lr=3e-3, every=5, seed=0)
    print(f"\nMIG-TF: {history}")
    second = kg.evaluate(mixed, triples)
    print(second)

    head, relation, _ = triples.test[0].tolist()
    question = {"head": triples.entity_labels[head], "relation": triples.relation_labels[relation]}
    print(f"\n{kg.predict(mixed, triples, count=5, **question)}")

    points = [
        Point("TuckER", tucker.parameter_count(), first.mrr),
        Point("MIG-TF", mixed.parameter_count(), second.mrr),
    ]
    mrr_figure(points, triples.name).savefig(Path(folder) / "train_knowledge_graph.png")
    return {"TuckER": first.mrr, "MIG-TF": second.mrr}


if __name__ == "__main__":
    main()
