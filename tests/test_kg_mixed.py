"""LPITF against distances, MIG-TF as a sum that starts at its Tucker model, frozen, joint, and on stored scores."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tnlayers import hyperbolic as H
from tnlayers.kg import LPITF, MIGTF, StoredScores, TuckER

F64 = torch.float64
GRAPH = SimpleNamespace(num_entities=12, num_relations=6, inverse=True)
ONE_WAY = SimpleNamespace(num_entities=12, num_relations=6, inverse=False)


def batch(rng, size=20, graph=GRAPH):
    return [
        torch.randint(n, (size,), generator=rng) for n in (graph.num_entities, graph.num_relations, graph.num_entities)
    ]


def trained_tucker(rng, dtype=F64):
    """A TuckER whose running statistics are not those of the start."""
    model = TuckER(GRAPH, entity_dim=5, relation_dim=3, dtype=dtype, generator=rng)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        h, r, t = batch(rng)
        optimizer.zero_grad()
        F.cross_entropy(model.score_all(h, r), t).backward()
        optimizer.step()
    return model.eval()


def interaction(u, t, v, c, normalized):
    """The spec's formula for single points."""
    u, t, v, o = (H.lift(x, c) for x in (u, t, v, torch.zeros_like(u)))

    def half(x, y):
        return H.lorentz_square_distance(x, y, c) / 2

    numerator = half(u, t) + half(o, v) - half(u, v) - half(t, v) - half(o, u) - half(o, t)
    return numerator / (u[0] * t[0] + u[0] * v[0] + t[0] * v[0]) if normalized else numerator


# --- the hyperbolic part ---


@pytest.mark.parametrize("options", [{}, {"normalized": True, "curvature": 1 / 1.3}, {"orthogonal_relations": True}])
@pytest.mark.parametrize("graph", [GRAPH, ONE_WAY])
def test_lpitf_is_the_formula_in_all_three_directions(options, graph, rng):
    model = LPITF(graph, dim=8, dtype=F64, generator=rng, **options)
    c, normalized = options.get("curvature", 1.0), model.normalized
    h, r, t = batch(rng, 4, graph)
    points = model.relation_points()

    def score(h, r, t):
        return interaction(model.entities[h], points[r], model.entities[t], c, normalized)

    tails, heads = model.score_all(h, r), model.score_heads(r, t)
    there = model.inverted(r) if graph.inverse else r
    for b in range(4):
        for e in range(12):
            assert torch.isclose(tails[b, e], score(h[b], r[b], e))
            expected = score(t[b], there[b], e) if graph.inverse else score(e, r[b], t[b])
            assert torch.isclose(heads[b, e], expected)
        for k, relation in enumerate(model.score_relations(h, t)[b]):
            assert torch.isclose(relation, score(h[b], k, t[b]))
        assert torch.isclose(model(h, r, t)[b], score(h[b], r[b], t[b]))


def test_orthonormal_relations(rng):
    model = LPITF(GRAPH, dim=8, dtype=F64, orthogonal_relations=True, generator=rng)
    points = model.relation_points()
    assert torch.allclose(points @ points.mT, torch.eye(6, dtype=F64), atol=1e-14)
    before = points.detach().clone()
    with torch.no_grad():
        model.relations.add_(1e-7 * torch.randn(6, 8, dtype=F64, generator=rng))
    assert float((model.relation_points().detach() - before).norm()) < 1e-5  # no jump of signs
    h, r, t = batch(rng)
    F.cross_entropy(model.score_all(h, r), t).backward()
    assert float(model.relations.grad.norm()) > 0


@pytest.mark.parametrize("normalized", [False, True])
def test_chunks_and_pairs_change_nothing(normalized, rng):
    model = LPITF(GRAPH, dim=4, dtype=F64, normalized=normalized, batch_norm=True, learn_curvature=True, generator=rng)
    model.train().score_all(*batch(rng)[:2])
    model.eval()
    h, r, t = batch(rng)
    query = model.query(h, r)
    whole = model.against(query)
    parts = [model.against(query, slice(a, a + 5)) for a in range(0, 12, 5)]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-14, atol=1e-14)
    some = torch.tensor([7, 0, 7])
    assert torch.allclose(model.against(query, some), whole[:, some], rtol=1e-14, atol=1e-14)
    own = torch.randint(12, (20, 3), generator=rng)
    assert torch.allclose(model.paired(query, own), whole.gather(1, own), rtol=1e-13, atol=1e-14)
    assert torch.allclose(model(h, r, t), whole.gather(1, t[:, None])[:, 0], rtol=1e-13, atol=1e-14)


def test_dropout_acts_in_training_only(rng):
    model = LPITF(GRAPH, dim=4, dropout=0.5, entity_dropout=0.5, generator=rng)
    h, r, _ = batch(rng)
    assert not torch.equal(model.score_all(h, r), model.score_all(h, r))
    model.eval()
    assert torch.equal(model.score_all(h, r), model.score_all(h, r))


# --- the mixture ---


