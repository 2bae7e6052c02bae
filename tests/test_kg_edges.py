"""Models and optimizers of knowledge graphs where users go wrong first: half precision, one rank, a wrong name."""

from types import SimpleNamespace

import pytest
import torch

from tnlayers import RankAdaptive
from tnlayers.kg import Answers, RTuckER, TuckER, embeddings, evaluate, load_triples, make_optimizer, train

GRAPH = SimpleNamespace(num_entities=9, num_relations=6, inverse=True)


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
