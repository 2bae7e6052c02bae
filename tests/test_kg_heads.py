"""Heads without inverse relations: the very score of tails, compared for every head."""

import copy

import pytest
import torch
from kg_models import Bilinear, graph

import tnlayers
from decompositions import TTMatrix
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
    "MEIM": {"blocks": 2, "block_dim": 3, "entity_bias": True},
    **{name: {"dim": 6} for name in ("DistMult", "CP", "SimplE", "ComplEx", "RESCAL")},
}
OTHERS = {
    **{name: {"entity_dim": 6} for name in ("RotH", "RefH", "AttH", "RotE")},
    "LPITF": {"dim": 6, "batch_norm": True},
}
TABLES = {"TT table": {"entity_table": tnlayers.random_network(TTMatrix, rank=3)}, "plain": {"batch_norm": False}}


def made(name, rng, **more):
    """In float64 and evaluation, with running statistics, norms and biases that are not those of the start."""
    model = getattr(kg, name)(graph(inverse=False), **(MODELS | OTHERS)[name], **more, generator=rng).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                value.copy_(torch.rand(value.shape, generator=rng) + 0.3)
    if getattr(model, "bias", None) is not None:
        model.bias.data.normal_(generator=rng)
    return model


def generic(model):
    """A copy that asks for heads as every model can: by a query for each."""
    other = copy.deepcopy(model)
    other._asks_heads = lambda: False
    return other


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_one_score_of_a_triple_ranks_heads_and_tails_without_inverse_relations(rng, name):
    model = made(name, rng)
    r, t = torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, 7, 22])
    every = torch.arange(23)
    wanted = torch.stack([model(every, r[k].expand(23), t[k].expand(23)) for k in range(4)])
    torch.testing.assert_close(model.score_heads(r, t), wanted)
    torch.testing.assert_close(model.score_heads(r, t, torch.tensor([5, 1])), wanted[:, [5, 1]])
    torch.testing.assert_close(kg.MIGTF(model, 2).eval().score_heads(r, t).argsort(), wanted.argsort())
    assert evaluate(model, graph(inverse=False)).by_direction["head"].count == 12


@pytest.mark.parametrize(
    ("name", "table"), [*((name, "") for name in MODELS), *(("TuckER", table) for table in TABLES)]
)
def test_the_closed_form_for_heads_is_the_query_for_every_head(rng, name, table):
    plain = graph(inverse=False)
    model = made(name, rng, **TABLES.get(table, {}))
    oracle = generic(model)
    r, t = torch.tensor([2, 0, 2, 1, 0]), torch.tensor([3, 3, 7, 22, 0])
    wanted = oracle.score_heads(r, t)
    query = model.query_heads(r, t)
    torch.testing.assert_close(model.against(query), wanted)
    torch.testing.assert_close(model.against(query, slice(4, 11)), wanted[:, 4:11])
    own = torch.randint(0, 23, (5, 3), generator=rng)
    torch.testing.assert_close(model.paired(query, own), wanted.gather(1, own))
    torch.testing.assert_close(model.query_heads(r[3:4], t[3:4])[0], query[0][3:4])  # whatever else is in the batch
    assert model.score_heads(r[:0], t[:0]).shape == (0, 23)
    options = torch.randint(0, 23, (12, 7), generator=rng)
    for choice in ({}, {"batch_size": 3, "entity_chunk": 5}, {"candidates": options, "direction": "head"}):
        found, sought = rank(model, plain, **choice), rank(oracle, plain, **choice)
        assert torch.equal(found.optimistic, sought.optimistic)
        assert torch.equal(found.pessimistic, sought.pessimistic)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_closed_form_is_that_of_the_generic_one(rng, name):
    model = made(name, rng)
    oracle = generic(model)
    r, t = torch.tensor([2, 0, 2]), torch.tensor([3, 3, 7])
    given = torch.randn(3, 23, generator=rng, dtype=torch.float64)
    for each in (model, oracle):
        (each.score_heads(r, t) * given).sum().backward()
    for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_in_training_batch_norm_is_not_affine_and_every_head_has_a_query(rng):
    model = made("TuckER", rng).train()
    model.dropouts = (0.0, 0.0, 0.0)
    r, t = torch.tensor([2]), torch.tensor([3])
    with pytest.raises(TypeError, match=r"TuckER: without inverse relations this model has no query for heads"):
        model.query_heads(r, t)
    heads = torch.arange(23)
    torch.testing.assert_close(model.score_heads(r, t)[0], model(heads, r.expand(23), t.expand(23)))


def test_mixed_geometry_asks_each_part_in_its_own_way(rng):
    plain = graph(inverse=False)
    model = kg.MIGTF(made("TuckER", rng), 4, generator=rng).double().eval()
    model.hyperbolic.entities.data.normal_(generator=rng)
    found, sought = rank(model, plain), rank(generic(model), plain)
    assert torch.equal(found.optimistic, sought.optimistic)
    asked = []
    own = model.tucker.query
    model.tucker.query = lambda heads, relations: asked.append(len(heads)) or own(heads, relations)
    model.score_heads(torch.tensor([0, 1]), torch.tensor([4, 5]))
    assert not asked


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "LPITF"])
def test_a_subclass_that_changes_the_query_alone_is_asked_by_that_query(rng, name, inverse):
    class Bent(getattr(kg, name)):
        def query(self, heads, relations):
            return super().query(heads, relations) * (1 + heads[:, None] + 100 * relations[:, None])

    options = {"dim": 6, "batch_norm": False} if name == "LPITF" else MODELS[name]
    model = Bent(graph(inverse=inverse), **options, generator=rng).double().eval()
    every, r, t = torch.arange(23), torch.tensor([2, 0]), torch.tensor([3, 7])
    pairs = [(every, r[k].expand(23), t[k].expand(23)) for k in range(2)]
    if inverse:
        pairs = [(tails, model.inverted(relations), heads) for heads, relations, tails in pairs]
    torch.testing.assert_close(model.score_heads(r, t), torch.stack([model(*pair) for pair in pairs]))
    count = model.num_relations // (2 if inverse else 1)
    wanted = torch.stack([model(r.new_full((2,), 5), r.new_full((2,), k), t) for k in range(count)], 1)
    torch.testing.assert_close(model.score_relations(r.new_full((2,), 5), t), wanted)