def test_the_mixture_is_the_sum(rng):
    tucker = trained_tucker(rng)
    model = MIGTF(tucker, 4, generator=rng).eval()
    with torch.no_grad():
        model.hyperbolic.entities.normal_(generator=rng)
    h, r, t = batch(rng)
    assert torch.allclose(model.score_all(h, r), tucker.score_all(h, r) + model.hyperbolic.score_all(h, r))
    assert torch.allclose(model.score_heads(r, t), tucker.score_heads(r, t) + model.hyperbolic.score_heads(r, t))
    own = torch.randint(12, (20, 3), generator=rng)
    query = model.query(h, r)
    assert all(isinstance(part, torch.Tensor) and len(part) == 20 for part in query)
    assert torch.allclose(model.paired(query, own), model.score_all(h, r).gather(1, own))
    some = torch.tensor([3, 1])
    assert torch.allclose(model.against(query, some), model.score_all(h, r)[:, some])
    count = tucker.parameter_count() + (12 + 6) * 4 + 4 * 4
    assert model.parameter_count() == count
    inner = MIGTF(model, 3, generator=rng).eval()  # a query of more parts than one
    assert torch.allclose(inner.score_all(h, r), model.score_all(h, r) + inner.hyperbolic.score_all(h, r))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_zero_start_leaves_the_ranks(frozen, training, rng):
    tucker = trained_tucker(rng)
    reference = copy.deepcopy(tucker)
    model = MIGTF(tucker, 4, frozen=frozen, generator=rng).train(training)
    h, r, t = batch(rng, 200)
    added = model.hyperbolic.score_all(h, r)
    assert torch.equal(added, added[:, :1].expand_as(added))
    if training and not frozen:
        return  # dropout acts on the joint model
    scores, before = model.score_all(h, r), reference.score_all(h, r)

    def rank(s):
        return (s > s.gather(1, t[:, None])).sum(1), (s >= s.gather(1, t[:, None])).sum(1)

    for found, expected in zip(rank(scores), rank(before), strict=True):
        assert torch.equal(found, expected)


def test_frozen_then_joint(rng):
    tucker = trained_tucker(rng)
    tucker.maps.requires_grad_(False)  # what was not trained before is not trained later
    state = copy.deepcopy(tucker.state_dict())
    model = MIGTF(tucker, 4, generator=rng)
    assert model.training
    assert not tucker.training
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("hyperbolic.")}

    def steps(model, count=20):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        h, r, _ = batch(torch.Generator().manual_seed(0), 40)
        losses = []
        for _ in range(count):
            optimizer.zero_grad()
            loss = F.cross_entropy(model.score_all(h, r), (h + r) % 12)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    losses = steps(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, state[name]) for name, value in tucker.state_dict().items())  # statistics too
    assert float(model.hyperbolic.entities.detach().norm()) > 0
    model.freeze(False)
    assert tucker.training
    assert not any(p.requires_grad for p in tucker.maps.parameters())
    steps(model, 2)
    changed = {name for name, value in tucker.state_dict().items() if not torch.equal(value, state[name])}
    assert any("running_mean" in name for name in changed)
    assert not any(name.startswith("maps") for name in changed)
    again = copy.deepcopy(model.freeze()).eval()
    h, r, _ = batch(rng)
    assert torch.equal(again.score_all(h, r), model.eval().score_all(h, r))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("in_file", [False, True])
def test_the_second_stage_on_stored_scores(dtype, in_file, tmp_path, rng):
    """The same losses and parameters as with the model itself, whatever the order of queries."""
    tucker = trained_tucker(rng, torch.float32).train()
    queries = torch.cartesian_prod(torch.arange(12), torch.arange(6))[torch.randperm(72, generator=rng)][:50]
    table = StoredScores(tucker, queries, dtype=dtype, file=tmp_path / "scores" if in_file else None, batch_size=7)
    assert tucker.training
    made = [MIGTF(copy.deepcopy(tucker), 4, generator=torch.Generator().manual_seed(1))]
    made.append(MIGTF(table, 4, generator=torch.Generator().manual_seed(1)))
    losses = []
    for model in made:
        optimizer = torch.optim.Adam(model.hyperbolic.parameters(), lr=0.01)
        g = torch.Generator().manual_seed(2)
        for _ in range(10):
            h, r = queries[torch.randint(50, (16,), generator=g)].unbind(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(model.score_all(h, r), (h + r) % 12)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    close = 1e-5 if dtype is None else 5e-2
    assert abs(losses[0] - losses[1]) <= close
    made[1].tucker = tucker
    made[1].freeze()
    assert not tucker.training
    h, r, _ = batch(rng)
    scores = [model.eval().score_all(h, r) for model in made]
    assert torch.allclose(scores[0], scores[1], atol=close)


def test_another_module_is_refused(unchecked):
    with pytest.raises(TypeError, match=r"expected a trained model of tnlayers.kg, got Linear"):
        MIGTF(torch.nn.Linear(2, 2))


def test_refusals(rng, unchecked):
    with pytest.raises(ValueError, match=r"only dim = 4 relations can be orthonormal, got num_relations = 6"):
        LPITF(GRAPH, dim=4, orthogonal_relations=True)
    with pytest.raises(ValueError, match=r"entity_dropout=1.0, std=0.2"):
        LPITF(GRAPH, dim=4, entity_dropout=1.0)
    with pytest.raises(ValueError, match=r"dim must be at least 1, got 0"):
        LPITF(GRAPH, dim=0)
    with pytest.raises(ValueError, match=r"c must be a positive number .* got 0"):
        LPITF(GRAPH, dim=4, curvature=0)
    with pytest.raises(TypeError, match=r"without inverse relations this model has no query for heads"):
        LPITF(ONE_WAY, dim=4, batch_norm=True).query_heads(torch.tensor([0]), torch.tensor([0]))
    model = LPITF(GRAPH, dim=4)
    with pytest.raises(ValueError, match=r"queries must be distinct, got 3 with 2 different"):
        StoredScores(model, torch.tensor([[0, 1], [2, 3], [0, 1]]))
    with pytest.raises(ValueError, match=r"must be \(Q, 2\) pairs \(head, relation\), got \(3,\)"):
        StoredScores(model, torch.arange(3))
    table = StoredScores(model, torch.tensor([[0, 1], [2, 3]]))
    with pytest.raises(ValueError, match=r"among the 2 stored, got head 2 with relation 4"):
        table.score_all(torch.tensor([0, 2]), torch.tensor([1, 4]))
