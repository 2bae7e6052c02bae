"""The batches of an epoch: every query once, by relation, whatever the workers; negatives."""

import pytest
import torch
from kg_models import answers_of, graph

from tnlayers.kg.batches import Batches, Sampling


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("size", [6, 7, 16, 50, 1000])
def test_an_epoch_has_every_query_once_with_all_its_answers(size, workers):
    answers = answers_of(graph())
    parts = [Batches(answers, size, worker=k, workers=workers) for k in range(workers)]
    epochs = [list(part.epoch(3)) for part in parts]
    seen = []
    for own in zip(*epochs, strict=True):
        for batch in own:
            rows, tails = answers.lookup(batch.heads, batch.relations)
            assert torch.equal(rows, batch.rows)
            assert torch.equal(tails, batch.tails)
            assert len(batch.heads) >= 2
            assert (batch.size, batch.answers) == (sum(len(b.heads) for b in own), sum(len(b.tails) for b in own))
        together = torch.cat([torch.stack([b.relations, b.heads], 1) for b in own])
        assert together.tolist() == sorted(together.tolist())  # by relation
        seen += together.tolist()
    assert sorted(seen) == sorted(answers.queries.flip(1).tolist())
    if size < 50:
        other = [batch.heads.tolist() for batch in parts[0].epoch(4)]
        assert other != [batch.heads.tolist() for batch in epochs[0]]
    sizes = [own[0].size for own in zip(*epochs, strict=True)]
    assert len(sizes) == -(-len(answers) // size)
    assert max(sizes) <= min(size, min(sizes) + 1)


def test_batches_of_one_and_too_small_ones():
    answers = answers_of(graph())
    assert {len(batch.heads) for batch in Batches(answers, 1).epoch(0)} == {1}
    with pytest.raises(ValueError, match="each of 3 workers needs two rows of a batch, expected batches of 6, got 4"):
        Batches(answers, 5, workers=3)


def test_negatives_do_not_depend_on_the_workers_and_leave_known_answers_out():
    answers = answers_of(graph(entities=8))
    sampling = Sampling(6, True)
    whole = list(Batches(answers, 10, sampling=sampling).epoch(1))
    parts = [list(Batches(answers, 10, sampling=sampling, worker=k, workers=2).epoch(1)) for k in range(2)]
    triples = []
    for batch, *own in zip(whole, *parts, strict=True):
        for name in ("heads", "relations", "tails", "negatives", "kept"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in own]))
        triples += zip(batch.heads.tolist(), batch.relations.tolist(), batch.tails.tolist(), strict=True)
        for b, row in enumerate(batch.negatives.tolist()):
            known = set(answers.lookup(batch.heads[b : b + 1], batch.relations[b : b + 1])[1].tolist())
            assert batch.kept[b].tolist() == [entity not in known for entity in row]
    every = answers.queries.repeat_interleave(answers.offsets.diff(), 0)
    assert sorted(triples) == sorted(
        (h, r, t) for (h, r), t in zip(every.tolist(), answers.tails.tolist(), strict=True)
    )
