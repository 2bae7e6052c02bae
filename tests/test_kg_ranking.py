"""Ranking against a loop over triples, against PyKEEN, and against itself in other batches, chunks and orders."""

import numpy as np
import pytest
import torch
from torch import nn

from tnlayers.kg import KGModel, Metrics, Ranks, Triples, as_model, evaluate, load_triples, rank
from tnlayers.kg.scoring import Scorer


def graph(rng, entities=23, relations=3, sizes=(60, 15, 25), inverse=True):
    def draw(n):
        return torch.stack([torch.randint(0, m, (n,), generator=rng) for m in (entities, relations, entities)], 1)

    names = ({f"e{k:03}": k for k in range(entities)}, {f"r{k}": k for k in range(relations)})
    return Triples(*map(draw, sizes), *names, inverse=inverse)


class Table(KGModel):
    """Every score is a stored number: scores[first, relation, second]."""

    def __init__(self, triples, rng, levels=None, dtype=torch.float32):
        super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
        shape = (self.num_entities, self.num_relations, self.num_entities)
        scores = torch.randn(shape, generator=rng) if levels is None else torch.randint(0, levels, shape, generator=rng)
        self.scores = nn.Parameter(scores.to(dtype))

    def query(self, heads, relations):
        return self.scores[heads, relations]

    def query_heads(self, relations, tails):
        return super().query_heads(relations, tails) if self.inverse else self.scores[:, relations, tails].mT

    def against(self, query, entities=None):
        return query if entities is None else query[:, entities]


class Dot(KGModel):
    """A bilinear model, all of it products."""

    def __init__(self, entities, relations):
        super().__init__(len(entities), len(relations), inverse=True)
        self.entities, self.relations = nn.Parameter(entities), nn.Parameter(relations)  # (N, d), (R, d, d)
        self.norm = nn.BatchNorm1d(entities.shape[1])

    def query(self, heads, relations):
        return torch.einsum("bi,bij->bj", self.norm(self.entities[heads]), self.relations[relations])

    def against(self, query, entities=None):
        return query @ (self.entities if entities is None else self.entities[entities]).mT


def slowly(model, triples, split, direction="both", candidates=None, filtered=True):
    """One triple at a time, one candidate at a time."""
    known = set(map(tuple, triples.known.tolist()))
    half = len(triples.relation_to_id)
    found = []
    for side in ("head", "tail"):
        if direction not in (side, "both"):
            continue
        for h, r, t in triples.split(split).tolist():
            if side == "tail":
                scores = model.scores[h, r]
            else:
                scores = model.scores[t, r + half] if triples.inverse else model.scores[:, r, t]
            truth = t if side == "tail" else h
            others = [
                e
                for e in (range(triples.num_entities) if candidates is None else candidates)
                if e != truth and not (filtered and ((h, r, e) if side == "tail" else (e, r, t)) in known)
            ]
            above = sum(bool(scores[e] > scores[truth]) for e in others)
            ties = sum(bool(scores[e] == scores[truth]) for e in others)
            found.append((1 + above, 1 + above + ties, 1 + len(others)))
    return torch.tensor(found)


def table_of(ranks):
    return torch.stack([ranks.optimistic, ranks.pessimistic, ranks.options], 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("direction", ["both", "head", "tail"])
def test_ranks_are_those_of_a_loop(rng, direction, levels, inverse, exact):
    triples = graph(rng, inverse=inverse)
    model = Table(triples, rng, levels)
    for split in ("train", "valid", "test"):
        found = rank(model, triples, split, direction=direction, exact=exact, batch_size=7, entity_chunk=5)
        assert torch.equal(table_of(found), slowly(model, triples, split, direction))


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("levels", [None, 3])
def test_candidates_that_are_the_same_for_all(rng, levels, filtered):
    triples = graph(rng)
    model = Table(triples, rng, levels)
    for chosen in ([4], [0, 22], list(range(3, 15)), list(range(23))):
        found = rank(
            model,
            triples,
            candidates=torch.tensor([*chosen, chosen[0]]),
            filtered=filtered,
            batch_size=4,
            entity_chunk=3,
        )
        assert torch.equal(table_of(found), slowly(model, triples, "test", candidates=chosen, filtered=filtered))
    by_side = rank(model, triples, candidates={"head": torch.tensor([1, 2])}, filtered=filtered)
    expected = [
        slowly(model, triples, "test", "head", [1, 2], filtered),
        slowly(model, triples, "test", "tail", None, filtered),
    ]
    assert torch.equal(table_of(by_side), torch.cat(expected))


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("levels", [None, 3])
def test_candidates_of_each_query(rng, levels, filtered):
    triples = graph(rng)
    model = Table(triples, rng, levels)
    offered = torch.stack([torch.randperm(23, generator=rng)[:9] for _ in range(len(triples.test))])
    found = rank(model, triples, direction="tail", candidates=offered, filtered=filtered, batch_size=4)
    rows = [
        slowly(model, Triples(triples.train, triples.valid, triples.test, triples.entity_to_id, triples.relation_to_id),
               "test", "tail", own.tolist(), filtered)[k]
        for k, own in enumerate(offered)
    ]  # fmt: skip
    assert torch.equal(table_of(found), torch.stack(rows))
    both = rank(model, triples, candidates={"tail": offered, "head": offered}, filtered=filtered)
    assert torch.equal(table_of(both)[len(offered) :], table_of(found))


def test_triples_that_are_in_no_split(rng):
    triples = graph(rng)
    model = Table(triples, rng, 3)
    known = set(map(tuple, triples.known.tolist()))
    fresh = torch.tensor([(h, r, t) for h in range(9) for r in range(3) for t in range(9) if (h, r, t) not in known])
    found = rank(model, triples, fresh, direction="tail")
    for (h, r, t), row in zip(fresh.tolist(), table_of(found).tolist(), strict=True):
        others = [e for e in range(23) if e != t and (h, r, e) not in known]
        scores = model.scores[h, r]
        above = sum(bool(scores[e] > scores[t]) for e in others)
        assert row == [1 + above, 1 + above + sum(bool(scores[e] == scores[t]) for e in others), 1 + len(others)]


# --- nothing but the scores decides ---


def near_ties(rng, entities, dim, dtype):
    """Four copies of every entity, in any order, some of their numbers moved by one bit."""
    mixed = torch.randperm(entities // 4 * 4, generator=rng)
    table = torch.randn(entities // 4, dim, generator=rng).to(dtype).repeat(4, 1)[mixed]
    nudge = torch.rand(table.shape, generator=rng) < 0.01
    return torch.where(nudge, torch.nextafter(table, torch.full_like(table, 9.0)), table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [7, 64])
def test_ranks_do_not_depend_on_batch_chunk_or_order(rng, dim, dtype):
    triples = graph(rng, 212, 3, (300, 40, 120))
    entities = near_ties(rng, 212, dim, dtype)
    relations = torch.randn(6, dim, dim, generator=rng).to(dtype)
    model = Dot(entities, relations)
    first = table_of(rank(model, triples))
    assert (first[:, 0] != first[:, 1]).float().mean() > 0.8  # most truths have ties
    for batch, chunk in ((1, 1), (1, 212), (3, 17), (16, 64), (300, 5), (64, 211)):
        assert torch.equal(table_of(rank(model, triples, batch_size=batch, entity_chunk=chunk)), first), (batch, chunk)
    order = torch.randperm(212, generator=rng)  # entity k is renamed order[k]
    moved = torch.empty_like(entities)
    moved[order] = entities

    def renamed(part):
        return torch.stack([order[part[:, 0]], part[:, 1], order[part[:, 2]]], 1)

    parts = (renamed(triples.split(split)) for split in ("train", "valid", "test"))
    other = Triples(*parts, triples.entity_to_id, triples.relation_to_id)
    for batch, chunk in ((None, None), (5, 9)):
        assert torch.equal(table_of(rank(Dot(moved, relations), other, batch_size=batch, entity_chunk=chunk)), first)


def test_equal_entities_are_tied_and_close_ones_are_not(rng):
    """A score is rounded to what its dtype can tell apart, not to less."""
    triples = graph(rng, 40, 1, (30, 5, 20))
    for dtype, apart in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-31)):
        base = torch.ones(40, 16, dtype=dtype)
        base[20:, 0] += 16 * apart * 1.01  # moves a sum of 16 by more than one step of its rounding
        model = Dot(base, torch.eye(16, dtype=dtype).expand(2, 16, 16).contiguous())
        ranks = rank(model, triples, direction="tail", filtered=False)
        high = triples.test[:, 2] >= 20
        assert ranks.optimistic.tolist() == torch.where(high, 1, 21).tolist()
        assert ranks.pessimistic.tolist() == torch.where(high, 20, 40).tolist()


def test_the_model_is_left_as_it_was(rng):
    triples = graph(rng)
    model = Dot(torch.randn(23, 8, generator=rng), torch.randn(6, 8, 8, generator=rng))
    model.norm.eval()  # a frozen part of a model in training
    state = {name: part.clone() for name, part in model.state_dict().items()}
    loss = model(triples.train[:, 0], triples.train[:, 1], triples.train[:, 2]).sum()
    for exact in (True, False):
        evaluate(model, triples, exact=exact)
        assert model.training
        assert not model.norm.training
    loss.backward()  # the graph of a loss is not broken
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())
    assert {part.dtype for part in model.parameters()} == {torch.float32}


def test_batch_norm_and_autocast_do_not_mix_the_batch(rng):
    triples = graph(rng)
    model = Dot(torch.randn(23, 8, generator=rng), torch.randn(6, 8, 8, generator=rng))
    model(triples.train[:, 0], triples.train[:, 1], triples.train[:, 2])  # running statistics
    expected = table_of(rank(model, triples, batch_size=1))
    assert torch.equal(table_of(rank(model, triples)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(table_of(rank(model, triples)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_ranked_by_their_numbers(rng, dtype):
    triples = graph(rng)
    entities, relations = torch.randn(23, 8, generator=rng).to(dtype), torch.randn(6, 8, 8, generator=rng).to(dtype)
    expected = rank(Dot(entities.float(), relations.float()), triples)
    found = rank(Dot(entities, relations).to(dtype), triples)
    assert torch.equal(table_of(found), table_of(expected))


def test_saturated_scores_are_ranked(rng):
    """Logits far beyond where a float32 sigmoid is exactly 1."""
    triples = graph(rng)
    model = Table(triples, rng)
    plain = rank(model, triples)
    model.scores.data = model.scores.data + 1000
    assert (torch.sigmoid(model.scores) == 1).all()
    moved = rank(model, triples)
    assert torch.equal(table_of(moved), slowly(model, triples, "test"))
    assert (moved.optimistic - plain.optimistic).abs().max() <= 1  # 1000 takes some bits


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_non_finite_scores_are_refused_with_the_query(rng, value, exact):
    triples = graph(rng)
    model = Table(triples, rng)
    h, r, t = triples.test[4].tolist()
    model.scores.data[h, r, 5] = value
    message = rf"scores must be finite, got {value} for \(e{h:03}, r{r}, \?\) at e005"
    with pytest.raises(ValueError, match=message):
        evaluate(model, triples, exact=exact, direction="tail", entity_chunk=2)
    with pytest.raises(ValueError, match=message):
        evaluate(model, triples, exact=exact, direction="tail", candidates=torch.tensor([5, 7]))
    own = torch.full((len(triples.test), 2), 5)
    with pytest.raises(ValueError, match=message):
        evaluate(model, triples, exact=exact, direction="tail", candidates=own)
    model.scores.data[h, r, 5] = 0
    model.scores.data[t, r + 3, 6] = value
    with pytest.raises(ValueError, match=rf"for \(\?, r{r}, e{t:03}\) at e006"):
        evaluate(model, triples, exact=exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "up"}, "direction must be one of both, head, tail, got 'up'"),
        ({"batch_size": 0}, "batch_size must be an int >= 1, or None, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an int >= 1, or None, got 2.0"),
        ({"entity_chunk": -1}, "entity_chunk must be an int >= 1, or None, got -1"),
        ({"hits_at": (1, 0)}, r"hits_at must be ints >= 1, got \(1, 0\)"),
        ({"hits_at": "10"}, r"hits_at must be ints >= 1, got \('1', '0'\)"),
        ({"split": "valid"}, "the split valid is empty"),
        ({"split": torch.tensor([[0, 3, 1]])}, r"ids of the graph, below \[23, 3, 23\]"),
        ({"candidates": torch.tensor([23])}, "candidates must be below 23 entities, got 23 to 23"),
        ({"candidates": torch.zeros(0, dtype=torch.int64)}, r"candidates are ids \(n,\) or \(25, k\)"),
        ({"candidates": torch.zeros(25, 2, dtype=torch.int64)}, "candidates a query are for one direction"),
        ({"candidates": {"up": torch.tensor([1])}}, "candidates have the keys head and tail, got up"),
    ],
)
def test_refusals(rng, arguments, message):
    triples = graph(rng, sizes=(60, 0, 25))
    with pytest.raises(ValueError, match=message):
        evaluate(Table(triples, rng), triples, **arguments)


def test_models_that_do_not_fit(rng):
    triples = graph(rng)
    with pytest.raises(ValueError, match="the model has 20 entities and 3 relations, the graph 23 and 3"):
        evaluate(Table(graph(rng, entities=20), rng), triples)
    with pytest.raises(TypeError, match="expected a KGModel or a PyKEEN model"):
        evaluate(nn.Linear(2, 2), triples)
    for ids, kind in (([0, 1], "list"), (torch.tensor([0.0, 1.0]), "torch.float32")):
        with pytest.raises(TypeError, match=f"candidates are int64 ids in a tensor, got {kind}"):
            evaluate(Table(triples, rng), triples, candidates=ids)
        with pytest.raises(TypeError, match=f"triples to rank are int64 ids in a tensor, got {kind}"):
            evaluate(Table(triples, rng), triples, [[0, 0, 1]] if kind == "list" else torch.zeros(1, 3))


def test_a_candidate_that_is_offered_twice_counts_twice(rng):
    triples = graph(rng)
    unknown = torch.tensor([[0, 0, 1]])
    offered = torch.tensor([[2, 2]])
    found = rank(Table(triples, rng, 1), triples, unknown, direction="tail", candidates=offered, filtered=False)
    assert table_of(found).tolist() == [[1, 3, 3]]


def test_a_model_that_cannot_be_copied_names_the_way_out(rng):
    triples = graph(rng)
    model = Table(triples, rng)
    model.kept = model.scores * 1  # deepcopy refuses tensors of a graph
    with pytest.raises(ValueError, match=r"cannot be copied .*; pass exact=False"):
        evaluate(model, triples)
    assert evaluate(model, triples, exact=False).count == 50


def test_complex_parameters_are_widened_too():
    model = KGModel(3, 1, inverse=False)
    model.table = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with Scorer(model, exact=True) as scorer:
        assert scorer.model.table.dtype == torch.complex128
        assert scorer.dtype == torch.float32


# --- metrics ---


def ranks_of(optimistic, pessimistic, options, relation=None, of_head=None):
    n = len(optimistic)
    triples = torch.zeros(n, 3, dtype=torch.int64)
    if relation is not None:
        triples[:, 1] = torch.tensor(relation)
    heads = torch.zeros(n, dtype=torch.bool) if of_head is None else torch.tensor(of_head)
    return Ranks(triples, heads, *map(torch.tensor, (optimistic, pessimistic, options)))


def test_metrics_by_hand():
    metrics = Metrics(ranks_of([1, 2, 5, 1], [1, 4, 5, 2], [10, 10, 5, 2]))
    assert metrics.mr == (1 + 3 + 5 + 1.5) / 4
    assert metrics.mrr == pytest.approx((1 + 1 / 3 + 1 / 5 + 1 / 1.5) / 4, rel=1e-15)
    assert metrics.hits == {1: 0.25, 3: 0.75, 10: 1.0}
    assert metrics.optimistic.hits[1] == 0.5
    assert metrics.pessimistic.mr == 3.0
    assert metrics.pessimistic.realistic.mr == metrics.mr
    assert metrics.amri == pytest.approx(1 - (metrics.mr - 1) / ((5.5 + 5.5 + 3 + 1.5) / 4 - 1), rel=1e-15)


def test_amri_is_one_for_the_best_order_and_zero_for_chance():
    assert Metrics(ranks_of([1, 1], [1, 1], [7, 9])).amri == pytest.approx(1.0, abs=1e-15)
    assert Metrics(ranks_of([1, 1], [7, 9], [7, 9])).amri == 0.0  # all tied
    assert Metrics(ranks_of([1], [1], [1])).amri == 0.0  # nothing to order


def test_metrics_by_relation_cardinality_and_direction(rng):
    triples = graph(rng)
    model = Table(triples, rng, 5)
    metrics = evaluate(model, triples)
    assert sum(part.count for part in metrics.by_relation.values()) == metrics.count == 50
    assert sum(part.count for part in metrics.by_cardinality.values()) == 50
    assert {name: part.count for name, part in metrics.by_direction.items()} == {"head": 25, "tail": 25}
    for k, name in enumerate(triples.relation_labels):
        chosen = triples.test[triples.test[:, 1] == k]
        assert metrics.by_relation[name].mr == evaluate(model, triples, chosen).mr
    total = sum(part.mr * part.count for part in metrics.by_relation.values())
    assert total / 50 == pytest.approx(metrics.mr, rel=1e-14)
    for kind, part in metrics.by_cardinality.items():
        classes = [triples.cardinality[r] for r in part.ranks.triples[:, 1].tolist()]
        assert set(classes) == {kind}
        assert set(part.by_direction) == {"head", "tail"}
    assert metrics.optimistic.by_relation["r0"].kind == "optimistic"


def test_what_is_printed_and_stored(rng):
    triples = graph(rng)
    metrics = evaluate(Table(triples, rng, 5), triples, hits_at=(1, 5))
    text = str(metrics).splitlines()
    assert text[0].split() == ["MRR", "MR", "AMRI", "H@1", "H@5", "queries"]
    assert [line.split()[0] for line in text[1:6]] == ["realistic", "optimistic", "pessimistic", "heads", "tails"]
    stored = metrics.to_dict()
    assert stored["mrr"] == metrics.mrr
    assert stored["hits"] == {"1": metrics.hits[1], "5": metrics.hits[5]}
    assert stored["pessimistic"]["mr"] == metrics.pessimistic.mr
    assert set(stored["by_relation"]) == set(metrics.by_relation)
    assert len({len(line) for line in text}) == 1


def test_metrics_are_checked():
    with pytest.raises(ValueError, match="kind must be realistic"):
        Metrics(ranks_of([1], [1], [2]), "fair")
    with pytest.raises(ValueError, match="no ranks to average"):
        Metrics(ranks_of([1], [1], [2]).where(torch.tensor([False])))


# --- PyKEEN ---


def pykeen_result(model, data):
    """PyKEEN's metrics, and the ranks behind them: heads, then tails."""
    evaluation = pytest.importorskip("pykeen.evaluation")
    evaluator = evaluation.RankBasedEvaluator(clear_on_finalize=False)
    result = evaluator.evaluate(
        model,
        data.testing.mapped_triples,
        batch_size=64,
        additional_filter_triples=[data.training.mapped_triples, data.validation.mapped_triples],
        use_tqdm=False,
    )
    kinds = {
        kind: np.concatenate([np.concatenate(evaluator.ranks[side, kind]) for side in ("head", "tail")])
        for kind in ("optimistic", "pessimistic")
    }
    options = np.concatenate([np.concatenate(evaluator.num_candidates[side]) for side in ("head", "tail")])
    return result, kinds, options


def assert_agrees(metrics, model, data):
    ranking = pytest.importorskip("pykeen.metrics.ranking")
    result, kinds, options = pykeen_result(model, data)
    assert np.array_equal(metrics.ranks.optimistic.numpy(), kinds["optimistic"])
    assert np.array_equal(metrics.ranks.pessimistic.numpy(), kinds["pessimistic"])
    assert np.array_equal(metrics.ranks.options.numpy(), options)
    for kind in ("optimistic", "pessimistic"):  # integers: PyKEEN averages them in float64
        view = getattr(metrics, kind)
        assert view.mrr == result.get_metric(f"both.{kind}.mrr")
        assert view.mr == result.get_metric(f"both.{kind}.mr")
        assert view.hits == {k: result.get_metric(f"both.{kind}.hits@{k}") for k in (1, 3, 10)}
    # PyKEEN keeps realistic ranks in float32: its own formulas in float64 to the last digit, its result to float32
    realistic = metrics.ranks.realistic.numpy()
    assert metrics.mrr == ranking.InverseHarmonicMeanRank()(realistic)
    assert metrics.mr == ranking.ArithmeticMeanRank()(realistic)
    assert metrics.amri == ranking.AdjustedArithmeticMeanRankIndex()(realistic, num_candidates=options)
    assert metrics.hits == {k: ranking.HitsAtK(k=k)(realistic) for k in (1, 3, 10)}
    for name, value in (("mrr", metrics.mrr), ("mr", metrics.mr), ("amri", metrics.amri)):
        assert result.get_metric(name) == pytest.approx(value, rel=1e-5, abs=1e-6)
    for side, part in metrics.by_direction.items():
        assert part.optimistic.mrr == result.get_metric(f"{side}.optimistic.mrr")


@pytest.mark.parametrize("name", ["nations", "umls", "kinships"])
@pytest.mark.filterwarnings("ignore")
def test_agrees_with_pykeen_on_random_scores_with_ties(name, rng):
    """The same quantized table of scores behind a model of theirs and one of ours."""
    models = pytest.importorskip("pykeen.models")
    data = pytest.importorskip("pykeen.datasets").get_dataset(dataset=name)
    triples = load_triples(name, inverse=False)
    ours = Table(triples, rng, levels=7)

    class Theirs(models.Model):
        def __init__(self, scores):
            super().__init__(triples_factory=data.training, random_seed=0)
            self.register_buffer("scores", scores)

        def _get_entity_len(self, *, mode):
            return self.num_entities

        def score_hrt(self, hrt_batch, **kwargs):
            return self.scores[tuple(hrt_batch.T)][:, None]

        def score_t(self, hr_batch, *, tails=None, **kwargs):
            found = self.scores[hr_batch[:, 0], hr_batch[:, 1]].clone()
            return found if tails is None else found[:, tails]

        def score_h(self, rt_batch, *, heads=None, **kwargs):
            found = self.scores[:, rt_batch[:, 0], rt_batch[:, 1]].mT.clone()
            return found if heads is None else found[:, heads]

        def score_r(self, ht_batch, **kwargs):
            raise NotImplementedError

        def _reset_parameters_(self):
            pass

        def collect_regularization_term(self):
            return 0.0

    theirs = Theirs(ours.scores.detach())
    metrics = evaluate(ours, triples, batch_size=50, entity_chunk=9)
    assert (metrics.ranks.optimistic < metrics.ranks.pessimistic).any()
    assert_agrees(metrics, theirs, data)
    assert_agrees(evaluate(theirs, triples), theirs, data)


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("kind", ["DistMult", "TuckER", "ComplEx", "TransE"])
@pytest.mark.filterwarnings("ignore")
def test_models_of_pykeen_have_their_own_result(kind, inverse):
    models = pytest.importorskip("pykeen.models")
    datasets = pytest.importorskip("pykeen.datasets")
    data = datasets.get_dataset(dataset="nations", dataset_kwargs={"create_inverse_triples": inverse})
    triples = load_triples("nations", inverse=inverse)
    model = getattr(models, kind)(triples_factory=data.training, random_seed=1, embedding_dim=8)
    ours = as_model(model)
    assert (ours.num_relations, ours.inverse) == (triples.num_relations, inverse)
    for exact in (True, False):
        assert_agrees(evaluate(model, triples, exact=exact), model, data)
    h, r, t = triples.test[:5].unbind(1)
    assert torch.allclose(ours(h, r, t), model.predict_hrt(triples.test[:5])[:, 0], atol=1e-5)
    part = ours.against(ours.query(h, r), slice(2, 9))
    assert torch.allclose(part, ours.score_all(h, r)[:, 2:9], atol=1e-5)
    part = ours.against(ours.query_heads(r, t), torch.tensor([3, 1]))
    assert torch.allclose(part, ours.score_heads(r, t)[:, [3, 1]], atol=1e-5)
