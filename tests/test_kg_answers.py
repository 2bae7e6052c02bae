"""Answers against dictionaries of sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlayers.kg import Answers

triples_of = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 4)), max_size=40)
queries_of = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=12)


def built(rows):
    return Answers.of(torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), 5, 3)


def slow(rows):
    found = {}
    for head, relation, tail in rows:
        found.setdefault((head, relation), set()).add(tail)
    return found


@given(triples_of)
def test_rows_are_what_a_dictionary_holds(rows):
    answers, expected = built(rows), slow(rows)
    assert list(map(tuple, answers.queries.tolist())) == sorted(expected, key=lambda query: (query[1], query[0]))
    assert answers.offsets[0] == 0
    assert len(answers.offsets) == len(answers) + 1
    for k, query in enumerate(map(tuple, answers.queries.tolist())):
        tails = answers.tails[answers.offsets[k] : answers.offsets[k + 1]].tolist()
        assert tails == sorted(expected[query])


@given(triples_of, queries_of)
def test_lookup_and_counts(rows, queries):
    answers, expected = built(rows), slow(rows)
    heads, relations = torch.tensor(queries, dtype=torch.int64).reshape(-1, 2).unbind(1)
    row, tail = answers.lookup(heads, relations)
    pairs = [(k, tail) for k, query in enumerate(queries) for tail in sorted(expected.get(query, ()))]
    assert list(zip(row.tolist(), tail.tolist(), strict=True)) == pairs
    assert answers.counts(heads, relations).tolist() == [len(expected.get(query, ())) for query in queries]


@given(triples_of, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 4)), max_size=20))
def test_contains(rows, asked):
    answers = built(rows)
    columns = torch.tensor(asked, dtype=torch.int64).reshape(-1, 3).unbind(1)
    assert answers.contains(*columns).tolist() == [triple in set(rows) for triple in asked]
    many = (column.reshape(-1, 1).expand(-1, 2) for column in columns)
    assert answers.contains(*many).shape == (len(asked), 2)


def test_large_numbers_do_not_overflow():
    """num_entities^2 num_relations is beyond int64 here; keys of pairs are not."""
    entities, relations = 10**8, 10**4
    triples = torch.tensor([[entities - 1, relations - 1, entities - 1], [entities - 1, relations - 1, 0], [0, 0, 7]])
    answers = Answers.of(triples, entities, relations)
    assert answers.queries.tolist() == [[0, 0], [entities - 1, relations - 1]]
    assert answers.tails.tolist() == [7, 0, entities - 1]
    assert answers.contains(*triples.unbind(1)).all()


def test_another_device_is_the_same_object_elsewhere():
    answers = built([(0, 0, 1), (0, 0, 2)]).to("meta")
    assert answers.tails.device.type == "meta"
    assert (answers.num_entities, answers.num_relations) == (5, 3)


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        ([[0, 0, 5]], "entities below 5 and relations below 3, got entities 0 to 5 and relations 0 to 0"),
        ([[0, 3, 0]], "relations 3 to 3"),
        ([[-1, 0, 0]], "entities -1 to 0"),
    ],
)
def test_numbers_out_of_range(triples, message):
    with pytest.raises(ValueError, match=message):
        Answers.of(torch.tensor(triples), 5, 3)


@pytest.mark.usefixtures("unchecked")
def test_shapes_and_types():
    with pytest.raises(ValueError, match=r"triples are integers \(n, 3\), got torch.int64 of shape \(1, 2\)"):
        Answers.of(torch.tensor([[0, 1]]), 5, 3)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        Answers.of(torch.zeros(1, 3), 5, 3)
