"""Small models and graphs for the tests of `tnlayers.kg`'s training."""

import torch
from torch import nn

import tnlayers
from decompositions import LowRank
from tnlayers.kg import Answers, KGModel, Triples


def graph(entities=23, relations=3, count=120, *, seed=0, inverse=True, valid=12, test=12) -> Triples:
    """Random triples, every relation and every split of them."""
    made = torch.Generator().manual_seed(seed)
    ids = [torch.randint(n, (count * 3,), generator=made) for n in (entities, relations, entities)]
    triples = torch.stack(ids, 1).unique(dim=0)
    triples = triples[torch.randperm(len(triples), generator=made)][:count]
    cut = len(triples) - valid - test
    names = ({f"e{k}": k for k in range(entities)}, {f"r{k}": k for k in range(relations)})
    return Triples(triples[:cut], triples[cut : cut + valid], triples[cut + valid :], *names, inverse=inverse)


class Bilinear(KGModel):
    """TuckER in a few lines: a core, two tables, batch norm and dropout on the query as asked."""

    def __init__(self, triples, dim=6, *, dropout=0.0, norm=False, dtype=torch.float32, seed=0):
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        made = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return nn.Parameter(torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype) * 0.3)

        self.entities, self.relations = drawn(self.num_entities, dim), drawn(self.num_relations, 3)
        self.core = drawn(3, dim, dim)
        self.norm = nn.BatchNorm1d(dim, dtype=dtype) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def query(self, heads, relations):
        maps = torch.einsum("br,rij->bij", self.relations[relations], self.core)
        return self.dropout(self.norm((self.entities[heads, None] @ maps)[:, 0]))

    def query_heads(self, relations, tails):
        if self.inverse:
            return super().query_heads(relations, tails)
        maps = torch.einsum("br,rij->bji", self.relations[relations], self.core)
        return (self.entities[tails, None] @ maps)[:, 0]

    def against(self, query, entities=None):
        return query @ (self.entities if entities is None else self.entities[entities]).mT


class Mapped(Bilinear):
    """The same with a network on the query, for optimizers of networks."""

    def __init__(self, triples, dim=6, *, dtype=torch.float32, seed=0, **options):
        super().__init__(triples, dim, dtype=dtype, seed=seed, **options)
        drawn = tnlayers.random_network(LowRank, rank=2, generator=torch.Generator().manual_seed(seed))
        self.map = tnlayers.Linear(dim, dim, network=drawn, dtype=dtype)
        self.map.bias.data.zero_()

    def query(self, heads, relations):
        return self.map(super().query(heads, relations))


def answers_of(triples):
    """Of training, in both directions where the graph has inverse relations."""
    return Answers.of(triples.directed("train"), triples.num_entities, triples.num_relations)


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def family(*, unseen=True) -> dict[str, list[tuple[str, str, str]]]:
    """Parents and grandparents of a binary tree: a rule to be learnt, and a relation and an entity never trained."""
    parent = [(f"person {k}", "parent of", f"person {2 * k + side}") for k in range(1, 16) for side in (0, 1)]
    grand = [(f"person {k}", "grandparent of", f"person {4 * k + s}") for k in range(1, 8) for s in range(4)]
    never = [("person 1", "knows", "stranger")] if unseen else []
    return {"train": parent + grand[4:], "valid": grand[:2], "test": grand[2:4] + never}


def written(folder, splits):
    """The splits as files of a folder."""
    for split, rows in splits.items():
        (folder / f"{split}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder
