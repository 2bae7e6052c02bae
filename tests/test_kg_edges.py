"""Models and optimizers of knowledge graphs where users go wrong first: precision, ranks, names, generators."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from tnlayers import RankAdaptive, kg, layer
from tnlayers.kg import Answers, RTuckER, TuckER, embeddings, evaluate, load_triples, make_optimizer, train
from tnlayers.kg.folder import inner_option

GRAPH = SimpleNamespace(num_entities=9, num_relations=6, inverse=True)
DRAWN = [
    name
    for name, kind in vars(kg).items()
    if inspect.isclass(kind) and issubclass(kind, kg.KGModel) and "generator" in inspect.signature(kind).parameters
]


@pytest.mark.parametrize("name", DRAWN)
def test_a_generator_is_all_that_a_start_draws_from(name):
    """Torch's own is left as it was, and the start does not depend on it; without one the start is torch's."""
    first = GRAPH if inner_option(name) is None else kg.TuckER(GRAPH, 4, 2)
    seen = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = getattr(kg, name)(first, generator=torch.Generator().manual_seed(5))
        assert torch.equal(torch.get_rng_state(), before)
        seen.append(model.state_dict())
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    getattr(kg, name)(first)
    assert not torch.equal(torch.get_rng_state(), before)


def test_models_of_ones_own_keep_the_promise():
    class Own(kg.KGModel):
        def __init__(self, triples, width=3, *, generator=None):
            super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
            self.entities = torch.nn.Embedding(self.num_entities, width)  # draws a start of its own
            torch.nn.init.normal_(self.entities.weight, generator=generator)

    before = torch.get_rng_state()
    Own(GRAPH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(inspect.signature(Own).parameters) == ["triples", "width", "generator"]


def test_a_generator_in_its_place_is_one_too_and_torchs_own_moves_on():
    class Own(kg.KGModel):
        def __init__(self, triples, generator):
            super().__init__(triples.num_entities, triples.num_relations, inverse=triples.inverse)
            self.entities = torch.nn.Embedding(self.num_entities, 3)
            torch.nn.init.normal_(self.entities.weight, generator=generator)

    class More(Own):
        def __init__(self, triples, generator):
            super().__init__(triples, generator)
            self.relations = torch.nn.Embedding(self.num_relations, 3)

    for kind in (Own, More):
        before = torch.get_rng_state()
        kind(GRAPH, torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(kind(GRAPH, generator=None).entities.weight, kind(GRAPH, None).entities.weight)
    first, second = (TuckER(GRAPH, 4, 2, generator=torch.default_generator) for _ in range(2))
    assert not torch.equal(first.entities.weight, second.entities.weight)


def test_every_model_that_draws_is_among_them():
    assert {"TuckER", "TTER", "RESCAL", "MEIM", "DistMult", "ComplEx", "RotH", "AttH", "LPITF", "MIGTF"} <= set(DRAWN)


def test_an_r_tucker_starts_in_half_precision():
    made = torch.Generator().manual_seed(0)
    model = RTuckER(GRAPH, (2, 3), dtype=torch.bfloat16, generator=made)
    assert {core.dtype for core in model.cores} == {torch.bfloat16}
    weight = torch.einsum("abc,ra,hb,tc->rht", *(core.detach().double() for core in model.cores))
    assert abs(float(weight.square().mean().sqrt()) - 0.1) < 0.01


def test_one_rank_is_refused():
    with pytest.raises(ValueError, match=r"ranks are ints >= 1 for relations and entities, .* got 10"):
        RTuckER(GRAPH, 10)


def test_optimizers_of_trees_name_those_of_shared_tables():
    with pytest.raises(ValueError, match="share a table, expected one of R-TuckER SGD, R-TuckER Adam, got 'RankAda"):
        make_optimizer(RTuckER(GRAPH, (2, 3)), "RankAdaptive", lr=0.1, weight_decay=0.0, steps=10)
    separate = RTuckER(GRAPH, (2, 3), shared=False)
    made = make_optimizer(separate, "RankAdaptive", lr=0.1, weight_decay=0.0, steps=10)
    assert isinstance(made, RankAdaptive)


@pytest.mark.parametrize("name", DRAWN)
def test_models_are_made_after_a_layer_was_measured(name, monkeypatch):
    """Plans measured for layers are looked up by their settings, while the constructor still runs."""
    monkeypatch.setitem(layer.probed, ("another layer",), None)
    getattr(kg, name)(GRAPH if inner_option(name) is None else kg.TuckER(GRAPH, 4, 2))


def test_results_print_in_a_line():
    triples = load_triples({"train": [(f"e{k}", "r", f"e{k + 1}") for k in range(300)], "test": [("e0", "r", "e2")]})
    model = TuckER(triples, 4, 2)
    history = train(model, triples, epochs=30, lr=0.01, seed=0)
    answers = Answers.of(triples.train, triples.num_entities, triples.num_relations)
    for made, text in (
        (history, "History(30 epochs in "),
        (answers, "Answers(300 queries, 300 answers, entities=301, relations=2)"),
        (evaluate(model, triples, "test").ranks, "Ranks(2 queries, 1 for heads)"),
        (embeddings(model), "Embeddings(entities={'entities': (301, 4)}, relations={"),
    ):
        assert repr(made).startswith(text)
        assert len(repr(made)) < 120
        assert "\n" not in repr(made)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"name": ["Adam"]}, r"optimizer must be one of AdamW, .* got \['Adam'\]"),
        ({"name": "Adam", "betas": 5}, r"torch's Adam takes no lr=0.1, \{'betas': 5\}"),
        ({"name": "Adam", "eps": "x"}, r"torch's Adam takes no lr=0.1, \{'eps': 'x'\}"),
        ({"name": "SGD", "nesterov": True}, r"torch's SGD takes no .* \(Nesterov momentum requires"),
        ({"name": "Adam", "differentiable": True}, "Adam has no option 'differentiable' here"),
    ],
)
def test_options_that_an_optimizer_does_not_take(asked, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(TuckER(GRAPH, 4, 2), asked, lr=0.1, weight_decay=0.0, steps=10)


def test_labels_that_were_numbers_are_asked_for_as_numbers():
    triples = load_triples({"train": [(10, 0, 20), (20, 0, 30), (30, 1, 10)]})
    assert triples.entity_ids([30, "10"]).tolist() == [2, 0]
    model = TuckER(triples, 4, 2)
    found, same = kg.predict(model, triples, head=10, relation=0), kg.predict(model, triples, head="10", relation="0")
    assert found == same
    assert found.question == "(10, 0, ?)"
    with pytest.raises(ValueError, match=r"count must be an int >= 1, got 1\.5"):
        kg.predict(model, triples, head=10, relation=0, count=1.5)
    with pytest.raises(TypeError, match="expected a KGModel or a PyKEEN model"):
        kg.predict(torch.nn.Linear(2, 2), triples, head=10, relation=0)


def test_a_model_of_pykeen_is_asked_by_name():
    models, data = pytest.importorskip("pykeen.models"), pytest.importorskip("pykeen.datasets")
    triples = load_triples("nations", inverse=False)
    model = models.DistMult(triples_factory=data.Nations().training, embedding_dim=4, random_seed=0)
    head, relation, _ = triples.test[0].tolist()
    found = kg.predict(
        model, triples, head=triples.entity_labels[head], relation=triples.relation_labels[relation], count=14
    )
    scores = model.score_t(torch.tensor([[head, relation]]))[0]
    assert [answer.name for answer in found.answers] == [
        triples.entity_labels[k] for k in scores.argsort(descending=True, stable=True)
    ]
