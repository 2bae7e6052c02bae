"""Heads without inverse relations: the very score of tails, compared for every head."""

import pytest
import torch
from kg_models import Bilinear, graph

from tnlayers import kg
from tnlayers.kg import KGModel, evaluate, rank


class Asked(Bilinear):
    """The same model, its closed form for heads forgotten."""

    query_heads = KGModel.query_heads


def test_heads_are_ranked_without_inverse_relations_and_without_a_query_for_them(rng):
    plain = graph(inverse=False)
    table, model = Bilinear(plain), Asked(plain)
    own = torch.randint(0, 23, (12, 7), generator=rng)
    for options in ({}, {"batch_size": 3, "entity_chunk": 5}, {"candidates": own, "direction": "head"}):
        found, wanted = rank(model, plain, **options), rank(table, plain, **options)
        assert torch.equal(found.optimistic, wanted.optimistic), options
        assert torch.equal(found.pessimistic, wanted.pessimistic)
        assert torch.equal(found.options, wanted.options)


MODELS = {
    "TuckER": {"entity_dim": 6, "relation_dim": 3, "shared": False, "entity_bias": True},
    "TTER": {"entity_dim": 6, "relation_dim": 3, "rank": 2},
    "RTuckER": {"ranks": (2, 5)},
    "MEIM": {},
    **{name: {"dim": 6} for name in ("DistMult", "CP", "SimplE", "ComplEx", "RESCAL")},
    **{name: {"entity_dim": 6} for name in ("RotH", "RefH", "AttH", "RotE")},
    "LPITF": {"dim": 6, "batch_norm": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_one_score_of_a_triple_ranks_heads_and_tails_without_inverse_relations(rng, name):
    plain = graph(inverse=False)
    model = getattr(kg, name)(plain, **MODELS[name], generator=rng).double().eval()
    r, t = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, 7, 22])
    every = torch.arange(23)
    wanted = torch.stack([model(every, r[k].expand(23), t[k].expand(23)) for k in range(4)])
    torch.testing.assert_close(model.score_heads(r, t), wanted)
    torch.testing.assert_close(model.score_heads(r, t, torch.tensor([5, 1])), wanted[:, [5, 1]])
    torch.testing.assert_close(kg.MIGTF(model, 2).eval().score_heads(r, t).argsort(), wanted.argsort())
    assert evaluate(model, plain).by_direction["head"].count == 12
